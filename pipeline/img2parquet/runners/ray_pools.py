"""Divide a Ray cluster's CPUs and GPUs among the pools of a job. `tests/runners/test_ray_pools.py` fakes the clusters.

    readers      tasks of READ_CPUS
    preparers    with GPUs: actors of ACTOR_CPUS, as many as the job's share of the cluster has CPUs
    workers      with GPUs: actors that compute; without: actors that prepare and compute, one for each CPU

A job that takes half of the GPUs takes half of the CPUs, so that several drivers can share a cluster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from img2parquet.job import JobSpec

log = logging.getLogger(__name__)

# Logical CPUs: an actor takes less than its core, so that a read task always finds a slot. When the pool holds every
# CPU and the read waits for one, the graph hangs for ever and logs nothing (seen on 2 cores).
ACTOR_CPUS, READ_CPUS = 0.75, 0.25
FIRST_LOOK_S, LOOK_S = 5.0, 1.0  # before we say that we wait for other drivers, and between two looks
# By compute capability, lowest first: what a worker finds out on one of these holds on all that follow
OLDER_GPUS = ("K80", "P4", "P100", "V100", "T4")
SHARE_HINT = "drivers that share a cluster should divide it: `--set resources.workers=N` for each"


@dataclass(frozen=True)
class Pools:
    """The number of tasks and actors that work at the same time. `preparers` is 0 where workers prepare."""

    readers: int
    preparers: int
    workers: int

    def is_outgrown_by(self, other: Pools, factor: float) -> bool:
        """Return whether the other pools have `factor` times as many actors, of either kind."""
        return other.workers >= factor * self.workers or other.preparers >= max(1, factor * self.preparers)


def pools_of(job: JobSpec, prepares_separately: bool) -> Pools:
    """Size the pools of a job for the cluster as it is now."""
    cpus, gpus, workers = resource("CPU"), gpus_per_worker(job), worker_count(job)
    share = min(1.0, workers * gpus / resource("GPU")) if gpus and resource("GPU") else 1.0
    readers = max(1, int(cpus * share * (1 - ACTOR_CPUS) / READ_CPUS))
    if not prepares_separately:
        return Pools(readers, 0, workers)
    computing = 0.0 if gpus else workers * ACTOR_CPUS
    return Pools(readers, max(1, int(cpus * share - computing)), workers)


def worker_count(job: JobSpec) -> int:
    """Return `resources.workers`, or as many as the cluster has GPUs for, or without GPUs, CPUs."""
    if job.resources.workers != "auto":
        return job.resources.workers
    gpus = gpus_per_worker(job)
    if gpus:
        return max(1, int(resource("GPU") / gpus))
    return max(1, int(resource("CPU")) // job.resources.threads_per_worker)


def gpus_per_worker(job: JobSpec) -> float:
    """Return `resources.gpus_per_worker`; for `auto` 1 where the cluster has GPUs or can add some, unless the job
    wants none."""
    wanted = job.resources.gpus_per_worker
    if wanted != "auto":
        return wanted
    if job.resources.device == "cpu":
        return 0.0
    return 1.0 if resource("GPU") >= 1 or can_add("GPU") else 0.0


def resource(name: str) -> float:
    """Return how much of a resource the cluster's nodes have, whether or not it is in use."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return total.get(name, 0.0)


def can_add(name: str) -> bool:
    """Return whether the cluster's autoscaler has nodes with this resource, such as a group with 0 replicas now."""
    try:  # private to Ray; an autoscaler stores it in the cluster, and without one there is none
        most: Mapping[str, int] = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    except Exception as error:
        log.debug("the autoscaler's node types are unknown: %s", error)
        return False
    return most.get(name, 0) >= 1


def weakest_gpu() -> str | None:
    """Return the kind of GPU that limits a cluster with several kinds: what suits it, all can do. None for one kind."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    kinds = [name.partition(":")[2] for name in total if name.startswith("accelerator_type:")]
    return next((kind for kind in OLDER_GPUS if kind in kinds and len(kinds) > 1), None)


def wait_for_room(job: JobSpec) -> None:
    """Wait while other drivers hold what one worker needs; actors that wait would count as a job that hangs.

    A cluster that is too small for one worker is not waited for: the actors themselves ask its autoscaler."""
    gpus = gpus_per_worker(job)
    need = {"GPU": gpus} if gpus else {"CPU": min(ACTOR_CPUS, resource("CPU"))}
    began, told = time.monotonic(), False
    while held := _held_by_others(need):
        if not told and time.monotonic() - began >= FIRST_LOOK_S:
            log.warning("waiting: other drivers use %s; %s", held, SHARE_HINT)
            told = True
        time.sleep(LOOK_S)


def _held_by_others(need: Mapping[str, float]) -> str:
    free: dict[str, Any] = ray.available_resources()  # type: ignore[no-untyped-call]
    for name, count in need.items():
        if free.get(name, 0.0) < count <= resource(name):
            return f"{resource(name) - free.get(name, 0.0):g} of the cluster's {resource(name):g} {name}s"
    return ""
