"""Parts to results in this process: one thread reads ahead, `workers` threads share the loaded models.

What an earlier process may have died of (`flight.suspects`) is done in processes apart."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

from pipeline import flight
from pipeline.apart import Apart, ReadApart
from pipeline.batch import Batch, Embedded, Failed, Prepared, Work, cut
from pipeline.embed import Embedder, Preparer
from pipeline.job import JobSpec
from pipeline.logs import at_part
from pipeline.meter import Idle
from pipeline.probe import Probe, probe
from pipeline.read import Source
from pipeline.schema import Part

SWITCH_INTERVAL_S = 5e-4


def start(job: JobSpec) -> Probe:
    """What this process can do."""
    return probe(job)


def workers(job: JobSpec) -> int:
    wanted = job.resources.workers
    return max(1, len(os.sched_getaffinity(0)) // job.resources.threads_per_worker) if wanted == "auto" else wanted


def pools(work: Work) -> dict[str, int]:
    """How many work at once, by what they do: for the meter."""
    count = workers(work.job)
    return {"readers": 1, "workers": count} if work.device == "cpu" else {"readers": 1, "preparers": count, "models": 1}


def stream(parts: Iterable[Part], work: Work) -> Iterator[Embedded | Failed]:
    """Results in the order of their batches; at most three batches per worker are in memory at any time."""
    with closing(Step(work)) as step:
        yield from through(step, parts, work)


def through(step: Step, parts: Iterable[Part], work: Work) -> Iterator[Embedded | Failed]:
    """The same, through models that are loaded already."""
    count = workers(work.job)
    waiting: deque[Future[Embedded | Failed] | Failed] = deque()
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
    """Threads that come back from C code wait for Python's lock up to one interval while another runs Python code. Of
    small images each passes it a dozen times: at the usual 5 ms two cores did a tenth less."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Step:
    """A batch prepared and embedded. The threads share the models; each has its own clock.

    A GPU has its clock itself, and a thread that waits for it waits as it does for its next batch."""

    def __init__(self, work: Work) -> None:
        self.suspects, self.threads = flight.suspects(), threading.local()
        self.prepare = Preparer(work)
        self.apart = Apart(work) if self.suspects else None
        self.embed = None if self.suspects.everything else Embedder(work)
        self.pool = "workers" if work.device == "cpu" else "preparers"

    def __call__(self, batch: Batch) -> Embedded | Failed:
        idle: Idle = self.threads.__dict__.setdefault("idle", Idle())
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
        if self.apart and self.suspects.decodes(batch.part_index):
            return self.apart.prepare(batch)
        rows = self.suspects.rows_of(batch.part_index, (row.row for row in batch.rows))
        return self.apart.prepare(batch, rows, self.prepare) if self.apart and rows else self.prepare(batch)

    def _embedded(self, prepared: Prepared) -> Embedded | Failed:
        if self.embed is None or self.suspects.embeds(prepared.part_index, prepared.k):
            assert self.apart
            return self.apart.embed(prepared)
        return self.embed(prepared)

    def close(self) -> None:
        if self.apart:
            self.apart.close()


def _result(item: Future[Embedded | Failed] | Failed) -> Embedded | Failed:
    return item if isinstance(item, Failed) else item.result()


class _Reader:
    """Batches read ahead by one thread. Closing it ends the thread; an error in it is raised to the consumer."""

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
        suspects, slot = flight.suspects(), flight.here()
        with closing(ReadApart(self.work)) as apart:
            for part in self.parts:
                source: Source = apart if suspects.reads_part(part.index) else self.work.job.input
                slot.begin(flight.READ, part.index)
                at_part(part.index)
                if not all(map(self._put, cut(source, part, self.work.batch_size, self.work.most_rows))):
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
