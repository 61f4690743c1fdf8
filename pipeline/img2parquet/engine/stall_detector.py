"""Detect that no batch has arrived for too long, and report which parts are unfinished and where the work hangs."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from img2parquet.runners.thread_stages import running_threads

log = logging.getLogger(__name__)

RERUNS = 2  # without a new batch between them
MAX_TICK_S = 2.0  # a longer time between two checks was one in which this process itself was stopped
LEFT_BEHIND: list[Callable[[], bool]] = []  # return whether a thread hangs, which would hang the interpreter's exit too
SHOWN_PARTS, SHOWN_FRAMES = 5, 8


@dataclass(frozen=True)
class UnfinishedPart:
    """A part that is neither complete nor failed. `missing_k` is its first missing batch, `since_s` the age of the last
    one received."""

    index: int
    batches: int
    missing_k: int
    since_s: float

    def __str__(self) -> str:
        received = (
            f"{self.batches} batches received, the last {self.since_s:.0f} s ago" if self.batches else "none received"
        )
        return f"part {self.index}: batch {self.missing_k} is missing; {received}"


class StallDetector:
    """Measures how long the driver of one session has waited for a batch; every batch resets it.

    Each rerun after a stall doubles the limit: otherwise workers that are merely slow to start would never get to
    their first batch."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s, self.waited_s, self.checked_at = stall_s, 0.0, time.monotonic()
        self.reruns, self.reported = 0, ""
        self.stalls: list[dict[str, object]] = []  # for the meter
        self.stragglers: list[dict[str, object]] = []

    def reset(self) -> None:
        self.waited_s, self.checked_at = 0.0, time.monotonic()

    def progress(self) -> None:
        """Note that a new batch has arrived."""
        self.reruns = 0

    def is_stalled(self) -> bool:
        """Return whether no batch has arrived for too long. Call this at every tick.

        Time in which this process was stopped does not count, beyond MAX_TICK_S."""
        now = time.monotonic()
        self.waited_s, self.checked_at = self.waited_s + min(now - self.checked_at, MAX_TICK_S), now
        return self.waited_s > self.stall_s * (1 << self.reruns)

    def report_stall(self, shown: Sequence[UnfinishedPart], left: int, where: str, workers: str = "") -> str:
        """Log the unfinished parts, and the stacks of our threads and of the workers. Return a summary in one line."""
        line = (
            f"no batch arrived for {self.waited_s:.0f} s (resources.stall_s: {self.stall_s:g}); {left} parts are "
            f"incomplete; the work probably hangs in: {where}"
        )
        self.stalls.append({"waited_s": round(self.waited_s), "where": where, "parts": left})
        log.warning(
            "%s\n%s\nthreads of the driver:\n%s%s", line, list_unfinished(shown, left), stacks(), _section(workers)
        )
        self.reported = line
        return line

    def report_stragglers(self, shown: Sequence[UnfinishedPart], left: int, idle_s: float, workers: str) -> None:
        """Log that the last parts keep other workers idle and are run there too, and what their own workers do."""
        self.stragglers.append({"waited_s": round(idle_s), "parts": left})
        log.warning(
            "some workers have been idle for %.0f s: the %d remaining parts run on them too\n%s%s",
            idle_s, left, list_unfinished(shown, left), _section(workers),
        )  # fmt: skip

    def may_rerun(self, why: str, left: int) -> bool:
        """Count one more rerun of the remaining parts; False after RERUNS of them without a single new batch."""
        self.reruns += 1
        if self.reruns > RERUNS:
            return False
        if why != self.reported:
            log.warning("%s", why)
        log.warning("running %d parts again with new workers (attempt %d of %d)", left, self.reruns, RERUNS)
        return True


def list_unfinished(shown: Sequence[UnfinishedPart], left: int) -> str:
    """Describe the shown parts, a line each, and say how many more are left."""
    more = f"\n  and {left - len(shown)} more" if left > len(shown) else ""
    return "\n".join(f"  {part}" for part in shown) + more


def stacks() -> str:
    """List every thread of this process with its innermost frames: files, lines and functions, but no values, so no
    secrets."""
    lines = []
    for name, frame in running_threads():
        lines.append(f"  {name}")
        lines += [f"    {s.filename}:{s.lineno} {s.name}" for s in traceback.extract_stack(frame)[-SHOWN_FRAMES:]]
    return "\n".join(lines)


def _section(workers: str) -> str:
    return f"\nworkers:\n{workers}" if workers else ""
