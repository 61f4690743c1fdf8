"""Re-run unfinished parts until all are done, retrying no longer helps, or a signal asks to stop.

A new stream of the unfinished parts replaces the last one when workers hang or are lost, or when the cluster has become
larger. At the end of a stream a second one may run beside it, for parts whose workers are too slow.

Results of an earlier stream are kept. The batches of a part are numbered and always the same, so one that arrives a
second time is recognized and dropped.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from signal import SIGINT
from typing import Protocol

from img2parquet.batch import Work
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.engine.result_consumer import TICK_S, ResultConsumer, StreamEnd
from img2parquet.engine.stall_detector import SHOWN_PARTS, StallDetector, UnfinishedPart, list_unfinished
from img2parquet.engine.stragglers import StragglerDetector
from img2parquet.errors import JobFailed
from img2parquet.runners.base import Result, ResultStream, Runner, WorkersLost
from img2parquet.schema import Part

log = logging.getLogger(__name__)

CHECK_S = 5.0  # between two checks of how many workers there could be, and how many are idle
QUIET_S = 30.0  # without a result, before a smaller cluster counts as one that has lost workers for good
OUTGROWN = "the cluster has room for more workers now"
SHRUNKEN = "the cluster no longer has room for all workers, and those that are left send nothing"


class PartTracker(Protocol):
    """Knows which parts are missing. Parts are named by their index."""

    def unfinished(self) -> list[int]:
        """Return the parts that are neither complete nor failed."""

    def started(self) -> set[int]:
        """Return the unfinished parts that some batches have arrived of."""

    def describe(self, index: int) -> UnfinishedPart:
        """Return what is missing of an unfinished part."""


class Scheduler:
    """Streams unfinished parts through a runner until none is left.

    on_stall: called after a stall has been reported, before anything is run again."""

    def __init__(
        self,
        runner: Runner,
        work: Work,
        signals: StopSignals,
        parts: PartTracker,
        stall_detector: StallDetector,
        on_stall: Callable[[], object],
    ) -> None:
        self.runner, self.work, self.signals, self.parts = runner, work, signals, parts
        self.stall_detector, self.on_stall = stall_detector, on_stall
        self.cpu_s = 0.0  # of the threads that consumed results
        self.finishing: set[int] | None = None  # after a signal: the parts that may still be completed

    def results(self, parts: Mapping[int, Part]) -> Iterator[Result]:
        """Yield results until no part is left. Raises JobFailed when workers hang that cannot be replaced, or when
        replacing them does not help."""
        while left := self.parts.unfinished():
            handed_out = (parts[index] for index in left if self.signals.received is None)
            consumer = ResultConsumer(self.runner.stream(handed_out, self.work))
            try:
                why = yield from self._consume(consumer, parts)
            except WorkersLost as error:
                why = str(error)
            finally:
                consumer.close()
            if self.signals.received:
                return
            left = self.parts.unfinished()
            if left and why not in (OUTGROWN, SHRUNKEN) and not self.stall_detector.may_rerun(why, len(left)):
                raise self._failure(why)

    def _consume(self, consumer: ResultConsumer, parts: Mapping[int, Part]) -> Generator[Result, None, str]:
        """Yield the results of one stream and return why it has ended. Raises WorkersLost or JobFailed on a stall."""
        has_started, cpu_s, checked_at = False, self.cpu_s, time.monotonic()
        stragglers = StragglerDetector(len(self.parts.unfinished()))
        self.stall_detector.reset()
        while not self._is_over():
            result = consumer.get(TICK_S)
            if isinstance(result, StreamEnd) or (consumer.helper and not self.parts.unfinished()):
                break
            if result is not None:
                has_started, self.cpu_s = True, cpu_s + consumer.cpu_s
                stragglers.add(result)
                yield result
                self.stall_detector.reset()
            elif self.stall_detector.is_stalled():
                raise self._stall(consumer.stream, has_started)
            if time.monotonic() - checked_at > CHECK_S and self.signals.received is None:
                checked_at = time.monotonic()
                if why := self._why_restart(consumer.stream):
                    log.warning("%s: starting the incomplete parts again", why)
                    return why
                self._help(consumer, stragglers, parts)
        return "the workers stopped before their parts were done"

    def _stall(self, stream: ResultStream, has_started: bool) -> WorkersLost | JobFailed:
        """Report a stall. Return WorkersLost where the workers can be replaced."""
        where = stream.where() + ("" if has_started else ", or its start")
        why = self.stall_detector.report_stall(*self._shown(), where, stream.stacks())
        self.on_stall()
        return WorkersLost(why) if stream.can_abandon else self._failure(why)

    def _help(self, consumer: ResultConsumer, stragglers: StragglerDetector, parts: Mapping[int, Part]) -> None:
        """At the end of a stream, let idle workers too do what others take too long for."""
        stragglers.update(consumer.stream.idle_workers(), consumer.waited_s)
        left = self.parts.unfinished()
        if left and not consumer.helper and stragglers.is_too_long(len(left)):
            self.stall_detector.report_stragglers(*self._shown(), stragglers.idle_s, consumer.stream.stacks())
            consumer.help([parts[index] for index in left])

    def _why_restart(self, stream: ResultStream) -> str:
        """Return why a stream of as many workers as there could be now would be better; empty where it would not."""
        if self._has_untouched() and stream.is_outgrown():
            return OUTGROWN
        return SHRUNKEN if self.stall_detector.waited_s > QUIET_S and stream.is_shrunken() else ""

    def _is_over(self) -> bool:
        """After a signal, return whether the parts that had started are complete, or half of the grace period is over.

        The other half is for commits."""
        received = self.signals.received
        if received is None:
            return False
        half_s = self.work.job.resources.grace_s / 2
        if self.finishing is None:
            self.finishing = self.parts.started()
            again = "press Ctrl-C again" if received == SIGINT else f"send {received.name} again"
            log.warning("%s: finishing the %d parts in progress, for at most %.0f s; %s to quit immediately",
                        received.name, len(self.finishing), half_s, again)  # fmt: skip
        return self.finishing.isdisjoint(self.parts.started()) or time.monotonic() > self.signals.received_at + half_s

    def _has_untouched(self) -> bool:
        return len(self.parts.unfinished()) > len(self.parts.started())

    def _shown(self) -> tuple[list[UnfinishedPart], int]:
        """Choose a few unfinished parts to show, started ones first since the others wait for them, and count all."""
        left, started = self.parts.unfinished(), self.parts.started()
        shown = heapq.nsmallest(SHOWN_PARTS, left, key=lambda index: (index not in started, index))
        return [self.parts.describe(index) for index in shown], len(left)

    def _failure(self, why: str) -> JobFailed:
        return JobFailed(
            f"{why}\n{list_unfinished(*self._shown())}",
            hint="committed parts are kept; run the same command again to resume",
        )
