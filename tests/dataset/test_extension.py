"""Extensions add files that came to an input later as a new generation; every reader sees the union, each row once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.cli import main
from img2parquet.dataset.commit import SUCCESS, Output
from img2parquet.engine.driver import run
from img2parquet.engine.retry import retry
from img2parquet.errors import InputError, RejectLimitExceeded, RunMismatch
from img2parquet.job import JobSpec, parse_job
from img2parquet.results.embeddings import open_vectors
from img2parquet.results.reader import open_results, read_rejects, status
from img2parquet.results.report import report
from img2parquet.results.verify import verify
from img2parquet.storage import Store, join
from tests.support.small_job import job_dict, jpeg, make_shards, small_job

PER_SHARD = 8


@pytest.fixture(scope="module")
def all_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make tars of 8 images, with one bad image in each of 0 and 2."""
    return make_shards(tmp_path_factory.mktemp("shards"), 5, PER_SHARD)


@pytest.fixture
def job(all_shards: list[Path], checkpoint: Path, tmp_path: Path) -> JobSpec:
    """Make a job on two of the shards."""
    (tmp_path / "in").mkdir()
    bring(tmp_path, all_shards, 0, 3)
    return small_job(f"{tmp_path}/in/*.tar", checkpoint, f"{tmp_path}/out", reject_limit=0.07)


def bring(folder: Path, shards: list[Path], *numbers: int) -> None:
    for number in numbers:
        shutil.copy2(shards[number], folder / "in" / shards[number].name)


def parts(uri: str) -> dict[str, bytes]:
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


def rows_by_shard(uri: str) -> dict[str, int]:
    counts = open_results(uri).to_table(columns=["shard"]).group_by("shard").aggregate([("shard", "count")])
    return {Path(row["shard"]).stem: row["shard_count"] for row in counts.to_pylist()}


def test_new_shards_are_a_generation_and_old_ones_are_not_done_again(
    job: JobSpec, all_shards: list[Path], tmp_path: Path
) -> None:
    uri = job.output.uri
    assert run(job, "local", extend=True).generation == 0  # for a new output, `extend` adds nothing to the job
    before = parts(uri)
    bring(tmp_path, all_shards, 1, 2)  # they sort between those that are planned
    assert run(job, "local").rows_in == 2 * PER_SHARD  # without `extend` nothing is added
    summary = run(job, "local", extend=True)
    assert (summary.generation, summary.added, summary.parts, summary.parts_done_before) == (1, 2, 4, 2)
    assert summary.rows_in == 4 * PER_SHARD and summary.rows_written == {"tiny": 30}
    assert summary.rejected == {"empty": 1, "not_an_image": 1}
    after = parts(uri)
    assert {name: after[name] for name in before} == before
    assert sorted(int(name.split("part-")[1][:6]) for name in after) == [0, 1, 2, 3]
    assert verify(uri) == []
    record = json.loads(Output.at(uri).read("_run-1.json") or b"")
    assert (record["kind"], record["parent"], record["parts"]) == ("extension", 0, 2)
    names = set(Output.at(uri).files())
    again = run(job, "local", extend=True)
    assert (again.generation, again.added, again.parts, again.parts_done_before) == (1, 0, 2, 2)
    assert set(Output.at(uri).files()) == names and again.rows_in == 4 * PER_SHARD
    bring(tmp_path, all_shards, 4)
    assert run(job, "local", extend=True, shard="0/1").generation == 2
    assert rows_by_shard(uri) == {"000": 7, "001": 8, "002": 7, "003": 8, "004": 8}
    assert verify(uri) == []


def test_all_that_reads_an_output_sees_the_union(
    job: JobSpec, all_shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = job.output.uri
    run(job, "local")
    bring(tmp_path, all_shards, 2, 4)
    run(job, "local", extend=True)
    now = status(uri)
    assert (now.is_complete, now.generation, now.retries_begun, now.parts) == (True, 1, 0, 4)
    assert (now.parts_done, now.rows_in, now.rejected) == ({"tiny": 4}, 32, 2)
    assert [(row["part"], row["reason"]) for row in read_rejects(uri).to_pylist()] == [
        (0, "empty"),
        (2, "not_an_image"),
    ]
    vectors = open_vectors(uri)
    assert sorted(vectors.parts) == [0, 1, 2, 3] and sum(len(block.unit_BD) for block in vectors.blocks()) == 30
    page = report(uri, tmp_path / "report.html", sample=20)[0]
    assert "32" in Path(page).read_text()
    assert main(["status", uri]) == 0 and "extended   1 times" in capsys.readouterr().out
    assert main(["verify", uri]) == 0
    manifest = pq.read_table(f"{uri}/_manifest-1.parquet")
    assert manifest.column("part").to_pylist() == [2, 3]


def test_rejects_of_old_and_new_files_are_retried_and_extended_again(
    checkpoint: Path, output_root: str, tmp_path: Path
) -> None:
    """Run a list, extend it by another list, retry over both, and extend once more, on disk and on S3."""
    root, store = output_root, Store()
    for number in range(12):
        if number not in (1, 5):
            store.create(join(root, f"img/{number}.jpg"), jpeg(number))
    for name, first in (("a", 0), ("b", 4), ("c", 8)):
        lines = "".join(f"img/{number}.jpg,{number}\n" for number in range(first, first + 4))
        store.create(join(root, f"{name}.csv"), ("uri,n\n" + lines).encode())
    uri = join(root, "out")
    lists = [table_job(root, checkpoint, uri, *"abc"[:n]) for n in (1, 2, 3)]
    run(lists[0], "local")
    assert run(lists[1], "local", extend=True).rejected == {"not_found": 2}
    for number in (1, 5):
        store.create(join(root, f"img/{number}.jpg"), jpeg(number))
    tried = retry(uri, runner="local")
    assert (tried.tried, tried.recovered, tried.rows_in, tried.rejected) == (2, {"tiny": 2}, 8, {})
    summary = run(lists[2], "local", extend=True)
    assert (summary.generation, summary.rows_in, summary.rows_written) == (3, 12, {"tiny": 12})
    assert sorted(open_results(uri).to_table(columns=["n"])["n"].to_pylist()) == list(range(12))
    assert verify(uri) == [] and status(uri).retries_begun == 1
    assert retry(uri, runner="local").tried == 0


def table_job(root: str, checkpoint: Path, uri: str, *names: str, **more: Any) -> JobSpec:
    document = job_dict("unused", checkpoint, uri, reject_limit=1.0, **more)
    lists = [join(root, f"{name}.csv") for name in names]
    document["input"] = {"kind": "table", "uris": lists, "keep": ["n:int64"]}
    document["output"]["rows_per_part"] = 3
    return parse_job(document)


def test_an_unfinished_job_is_done_first_as_it_was_planned(
    job: JobSpec, all_shards: list[Path], tmp_path: Path
) -> None:
    uri = job.output.uri
    run(job, "local")
    for name in (*sorted(parts(uri))[:1], "_manifest.parquet", "_rejects.parquet", SUCCESS):
        (Path(uri) / name).unlink()  # as if it had been killed
    bring(tmp_path, all_shards, 1)
    summary = run(job, "local", extend=True)
    assert (summary.parts, summary.parts_done_before, summary.rows_in) == (3, 1, 24)
    assert (Path(uri) / "_SUCCESS-1").exists() and verify(uri) == []


def test_an_extension_that_was_killed_goes_on_and_then_takes_what_came_in_the_meantime(
    job: JobSpec, all_shards: list[Path], tmp_path: Path
) -> None:
    uri = job.output.uri
    run(job, "local")
    bring(tmp_path, all_shards, 1, 2)
    run(job, "local", extend=True)
    for name in (sorted(parts(uri))[2], "_manifest-1.parquet", "_rejects-1.parquet", "_SUCCESS-1"):
        (Path(uri) / name).unlink()
    now = status(uri)
    assert not now.is_complete and now.parts_done == {"tiny": 3} and now.parts == 4
    assert run(job, "local").rows_in == 16  # the job itself is complete
    with pytest.raises(RunMismatch, match="extension 1 was started"):
        retry(uri, runner="local")
    bring(tmp_path, all_shards, 4)
    summary = run(job, "local", extend=True)
    assert (summary.generation, summary.added, summary.rows_in) == (2, 3, 40)
    assert verify(uri) == []


def test_slices_extend_together(job: JobSpec, all_shards: list[Path], tmp_path: Path) -> None:
    run(job, "local")
    bring(tmp_path, all_shards, 1, 2, 4)
    first = run(job, "local", extend=True, shard=(1, 2))
    assert (first.generation, first.parts, first.parts_left, first.rows_in) == (1, 1, 2, 8)
    with pytest.raises(RunMismatch, match="overlaps"):
        (Path(job.output.uri) / sorted(parts(job.output.uri))[-1]).unlink()
        run(job, "local", extend=True, shard=(0, 3))
    assert run(job, "local", extend=True, shard=(0, 2)).parts_left == 1
    last = run(job, "local", extend=True, shard=(1, 2))
    assert (last.parts_left, last.rows_in) == (0, 40) and verify(job.output.uri) == []


def test_what_cannot_be_extended_is_one_clear_error(job: JobSpec, all_shards: list[Path], tmp_path: Path) -> None:
    uri = job.output.uri
    run(job, "local")
    shard, files = tmp_path / "in" / all_shards[0].name, set(Output.at(uri).files())
    bring(tmp_path, all_shards, 1)
    os.utime(shard, (1, 1))
    with pytest.raises(InputError, match=r"1 files changed since .*000.tar: etag `.*` is now"):
        run(job, "local", extend=True)
    bring(tmp_path, all_shards, 0)
    with pytest.raises(RunMismatch, match="differ"):
        other = job.model_dump(mode="json")
        other["models"][0]["outputs"] = [{"kind": "logits"}]
        run(parse_job(other), "local", extend=True)
    assert set(Output.at(uri).files()) == files  # nothing was started
    shutil.copy2(all_shards[2], tmp_path / "in" / "005.tar")
    shutil.copy2(all_shards[0], tmp_path / "in" / "006.tar")
    with pytest.raises(RejectLimitExceeded, match="3 of 40"):
        run(job, "local", extend=True)
    assert not status(uri).is_complete
    run(job.model_copy(update={"reject_limit": 1.0}), "local", extend=True)
    assert status(uri).is_complete and verify(uri) == []


def test_a_retry_that_was_begun_has_to_end_first(checkpoint: Path, tmp_path: Path) -> None:
    root, uri = str(tmp_path), f"{tmp_path}/out"
    for name, number in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.csv").write_text(f"uri,n\nimg/{number}.jpg,{number}\n")
    run(table_job(root, checkpoint, uri, "a"), "local")
    retry(uri, runner="local")
    (tmp_path / "out/_SUCCESS-1").unlink()
    with pytest.raises(RunMismatch, match="retry 1 was started"):
        run(table_job(root, checkpoint, uri, *"ab"), "local", extend=True)


def test_verify_finds_an_extension_that_does_not_fit(job: JobSpec, all_shards: list[Path], tmp_path: Path) -> None:
    uri = job.output.uri
    run(job, "local")
    bring(tmp_path, all_shards, 1, 2)
    run(job, "local", extend=True)
    plan, manifest = Path(uri) / "_plan-1.parquet", Path(uri) / "_manifest-1.parquet"
    kept = plan.read_bytes()
    table = pq.read_table(pa.BufferReader(kept))
    pq.write_table(table.slice(1), plan)  # its first index does not follow the last one
    assert verify(uri) == [
        "the plan of a later generation cannot be read: _plan-1.parquet does not continue the plans before it"
    ]
    plan.write_bytes(kept)
    manifest.write_bytes((Path(uri) / "_manifest.parquet").read_bytes())
    problems = verify(uri)
    assert any("_manifest-1.parquet does not name" in problem for problem in problems)
    assert any("_SUCCESS-1 has another digest" in problem for problem in problems)


@pytest.mark.slow
def test_an_extension_that_is_killed_at_any_step_goes_on() -> None:
    """Kill at every third step, on disk and on S3; `make chaos` does all."""
    command = [sys.executable, "-m", "tests.harness.chaos.on_extend", "--every", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
