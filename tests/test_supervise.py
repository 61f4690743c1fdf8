"""The supervisor with small drivers: what it begins again, what it passes on, and that it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER = """
import ctypes, os, signal, sys, time
from pathlib import Path
from pipeline import flight, supervise
supervise.TICK_S = 0.05
code = supervise.supervise()
if code is not None:
    print("supervisor", code, flush=True)
    sys.exit(code)
lives = Path({lives!r})
with lives.open("a") as file:
    print(os.getpid(), file=file)
life = len(lives.read_text().split())
slot, suspects = flight.here(), flight.suspects()
{body}
"""


@pytest.fixture
def lives(tmp_path: Path) -> Path:
    return tmp_path / "lives"


def start(lives: Path, body: str, **options: bool) -> subprocess.Popen[str]:
    code = DRIVER.format(lives=str(lives), body=body)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)  # fmt: skip


def run(lives: Path, body: str) -> tuple[int, str, str]:
    process = start(lives, body)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(lives: Path) -> int:
    """The driver's process id."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if lives.exists() and lives.read_text().endswith("\n"):
            return int(lives.read_text().split()[-1])
        time.sleep(0.02)
    raise AssertionError("no driver")


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_the_exit_code_and_the_output_are_the_drivers(lives: Path, code: int) -> None:
    ended, out, err = run(lives, f"print('said'); sys.exit({code})")
    assert (ended, out, err) == (code, f"said\nsupervisor {code}\n", "")
    assert len(lives.read_text().split()) == 1


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE", "SIGKILL"])
def test_a_driver_that_dies_by_accident_is_begun_again_with_its_suspects(lives: Path, name: str) -> None:
    body = f"""
slot.begin(flight.DECODE, 3, 1, 17, 60.0)
if life == 1:
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
print(sorted(suspects.rows), suspects.parts, suspects.everything)"""
    ended, out, err = run(lives, body)
    assert (ended, out) == (0, "[(3, 17)] set() False\nsupervisor 0\n")
    where = "at row 17 of part 3 (decode); it goes on with that in a process apart"
    assert err == f"img2parquet: the driver died of {name} {where}\n"


def test_suspicion_widens_and_an_end_is_certain(lives: Path) -> None:
    body = """
print(life, len(suspects.rows), sorted(suspects.parts), suspects.everything, flush=True)
slot.begin(flight.DECODE, life, 0, 7)
os.abort()"""
    ended, out, err = run(lives, body)
    told = ["1 0 [] False", "2 1 [] False", "3 2 [2] False", "4 3 [2, 3] True", "5 4 [2, 3, 4] True", "supervisor 1"]
    assert out.splitlines() == told
    assert ended == 1 and err.count("img2parquet: ") == 4
    assert "error: the driver died 5 times without committing a part in between, the last time of SIGABRT" in err


def test_commits_begin_the_count_anew(lives: Path) -> None:
    body = """
slot.begin(flight.DECODE, life, 0, 7)
if life < 9:
    flight.committed(1)
    os.abort()
print(suspects.parts, suspects.everything)"""
    ended, out, _ = run(lives, body)
    assert (ended, out) == (0, "set() False\nsupervisor 0\n")


def test_what_takes_too_long_is_shown_and_ended(lives: Path) -> None:
    body = """
def in_the_decoder():
    while True:  # the signal that asks for its stack ends one sleep
        ctypes.PyDLL(None).sleep(60)
if life == 1:
    slot.begin(flight.DECODE, 0, 0, 4, limit_s=0.3)
    in_the_decoder()
slot.begin(flight.READ, 0)
time.sleep(1)
print(suspects.rows)"""
    ended, out, err = run(lives, body)
    assert (ended, out) == (0, "{(0, 4)}\nsupervisor 0\n")
    assert "in in_the_decoder" in err and "took longer than resources.image_timeout_s at row 4 of part 0" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_driver_once(lives: Path, number: signal.Signals) -> None:
    body = f"""
came = []
signal.signal({int(number)}, lambda *_: came.append(1))
lives.open("a").write("ready\\n")
deadline = time.monotonic() + 60
while not came and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.5)  # for a second one
print(came)
sys.exit(9)"""
    process = start(lives, body, start_new_session=True)
    while not (lives.exists() and "ready" in lives.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does: to the whole foreground group
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (9, "[1]\nsupervisor 9\n")


def test_a_signal_that_was_meant_ends_both_the_same_way(lives: Path) -> None:
    process = start(lives, "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)")
    wait_for(lives)
    time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGTERM and len(lives.read_text().split()) == 1


def test_after_a_wish_to_end_nothing_is_begun_again(lives: Path) -> None:
    body = """
def die(*_):
    slot.begin(flight.DECODE, 0)
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, die)
lives.open("a").write("ready\\n")
time.sleep(60)"""
    process = start(lives, body)
    while not (lives.exists() and "ready" in lives.read_text()):
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and len(lives.read_text().split()) == 2


def test_the_driver_dies_with_its_supervisor(lives: Path) -> None:
    process = start(lives, "time.sleep(60)")
    driver = wait_for(lives)
    process.kill()
    process.communicate(timeout=300)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{driver}").exists() and time.monotonic() < deadline:
        if re.search(r"State:\s+Z", Path(f"/proc/{driver}/status").read_text()):
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{driver}").exists()


def test_a_stopped_job_is_not_a_slow_image(lives: Path) -> None:
    body = """
slot.begin(flight.DECODE, 0, 0, 0, limit_s=3.0)
lives.open("a").write("ready\\n")
time.sleep(0.3)
print("on time")"""
    process = start(lives, body)
    while not (lives.exists() and "ready" in lives.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTSTP)
    time.sleep(5)  # stopped for longer than the limit
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "on time\nsupervisor 0\n", "")
