"""How long nothing has come from the workers -> what is said of it: which parts are out, and where it hangs."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

RERUNS = 2  # without a new batch between them
MOST_TICK_S = 2.0
LEFT_BEHIND: list[Callable[[], bool]] = []  # whether something hangs; with it, so would the end of the interpreter
SHOWN_PARTS, SHOWN_FRAMES = 5, 8


@dataclass(frozen=True)
class Outstanding:
    """A part that is not whole: how many of its batches came, the first that did not, how long ago the last came."""

    index: int
    batches: int
    missing_k: int
    since_s: float

    def __str__(self) -> str:
        came = f"{self.batches} batches came, the last {self.since_s:.0f} s ago" if self.batches else "nothing came"
        return f"part {self.index}: batch {self.missing_k} is missing; {came}"


class Watch:
    """The clock of one session. It runs while the driver waits for a batch, and begins anew when one comes.

    After a stall twice as long is waited: workers that were only slow to start would be ended for ever."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s, self.waited_s, self.looked = stall_s, 0.0, time.monotonic()
        self.reruns, self.told = 0, ""
        self.stalls: list[dict[str, object]] = []  # for the meter
        self.stragglers: list[dict[str, object]] = []

    def begin(self) -> None:
        self.waited_s, self.looked = 0.0, time.monotonic()

    def progress(self) -> None:
        """A batch came that was not there yet."""
        self.reruns = 0

    def is_stalled(self) -> bool:
        """Asked at every tick. A long time between two ticks was one in which this process was stopped."""
        now = time.monotonic()
        self.waited_s, self.looked = self.waited_s + min(now - self.looked, MOST_TICK_S), now
        return self.waited_s > self.stall_s * (1 << self.reruns)

    def tell(self, shown: Sequence[Outstanding], left: int, where: str, workers: str = "") -> str:
        """Say what is out and where it hangs, with the stacks of our threads and of workers elsewhere; the same without
        them in one line."""
        line = (
            f"no batch came for {self.waited_s:.0f} s (resources.stall_s: {self.stall_s:g}); {left} parts are "
            f"not whole; it hangs probably in: {where}"
        )
        self.stalls.append({"waited_s": round(self.waited_s), "where": where, "parts": left})
        log.warning("%s\n%s\nthreads of the driver:\n%s%s", line, told(shown, left), stacks(), _beyond(workers))
        self.told = line
        return line

    def straggle(self, shown: Sequence[Outstanding], left: int, waited_s: float, workers: str) -> None:
        """Say that the last parts keep idle workers waiting, and run on them too; and where the others are."""
        self.stragglers.append({"waited_s": round(waited_s), "parts": left})
        log.warning(
            "some workers have had nothing to do for %.0f s: what is left (%d of the parts) runs on them too\n%s%s",
            waited_s, left, told(shown, left), _beyond(workers),
        )  # fmt: skip

    def again(self, why: str, left: int) -> bool:
        """Whether to run what is left again; False when that was done RERUNS times without one new batch."""
        self.reruns += 1
        if self.reruns > RERUNS:
            return False
        if why != self.told:
            log.warning("%s", why)
        log.warning("%d parts are run again with new workers (%d of %d times)", left, self.reruns, RERUNS)
        return True


def told(shown: Sequence[Outstanding], left: int) -> str:
    """A few of the parts that are left, a line each."""
    more = f"\n  and {left - len(shown)} more" if left > len(shown) else ""
    return "\n".join(f"  {part}" for part in shown) + more


def _beyond(workers: str) -> str:
    return f"\nworkers:\n{workers}" if workers else ""


def where_threads_are() -> str:
    """The stages that this process's workers and reader are in."""
    stages = [stage for name, frame in _threads() if name.startswith(OURS) and (stage := _stage(frame))]
    return ", ".join(sorted(set(stages))) or "what comes before the first batch"


OURS = ("img2parquet-worker", "img2parquet-reader")
STAGES = {"read": "read", "decode": "decode", "preprocess": "preprocess", "forward": "embed", "embed": "embed"}


def _stage(frame: FrameType) -> str:
    """`decode (decode.py:123)` of the innermost of our files that is one of a stage's; `` in a thread that idles."""
    root = Path(__file__).parent
    for each in reversed(traceback.extract_stack(frame)):
        path = Path(each.filename)
        if root in path.parents and (stage := STAGES.get(path.relative_to(root).parts[0].removesuffix(".py"))):
            return f"{stage} ({path.name}:{each.lineno})"
    return ""


def stacks() -> str:
    """Every thread of this process: its name and where it is. Files, lines and functions; no values, so no secrets."""
    lines = []
    for name, frame in _threads():
        lines.append(f"  {name}")
        lines += [f"    {s.filename}:{s.lineno} {s.name}" for s in traceback.extract_stack(frame)[-SHOWN_FRAMES:]]
    return "\n".join(lines)


def _threads() -> list[tuple[str, FrameType]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [(names.get(ident, str(ident)), frame) for ident, frame in sys._current_frames().items()]
