"""A stream of results, taken by a thread of its own: who waits for them can look at the clock and at signals.

Abandonable    what a stream says of its workers, and how it is ended, where they are elsewhere
Pump           a stream -> its results; perhaps with a second one beside it, of what the first has not given yet
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Protocol, runtime_checkable

from pipeline.batch import Embedded, Failed
from pipeline.schema import Part
from pipeline.watch import LEFT_BEHIND, MOST_TICK_S, where_threads_are

log = logging.getLogger(__name__)

TICK_S = 0.2
LEAVE_S = 5.0  # for a stream to end that is not wanted any more
Result = Embedded | Failed


@runtime_checkable
class Abandonable(Protocol):
    """A stream that can be ended from another thread, with everything that works for it: its parts can run again."""

    def abandon(self) -> None: ...

    def at_work(self) -> Mapping[str, int]:
        """Tasks under way by stage, as far as it knows."""

    def is_outgrown(self) -> bool:
        """Whether a new stream of the same parts would have more workers."""

    def is_shrunken(self) -> bool:
        """Whether it has lost workers that cannot be replaced: the cluster has no room for them."""

    def idle_workers(self) -> int:
        """Workers without a task and with none to come, while others have some; 0 where that is not known."""

    def beside(self, parts: list[Part]) -> Iterator[Result]:
        """Another such stream, on the idle workers' machines."""

    def stacks(self) -> str:
        """Where its workers' threads are, in lines."""


class Ended:
    """What comes after the last result."""


class Pump:
    """At most one result waits in it. Errors of the stream are raised where results are taken.

    `helped`: another one that takes this one's results; this one's end, good or bad, is then nobody's concern."""

    def __init__(self, stream: Iterator[Result], helped: Pump | None = None) -> None:
        self.stream, self.cpu_s, self.waited_s, self.is_helper = stream, 0.0, 0.0, helped is not None
        self.queue: queue.Queue[Result | Ended | BaseException] = helped.queue if helped else queue.Queue(1)
        self.helper: Pump | None = None
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="img2parquet-results", daemon=True)
        self.thread.start()

    def get(self, timeout_s: float) -> Result | Ended | None:
        """The next result; None where none came in time. Raises what the stream raised."""
        since = time.monotonic()
        try:
            item = self.queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        finally:
            self.waited_s += min(time.monotonic() - since, MOST_TICK_S)  # no more where this process was stopped
        if isinstance(item, BaseException):
            raise item
        return item

    @property
    def can_abandon(self) -> bool:
        return isinstance(self.stream, Abandonable)

    def is_outgrown(self) -> bool:
        return isinstance(self.stream, Abandonable) and self.stream.is_outgrown()

    def is_shrunken(self) -> bool:
        return isinstance(self.stream, Abandonable) and self.stream.is_shrunken()

    def idle_workers(self) -> int:
        return self.stream.idle_workers() if isinstance(self.stream, Abandonable) else 0

    def help(self, parts: list[Part]) -> None:
        """The same parts beside, on workers that are idle; results come from both."""
        assert isinstance(self.stream, Abandonable)
        self.helper = Pump(self.stream.beside(parts), self)

    def stacks(self) -> str:
        return self.stream.stacks() if isinstance(self.stream, Abandonable) else ""

    def where(self) -> str:
        """Where the work hangs: from what the stream knows of its tasks, or from where our own threads are."""
        if not isinstance(self.stream, Abandonable):
            return where_threads_are()
        tasks = ", ".join(f"{stage} ({count} under way)" for stage, count in self.stream.at_work().items() if count)
        return tasks or "the runner, which has no task under way"

    def close(self) -> None:
        """End the stream; what it still gives is dropped. Returns after LEAVE_S also where a worker does not end."""
        if self.helper:
            self.helper.close()
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
        if not self.is_helper:
            self._put(last)
        elif isinstance(last, BaseException) and not self.closed.is_set():
            log.warning("the second run of what was slow has ended: %s", last)

    def _put(self, item: Result | Ended | BaseException) -> None:
        while not self.closed.is_set():
            with suppress(queue.Full):
                self.queue.put(item, timeout=TICK_S)
                return
