"""The tally in words: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import time

import pytest

from img2parquet.cli.progress import Progress, bar, describe, eta_s, share_done
from img2parquet.engine.run_report import Tally


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tally(**values: int) -> Tally:
    made = Tally("out", parts=10)
    made.working_since = time.monotonic() - 10
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_the_line_says_parts_rows_rejects_speed_and_time_left() -> None:
    text = describe(tally(parts_committed=5, rows_in=5000, rows_rejected=7))
    assert text.startswith("50 %  parts 5/10  rows 5,000  rejects 7  ")
    assert "500 images/s" in text
    assert "ETA 0:" in text


def test_the_share_is_of_rows_where_their_number_is_known() -> None:
    assert describe(tally(rows_planned=300, rows_in=200, parts_committed=5)).startswith(
        "66 %  parts 5/10  rows 200/300 "
    )
    assert describe(tally(rows_planned=300, rows_in=10, parts_done_before=9)).startswith("90 %  parts 9/10  rows 10 ")
    assert bar(tally(parts_committed=5)) == "████████░░░░░░░░ "
    assert share_done(Tally("out")) == 0.0


def test_a_live_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    progress = Progress(terminal)
    progress(tally(parts_committed=5, rows_in=5000))
    assert len(terminal.getvalue().replace("\r\x1b[2K", "")) <= 30
    progress.close()


def test_time_left_counts_this_session_alone() -> None:
    resumed = tally(parts_done_before=8, parts_committed=1, rows_in=10)
    assert 9 < (eta_s(resumed) or 0) < 11
    assert eta_s(Tally("out", parts=10)) is None
    planned = tally(rows_planned=100, rows_in=50)
    assert 9 < (eta_s(planned) or 0) < 11


def test_a_terminal_has_one_live_line_and_a_file_has_few_plain_ones() -> None:
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = Progress(stream)
        for done in range(11):
            progress(tally(parts_committed=done, rows_in=done))
        progress.close()
    assert "\r" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")
    assert plain.getvalue().count("\n") == 2  # the first, and the end
    assert "parts 10/10" in plain.getvalue()
