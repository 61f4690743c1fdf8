"""A runner's streams, one after another -> results, until every part is whole, nothing helps, or a signal came.

    Rounds    streams of what is left: again when workers hang, are lost, or could be more; at its end a second one
              beside the first, where some workers wait for others that are too slow

What a stream has given stays when the next one takes its place. Batches are numbered, and always the same, so that
one which comes a second time is known and dropped.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from types import ModuleType
from typing import Protocol

from pipeline.batch import Work, WorkersLost
from pipeline.errors import JobFailed
from pipeline.pump import TICK_S, Ended, Pump, Result
from pipeline.schema import Part
from pipeline.signals import Signals
from pipeline.stragglers import Tail
from pipeline.watch import SHOWN_PARTS, Outstanding, Watch, told

log = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks at how many workers there could be, and at how many have nothing to do
QUIET_S = 30.0  # without a result, where a smaller cluster has lost workers for good


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
                why = yield from self._taken(pump, parts)
            except WorkersLost as error:
                why = str(error)
            finally:
                pump.close()
            if self.signals.came:
                return
            left = self.ledger.undone()
            if left and why not in (OUTGROWN, SHRUNKEN) and not self.watch.again(why, len(left)):
                raise self._failure(why)

    def _taken(self, pump: Pump, parts: Mapping[int, Part]) -> Generator[Result, None, str]:
        """One stream's results; why it has ended. Raises WorkersLost, or JobFailed, when nothing comes any more."""
        has_begun, cpu_s, looked, tail = False, self.cpu_s, time.monotonic(), Tail(len(self.ledger.undone()))
        self.watch.begin()
        while not self._is_over():
            result = pump.get(TICK_S)
            if isinstance(result, Ended) or (pump.helper and not self.ledger.undone()):
                break
            if result is not None:
                has_begun, self.cpu_s = True, cpu_s + pump.cpu_s
                tail.came(result)
                yield result
                self.watch.begin()
            elif self.watch.is_stalled():
                where = pump.where() + ("" if has_begun else ", or its start")
                why = self.watch.tell(*self._shown(), where, pump.stacks())
                self.ledger.stalled()
                raise WorkersLost(why) if pump.can_abandon else self._failure(why)
            if time.monotonic() - looked > LOOK_S and self.signals.came is None:
                looked = time.monotonic()
                if why := self._misfit(pump):
                    log.warning("%s: the parts that are not whole begin anew", why)
                    return why
                self._help(pump, tail, parts)
        return "the workers ended before their parts did"

    def _help(self, pump: Pump, tail: Tail, parts: Mapping[int, Part]) -> None:
        """At the end of a stream: what some workers do for too long, done by those too that wait for them."""
        tail.look(pump.idle_workers(), pump.waited_s)
        left = self.ledger.undone()
        if left and not pump.helper and tail.is_too_long(len(left)):
            self.watch.straggle(*self._shown(), tail.idle_s, pump.stacks())
            pump.help([parts[index] for index in left])

    def _misfit(self, pump: Pump) -> str:
        """Why a stream of the workers that there could be now would be better; `` where it would not."""
        if self._has_untouched() and pump.is_outgrown():
            return OUTGROWN
        return SHRUNKEN if self.watch.waited_s > QUIET_S and pump.is_shrunken() else ""

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
SHRUNKEN = "there is no room any more for all workers, and nothing comes from those that are left"
