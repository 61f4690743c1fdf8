"""Turn parts into results in this process: one thread reads ahead, `workers` threads share the loaded models.

What an earlier process may have died of (`flight_recorder.suspects`) is done in isolated processes."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

from img2parquet.batch import Batch, Embedded, Failed, Prepared, Work, split_into_batches
from img2parquet.inference.capabilities import Capabilities, probe_capabilities
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.isolation.isolated_steps import IsolatedReader, IsolatedSteps
from img2parquet.job import JobSpec
from img2parquet.read import Source
from img2parquet.runners.base import Result, ResultStream
from img2parquet.runners.thread_stages import stages_of_threads
from img2parquet.schema import Part
from img2parquet.telemetry import flight_recorder
from img2parquet.telemetry.logs import at_part, log_step
from img2parquet.telemetry.prometheus import Sink
from img2parquet.telemetry.stage_timing import IdleClock

SWITCH_INTERVAL_S = 5e-4


class LocalRunner:
    """Works in this process: every thread shares one copy of the models."""

    def start(self, job: JobSpec, address: str | None = None) -> Capabilities:
        """Return what this process can do. There is no cluster to join, so `address` is ignored."""
        return probe_capabilities(job)

    def stream(self, parts: Iterable[Part], work: Work) -> LocalStream:
        """Start to work on the parts, as `local_results` does."""
        return LocalStream(local_results(parts, work))

    def pools(self, work: Work) -> dict[str, int]:
        """Return the number of threads by what they do."""
        count = worker_count(work.job)
        if work.device == "cpu":
            return {"readers": 1, "workers": count}
        return {"readers": 1, "preparers": count, "models": 1}

    def metric_sinks(self) -> Sequence[Sink]:
        """Return none: the sinks of this process are all there is."""
        return ()


class LocalStream:
    """Results of this process's own threads. No other thread can end them, and there are none elsewhere to ask about.

    results: any generator of results."""

    can_abandon = False

    def __init__(self, results: Generator[Result]) -> None:
        self.results = results

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        return next(self.results)

    def close(self) -> None:
        self.results.close()

    def abandon(self) -> None:
        raise NotImplementedError("the threads of this process cannot be ended")

    def is_outgrown(self) -> bool:
        return False

    def is_shrunken(self) -> bool:
        return False

    def idle_workers(self) -> int:
        return 0

    def beside(self, parts: list[Part]) -> ResultStream:
        raise NotImplementedError("there is no other machine for a second stream")

    def where(self) -> str:
        """Name the stages that this process's threads are in."""
        return stages_of_threads()

    def stacks(self) -> str:
        """Return nothing: the driver logs the stacks of its own process anyway."""
        return ""


def worker_count(job: JobSpec) -> int:
    """Return `resources.workers`, or as many as this process has CPUs for."""
    wanted = job.resources.workers
    return max(1, len(os.sched_getaffinity(0)) // job.resources.threads_per_worker) if wanted == "auto" else wanted


def local_results(parts: Iterable[Part], work: Work) -> Generator[Result]:
    """Yield results in the order of their batches; at most three batches per worker are in memory at any time."""
    with closing(Step(work)) as step:
        yield from through(step, parts, work)


def through(step: Step, parts: Iterable[Part], work: Work) -> Iterator[Result]:
    """Yield results as `local_results` does, from models that are loaded already."""
    count = worker_count(work.job)
    waiting: deque[Future[Result] | Failed] = deque()
    with (
        _quick_turns(),
        _Reader(parts, work, depth=count) as batches,
        ThreadPoolExecutor(count, "img2parquet-worker") as pool,
    ):
        for batch in batches:
            waiting.append(batch if isinstance(batch, Failed) else pool.submit(step, batch))
            if len(waiting) >= 2 * count:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Shorten the interval at which threads take turns.

    A thread that returns from C code waits for Python's lock, up to one interval, while another runs Python code. A
    small image takes the lock a dozen times: at the usual 5 ms, two cores did a tenth less work."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Step:
    """Prepares and embeds a batch. The threads share the models; each has its own clock.

    The embedder times a GPU itself, and a thread that waits for the GPU counts as idle, as it does between batches."""

    def __init__(self, work: Work) -> None:
        self.suspects, self.threads = flight_recorder.suspects(), threading.local()
        self.prepare = Preparer(work)
        self.isolated = IsolatedSteps(work) if self.suspects else None
        log_step("Loading %s", ", ".join(work.cards))
        self.embed = None if self.suspects.everything else Embedder(work)
        self.pool = "workers" if work.device == "cpu" else "preparers"

    def __call__(self, batch: Batch) -> Result:
        idle: IdleClock = self.threads.__dict__.setdefault("idle", IdleClock())
        waited_s = idle.end()
        at_part(batch.part_index)
        prepared = self._prepared(batch)
        if self.pool == "preparers":
            idle.begin()
        result = self._embedded(prepared)
        if self.pool == "workers":
            idle.begin()
        return (
            replace(result, waited={**result.waited, self.pool: waited_s}) if isinstance(result, Embedded) else result
        )

    def _prepared(self, batch: Batch) -> Prepared:
        if self.isolated and self.suspects.decodes(batch.part_index):
            return self.isolated.prepare(batch)
        rows = self.suspects.rows_of(batch.part_index, (row.row for row in batch.rows))
        return self.isolated.prepare(batch, rows, self.prepare) if self.isolated and rows else self.prepare(batch)

    def _embedded(self, prepared: Prepared) -> Result:
        if self.embed is None or self.suspects.embeds(prepared.part_index, prepared.k):
            assert self.isolated
            return self.isolated.embed(prepared)
        return self.embed(prepared)

    def close(self) -> None:
        if self.isolated:
            self.isolated.close()


def _result(item: Future[Result] | Failed) -> Result:
    return item if isinstance(item, Failed) else item.result()


class _Reader:
    """Reads batches ahead on one thread. Closing it ends the thread; the thread's errors are raised to the consumer."""

    def __init__(self, parts: Iterable[Part], work: Work, depth: int) -> None:
        self.parts, self.work = parts, work
        self.queue: queue.Queue[Batch | Failed | BaseException | None] = queue.Queue(depth)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="img2parquet-reader", daemon=True)

    def __enter__(self) -> _Reader:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()

    def __iter__(self) -> Iterator[Batch | Failed]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _run(self) -> None:
        try:
            if self._put_all():
                self._put(None)
        except BaseException as error:
            self._put(error)

    def _put_all(self) -> bool:
        suspects, slot = flight_recorder.suspects(), flight_recorder.here()
        with closing(IsolatedReader(self.work)) as isolated:
            for part in self.parts:
                source: Source = isolated if suspects.reads_part(part.index) else self.work.job.input
                slot.begin(flight_recorder.READ, part.index)
                at_part(part.index)
                if not all(map(self._put, split_into_batches(source, part, self.work.batch_size, self.work.most_rows))):
                    return False
                slot.end()
        return True

    def _put(self, item: Batch | Failed | BaseException | None) -> bool:
        while not self.closed.is_set():
            try:
                self.queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
