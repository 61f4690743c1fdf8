"""What Ray's workers do with a batch, and with what has killed one of them.

    Read        a task: parts to batches; a part that killed its task is read in a process apart the next time
    Step        an actor: prepares, embeds, or both; one that Ray had to start again does it in a process apart
    Attempts    an actor that counts how often each part's reading was begun

An image that takes too long ends its actor, as a crash does: by the process's own timer, so also while C code holds
Python's lock.
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

from pipeline import flight, stacks
from pipeline.allocator import keep_freed_memory
from pipeline.apart import Apart, ReadApart
from pipeline.batch import Batch, Embedded, Failed, Prepared, Work, cut
from pipeline.embed import Embedder, Preparer
from pipeline.logs import at_part, begin_worker
from pipeline.meter import Idle
from pipeline.read import Source
from pipeline.schema import Part

POOLS = {"both": "workers", "prepare": "preparers", "embed": "models"}  # names for the meter


class Attempts:
    """One for a graph. Begun is begun: who reads a part again need not know why."""

    def __init__(self) -> None:
        self.begun = Counter[int]()

    def begin(self, part_index: int) -> int:
        """How often it was begun, now included."""
        self.begun[part_index] += 1
        return self.begun[part_index]


class Read:
    """Parts to batches, one row each. A failed part travels on as a row of its own."""

    def __init__(self, work: ray.ObjectRef[Work], attempts: Any) -> None:
        self.work, self.attempts = work, attempts

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        work: Work = ray.get(self.work)
        keep_freed_memory()
        stacks.answer(job_name())
        begin_worker(work.log_as)
        with closing(ReadApart(work)) as apart:
            for payload in table.column("payload"):
                part: Part = pickle.loads(payload.as_buffer())
                at_part(part.index)
                source: Source = work.job.input if self._is_first(part) else apart
                for batch in cut(source, part, work.batch_size, work.most_rows):
                    yield row(batch)

    def _is_first(self, part: Part) -> bool:
        try:
            return bool(ray.get(self.attempts.begin.remote(part.index)) == 1)
        except ray.exceptions.RayActorError:  # lost with its node: we cannot know
            return False


class Step:
    """Lets failed parts through."""

    def __init__(self, what: str, work: ray.ObjectRef[Work] | Work) -> None:
        work = ray.get(work) if isinstance(work, ray.ObjectRef) else work
        begin_worker(work.log_as)
        self.prepare: Callable[[Batch], Prepared] | None = None
        self.embed: Callable[[Prepared], Embedded | Failed] | None = None
        self.pool, self.idle = POOLS[what], Idle()
        stacks.answer(job_name())
        apart = Apart(work) if _is_restarted() else None
        if not apart:
            _ends_when_late()
        if what in ("prepare", "both"):
            self.prepare = apart.prepare if apart else Preparer(work)
        if what in ("embed", "both"):
            self.embed = apart.embed if apart else Embedder(work)

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
    """Of the driver's job on this cluster, the same in all its processes."""
    return str(ray.get_runtime_context().get_job_id())


def row(item: object) -> pa.Table:
    """A block's only row: one whole item, pickled, so that blocks may be cut and merged. The pickle is not copied."""
    data = pickle.dumps(item, protocol=5)
    ends = pa.array([0, len(data)], pa.int64()).buffers()[1]
    return pa.table({"payload": pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(data)])})


def _is_restarted() -> bool:
    """Whether this actor took the place of one that died, of whatever it was."""
    context = ray.get_runtime_context()
    return bool(context.get_actor_id() and context.was_current_actor_reconstructed)


def _ends_when_late() -> None:
    faulthandler.register(signal.SIGALRM, file=2, chain=True)  # where it was, to the worker's log
    flight.use(flight.Alarms().slot)
