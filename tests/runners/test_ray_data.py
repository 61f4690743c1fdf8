"""A job is split into blocks small enough for every worker to get some; a failed start of Ray is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from img2parquet.batch import Work
from img2parquet.dataset.plan import make_plan
from img2parquet.errors import JobFailed
from img2parquet.inference.capabilities import probe_capabilities
from img2parquet.runners import ray_data
from img2parquet.runners.ray_pools import Pools
from img2parquet.schema import Part, Piece
from tests.support.small_job import make_checkpoint, make_shards, small_job

MIB = 1 << 20


def test_a_machine_too_busy_for_ray_to_start_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(**how: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", too_late)
    with pytest.raises(JobFailed, match=r"^Ray did not start: The current node timed out") as raised:
        ray_data._init(None)
    assert "--runner local" in str(raised.value.hint)


def parts(*sizes_bytes: int, rows: int | None = None) -> list[Part]:
    return [Part(index, (Piece(f"{index}.tar", size, "etag", rows=rows),)) for index, size in enumerate(sizes_bytes)]


@pytest.mark.parametrize(
    ("sizes_bytes", "workers", "block_bytes"),
    [((4 * MIB,), 2, MIB // 4), ((4 * MIB, 4 * MIB), 2, MIB // 2), ((1 << 40,), 2, 16 * MIB), ((5,), 100, 1)],
)
def test_blocks_of_a_small_job_are_small(sizes_bytes: tuple[int, ...], workers: int, block_bytes: int) -> None:
    assert ray_data._block_bytes(parts(*sizes_bytes), workers) == block_bytes


def test_a_list_is_as_large_as_what_it_lists() -> None:
    assert ray_data._block_bytes(parts(1000, rows=16 * 1024), 2) == 16 * MIB


def test_one_small_part_is_work_for_every_worker(ray_cluster: str, tmp_path: Path) -> None:
    """One task reads it, whose batches would else travel as one block, to one actor."""
    make_shards(tmp_path / "shards", shards=1, per_shard=64, broken=False)
    job = small_job(f"{tmp_path}/shards/*.tar", make_checkpoint(tmp_path / "model"), str(tmp_path / "out"))
    found = probe_capabilities(job)
    (part,) = make_plan(job, found.cards, found.dtype).parts
    work = Work(job, found.cards, found.dtype, found.device, batch_size=4, threads=1)
    blocks = ray_data._batches([part], work, ray.put(work), Pools(2, 0, 2)).materialize()
    assert blocks.count() == 16 and blocks.num_blocks() >= 8


def test_a_cluster_that_dies_as_a_job_starts_is_one_clear_error(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(ref: object) -> None:
        raise ray.exceptions.LocalRayletDiedError("the raylet is gone")

    make_shards(tmp_path / "shards", shards=1, per_shard=4, broken=False)
    job = small_job(f"{tmp_path}/shards/*.tar", make_checkpoint(tmp_path / "model"), str(tmp_path / "out"))
    monkeypatch.setattr(ray_data.ray, "get", died)
    with pytest.raises(JobFailed, match=r"the Ray cluster was lost while the job started: .*raylet"):
        ray_data.RayRunner().start(job)
