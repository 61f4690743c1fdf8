"""Run the steps of a job somewhere, and hand their results to the engine.

base             defines the protocols `Runner` and `ResultStream`, which the engine knows runners by
local            runs all steps on threads of this process
ray_data         runs them as a Ray Data graph, on a cluster or on this machine
ray_pools        divides a cluster's CPUs and GPUs among the stages
ray_workers      reads, prepares and embeds in Ray's workers, and isolates what killed one of them
ray_metrics      exports the metrics of a session through Ray's own exporter
thread_stages    names the stages that this process's threads are in, for messages about stalls
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from img2parquet.errors import JobError, nearest
from img2parquet.inference.device_selection import count_nvidia_devices

if TYPE_CHECKING:  # the command starts without numpy and pyarrow
    from img2parquet.runners.base import Runner

RUNNERS = ("auto", "local", "ray")
LOCAL_CPUS, LOCAL_BYTES = 8, 4 << 30  # one process feeds about so many CPUs; an input of minutes, not of hours


def check_runner(name: str) -> None:
    """Raise JobError when no runner has that name."""
    if name not in RUNNERS:
        raise JobError(f"unknown runner `{name}`", known=RUNNERS, hint=nearest(name, RUNNERS))


def choose_runner(name: str) -> Runner:
    """Return the runner `local` or `ray`. Ray is imported only for its own."""
    if name == "local":
        from img2parquet.runners.local import LocalRunner

        return LocalRunner()
    from img2parquet.runners.ray_data import RayRunner

    return RayRunner()


def needs_cluster(address: str | None) -> str:
    """Return why a job belongs on Ray whatever its input is; empty where nothing says so.

    A cluster that is named is used, as is every GPU: the local runner has one process, which uses one."""
    if address or os.environ.get("RAY_ADDRESS"):
        return f"a Ray cluster is named, `{address or os.environ['RAY_ADDRESS']}`"
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return "this process has joined a Ray cluster"
    gpus = count_nvidia_devices()
    return f"this machine has {gpus} GPUs" if gpus > 1 else ""


def choose_automatically(address: str | None, input_bytes: Callable[[], int]) -> tuple[str, str]:
    """Choose the runner that `auto` stands for, and say why: `local` for what one process does in minutes.

    Ray's start costs half a minute, and its workers are processes of their own: that pays for a large input on a
    machine with more CPUs than one process can feed, and with several GPUs or nodes. input_bytes: counts the input,
    and is called only where the answer depends on it."""
    if why := needs_cluster(address):
        return "ray", why
    cpus = len(os.sched_getaffinity(0))
    if cpus > LOCAL_CPUS and (size := input_bytes()) > LOCAL_BYTES:
        return "ray", f"{size / 1e9:,.0f} GB of input and {cpus} CPUs"
    return "local", ""
