"""Choose the device of a job's workers from the GPUs that the machine, the cluster and torch report.

A GPU that would stay idle is an error unless the job says `resources.device: cpu`. Such a job would give the right
results at a twentieth of the speed, and nothing else would show why.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from img2parquet.errors import JobError

if TYPE_CHECKING:  # the command counts GPUs before it loads anything
    from img2parquet.job import Device


@dataclass(frozen=True)
class GpuInventory:
    """Count the GPUs that exist and those that torch can use."""

    present: int  # in the machine, or in the whole cluster
    usable: int  # by torch, in this process
    torch: str  # its version and build: "2.13.0+cpu, built without CUDA"


def choose_device(wanted: Device, each: float | Literal["auto"], gpus: GpuInventory) -> Literal["cpu", "cuda"]:
    """Choose the device of a job's workers. each: the number of GPUs that one worker gets.

    Raises JobError when a GPU would stay idle, or when the job asks for one and there is none."""
    if wanted == "cpu":
        if each not in ("auto", 0):
            message = f"resources.device is `cpu`, but resources.gpus_per_worker is {each:g}"
            raise JobError(message, hint="remove one of the two settings")
        return "cpu"
    if not gpus.present and not gpus.usable:
        if wanted == "cuda" or each not in ("auto", 0):
            raise JobError("`resources` asks for GPUs, but there are none here", hint=NO_GPU_HINT)
        return "cpu"
    if each == 0:
        message = f"{_count_of(gpus)}, but a worker gets none (resources.gpus_per_worker: 0)"
        raise JobError(message, hint=IDLE_GPU_HINT)
    if not gpus.usable:
        raise JobError(f"{_count_of(gpus)}, but torch cannot use it: {gpus.torch}", hint=UNUSABLE_GPU_HINT)
    return "cuda"


NO_GPU_HINT = (
    "set `resources.device: auto`; on a Ray cluster that adds GPU nodes on demand, also set "
    "`resources.gpus_per_worker: 1`"
)
IDLE_GPU_HINT = (
    "remove gpus_per_worker (and start Ray with its GPUs), or set `resources.device: cpu` to leave the GPU idle"
)
UNUSABLE_GPU_HINT = (
    "install a torch with CUDA that fits the driver (pytorch.org/get-started), or set `resources.device: cpu` to leave "
    "the GPU idle"
)


def detect_gpus(in_cluster: int = 0) -> GpuInventory:
    """Count the GPUs that this process sees. in_cluster: the number that Ray counted."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = torch.version.cuda or torch.version.hip
    about = f"{torch.__version__}, {f'built for {built}, sees no device' if built else 'built without CUDA'}"
    return GpuInventory(max(in_cluster, count_nvidia_devices()), usable, about)


def count_nvidia_devices(devices: Path = Path("/dev")) -> int:
    """Count this machine's NVIDIA devices that CUDA_VISIBLE_DEVICES allows, whether or not torch can use them."""
    count = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]))


def _count_of(gpus: GpuInventory) -> str:
    count = max(gpus.present, gpus.usable)
    return "there is 1 GPU" if count == 1 else f"there are {count} GPUs"
