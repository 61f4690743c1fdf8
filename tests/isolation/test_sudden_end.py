"""A driver of a Ray run that ends without a word, whoever ends it, and one that does not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

DRIVER = """
import os, signal, sys
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.isolation.sudden_end import report_sudden_end
from img2parquet.telemetry import logs
{first}
ends_by_itself = report_sudden_end()
print("works", flush=True)
{body}
"""


def run(body: str, first: str = "") -> tuple[int, str, str]:
    command = [sys.executable, "-c", DRIVER.format(first=first, body=body)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("body", "code"), [("os._exit(1)", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)]
)
def test_a_sudden_end_is_told(body: str, code: int) -> None:
    """Ray's C++ half ends the driver by `_exit(1)` when the raylet of its machine has died."""
    ended, out, err = run(body)
    assert (ended, out) == (code, "works\n")
    assert err.startswith("error: the driver ended without a word") and "run the same command again" in err


def test_a_sudden_end_is_told_as_json() -> None:
    _, _, err = run("os._exit(1)", first="logs.use_json()")
    said = json.loads(err)
    assert said["level"] == "error" and "ended without a word" in said["message"]


SECOND_SIGNAL = """
with StopSignals(before_exit=ends_by_itself) as signals, signals.graceful():
    os.kill(os.getpid(), signal.SIGTERM)
    signals.received_at -= 1
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("body", "code"), [("ends_by_itself(); sys.exit(3)", 3), (SECOND_SIGNAL, 143)])
def test_an_end_of_its_own_needs_no_word(body: str, code: int) -> None:
    assert run(body) == (code, "works\n", "")


def test_a_signal_to_the_whole_group_leaves_the_word_to_the_driver() -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: None)\nos.killpg(0, signal.SIGTERM)\nos._exit(1)"
    _, _, err = run(body, first="os.setsid()")
    assert err.startswith("error: ")
