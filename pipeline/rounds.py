"""A runner's streams, one after another -> results, until every part is whole, nothing helps, or a signal came.

    Rounds    streams of what is left: again when workers hang, are lost, or could be more
    Pump      a stream -> its results, from a thread of its own: who waits for them can look at the clock and at signals

What a stream has given stays when the next one takes its place. Batches are numbered, and always the same, so that
one which comes a second time is known and dropped.
"""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Protocol, runtime_checkable

from pipeline.batch import Embedded, Failed, Work, WorkersLost
from pipeline.errors import JobFailed
from pipeline.schema import Part
from pipeline.signals import Signals
from pipeline.watch import LEFT_BEHIND, SHOWN_PARTS, Outstanding, Watch, told, where_threads_are

log = logging.getLogger(__name__)

TICK_S = 0.2
LOOK_S = 5.0  # between two looks at how many workers there could be
LEAVE_S = 5.0  # for a stream to end that is not wanted any more
Result = Embedded | Failed


class Ledger(Protocol):
    """Who takes the results, and knows what is missing. Parts are named by their index."""

    def undone(self) -> list[int]:
        """Those that are neither whole nor failed."""

    def begun(self) -> set[int]:
        """Those of which some batches came."""

    def outstanding(self, index: int) -> Outstanding: ...

    def stalled(self) -> None:
        """Called when nothing came for `resources.stall_s`."""


class Rounds:
    def __init__(self, runner: ModuleType, work: Work, signals: Signals, ledger: Ledger, watch: Watch) -> None:
        self.runner, self.work, self.signals, self.ledger, self.watch = runner, work, signals, ledger, watch
        self.cpu_s = 0.0  # of the threads that took results
        self.finishing: set[int] | None = None  # once a signal came: the parts that may still become whole

    def results(self, parts: Mapping[int, Part]) -> Iterator[Result]:
        """Raises JobFailed when workers hang that cannot be replaced, or when that does not help."""
        while left := self.ledger.undone():
            handed_out = (parts[index] for index in left if self.signals.came is None)
            pump = Pump(self.runner.stream(handed_out, self.work))
            try:
                why = yield from self._taken(pump)
            except WorkersLost as error:
                why = str(error)
            finally:
                pump.close()
            if self.signals.came:
                return
            left = self.ledger.undone()
            if left and why != OUTGROWN and not self.watch.again(why, len(left)):
                raise self._failure(why)

    def _taken(self, pump: Pump) -> Generator[Result, None, str]:
        """One stream's results; why it has ended. Raises WorkersLost, or JobFailed, when nothing comes any more."""
        has_begun, cpu_s, looked = False, self.cpu_s, time.monotonic()
        self.watch.begin()
        while not self._is_over():
            result = pump.get(TICK_S)
            if isinstance(result, Ended):
                break
            if result is not None:
                has_begun, self.cpu_s = True, cpu_s + pump.cpu_s
                yield result
                self.watch.begin()
            elif self.watch.is_stalled():
                where = pump.where() + ("" if has_begun else ", or its start")
                why = self.watch.tell(*self._shown(), where)
                self.ledger.stalled()
                raise WorkersLost(why) if pump.can_abandon else self._failure(why)
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if self.signals.came is None and self._has_untouched() and pump.is_outgrown():
                    log.warning("%s: the parts that are not whole begin anew", OUTGROWN)
                    return OUTGROWN
        return "the workers ended before their parts did"

    def _is_over(self) -> bool:
        """After a signal: when what was begun is whole, or half of the grace is over; the other half is for commits."""
        came = self.signals.came
        if came is None:
            return False
        half_s = self.work.job.resources.grace_s / 2
        if self.finishing is None:
            self.finishing = self.ledger.begun()
            log.warning("%s: the %d parts that are begun have %.0f s to end; the same again ends at once",
                        came.name, len(self.finishing), half_s)  # fmt: skip
        return self.finishing.isdisjoint(self.ledger.begun()) or time.monotonic() > self.signals.came_at + half_s

    def _has_untouched(self) -> bool:
        return len(self.ledger.undone()) > len(self.ledger.begun())

    def _shown(self) -> tuple[list[Outstanding], int]:
        """A few of the parts that are left, begun ones first: what the others wait for; and how many are left."""
        left, begun = self.ledger.undone(), self.ledger.begun()
        shown = heapq.nsmallest(SHOWN_PARTS, left, key=lambda index: (index not in begun, index))
        return [self.ledger.outstanding(index) for index in shown], len(left)

    def _failure(self, why: str) -> JobFailed:
        return JobFailed(f"{why}\n{told(*self._shown())}", hint="what is committed stays; run the same command again")


OUTGROWN = "there are more workers now"


@runtime_checkable
class Abandonable(Protocol):
    """A stream that can be ended from another thread, with everything that works for it: its parts can run again."""

    def abandon(self) -> None: ...

    def at_work(self) -> Mapping[str, int]:
        """Tasks under way by stage, as far as it knows."""

    def is_outgrown(self) -> bool:
        """Whether a new stream of the same parts would have more workers."""


class Ended:
    """What comes after the last result."""


class Pump:
    """At most one result waits in it. Errors of the stream are raised where results are taken."""

    def __init__(self, stream: Iterator[Result]) -> None:
        self.stream, self.cpu_s = stream, 0.0
        self.queue: queue.Queue[Result | Ended | BaseException] = queue.Queue(1)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="img2parquet-results", daemon=True)
        self.thread.start()

    def get(self, timeout_s: float) -> Result | Ended | None:
        """The next result; None where none came in time. Raises what the stream raised."""
        try:
            item = self.queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    @property
    def can_abandon(self) -> bool:
        return isinstance(self.stream, Abandonable)

    def is_outgrown(self) -> bool:
        return isinstance(self.stream, Abandonable) and self.stream.is_outgrown()

    def where(self) -> str:
        """Where the work hangs: from what the stream knows of its tasks, or from where our own threads are."""
        if not isinstance(self.stream, Abandonable):
            return where_threads_are()
        tasks = ", ".join(f"{stage} ({count} under way)" for stage, count in self.stream.at_work().items() if count)
        return tasks or "the runner, which has no task under way"

    def close(self) -> None:
        """End the stream; what it still gives is dropped. Returns after LEAVE_S also where a worker does not end."""
        self.closed.set()
        ending = threading.Thread(target=self._end, name="img2parquet-ending", daemon=True)
        ending.start()
        ending.join(LEAVE_S)
        LEFT_BEHIND.append(ending.is_alive)

    def _end(self) -> None:
        if isinstance(self.stream, Abandonable) and self.thread.is_alive():
            self.stream.abandon()
        self.thread.join()

    def _run(self) -> None:
        last: Ended | BaseException = Ended()
        try:
            while not self.closed.is_set() and (result := next(self.stream, None)) is not None:
                self.cpu_s = time.thread_time()
                self._put(result)
        except BaseException as error:
            last = error
        close = getattr(self.stream, "close", None)  # a generator's: here, in the thread that runs it
        if close:
            close()
        self._put(last)

    def _put(self, item: Result | Ended | BaseException) -> None:
        while not self.closed.is_set():
            with suppress(queue.Full):
                self.queue.put(item, timeout=TICK_S)
                return
