"""What came of a stream, and how long some of its workers have had nothing to do -> whether the others are too slow.

Once nothing is left to hand out, whoever has ended waits for whoever has not: a node that is slow, or hangs. As soon as
that has taken as long as doing the missing parts again would, they are begun again on the workers that wait, and each
batch is taken from whichever gives it first. So a job's end costs at most about twice what it could, and two runs of a
batch are the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.batch import Embedded, Failed
from pipeline.meter import RETRY, Spent

LEAST_S = 20.0  # a graph takes some seconds to start
PARTS = 2.0  # so many parts' time: a worker may have a few blocks in its queue


@dataclass
class Tail:
    """The end of one stream: `busy_s` of all batches that came, `idle_s` that workers have been without any to do."""

    parts: int
    busy_s: float = 0.0
    idle_s: float = 0.0
    waited_s: float = 0.0

    def came(self, result: Embedded | Failed) -> None:
        self.busy_s += _seconds(result.spent)

    def look(self, idle_workers: int, waited_s: float) -> None:
        """waited_s: that the driver has waited for results in all; what it did itself is nobody's delay."""
        self.idle_s = self.idle_s + waited_s - self.waited_s if idle_workers else 0.0
        self.waited_s = waited_s

    def is_too_long(self, left: int) -> bool:
        """left: parts that are not whole. While none is, nobody knows how long one takes."""
        done = self.parts - left
        return done > 0 and self.idle_s > max(LEAST_S, PARTS * self.busy_s / done)


def _seconds(spent: Mapping[str, Spent]) -> float:
    return sum(each.seconds for stage, each in spent.items() if not stage.startswith(RETRY))
