"""Print the progress of a run: one live line on a terminal, plain lines elsewhere.

Also report commits to the supervisor of this process, if it has one: it counts deaths between commits."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from typing import TextIO

from img2parquet.engine.run_report import Tally
from img2parquet.telemetry import flight_recorder, logs

PLAIN_EVERY_S = 10.0


class Progress(logging.Handler):
    """Print a tally to stderr whenever it is called, by one thread at a time, and as a log handler the steps before."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and not logs.is_json()
        self.printed_at = 0.0
        self.printed_parts = -1

    def __call__(self, tally: Tally) -> None:
        flight_recorder.committed(tally.parts_committed)
        now = time.monotonic()
        interval_s = 0.2 if self.live else PLAIN_EVERY_S
        is_done = tally.parts_committed + tally.parts_done_before == tally.parts
        if now - self.printed_at < interval_s and not (is_done and tally.parts_committed != self.printed_parts):
            return
        self.printed_at, self.printed_parts = now, tally.parts_committed
        text = describe(tally)
        if logs.is_json():
            logs.write_line(text, stream=self.stream, fields=as_fields(tally))
            return
        if self.live:
            text = f"\r\x1b[2K{bar(tally)}{text}"[: shutil.get_terminal_size().columns + 4]  # + what moves the cursor
        self.stream.write(text if self.live else text + "\n")
        self.stream.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a step that takes a while, as it begins."""
        if not logs.is_json():  # whose handler has written it
            self.stream.write("\r\x1b[2K" * self.live + record.getMessage() + "\n")
            self.stream.flush()

    def __enter__(self) -> Progress:
        logs.STEPS.addHandler(self)
        logs.STEPS.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logs.STEPS.removeHandler(self)
        self.close()

    def close(self) -> None:
        """End the live line."""
        super().close()
        if self.live and self.printed_at:
            self.stream.write("\n")


def bar(tally: Tally) -> str:
    """Draw the share that is done with 16 blocks."""
    full = int(16 * share_done(tally))
    return "█" * full + "░" * (16 - full) + " "


def share_done(tally: Tally) -> float:
    """Return the share of the rows or, where their number is not planned, of the parts."""
    if not tally.parts:
        return 0.0
    share = (tally.parts_done_before + tally.parts_committed) / tally.parts
    if tally.rows_planned and not tally.parts_done_before:
        share = max(share, tally.rows_in / tally.rows_planned)
    return min(share, 1.0)


def describe(tally: Tally) -> str:
    """Format a tally: `37 %  parts 3/8  rows 1,204/3,200  rejects 12  310 images/s  ETA 0:42`"""
    done = tally.parts_done_before + tally.parts_committed
    planned = f"/{tally.rows_planned:,}" if tally.rows_planned and not tally.parts_done_before else ""
    fields = [
        f"{int(100 * share_done(tally))} %", f"parts {done}/{tally.parts}", f"rows {tally.rows_in:,}{planned}",
        f"rejects {tally.rows_rejected:,}",
    ]  # fmt: skip
    if tally.images_per_s:
        fields.append(f"{tally.images_per_s:,.0f} images/s")
    left = eta_s(tally)
    if left is not None:
        fields.append(f"ETA {int(left) // 60}:{int(left) % 60:02d}")
    return "  ".join(fields)


def as_fields(tally: Tally) -> dict[str, object]:
    left = eta_s(tally)
    return {
        "event": "progress", "parts": tally.parts, "parts_done": tally.parts_done_before + tally.parts_committed,
        "rows_in": tally.rows_in, "rows_rejected": tally.rows_rejected,
        "images_per_s": round(tally.images_per_s, 1), "eta_s": None if left is None else round(left),
    }  # fmt: skip


def eta_s(tally: Tally) -> float | None:
    """Estimate the seconds left from the share of this session's rows or, without a row count, its parts."""
    if not tally.working_since:
        return None
    elapsed = time.monotonic() - tally.working_since
    remaining = tally.parts - tally.parts_done_before
    share = tally.parts_committed / remaining if remaining else 1.0
    if tally.rows_planned and not tally.parts_done_before:
        share = max(share, tally.rows_in / tally.rows_planned)
    return elapsed * (1 - share) / share if share > 0 else None
