"""At the end of a job, the parts of slow workers run on idle ones too, and the first result counts."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2parquet.batch import Embedded, Work
from img2parquet.engine import scheduler, stragglers
from img2parquet.engine.stragglers import StragglerDetector
from img2parquet.results.reader import status
from img2parquet.runners import ray_data
from img2parquet.runners.base import WorkersLost
from img2parquet.runners.local import LocalRunner, local_results
from img2parquet.schema import Part
from img2parquet.telemetry import stack_dumps
from img2parquet.telemetry.stage_timing import StageTime
from tests.engine.test_scheduler import Hanging, check_whole
from tests.support.patched_workers import before_each_batch
from tests.support.ray_cluster import driver_environment
from tests.support.small_job import ROWS, job_dict

pytestmark = pytest.mark.timeout(300)


def embedded(seconds: float) -> Embedded:
    return Embedded(0, 0, {}, {}, spent={"decode": StageTime(seconds, 1), "retry slowdown": StageTime(99.0, 1)})


def test_idle_workers_wait_as_long_as_a_part_costs() -> None:
    detector = StragglerDetector(parts=3)
    for _ in range(4):
        detector.add(embedded(10.0))
    detector.update(1, 15.0)
    detector.update(1, 39.0)
    assert not detector.is_too_long(left=1)  # 39 s of the 40 that two parts take
    detector.update(1, 41.0)
    assert detector.is_too_long(left=1) and not detector.is_too_long(left=2) and not detector.is_too_long(left=3)
    detector.update(0, 42.0)  # there is work again
    detector.update(1, 43.0)
    assert detector.idle_s == 1.0 and not detector.is_too_long(left=1)


def test_short_parts_are_not_begun_twice_at_once() -> None:
    detector = StragglerDetector(parts=100)
    detector.add(embedded(0.1))
    detector.update(1, stragglers.LEAST_S)
    assert not detector.is_too_long(left=1)


# ---- a runner whose first stream hangs while some of its workers have nothing to do -----------------------------


class Slow(Hanging):
    def __init__(self, runner: SlowRunner, parts: list[Part], work: Work, hold_at: int | None) -> None:
        super().__init__(local_results(parts, work), hold_at, None)
        self.runner, self.work = runner, work

    def idle_workers(self) -> int:
        return 1 if self.given == self.hold_at else 0

    def is_shrunken(self) -> bool:
        return self.runner.is_shrunken and self is self.runner.streams[0]

    def beside(self, parts: list[Part]) -> Slow:
        self.runner.beside.append([part.index for part in parts])
        helper = Slow(self.runner, parts, self.work, None)
        if self.runner.error:
            helper.hold_at, helper.error = 0, self.runner.error
        return helper


class SlowRunner(LocalRunner):
    """hold_at: at which result its first stream hangs. error: what the stream beside it raises."""

    def __init__(self, hold_at: int, error: Exception | None = None, is_shrunken: bool = False) -> None:
        self.hold_at: int | None = hold_at
        self.error, self.is_shrunken = error, is_shrunken
        self.streams, self.beside = list[Slow](), list[list[int]]()

    def stream(self, parts: Iterable[Part], work: Work) -> Slow:  # type: ignore[override]
        self.streams.append(Slow(self, list(parts), work, self.hold_at))
        self.hold_at = None
        return self.streams[-1]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "CHECK_S", 0.0)
    monkeypatch.setattr(stragglers, "LEAST_S", 0.0)
    monkeypatch.setattr(stragglers, "PARTS", 0.0)


def test_the_last_parts_run_beside_the_stream_that_hangs(
    job: Any, made: Path, run_with: Any, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    runner = SlowRunner(13)  # four whole parts of three batches, and one batch of the fifth
    with caplog.at_level(logging.WARNING):
        summary = run_with(job, runner)
    assert runner.beside == [[4, 5]] and len(runner.streams) == 1
    assert runner.streams[0].abandoned.is_set()  # it is told that all parts are done
    assert summary.meter["rows_in"] == ROWS  # a batch that arrived from both counts once
    assert "stalls" not in summary.meter
    (straggler,) = status(job.output.uri).meter["stragglers"]
    assert straggler["parts"] == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the 2 remaining parts run on them too" in message and "part 4: batch" in message
    assert message.endswith("workers:\n  a worker's stack")
    check_whole(made, job.output.uri)


def test_a_second_run_that_fails_harms_nothing(
    job: Any, made: Path, run_with: Any, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The first stream then stalls, and is replaced as usual."""
    runner = SlowRunner(13, error=WorkersLost("the other node died too"))
    run_with(job, runner)
    assert runner.beside == [[4, 5]] and len(runner.streams) == 2
    assert "the other node died too" in caplog.text
    check_whole(made, job.output.uri)


def test_nothing_runs_twice_before_a_part_is_whole(job: Any, made: Path, run_with: Any, at_once: None) -> None:
    runner = SlowRunner(1)
    run_with(job, runner)
    assert runner.beside == [] and len(runner.streams) == 2
    check_whole(made, job.output.uri)


def test_a_cluster_that_has_shrunk_is_not_waited_for_as_long_as_for_a_stall(
    job: Any, made: Path, run_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "CHECK_S", 0.0)
    monkeypatch.setattr(scheduler, "QUIET_S", 0.3)
    runner = SlowRunner(7, is_shrunken=True)
    summary = run_with(job, runner)
    assert len(runner.streams) == 2 and "stalls" not in summary.meter
    check_whole(made, job.output.uri)


# ---- stacks of other processes -----------------------------------------------------------------------------------

HANGS = """
import ctypes, sys
from img2parquet.telemetry import stack_dumps
stack_dumps.answer(sys.argv[1])
stack_dumps.answer(sys.argv[1])
def hang_in_c():
    print("ready", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(60)  # with Python's lock; a signal ends it
hang_in_c()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="through /proc")
def test_a_process_that_hangs_with_pythons_lock_says_where(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    command = [sys.executable, str(script), "one"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        for _ in range(2):
            ((title, threads),) = stack_dumps.of_machine("one", ours=str(tmp_path))
            assert f"(process {process.pid})" in title
            assert re.search(r'hangs.py", line \d+ in hang_in_c\n', threads), threads
        assert stack_dumps.of_machine("one", ours="nowhere") == stack_dumps.of_machine("on") == []
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


# ---- on Ray ------------------------------------------------------------------------------------------------------

HANG_ONCE = """
import pathlib
mark = pathlib.Path({mark!r})
if batch.part_index == 5 and batch.k == 1 and not mark.exists():
    mark.touch()
    time.sleep(600)
"""
DRIVE = """
import sys
from img2parquet.engine import scheduler, stragglers
from img2parquet.cli import main
scheduler.CHECK_S, stragglers.LEAST_S, stragglers.PARTS = 0.2, 1.0, 0.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_runs_what_hangs_on_the_worker_that_waits(made: Path, finished: Path, tmp_path: Path) -> None:
    """One of two workers hangs in one batch for longer than this job takes."""
    resources = {"workers": 2, "batch_size": 8, "stall_s": 580.0}
    document = job_dict(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"), resources=resources)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    path = before_each_batch(tmp_path / "site", HANG_ONCE.format(mark=str(tmp_path / "mark")))
    command = [sys.executable, "-c", DRIVE, "run", str(tmp_path / "job.yaml"), "--runner", "ray"]
    ran = subprocess.run(command, env=driver_environment(PYTHONPATH=path), capture_output=True, text=True, timeout=560)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    assert (tmp_path / "mark").exists()
    assert "run on them too" in said and "no batch arrived" not in said
    workers = said.partition("\nworkers:\n")[2]
    assert re.search(r"ray::MapWorker.*\(process \d+\) on ", workers), said
    assert re.search(r'sitecustomize.py", line \d+ in prepare\n', workers), said
    check_whole(made, str(tmp_path / "out"))


def test_names_of_rays_that_we_lean_on() -> None:
    """`RayStream` uses these private names; if Ray renames them, idle workers are unknown, and nothing runs twice."""
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator, _ActorPool
    from ray.data._internal.execution.streaming_executor_state import OpState

    assert callable(ActorPoolMapOperator.get_autoscaling_actor_pools) and callable(OpState.total_enqueued_input_blocks)
    names = ("num_active_actors", "num_restarting_actors", "num_pending_actors")
    assert all(callable(getattr(_ActorPool, name)) for name in names)


class Pool:
    """Stands in for the pool of a graph whose input has ended, with nothing queued."""

    def __init__(self, active: int, restarting: int = 0) -> None:
        self.active, self.restarting = active, restarting
        self._inputs_complete = True

    def get_autoscaling_actor_pools(self) -> list[Pool]:
        return [self]

    def num_active_actors(self) -> int:
        return self.active

    def num_restarting_actors(self) -> int:
        return self.restarting

    def num_pending_actors(self) -> int:
        return 0

    def total_enqueued_input_blocks(self) -> int:
        return 0


class Stage:
    def __init__(self, name: str, tasks: int) -> None:
        self.name, self.tasks = name, tasks

    def num_active_tasks(self) -> int:
        return self.tasks


def test_a_stream_names_the_stages_that_have_tasks_under_way(job: Any) -> None:
    stream = ray_data.RayStream([], Work(job, {}, "float32", "cpu", batch_size=8, threads=1), count=4)
    assert stream.where() == "the runner, which has no task under way"
    read, step, other = Stage("MapBatches(Read)", 0), Stage("MapBatches(Step)", 2), Stage("Input", 1)
    stream.executor = type("Executor", (), {"_topology": [read, step, other]})()
    assert stream.where() == "the workers' batches (2 under way), Input (1 under way)"


@pytest.mark.parametrize(
    ("pool", "room", "idle", "is_shrunken"),
    [
        (Pool(active=1), 4, 3, False),
        (Pool(active=0), 4, 0, False),  # no worker is waited for
        (Pool(active=4), 4, 0, False),
        (Pool(active=1), 2, 1, False),  # the nodes of idle workers have gone
        (Pool(active=2, restarting=1), 3, 1, True),
        (Pool(active=2, restarting=1), 4, 2, False),  # it is only being replaced
    ],
)
def test_what_a_stream_says_of_its_workers(
    pool: Pool, room: int, idle: int, is_shrunken: bool, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_data, "worker_count", lambda job: room)
    work = Work(job, {}, "float32", "cpu", batch_size=8, threads=1)
    stream = ray_data.RayStream([], work, count=4)
    assert stream.idle_workers() == 0 and not stream.is_shrunken()  # before it has started
    stream.executor = type("Executor", (), {"_topology": {pool: pool}})()
    assert stream.idle_workers() == idle and stream.is_shrunken() == is_shrunken
