"""The meter that a session stores, and the cost of finalizing a job: footers read, listings made, rejects collected."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.batch import Work
from img2parquet.dataset import commit
from img2parquet.dataset.commit import Output
from img2parquet.dataset.finalize import METER_KEY, FooterTotals, encode_manifest, finalize
from img2parquet.dataset.footer import Footer
from img2parquet.dataset.generations import History
from img2parquet.dataset.part_file import _pack
from img2parquet.dataset.plan import Plan
from img2parquet.dataset.slices import WHOLE
from img2parquet.engine import committer, driver, run_report
from img2parquet.engine.driver import run
from img2parquet.engine.run_report import Tally
from img2parquet.engine.session import Session
from img2parquet.engine.stall_detector import LEFT_BEHIND, StallDetector
from img2parquet.errors import AccessDenied, JobFailed, RunMismatch, StorageError
from img2parquet.job import JobSpec, parse_job
from img2parquet.results import reader
from img2parquet.results.reader import read_rejects, status
from img2parquet.results.verify import verify
from img2parquet.runners.local import LocalRunner, LocalStream, local_results
from img2parquet.schema import Part, Reject
from img2parquet.storage import Entry, Store
from img2parquet.telemetry.stage_timing import STAGES
from tests.support.small_job import BROKEN, GOOD, ROWS, SHARDS, job_dict, make_shards, small_job


@pytest.fixture
def job(made: Path, tmp_path: Path) -> JobSpec:
    return small_job(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))


@pytest.fixture
def footers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the URIs of the parts whose footers are read back."""
    read, real = list[str](), commit.read_footer
    monkeypatch.setattr(commit, "read_footer", lambda store, entry: read.append(entry.uri) or real(store, entry))
    return read


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made, real = list[str](), Store.scan
    monkeypatch.setattr(Store, "scan", lambda store, uri: made.append(uri) or real(store, uri))
    return made


def lose(job: JobSpec, count: int) -> list[Path]:
    """Make the output look as if the job had been killed before its last `count` parts. Return their paths."""
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


# ---- batches -------------------------------------------------------------------------------------------------------


class Disorderly(LocalRunner):
    """Delivers everything last batch first, so that parts come in reverse and each begins with its end."""

    def stream(self, parts: Iterable[Part], work: Work) -> LocalStream:
        results = list(local_results(parts, work))
        return LocalStream(result for result in [*reversed(results), *results])


def test_batches_that_arrive_in_any_order_and_twice_write_the_same_bytes(
    job: JobSpec, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2parquet.engine.driver.choose_runner", lambda name: Disorderly())
    summary = run(job.model_copy(update={"resources": job.resources.model_copy(update={"batch_size": 8})}), "local")
    assert (summary.rows_in, summary.rows_written) == (ROWS, {"tiny": GOOD})
    assert verify(job.output.uri) == []
    names = [path.relative_to(finished) for path in finished.glob("model=*/*")]
    assert len(names) == SHARDS
    for name in names:
        assert (Path(job.output.uri) / name).read_bytes() == (finished / name).read_bytes()


# ---- commits -------------------------------------------------------------------------------------------------------


def test_a_store_that_overwrites_gets_no_part(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "creates_exclusively", lambda store, uri: False)
    with pytest.raises(StorageError, match="ignores `If-None-Match"):
        run(job, "local")
    assert Output.at(job.output.uri).part_files() == {}


def test_a_commit_that_fails_is_the_error_of_the_job(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last part too, after which no other commit waits."""
    real = Output.put_once

    def put_once(output: Output, name: str, data: bytes) -> str:
        if f"part-{SHARDS - 1:06d}" in name:
            raise AccessDenied("no more")
        return real(output, name, data)

    monkeypatch.setattr(Output, "put_once", put_once)
    with pytest.raises(AccessDenied, match="no more"):
        run(job, "local")
    assert len(Output.at(job.output.uri).part_files()) == SHARDS - 1


def test_only_what_is_missing_of_a_part_is_written(made: Path, tmp_path: Path) -> None:
    document = job_dict(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))
    other = {**document["models"][0], "name": "other", "outputs": [{"kind": "labels"}]}
    two = parse_job({**document, "models": [*document["models"], other]})
    run(two, "local")
    (path,) = lose(two, 1)
    again = run(two, "local")
    assert (
        path.exists() and again.meter["stages"]["commit"]["images"] == again.meter["stages"]["encode"]["images"] == 20
    )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("img2parquet-commit")]


def test_a_stop_does_not_wait_for_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "LAST_SNAPSHOT_S", 0.05)
    output, plan, released = Output.at(str(tmp_path)), Plan((), {}), threading.Event()
    report = run_report.RunReport(output, WHOLE, run_report.Tally(output.uri), StallDetector(60.0), lambda tally: None)
    monkeypatch.setattr(report, "store", lambda name, data: released.wait(60) and None)
    ending = committer.Committer(output, plan, {}, lambda model, buffer: pytest.fail("no part"), report)
    before, started = len(LEFT_BEHIND), time.monotonic()
    try:
        ending.finish_before(started + 0.2)
        assert time.monotonic() - started < 30  # on a machine however busy
        assert LEFT_BEHIND[-1]()  # it is not done
    finally:
        released.set()
        ending.close(is_stopped=False)
        assert not LEFT_BEHIND[-1]()
        del LEFT_BEHIND[before:]


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
    monkeypatch.setattr(run_report, "FIRST_SNAPSHOT_S", 1e-4)
    seen: list[dict[str, Any]] = []
    run(job, "local", on_change=lambda tally: seen.append(status(job.output.uri).meter))
    names = sorted(path.name for path in Path(job.output.uri).glob("_meter-*"))
    assert len(names) >= 3
    assert [name[-8:-5] for name in names] == [f"{n:03d}" for n in range(1, len(names) + 1)]
    done = [meter["parts_here"] for meter in seen if meter]
    assert done == sorted(done) and done[0] < SHARDS  # some were stored before the end
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


# ---- the cost of finalizing -----------------------------------------------------------------------------------------


def test_what_a_session_committed_is_not_read_back(job: JobSpec, footers_read: list[str], listings: list[str]) -> None:
    run(job, "local")
    assert footers_read == []
    assert len(listings) == 3  # is the folder empty, what is done, and at the end: what is there
    lost = lose(job, 2)
    del listings[:]
    run(job, "local")
    assert len(footers_read) == SHARDS - 2 and not {str(path) for path in lost} & set(footers_read)
    assert len(listings) == 2
    assert verify(job.output.uri) == []


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
    monkeypatch.setattr(committer, "KEPT_REJECT_BYTES", kept_bytes)
    summary = run(job, "local")
    assert len(footers_read) == (0 if kept_bytes else len(BROKEN))  # parts without rejects are never read back
    assert summary.rejected == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert verify(job.output.uri) == []


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
        finalize(output, History(plan), 0, output.files())


@pytest.mark.parametrize("removed", ["the whole output", "the plan"])
def test_an_output_that_is_removed_meanwhile_ends_the_job_at_once(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    monkeypatch.setattr(committer, "COMMIT_THREADS", 1)
    out, kept, encoded = Path(job.output.uri), job.output.uri + ".plan", list[int]()

    def remove(tally: Tally) -> None:
        if tally.parts_committed == 2 and not Path(kept).exists():
            shutil.copy(out / "_plan.parquet", kept)
            shutil.rmtree(out) if removed == "the whole output" else (out / "_plan.parquet").unlink()

    real = Session._encode
    monkeypatch.setattr(
        Session, "_encode", lambda self, model, buffer: encoded.append(buffer.part.index) or real(self, model, buffer)
    )
    with pytest.raises(StorageError, match=r"_plan.parquet is gone") as error:
        run(job, "local", on_change=remove)
    assert len(encoded) == 2 < SHARDS
    if removed == "the plan":  # do each thing that the hint names
        assert "put it back and run the same command again" in error.value.hint
        shutil.copy(kept, out / "_plan.parquet")
    assert "start over" in error.value.hint
    assert run(job, "local").rows_in == ROWS and verify(job.output.uri) == []


def test_an_output_without_its_plan_is_refused_with_a_hint_that_helps(job: JobSpec) -> None:
    run(job, "local")
    (Path(job.output.uri) / "_plan.parquet").unlink()
    with pytest.raises(RunMismatch, match="cannot be resumed") as error:
        run(job, "local")
    assert "remove these files" in error.value.hint
    shutil.rmtree(f"{job.output.uri}/model=tiny")
    for path in Path(job.output.uri).glob("_*"):
        path.unlink()
    assert run(job, "local").rows_in == ROWS and verify(job.output.uri) == []


@pytest.mark.parametrize("name", ["_plan.parquet", "_run.json", "_manifest.parquet", "_rejects.parquet"])
def test_no_job_is_complete_without_one_of_its_records(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = driver.judge
    monkeypatch.setattr(driver, "judge", lambda *what: (Path(job.output.uri) / name).unlink() or real(*what))
    with pytest.raises(StorageError, match=rf"{name} was removed") as error:
        run(job, "local")
    assert not (Path(job.output.uri) / "_SUCCESS").exists()
    monkeypatch.setattr(driver, "judge", real)
    if name == "_plan.parquet":
        assert "start over" in error.value.hint
    else:
        assert error.value.hint == "run the same command again"
        assert run(job, "local").rows_in == ROWS and verify(job.output.uri) == []


def test_models_that_disagree_on_rows_in_are_an_error() -> None:
    footers = [("model=a/x", Footer("i", 0, 5, 5, "")), ("model=b/x", Footer("i", 0, 6, 6, ""))]
    with pytest.raises(StorageError, match="do not agree"):
        list(FooterTotals().rejects(footers))


def test_an_image_that_several_models_reject_counts_once() -> None:
    def footer(reason: Any) -> Footer:
        return Footer("i", 0, 5, 4, _pack([Reject(1, "key", "shard", "embed", reason, "")]))

    counted = FooterTotals()
    rows = list(counted.rejects([("model=a/x", footer("timed_out")), ("model=b/x", footer("not_finite"))]))
    assert [(row["model"], row["row"], row["reason"]) for row in rows] == [
        ("a", 1, "timed_out"),
        ("b", 1, "not_finite"),
    ]
    assert counted.totals(1) == {
        "parts": 1, "rows_in": 5, "rows_written": {"a": 4, "b": 4}, "rejected": {"timed_out": 1},
    }  # fmt: skip


def test_the_most_frequent_reason_comes_first_and_then_the_alphabet() -> None:
    counted = FooterTotals(reasons=Counter({"truncated": 1, "timed_out": 3, "empty": 3}))
    assert list(counted.totals(1)["rejected"].items()) == [("empty", 3), ("timed_out", 3), ("truncated", 1)]


def test_the_manifest_is_sorted_by_name_though_files_come_by_part() -> None:
    names = ["model=a/0", "model=b/0", "model=a/1", "model=b/1"]
    footers = [(name, Footer("i", int(name[-1]), 5, 5, "", bytes([n]) * 32)) for n, name in enumerate(names)]
    files = {name: Entry(name, 100 + n, "") for n, name in enumerate(names)}
    table = pq.read_table(pa.BufferReader(encode_manifest(FooterTotals.of(footers), files, {})))
    assert table.column("file").to_pylist() == sorted(names)
    assert table.column("size_bytes").to_pylist() == [100, 102, 101, 103]
    assert [digest[0] for digest in table.column("sha256").to_pylist()] == [0, 2, 1, 3]


# ---- status and rejects of many parts ----------------------------------------------------------------------------


def test_status_of_many_parts_reads_footers_only_on_request(
    job: JobSpec, footers_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FEW_FILES", 3)
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
    monkeypatch.setattr(reader, "FEW_FILES", 0)
    now = status(job.output.uri)
    assert (now.rows_in, now.rows_planned, now.rejected) == (ROWS - 40, ROWS, None)


def test_rejects_come_from_the_gathered_file_when_there_is_one(job: JobSpec, footers_read: list[str]) -> None:
    run(job, "local")
    table = read_rejects(job.output.uri)
    assert footers_read == []
    (Path(job.output.uri) / "_rejects.parquet").unlink()
    assert read_rejects(job.output.uri).equals(table)
    assert len(footers_read) == SHARDS
