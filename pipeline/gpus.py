"""What the machine, the cluster and torch tell of GPUs -> the device of a job's workers.

A GPU that nobody would use is an error unless the job says `resources.device: cpu`: such a job gives the right results
at a twentieth of the speed, and nothing else tells.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import JobError

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Gpus:
    """Of one worker, and of the cluster that it is a part of."""

    present: int  # the machine or the cluster has them
    usable: int  # torch can compute on them
    torch: str  # which torch that is: "2.13.0+cpu, built without CUDA"


def choose_device(wanted: Device, each: float | Literal["auto"], gpus: Gpus) -> Literal["cpu", "cuda"]:
    """each: GPUs that a worker gets. Raises JobError where one would lie idle, or is asked for in vain."""
    if wanted == "cpu":
        if each not in ("auto", 0):
            raise JobError(f"resources.device is `cpu`, but resources.gpus_per_worker is {each:g}", hint="drop one")
        return "cpu"
    if not gpus.present and not gpus.usable:
        if wanted == "cuda" or each not in ("auto", 0):
            raise JobError("the job asks for GPUs (`resources`), and there is none here", hint=NONE_HERE)
        return "cpu"
    if each == 0:
        raise JobError(f"{_are(gpus)}, but a worker gets none (resources.gpus_per_worker: 0)", hint=NOBODY_USES_IT)
    if not gpus.usable:
        raise JobError(f"{_are(gpus)}, but torch cannot use it: {gpus.torch}", hint=TORCH_CANNOT)
    return "cuda"


NONE_HERE = (
    "say `resources.device: auto`; for a Ray cluster that adds GPU nodes when they are asked for, also "
    "`resources.gpus_per_worker: 1`"
)
NOBODY_USES_IT = (
    "leave out gpus_per_worker (and start Ray with its GPUs), or say `resources.device: cpu` to leave the GPU idle"
)
TORCH_CANNOT = (
    "install a torch with CUDA that fits the driver (pytorch.org/get-started), or say `resources.device: cpu` to leave "
    "the GPU idle"
)


def find(in_cluster: int = 0) -> Gpus:
    """What is here, in this process; `in_cluster` is what Ray has counted."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = torch.version.cuda or torch.version.hip
    about = f"{torch.__version__}, {f'built for {built}, sees no device' if built else 'built without CUDA'}"
    return Gpus(max(in_cluster, present()), usable, about)


def present(devices: Path = Path("/dev")) -> int:
    """NVIDIA devices of this machine that this process may see, whatever torch thinks of them."""
    count = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]))


def _are(gpus: Gpus) -> str:
    count = max(gpus.present, gpus.usable)
    return "there is 1 GPU" if count == 1 else f"there are {count} GPUs"
