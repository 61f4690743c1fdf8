"""Divide faked clusters among the pools of a job: growth, drivers that share one, mixed GPUs, GPUs that are to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from img2parquet.batch import Work
from img2parquet.errors import JobError
from img2parquet.job import JobSpec, parse_job
from img2parquet.runners import ray_data, ray_pools
from img2parquet.runners.ray_pools import Pools, gpus_per_worker, pools_of, wait_for_room, weakest_gpu
from tests.support.small_job import job_dict

Fake = Callable[..., None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A function that fakes what a cluster has, what its autoscaler can add, and what is free at each look."""

    def fake(total: dict[str, float], most: dict[str, int] | None = None, free: Iterator[Any] | None = None) -> None:
        looks = free or iter(())
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(ray, "available_resources", lambda: next(looks, total))
        state = ray._private.state.state
        monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: most, raising=True)

    return fake


def job(**resources: Any) -> JobSpec:
    return parse_job({**job_dict("*.tar", Path("model"), "out"), "resources": resources})


def node(count: int, cpus: int, gpus: int = 0) -> dict[str, float]:
    return {"CPU": count * cpus, **({"GPU": count * gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("total", "resources", "expected"),
    [
        (node(1, 16), {}, Pools(16, 0, 16)),
        (node(1, 16), {"threads_per_worker": 4}, Pools(16, 0, 4)),
        (node(1, 16, 1), {}, Pools(16, 16, 1)),
        (node(64, 16, 1), {}, Pools(1024, 1024, 64)),
        (node(8, 8, 1), {"gpus_per_worker": 0.5}, Pools(64, 64, 16)),
        (node(8, 8, 1), {"workers": 4}, Pools(32, 32, 4)),  # half of the GPUs, half of the CPUs
        (node(1, 8, 1), {"workers": 8, "gpus_per_worker": 1}, Pools(8, 8, 8)),  # the other nodes are to come
        (node(1, 16, 1), {"device": "cpu"}, Pools(16, 0, 16)),
        (node(0, 0), {"workers": 8, "gpus_per_worker": 1}, Pools(1, 1, 8)),
    ],
)
def test_every_cpu_reads_and_decodes(
    total: dict[str, float], resources: dict[str, Any], expected: Pools, cluster: Fake
) -> None:
    cluster(total)
    spec = job(**resources)
    assert pools_of(spec, prepares_separately=gpus_per_worker(spec) > 0) == expected


@pytest.mark.parametrize(
    ("total", "cpus_each", "gpus_each"),
    [(node(1, 1), 1, 0), (node(1, 2, 1), 2, 1), (node(3, 8, 1), 8, 1), (node(5, 16), 16, 0)],
)
def test_they_fit_on_the_nodes(total: dict[str, float], cpus_each: int, gpus_each: int, cluster: Fake) -> None:
    """A read task always finds a slot: when the actors hold every CPU, the graph hangs."""
    cluster(total)
    pools = pools_of(job(), prepares_separately=gpus_each > 0)
    actors = pools.preparers if gpus_each else pools.workers
    each = total["CPU"] / cpus_each
    assert actors / each * ray_pools.ACTOR_CPUS + ray_pools.READ_CPUS <= cpus_each
    assert actors * ray_pools.ACTOR_CPUS + pools.readers * ray_pools.READ_CPUS <= total["CPU"]


def stream(spec: JobSpec, device: str) -> ray_data.RayStream:
    return ray_data.RayStream([], Work(spec, {}, "float32", device, batch_size=8, threads=1))


@pytest.mark.parametrize(
    ("before", "after", "grown"),
    [
        (node(1, 24, 1), {"CPU": 256, "GPU": 1}, True),  # only CPUs have joined
        (node(1, 8, 1), node(8, 8, 1), True),
        (node(8, 8, 1), {"CPU": 72, "GPU": 8}, False),  # less than a quarter more
        (node(8, 8, 1), node(2, 8, 1), False),
    ],
)
def test_cpus_that_join_a_gpu_job_are_used(
    before: dict[str, float], after: dict[str, float], grown: bool, cluster: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_data, "GROWN_FOR_S", 0.0)
    cluster(before)
    running = stream(job(), "cuda")
    assert not running.is_outgrown()
    cluster(after)
    assert running.is_outgrown() == grown


def test_cpus_that_join_a_cpu_job_are_used(cluster: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "GROWN_FOR_S", 0.0)
    cluster(node(2, 16))
    running = stream(job(), "cpu")
    assert not running.is_outgrown()
    cluster(node(3, 16))
    assert running.is_outgrown()


def test_two_drivers_divide_a_cluster(cluster: Fake) -> None:
    total = node(8, 16, 1)
    cluster(total)
    pools = pools_of(job(workers=4), prepares_separately=True)
    assert 2 * pools.preparers <= total["CPU"] and 2 * pools.workers == total["GPU"]


@pytest.mark.parametrize(
    ("total", "held"),
    [(node(1, 16), "15.75 of the cluster's 16 CPUs"), (node(4, 8, 1), "4 of the cluster's 4 GPUs")],
)
def test_a_second_driver_says_that_it_waits(
    total: dict[str, float], held: str, cluster: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pools, "FIRST_LOOK_S", 0.0)
    monkeypatch.setattr(ray_pools, "LOOK_S", 0.0)
    looks = iter([{"CPU": 0.25}] * 3)
    cluster(total, free=looks)
    wait_for_room(job())
    assert next(looks, None) is None and len(caplog.messages) == 1
    assert held in caplog.text and "resources.workers=N" in caplog.text


def test_a_cluster_that_is_too_small_is_not_waited_for(cluster: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors' own requests make an autoscaler add nodes."""
    monkeypatch.setattr(ray_pools.time, "sleep", lambda seconds: pytest.fail("waited"))
    cluster(node(1, 0))
    wait_for_room(job())
    cluster({"CPU": 8}, free=iter([{"CPU": 8}]))
    wait_for_room(job(gpus_per_worker=1))


def test_gpus_that_the_cluster_can_add_are_used(cluster: Fake) -> None:
    """A group of GPU nodes at 0 replicas does not make a CPU job of it."""
    cluster(node(2, 8), most={"CPU": 320, "GPU": 8})
    assert gpus_per_worker(job()) == 1 and pools_of(job(), prepares_separately=True).workers == 1
    assert gpus_per_worker(job(device="cpu")) == 0 == gpus_per_worker(job(gpus_per_worker=0))
    cluster(node(2, 8), most={"CPU": 320, "GPU": 0})
    assert gpus_per_worker(job()) == 0
    cluster(node(2, 8), most=None)
    assert gpus_per_worker(job()) == 0


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], None), (["H200"], None), (["T4"], None), (["H200", "L4"], None), (["L4", "T4"], "T4"),
        (["T4", "V100", "A100"], "V100"),
    ],
)  # fmt: skip
def test_in_a_mixed_cluster_the_weakest_gpu_decides(kinds: list[str], expected: str | None, cluster: Fake) -> None:
    cluster({**node(4, 8, 1), **{f"accelerator_type:{kind}": 2 for kind in kinds}})
    assert weakest_gpu() == expected


def test_a_worker_of_two_gpus_is_refused() -> None:
    with pytest.raises(JobError, match=r"gpus_per_worker.*a worker computes on one GPU; `1` starts one worker"):
        job(gpus_per_worker=2)
    assert job(gpus_per_worker=1).resources.gpus_per_worker == 1


def test_attempts_are_counted_where_the_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a node that may be reclaimed: without them every further part is read in a child process."""
    asked: dict[str, Any] = {}

    class Class:
        def options(self, **options: Any) -> Class:
            asked.update(options)
            return self

        def remote(self) -> str:
            return "actor"

    monkeypatch.setattr(ray, "remote", lambda **options: lambda cls: Class())
    context = SimpleNamespace(get_node_id=lambda: "a" * 56)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert ray_data._attempts() == "actor"
    assert asked["scheduling_strategy"].node_id == "a" * 56 and asked["scheduling_strategy"].soft
