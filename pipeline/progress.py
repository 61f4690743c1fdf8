"""A run's tally to the terminal: one live line where there is one, plain lines where there is not.

And to the process that watches this one, if there is one: it counts deaths between commits."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from pipeline import flight, logs
from pipeline.session import Tally

PLAIN_EVERY_S = 10.0


class Progress:
    """Called with the tally whenever it changes, by one thread at a time; prints to stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and not logs.is_json()
        self.printed_at = 0.0
        self.printed_parts = -1

    def __call__(self, tally: Tally) -> None:
        flight.committed(tally.parts_committed)
        now = time.monotonic()
        every = 0.2 if self.live else PLAIN_EVERY_S
        ended = tally.parts_committed + tally.parts_done_before == tally.parts
        if now - self.printed_at < every and not (ended and tally.parts_committed != self.printed_parts):
            return
        self.printed_at, self.printed_parts = now, tally.parts_committed
        text = describe(tally)
        if logs.is_json():
            logs.tell(text, stream=self.stream, fields=as_fields(tally))
            return
        self.stream.write(f"\r\x1b[2K{text}" if self.live else text + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.live and self.printed_at:
            self.stream.write("\n")


def describe(tally: Tally) -> str:
    """`parts 3/8  rows 1,204  rejects 12  310 images/s  ETA 0:42`"""
    done = tally.parts_done_before + tally.parts_committed
    words = [f"parts {done}/{tally.parts}", f"rows {tally.rows_in:,}", f"rejects {tally.rows_rejected:,}"]
    if tally.images_per_s:
        words.append(f"{tally.images_per_s:,.0f} images/s")
    left = eta_s(tally)
    if left is not None:
        words.append(f"ETA {int(left) // 60}:{int(left) % 60:02d}")
    return "  ".join(words)


def as_fields(tally: Tally) -> dict[str, object]:
    left = eta_s(tally)
    return {
        "event": "progress", "parts": tally.parts, "parts_done": tally.parts_done_before + tally.parts_committed,
        "rows_in": tally.rows_in, "rows_rejected": tally.rows_rejected,
        "images_per_s": round(tally.images_per_s, 1), "eta_s": None if left is None else round(left),
    }  # fmt: skip


def eta_s(tally: Tally) -> float | None:
    """Seconds left, from the share of this session's rows or, where the plan cannot count them, parts."""
    if not tally.working_since:
        return None
    elapsed = time.monotonic() - tally.working_since
    todo = tally.parts - tally.parts_done_before
    share = tally.parts_committed / todo if todo else 1.0
    if tally.rows_planned and not tally.parts_done_before:
        share = max(share, tally.rows_in / tally.rows_planned)
    return elapsed * (1 - share) / share if share > 0 else None
