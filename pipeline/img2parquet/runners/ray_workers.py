"""Read, prepare and embed in Ray's workers, and isolate what has killed one of them.

    Read        a task that reads parts into batches; a part that killed its task is read in a child process next time
    Step        an actor that prepares, embeds, or both; one that Ray had to restart works in a child process
    Attempts    an actor that counts how often each part was read

An image that takes too long ends its actor as a crash does. The process's own timer sees to it, so this works while C
code holds Python's lock, too.
"""

from __future__ import annotations

import faulthandler
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from img2parquet.batch import Batch, Embedded, Failed, Prepared, Work, split_into_batches
from img2parquet.inference.allocator import keep_freed_memory
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.isolation.isolated_steps import IsolatedReader, IsolatedSteps
from img2parquet.read import Source
from img2parquet.schema import Part
from img2parquet.telemetry import flight_recorder, stack_dumps
from img2parquet.telemetry.logs import at_part, begin_worker
from img2parquet.telemetry.stage_timing import IdleClock

POOLS = {"both": "workers", "prepare": "preparers", "embed": "models"}  # as the meter names them


class Attempts:
    """Counts read attempts per part, for one graph. An attempt counts whatever became of it."""

    def __init__(self) -> None:
        self.started = Counter[int]()

    def start(self, part_index: int) -> int:
        """Count one more attempt, and return how many there were."""
        self.started[part_index] += 1
        return self.started[part_index]


class Read:
    """Turns parts into batches, one per row. A failed part is passed on as a row of its own."""

    def __init__(self, work: ray.ObjectRef[Work], attempts: Any) -> None:
        self.work, self.attempts = work, attempts

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        work: Work = ray.get(self.work)
        keep_freed_memory()
        stack_dumps.answer(job_name())
        begin_worker(work.log_as)
        with closing(IsolatedReader(work)) as isolated:
            for payload in table.column("payload"):
                part: Part = pickle.loads(payload.as_buffer())
                at_part(part.index)
                source: Source = work.job.input if self._is_first(part) else isolated
                for batch in split_into_batches(source, part, work.batch_size, work.most_rows):
                    yield row(batch)

    def _is_first(self, part: Part) -> bool:
        try:
            return bool(ray.get(self.attempts.start.remote(part.index)) == 1)
        except ray.exceptions.RayActorError:  # it was lost with its node: we cannot know
            return False


class Step:
    """Prepares batches, embeds them, or both. Failed parts are passed on."""

    def __init__(self, what: str, work: ray.ObjectRef[Work] | Work) -> None:
        work = ray.get(work) if isinstance(work, ray.ObjectRef) else work
        begin_worker(work.log_as)
        self.prepare: Callable[[Batch], Prepared] | None = None
        self.embed: Callable[[Prepared], Embedded | Failed] | None = None
        self.pool, self.idle = POOLS[what], IdleClock()
        stack_dumps.answer(job_name())
        isolated = IsolatedSteps(work) if _is_restarted() else None
        if not isolated:
            _die_when_late()
        if what in ("prepare", "both"):
            self.prepare = isolated.prepare if isolated else Preparer(work)
        if what in ("embed", "both"):
            self.embed = isolated.embed if isolated else Embedder(work)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for payload in table.column("payload"):
            yield row(self._one(pickle.loads(payload.as_buffer())))

    def _one(self, item: Any) -> Prepared | Embedded | Failed:
        if isinstance(item, Failed):
            return item
        waited_s = self.idle.end()
        at_part(item.part_index)
        prepared = self.prepare(item) if self.prepare else item
        result = self.embed(prepared) if self.embed else prepared
        self.idle.begin()
        return result if isinstance(result, Failed) else replace(result, waited={self.pool: waited_s, **result.waited})


def job_name() -> str:
    """Return the id of the driver's job on this cluster, which is the same in all its processes."""
    return str(ray.get_runtime_context().get_job_id())


def row(item: object) -> pa.Table:
    """Make a table of one row, the pickled item, so that Ray may split and merge blocks. The pickle is not copied."""
    data = pickle.dumps(item, protocol=5)
    ends = pa.array([0, len(data)], pa.int64()).buffers()[1]
    return pa.table({"payload": pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(data)])})


def _is_restarted() -> bool:
    """Return whether this actor replaces one that died, whatever the cause."""
    context = ray.get_runtime_context()
    return bool(context.get_actor_id() and context.was_current_actor_reconstructed)


def _die_when_late() -> None:
    faulthandler.register(signal.SIGALRM, file=2, chain=True)  # writes the stack to the worker's log
    flight_recorder.use(flight_recorder.Alarms().slot)
