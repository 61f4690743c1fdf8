"""Run whole jobs over every known bad image and broken shard: each has the expected outcome and affects no other."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import pytest

from img2parquet.engine.driver import run
from img2parquet.errors import Img2ParquetError
from img2parquet.job import parse_job
from img2parquet.results.reader import open_results, read_rejects
from img2parquet.results.verify import verify
from tests.read.broken_shards import BROKEN_SHARDS, BrokenShard, put
from tests.support.bad_images import BAD_IMAGES
from tests.support.small_job import add_member, job_dict, jpeg, small_job


def test_every_bad_image_has_its_outcome_among_good_neighbours(checkpoint: Path, tmp_path: Path) -> None:
    assert len(BAD_IMAGES) >= 40
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for number, odd in enumerate(BAD_IMAGES):
            add_member(tar, f"odd-{number:03d}.jpg", odd.data)
            add_member(tar, f"good-{number:03d}.jpg", jpeg(number))
    job = small_job(f"{tmp_path}/odd.tar", checkpoint, str(tmp_path / "out"), reject_limit=1.0)
    summary = run(job, "local")
    refused = Counter(odd.reason for odd in BAD_IMAGES if odd.reason)
    assert summary.rejected == dict(refused)
    assert summary.rows_in == 2 * len(BAD_IMAGES)
    rows = {row["key"]: row for row in open_results(job.output.uri).to_table().to_pylist()}
    rejects = {row["key"]: row for row in read_rejects(job.output.uri).to_pylist()}
    for number, odd in enumerate(BAD_IMAGES):
        key = f"odd-{number:03d}"
        assert f"good-{number:03d}" in rows
        if odd.reason:
            assert (rejects[key]["reason"], rejects[key]["stage"]) == (odd.reason, odd.stage), odd.name
            assert rejects[key]["message"]
        else:
            assert tuple(rows[key]["warnings"]) == odd.warnings, odd.name
            assert (rows[key]["height"], rows[key]["width"]) == odd.size_HW, odd.name
    assert verify(job.output.uri) == []


@pytest.mark.parametrize("shard", BROKEN_SHARDS, ids=lambda shard: shard.name)
def test_every_broken_shard_ends_as_a_job_or_in_one_of_our_errors(
    shard: BrokenShard, checkpoint: Path, tmp_path: Path
) -> None:
    """Rows and reasons of each shard are tested in tests/read; this tests that a whole job accounts for them."""
    document = job_dict("unused", checkpoint, str(tmp_path / "out"), reject_limit=1.0)
    settings = put(shard, str(tmp_path / "in"))
    try:
        summary = run(parse_job({**document, "input": settings}), "local")
    except Img2ParquetError as error:
        if not shard.error and not shard.keys and not shard.rejects:
            assert "neither rows nor rejects" in str(error)
            return
        assert shard.error is not None, f"{shard.name}: {error}"
        assert shard.says in str(error)
        return
    assert shard.error is None, shard.name
    assert summary.rows_in == summary.rows_written["tiny"] + sum(summary.rejected.values())
    for reason, count in shard.rejects.items():
        assert summary.rejected[reason] >= count  # its stand-ins for images may not decode either
    assert verify(str(tmp_path / "out")) == []
