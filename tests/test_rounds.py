"""Streams that hang, lose their workers or end early: said once, run again what can be, and an end in any case."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import local, rounds
from pipeline.batch import Embedded, Failed, Work, WorkersLost
from pipeline.commit import Output
from pipeline.driver import run
from pipeline.errors import JobFailed
from pipeline.job import JobSpec
from pipeline.results import status
from pipeline.schema import Part
from pipeline.verify import verify
from tests.small import ROWS, SHARDS, make_checkpoint, make_shards, small_job

STALL_S = 2.0
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    make_shards(folder / "in")
    make_checkpoint(folder / "model")
    run(small_job(f"{folder}/in/*.tar", folder / "model", str(folder / "quiet")), "local")
    return folder


@pytest.fixture
def job(made: Path, tmp_path: Path) -> JobSpec:
    resources = {"workers": 2, "batch_size": 8, "stall_s": STALL_S}
    return small_job(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"), resources=resources)


def part_bytes(uri: str) -> dict[str, bytes]:
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


def check_whole(made: Path, uri: str) -> None:
    assert verify(Output.at(uri)) == []
    assert part_bytes(uri) == part_bytes(str(made / "quiet"))


# ---- a runner that can be abandoned, as ray can -----------------------------------------------------------------


class Hanging:
    """The local runner's results, of which the `hold_at`-th does not come until the stream is abandoned."""

    def __init__(self, results: Iterator[Embedded | Failed], hold_at: int | None, error: Exception | None) -> None:
        self.results, self.hold_at, self.error, self.given = results, hold_at, error, 0
        self.abandoned = threading.Event()

    def __iter__(self) -> Iterator[Embedded | Failed]:
        return self

    def __next__(self) -> Embedded | Failed:
        if self.given == self.hold_at:
            if self.error:
                raise self.error
            assert self.abandoned.wait(60)
            raise StopIteration
        self.given += 1
        return next(self.results)

    def close(self) -> None:
        self.results.close()  # type: ignore[attr-defined]

    def abandon(self) -> None:
        self.abandoned.set()

    def at_work(self) -> dict[str, int]:
        return {"reading": 0, "the workers' batches": 2}

    def is_outgrown(self) -> bool:
        return False

    def is_shrunken(self) -> bool:
        return False

    def idle_workers(self) -> int:
        return 0

    def beside(self, parts: list[Part]) -> Iterator[Embedded | Failed]:
        raise AssertionError("nobody waits")

    def stacks(self) -> str:
        return "  a worker's stack"


class Runner:
    """`holds`: at which result each of its streams hangs; those after them do not."""

    def __init__(self, *holds: int, error: Exception | None = None) -> None:
        self.holds, self.error, self.streams, self.asked = list(holds), error, list[Hanging](), list[list[int]]()
        self.start, self.pools = local.start, local.pools

    def stream(self, parts: Iterable[Part], work: Work) -> Hanging:
        parts = list(parts)
        self.asked.append([part.index for part in parts])
        hold_at = self.holds.pop(0) if self.holds else None
        self.streams.append(Hanging(local.stream(parts, work), hold_at, self.error))
        return self.streams[-1]


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[JobSpec, Runner], Any]:
    def go(job: JobSpec, runner: Runner) -> Any:
        monkeypatch.setattr("pipeline.driver.choose_runner", lambda name: runner)
        return run(job, "local")

    return go


def test_what_a_hanging_stream_left_is_run_again(
    job: JobSpec, made: Path, run_with: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner(7)  # two whole parts of three batches, and one batch of the third
    counted: list[int] = []
    with caplog.at_level(logging.WARNING):
        summary = run_with(job, runner)
    counted.append(summary.meter["rows_in"])
    assert runner.streams[0].abandoned.is_set()
    assert runner.asked == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]]
    assert counted == [ROWS]  # the first batch of part 2 came twice, and counted once
    (told,) = [r.getMessage() for r in caplog.records if "no batch came" in r.getMessage()]
    assert "4 parts are not whole" in told and "the workers' batches (2 under way)" in told
    assert "part 2: batch 1 is missing; 1 batches came" in told and "part 3: batch 0 is missing; nothing came" in told
    assert "img2parquet-results" in told and "rounds.py" in told  # the driver's threads
    assert told.endswith("workers:\n  a worker's stack")
    assert summary.meter["stalls"] == [{"waited_s": 2, "where": "the workers' batches (2 under way)", "parts": 4}]
    check_whole(made, job.output.uri)


def test_status_tells_of_a_stall_while_the_job_hangs(job: JobSpec, run_with: Any) -> None:
    with pytest.raises(JobFailed):
        run_with(job, Runner(4, 0, 0))
    stalls = status(job.output.uri).meter["stalls"]
    assert [stall["parts"] for stall in stalls] == [SHARDS - 1] * 3


def test_two_runs_without_a_new_batch_are_the_last(job: JobSpec, made: Path, run_with: Any) -> None:
    runner, started = Runner(7, 1, 1, 1), time.monotonic()
    with pytest.raises(JobFailed) as raised:
        run_with(job, runner)
    assert len(runner.streams) == 3 and time.monotonic() - started > 7 * STALL_S  # each twice as patient
    assert "part 2: batch 1 is missing" in str(raised.value) and "run the same command again" in str(raised.value)
    assert raised.value.exit_code == 1
    assert run_with(job, Runner()).parts_done_before == 2
    check_whole(made, job.output.uri)


def test_progress_between_stalls_is_no_reason_to_give_up(job: JobSpec, made: Path, run_with: Any) -> None:
    runner = Runner(3, 3, 3, 3)
    run_with(job, runner)
    assert len(runner.streams) == 5
    check_whole(made, job.output.uri)


def test_lost_workers_are_replaced_without_waiting(job: JobSpec, made: Path, run_with: Any) -> None:
    runner = Runner(5, 2, error=WorkersLost("a node died"))
    assert "stalls" not in run_with(job, runner).meter
    assert runner.asked[1] == [1, 2, 3, 4, 5] and len(runner.streams) == 3
    check_whole(made, job.output.uri)


def test_workers_that_are_always_lost_end_in_one_error(job: JobSpec, run_with: Any) -> None:
    with pytest.raises(JobFailed, match="a node died"):
        run_with(job, Runner(*[0] * 9, error=WorkersLost("a node died")))


def test_a_runner_that_ends_early_loses_nothing(job: JobSpec, made: Path, run_with: Any) -> None:
    run_with(job, Runner(6, error=StopIteration()))
    check_whole(made, job.output.uri)


def test_slow_is_not_stalled(job: JobSpec, made: Path, run_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each batch takes a good part of the limit, and all of them several times as long as it."""
    runner = Runner()
    slow = local.stream

    def stream(parts: Iterable[Part], work: Work) -> Iterator[Embedded | Failed]:
        for number, result in enumerate(slow(parts, work)):
            time.sleep(STALL_S / 2 if number < 6 else 0)
            yield result

    runner.stream = stream  # type: ignore[assignment,method-assign]
    with caplog.at_level(logging.WARNING):
        summary = run_with(job, runner)
    assert "stalls" not in summary.meter and summary.seconds > STALL_S and not caplog.records
    check_whole(made, job.output.uri)


def test_a_cluster_that_has_grown_gets_a_new_stream(
    job: JobSpec, made: Path, run_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "LOOK_S", 0.0)
    runner = Runner()
    monkeypatch.setattr(Hanging, "is_outgrown", lambda stream: stream is runner.streams[0])
    run_with(job, runner)
    assert len(runner.streams) == 2 and runner.streams[0].abandoned.is_set()
    check_whole(made, job.output.uri)


def test_a_stopped_process_has_not_waited() -> None:
    watch = rounds.Watch(stall_s=10.0)
    watch.looked -= 3600  # as after SIGSTOP and SIGCONT
    assert not watch.is_stalled()
    watch.waited_s = 9.9
    watch.looked -= 1
    assert watch.is_stalled()
