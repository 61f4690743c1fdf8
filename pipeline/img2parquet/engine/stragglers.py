"""Decide when the last workers of a job are so slow that their parts should run on the idle ones too.

Once nothing is left to hand out, workers that have finished wait for those that have not: for a node that is slow, or
hangs. As soon as that has taken as long as doing the missing parts again would, those parts are started again on the
idle workers, and each batch is taken from whichever stream yields it first. So the end of a job costs at most about
twice its necessary time. Both runs of a batch give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from img2parquet.runners.base import Result
from img2parquet.telemetry.stage_timing import RETRY, StageTime

LEAST_S = 20.0  # a graph takes some seconds to start
PARTS = 2.0  # workers may idle for the time of this many parts: the others may have a few blocks queued


@dataclass
class StragglerDetector:
    """Watches the end of one stream. `busy_s` adds up all its batches, `idle_s` is how long some workers have had no
    work."""

    parts: int
    busy_s: float = 0.0
    idle_s: float = 0.0
    waited_s: float = 0.0

    def add(self, result: Result) -> None:
        self.busy_s += _seconds(result.spent)

    def update(self, idle_workers: int, waited_s: float) -> None:
        """Add to `idle_s` the time since the last call, if some workers are idle now.

        waited_s: how long the driver has waited for results in total; the time of its own work does not count."""
        self.idle_s = self.idle_s + waited_s - self.waited_s if idle_workers else 0.0
        self.waited_s = waited_s

    def is_too_long(self, left: int) -> bool:
        """Return whether workers have been idle for longer than doing the missing parts again would take.

        left: the number of unfinished parts. Always False before the first part is complete, since nobody knows until
        then how long one takes."""
        done = self.parts - left
        return done > 0 and self.idle_s > max(LEAST_S, PARTS * self.busy_s / done)


def _seconds(spent: Mapping[str, StageTime]) -> float:
    return sum(each.seconds for stage, each in spent.items() if not stage.startswith(RETRY))
