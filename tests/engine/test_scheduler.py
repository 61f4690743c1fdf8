"""Streams that hang, lose their workers or end early are reported once and run again, and every job comes to an end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from img2parquet.batch import Work
from img2parquet.dataset.commit import Output
from img2parquet.engine import scheduler
from img2parquet.engine.stall_detector import StallDetector
from img2parquet.errors import JobFailed
from img2parquet.job import JobSpec
from img2parquet.results.reader import status
from img2parquet.results.verify import verify
from img2parquet.runners.base import Result, ResultStream, WorkersLost
from img2parquet.runners.local import LocalRunner, LocalStream, local_results
from img2parquet.schema import Part
from tests.engine.conftest import STALL_S
from tests.support.fast_clock import CLOCK
from tests.support.small_job import ROWS, SHARDS

pytestmark = pytest.mark.timeout(120)


def part_bytes(uri: str) -> dict[str, bytes]:
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


def check_whole(made: Path, uri: str) -> None:
    assert verify(uri) == []
    assert part_bytes(uri) == part_bytes(str(made / "finished"))


# ---- a runner whose streams can be abandoned, as Ray's can ------------------------------------------------------


class Hanging:
    """Yields the local runner's results, but withholds the `hold_at`-th until the stream is abandoned."""

    can_abandon = True

    def __init__(self, results: Generator[Result], hold_at: int | None, error: Exception | None) -> None:
        self.results, self.hold_at, self.error, self.given = results, hold_at, error, 0
        self.abandoned = threading.Event()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self.given == self.hold_at:
            if self.error:
                raise self.error
            assert CLOCK.wait(self.abandoned, 60)
            raise StopIteration
        self.given += 1
        return next(self.results)

    def close(self) -> None:
        self.results.close()

    def abandon(self) -> None:
        self.abandoned.set()

    def where(self) -> str:
        return "the workers' batches (2 under way)"

    def is_outgrown(self) -> bool:
        return False

    def is_shrunken(self) -> bool:
        return False

    def idle_workers(self) -> int:
        return 0

    def beside(self, parts: list[Part]) -> ResultStream:
        raise AssertionError("no worker is idle")

    def stacks(self) -> str:
        return "  a worker's stack"


class HangingRunner(LocalRunner):
    """`holds`: at which result each of its streams hangs; later streams do not."""

    def __init__(self, *holds: int, error: Exception | None = None) -> None:
        self.holds, self.error, self.streams, self.handed_out = list(holds), error, list[Hanging](), list[list[int]]()

    def stream(self, parts: Iterable[Part], work: Work) -> Hanging:  # type: ignore[override]
        parts = list(parts)
        self.handed_out.append([part.index for part in parts])
        hold_at = self.holds.pop(0) if self.holds else None
        self.streams.append(Hanging(local_results(parts, work), hold_at, self.error))
        return self.streams[-1]


def test_what_a_hanging_stream_left_is_run_again(
    job: JobSpec, made: Path, run_with: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runner = HangingRunner(7)  # two whole parts of three batches, and one batch of the third
    counted: list[int] = []
    with caplog.at_level(logging.WARNING):
        summary = run_with(job, runner)
    counted.append(summary.meter["rows_in"])
    assert runner.streams[0].abandoned.is_set()
    assert runner.handed_out == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]]
    assert counted == [ROWS]  # the first batch of part 2 arrived twice, and counted once
    (message,) = [r.getMessage() for r in caplog.records if "no batch arrived" in r.getMessage()]
    assert "4 parts are incomplete" in message and "the workers' batches (2 under way)" in message
    assert (
        "part 2: batch 1 is missing; 1 batches received" in message
        and "part 3: batch 0 is missing; none received" in message
    )
    assert "img2parquet-results" in message and "scheduler.py" in message  # the driver's threads
    assert message.endswith("workers:\n  a worker's stack")
    assert summary.meter["stalls"][0].pop("waited_s") in (2, 3)
    assert summary.meter["stalls"] == [{"where": "the workers' batches (2 under way)", "parts": 4}]
    check_whole(made, job.output.uri)


def test_status_tells_of_a_stall_while_the_job_hangs(job: JobSpec, run_with: Any) -> None:
    with pytest.raises(JobFailed):
        run_with(job, HangingRunner(4, 0, 0))
    stalls = status(job.output.uri).meter["stalls"]
    assert [stall["parts"] for stall in stalls] == [SHARDS - 1] * 3


def test_two_runs_without_a_new_batch_are_the_last(job: JobSpec, made: Path, run_with: Any) -> None:
    runner, started = HangingRunner(7, 1, 1, 1), CLOCK.monotonic()
    with pytest.raises(JobFailed) as raised:
        run_with(job, runner)
    assert len(runner.streams) == 3 and CLOCK.monotonic() - started > 7 * STALL_S  # each twice as patient
    assert "part 2: batch 1 is missing" in str(raised.value) and "run the same command again" in str(raised.value)
    assert raised.value.exit_code == 1
    assert run_with(job, HangingRunner()).parts_done_before == 2
    check_whole(made, job.output.uri)


def test_progress_between_stalls_is_no_reason_to_give_up(job: JobSpec, made: Path, run_with: Any) -> None:
    runner = HangingRunner(3, 3, 3, 3)
    run_with(job, runner)
    assert len(runner.streams) == 5
    check_whole(made, job.output.uri)


def test_lost_workers_are_replaced_without_waiting(job: JobSpec, made: Path, run_with: Any) -> None:
    runner = HangingRunner(5, 2, error=WorkersLost("a node died"))
    assert "stalls" not in run_with(job, runner).meter
    assert runner.handed_out[1] == [1, 2, 3, 4, 5] and len(runner.streams) == 3
    check_whole(made, job.output.uri)


def test_workers_that_are_always_lost_end_in_one_error(job: JobSpec, run_with: Any) -> None:
    with pytest.raises(JobFailed, match="a node died"):
        run_with(job, HangingRunner(*[0] * 9, error=WorkersLost("a node died")))


def test_a_runner_that_ends_early_loses_nothing(job: JobSpec, made: Path, run_with: Any) -> None:
    run_with(job, HangingRunner(6, error=StopIteration()))
    check_whole(made, job.output.uri)


def test_slow_is_not_stalled(job: JobSpec, made: Path, run_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each batch takes half of the limit, and all of them take several times as long as the limit."""

    def slow(parts: Iterable[Part], work: Work) -> Generator[Result]:
        for number, result in enumerate(local_results(parts, work)):
            time.sleep(STALL_S / 2 if number < 4 else 0)
            yield result

    class SlowRunner(LocalRunner):
        def stream(self, parts: Iterable[Part], work: Work) -> LocalStream:
            return LocalStream(slow(parts, work))

    with caplog.at_level(logging.WARNING):
        summary = run_with(job, SlowRunner())
    assert "stalls" not in summary.meter and summary.seconds > STALL_S and not caplog.records
    check_whole(made, job.output.uri)


def test_a_cluster_that_has_grown_gets_a_new_stream(
    job: JobSpec, made: Path, run_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "CHECK_S", 0.0)
    runner = HangingRunner()
    monkeypatch.setattr(Hanging, "is_outgrown", lambda stream: stream is runner.streams[0])
    run_with(job, runner)
    assert len(runner.streams) == 2 and runner.streams[0].abandoned.is_set()
    check_whole(made, job.output.uri)


def test_a_stopped_process_has_not_waited() -> None:
    detector = StallDetector(stall_s=10.0)
    detector.checked_at -= 3600  # as after SIGSTOP and SIGCONT
    assert not detector.is_stalled()
    detector.waited_s = 9.9
    detector.checked_at -= 1
    assert detector.is_stalled()
