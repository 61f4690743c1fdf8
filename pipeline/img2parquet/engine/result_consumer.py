"""Consume a runner's results on a background thread, so that the driver can watch the clock and listen for signals.

A consumer may get a helper: a second stream of the parts that the first one has not finished, whose results arrive in
the same queue.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress

from img2parquet.engine.stall_detector import LEFT_BEHIND, MAX_TICK_S
from img2parquet.runners.base import Result, ResultStream
from img2parquet.schema import Part

log = logging.getLogger(__name__)

TICK_S = 0.2
CLOSE_S = 5.0  # how long a stream that is no longer wanted may take to end


class StreamEnd:
    """Marks the end of a stream in the queue, after its last result."""


class ResultConsumer:
    """Holds at most one result at a time, so the stream goes no faster than its results are used.

    helped: the consumer that takes this one's results. How the helper itself ends, well or badly, then does not matter.
    """

    def __init__(self, stream: ResultStream, helped: ResultConsumer | None = None) -> None:
        self.stream, self.cpu_s, self.waited_s, self.is_helper = stream, 0.0, 0.0, helped is not None
        self.queue: queue.Queue[Result | StreamEnd | BaseException] = helped.queue if helped else queue.Queue(1)
        self.helper: ResultConsumer | None = None
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="img2parquet-results", daemon=True)
        self.thread.start()

    def get(self, timeout_s: float) -> Result | StreamEnd | None:
        """Return the next result, or None when none arrives in time. Raises what the stream raised."""
        since = time.monotonic()
        try:
            item = self.queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        finally:
            self.waited_s += min(time.monotonic() - since, MAX_TICK_S)  # this process itself may have been stopped
        if isinstance(item, BaseException):
            raise item
        return item

    def help(self, parts: list[Part]) -> None:
        """Run these parts a second time, on the stream's idle workers; results come from both streams."""
        self.helper = ResultConsumer(self.stream.beside(parts), self)

    def close(self) -> None:
        """End the stream and drop what it still yields. Returns after CLOSE_S even when a worker does not end."""
        if self.helper:
            self.helper.close()
        self.closed.set()
        ending = threading.Thread(target=self._end, name="img2parquet-ending", daemon=True)
        ending.start()
        ending.join(CLOSE_S)
        LEFT_BEHIND.append(ending.is_alive)

    def _end(self) -> None:
        if self.stream.can_abandon and self.thread.is_alive():
            self.stream.abandon()
        self.thread.join()

    def _run(self) -> None:
        last: StreamEnd | BaseException = StreamEnd()
        try:
            while not self.closed.is_set() and (result := next(self.stream, None)) is not None:
                self.cpu_s = time.thread_time()
                self._put(result)
        except BaseException as error:
            last = error
        self.stream.close()  # here, on the thread that ran it: it may be a generator
        if not self.is_helper:
            self._put(last)
        elif isinstance(last, BaseException) and not self.closed.is_set():
            log.warning("the second run of the slow parts has failed: %s", last)

    def _put(self, item: Result | StreamEnd | BaseException) -> None:
        while not self.closed.is_set():
            with suppress(queue.Full):
                self.queue.put(item, timeout=TICK_S)
                return
