"""What a session leaves of itself, and what the end of a job costs: footers read, listings made, rejects gathered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import commit, results, session
from pipeline.commit import Footer, Output
from pipeline.driver import run
from pipeline.errors import JobFailed, StorageError
from pipeline.finish import METER_KEY, Counting, finish
from pipeline.job import JobSpec, parse_job
from pipeline.meter import STAGES
from pipeline.results import read_rejects, status
from pipeline.storage import Store
from pipeline.verify import verify
from tests.small import BROKEN, GOOD, ROWS, SHARDS, job_dict, make_checkpoint, make_shards, small_job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    make_shards(folder / "in")
    make_checkpoint(folder / "model")
    return folder


@pytest.fixture
def job(made: Path, tmp_path: Path) -> JobSpec:
    return small_job(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))


@pytest.fixture
def footers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs of the parts whose footers are read back."""
    read, real = list[str](), commit.read_footer
    monkeypatch.setattr(commit, "read_footer", lambda store, entry: read.append(entry.uri) or real(store, entry))
    return read


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made, real = list[str](), Store.scan
    monkeypatch.setattr(Store, "scan", lambda store, uri: made.append(uri) or real(store, uri))
    return made


def lose(job: JobSpec, count: int) -> list[Path]:
    """As if the job had been killed before its last `count` parts."""
    folder = Path(job.output.uri)
    for path in folder.glob("_*"):
        if path.name not in ("_plan.parquet", "_run.json"):
            path.unlink()
    lost = sorted((folder / "model=tiny").iterdir())[-count:]
    for path in lost:
        path.unlink()
    return lost


def manifest_meter(job: JobSpec) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(pq.read_schema(f"{job.output.uri}/_manifest.parquet").metadata[METER_KEY])
    return said


# ---- the meter --------------------------------------------------------------------------------------------------


def test_the_summary_the_manifest_and_status_carry_the_meter(job: JobSpec) -> None:
    summary = run(job, "local")
    said = manifest_meter(job)
    assert summary.bottleneck and said["bottleneck"] == summary.bottleneck == status(job.output.uri).bottleneck
    assert said == json.loads(json.dumps(summary.meter))
    stages = said["stages"]
    assert list(stages) == sorted(STAGES)
    assert all(stages[stage]["seconds"] > 0 and stages[stage]["size_bytes"] > 0 for stage in STAGES), stages
    assert stages["read"]["images"] == ROWS
    assert stages["decode"]["images"] == stages["embed"]["images"] == stages["commit"]["images"] == GOOD
    files = Output.at(job.output.uri).part_files().values()
    assert stages["commit"]["size_bytes"] == sum(entry.size_bytes for entry in files)
    assert said["pools"] == {"readers": 1, "workers": 2}
    assert set(said["waited"]) == {"workers"}
    assert (said["parts_here"], said["parts_before"], said["parts"]) == (SHARDS, 0, SHARDS)


def test_each_stage_is_counted_once_for_each_model(made: Path, tmp_path: Path) -> None:
    document = job_dict(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))
    wide = {"model": str(made / "model"), "name": "wide", "image_size": 64, "outputs": [{"kind": "tokens"}]}
    stages = run(parse_job({**document, "models": [*document["models"], wide]}), "local").meter["stages"]
    assert stages["decode"]["images"] == GOOD
    assert stages["embed"]["images"] == stages["encode"]["images"] == 2 * GOOD


def test_after_a_kill_the_manifest_says_whose_session_it_describes(job: JobSpec) -> None:
    first = run(job, "local")
    lose(job, 2)
    second = run(job, "local")
    said = manifest_meter(job)
    assert said["session"] == second.meter["session"] != first.meter["session"]
    assert (said["parts_here"], said["parts_before"]) == (2, SHARDS - 2)
    assert said["stages"]["read"]["images"] == 40


def test_a_session_that_only_ends_a_job_names_the_one_that_worked(job: JobSpec) -> None:
    first = run(job, "local")
    for name in ("_manifest.parquet", "_SUCCESS"):
        (Path(job.output.uri) / name).unlink()
    again = run(job, "local")
    assert again.meter == {} and again.bottleneck == ""
    assert manifest_meter(job)["session"] == first.meter["session"]


def test_a_working_session_leaves_its_meter_under_new_names(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIRST_SNAPSHOT_S", 1e-4)
    seen: list[dict[str, Any]] = []
    run(job, "local", on_change=lambda tally: seen.append(status(job.output.uri).meter))
    names = sorted(path.name for path in Path(job.output.uri).glob("_meter-*"))
    assert len(names) >= 3
    assert [name[-8:-5] for name in names] == [f"{n:03d}" for n in range(1, len(names) + 1)]
    done = [meter["parts_here"] for meter in seen if meter]
    assert done == sorted(done) and done[0] < SHARDS  # it was told before the end
    assert status(job.output.uri).meter["parts_here"] == SHARDS


def test_parts_that_fail_leave_a_meter_too(job: JobSpec, made: Path, tmp_path: Path) -> None:
    paths = make_shards(tmp_path / "in", shards=2, broken=False)
    failing = small_job(f"{tmp_path}/in/*.tar", made / "model", job.output.uri)
    run(failing, "local")
    lose(failing, 1)
    paths[1].write_bytes(paths[0].read_bytes() + b"\0" * 512)
    with pytest.raises(JobFailed):
        run(failing, "local")
    assert status(failing.output.uri).meter["parts_here"] == 0


def test_a_store_that_refuses_the_meter_does_not_end_the_job(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Output.put_once

    def put_once(output: Output, name: str, data: bytes) -> str:
        if name.startswith("_meter"):
            raise StorageError("503 SlowDown")
        return real(output, name, data)

    monkeypatch.setattr(Output, "put_once", put_once)
    assert run(job, "local").rows_in == ROWS
    assert status(job.output.uri).meter == {}


# ---- what the end costs -----------------------------------------------------------------------------------------


def test_what_a_session_committed_is_not_read_back(job: JobSpec, footers_read: list[str], listings: list[str]) -> None:
    run(job, "local")
    assert footers_read == []
    assert len(listings) == 3  # is the folder empty, what is done, and at the end: what is there
    lost = lose(job, 2)
    del listings[:]
    run(job, "local")
    assert len(footers_read) == SHARDS - 2 and not {str(path) for path in lost} & set(footers_read)
    assert len(listings) == 2
    assert verify(Output.at(job.output.uri)) == []


def test_a_complete_output_is_listed_once_and_not_read(
    job: JobSpec, footers_read: list[str], listings: list[str]
) -> None:
    first = run(job, "local")
    del listings[:]
    again = run(job, "local")
    assert footers_read == [] and len(listings) == 1
    for name in ("rows_in", "rows_written", "rejected", "parts", "losses"):
        assert getattr(again, name) == getattr(first, name)


@pytest.mark.parametrize("kept_bytes", [0, 64 << 20])
def test_rejects_are_the_same_from_memory_and_read_back(
    job: JobSpec, footers_read: list[str], monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(session, "KEPT_REJECT_BYTES", kept_bytes)
    summary = run(job, "local")
    assert len(footers_read) == (0 if kept_bytes else len(BROKEN))  # parts without rejects are never read back
    assert summary.rejected == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert verify(Output.at(job.output.uri)) == []


def test_a_part_that_somebody_else_created_is_read_back(
    job: JobSpec, footers_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Output.put_once
    monkeypatch.setattr(Output, "put_once", lambda self, name, data: real(self, name, data) and "done")
    run(job, "local")
    assert len(footers_read) == SHARDS


def test_a_file_that_is_gone_at_the_end_is_an_error(job: JobSpec) -> None:
    run(job, "local")
    output = Output.at(job.output.uri)
    plan = output.stored_plan()
    assert plan is not None
    lose(job, 1)
    with pytest.raises(StorageError, match="1 committed files are gone"):
        finish(output, plan, {}, {})


def test_models_that_disagree_on_rows_in_are_an_error() -> None:
    footers = [("model=a/x", Footer("i", 0, 5, 5, "")), ("model=b/x", Footer("i", 0, 6, 6, ""))]
    with pytest.raises(StorageError, match="do not agree"):
        list(Counting().rejects(footers))


# ---- status and rejects of many parts ----------------------------------------------------------------------------


def test_status_of_many_parts_reads_footers_only_on_request(
    job: JobSpec, footers_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FEW_FILES", 3)
    run(job, "local")
    lose(job, 2)
    del footers_read[:]
    now = status(job.output.uri)
    assert now.parts_done == {"tiny": SHARDS - 2} and footers_read == []
    assert (now.rows_in, now.rows_written, now.rejected) == (None, None, None)  # a tar's rows are known when read
    counted = status(job.output.uri, read_footers=True)
    assert (counted.rows_in, counted.rows_written, counted.rejected) == (80, {"tiny": 78}, 2)
    assert len(footers_read) == SHARDS - 2
    run(job, "local")
    del footers_read[:]
    last = status(job.output.uri)
    assert (last.rows_in, last.rows_written, last.rejected) == (ROWS, {"tiny": GOOD}, len(BROKEN))
    assert footers_read == []


def test_status_takes_rows_from_a_plan_that_has_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = job_dict(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))
    document["input"]["split_above_bytes"] = 1  # headers are walked, rows counted, when the job is planned
    job = parse_job(document)
    run(job, "local")
    lose(job, 2)
    monkeypatch.setattr(results, "FEW_FILES", 0)
    now = status(job.output.uri)
    assert (now.rows_in, now.rows_planned, now.rejected) == (ROWS - 40, ROWS, None)


def test_rejects_come_from_the_gathered_file_when_there_is_one(job: JobSpec, footers_read: list[str]) -> None:
    run(job, "local")
    table = read_rejects(job.output.uri)
    assert footers_read == []
    (Path(job.output.uri) / "_rejects.parquet").unlink()
    assert read_rejects(job.output.uri).equals(table)
    assert len(footers_read) == SHARDS
