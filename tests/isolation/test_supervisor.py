"""The supervisor with small drivers: it restarts those that die by accident, passes signals on, and always ends."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = """
import ctypes, os, signal, sys, time
from pathlib import Path
from img2parquet.isolation import supervisor
from img2parquet.telemetry import flight_recorder as flight
supervisor.TICK_S = 0.05
{first}
code = supervisor.supervise()
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


def start(lives: Path, body: str, first: str = "", **options: bool) -> subprocess.Popen[str]:
    """Start a supervisor whose driver runs `body`. first: code that runs before the supervisor forks."""
    code = DRIVER.format(lives=str(lives), first=first, body=body)
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
    """Wait for the driver to start, and return its process id."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if lives.exists() and lives.read_text().endswith("\n"):
            return int(lives.read_text().split()[-1])
        time.sleep(0.02)
    raise AssertionError("no driver")


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_the_exit_code_and_the_output_are_the_drivers(lives: Path, code: int) -> None:
    ended, out, err = run(lives, f"print('said'); flight.ends_by_itself(); sys.exit({code})")
    assert (ended, out, err) == (code, f"said\nsupervisor {code}\n", "")
    assert len(lives.read_text().split()) == 1


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE", "SIGKILL"])
def test_a_driver_that_dies_by_accident_is_restarted_with_its_suspects(lives: Path, name: str) -> None:
    body = f"""
slot.begin(flight.DECODE, 3, 1, 17, 60.0)
if life == 1:
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
print(sorted(suspects.rows), suspects.parts, suspects.everything)"""
    ended, out, err = run(lives, body)
    assert (ended, out) == (0, "[(3, 17)] set() False\nsupervisor 0\n")
    where = "at row 17 of part 3 (decode); restarting it, with that in an isolated process"
    assert err == f"img2parquet: the driver died of {name} {where}\n"


def test_suspicion_widens_and_an_end_is_certain(lives: Path) -> None:
    body = """
print(life, len(suspects.rows), sorted(suspects.parts), suspects.everything, flush=True)
slot.begin(flight.DECODE, life, 0, 7)
os.abort()"""
    ended, out, err = run(lives, body)
    lines = ["1 0 [] False", "2 1 [] False", "3 2 [2] False", "4 3 [2, 3] True", "5 4 [2, 3, 4] True", "supervisor 1"]
    assert out.splitlines() == lines
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
received = []
signal.signal({int(number)}, lambda *_: received.append(1))
lives.open("a").write("ready\\n")
deadline = time.monotonic() + 60
while not received and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.5)  # for a second one
print(received)
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


def test_after_a_wish_to_end_nothing_is_restarted(lives: Path) -> None:
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


# ---- stopped and continued, as by Ctrl-Z, `scontrol suspend` or `kill -STOP` ----------------------------------------

TICK_S, LIMIT_S = 0.05, 2.0
UNTIL_TOLD = """
lives.open("a").write("ready\\n")
while not Path(f"{lives}.end").exists():
    slot.begin(flight.DECODE, 0, 0, 0, limit_s=LIMIT_S)
    time.sleep(0.01)
slot.end()
print("on time")"""


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_and_continue(lives: Path, stopped: str, number: signal.Signals, stop_s: float, limit_s: float) -> None:
    process = start(lives, UNTIL_TOLD, first=f"LIMIT_S = {limit_s}")
    wait_until(lambda: lives.exists() and "ready" in lives.read_text())
    both = [process.pid, int(lives.read_text().split()[0])]
    pids = {"supervisor": both[:1], "driver": both[1:], "driver, supervisor": both[::-1]}.get(stopped, both)
    # once only with SIGTSTP: the supervisor passes its SIGCONT on, perhaps after the next one
    for _ in range(3 if number == signal.SIGSTOP else 1):
        for pid in pids:
            os.kill(pid, number)
            wait_until(lambda pid=pid: is_stopped(pid))
        time.sleep(stop_s)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not any(map(is_stopped, both)))
    Path(f"{lives}.end").touch()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "on time\nsupervisor 0\n", "")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
@pytest.mark.parametrize("stopped", ["supervisor", "driver", "driver, supervisor", "supervisor, driver"])
def test_a_stop_ends_nothing(lives: Path, stopped: str, number: signal.Signals) -> None:
    """It is longer than the supervisor waits at a time."""
    stop_and_continue(lives, stopped, number, stop_s=3 * TICK_S, limit_s=600)


@pytest.mark.parametrize(
    ("stopped", "number"),
    [("supervisor", signal.SIGTSTP), ("driver", signal.SIGSTOP), ("supervisor, driver", signal.SIGSTOP)],
)
def test_a_stopped_job_is_not_a_slow_image(lives: Path, stopped: str, number: signal.Signals) -> None:
    stop_and_continue(lives, stopped, number, stop_s=LIMIT_S + 3 * TICK_S, limit_s=LIMIT_S)


def test_a_stop_that_is_revoked_at_once_is_no_stop(lives: Path) -> None:
    """SIGCONT arrives after SIGTSTP was taken, and before the supervisor has stopped itself; no second one follows."""
    first = """
kill = supervisor._Driver._kill
def revoked(driver, number):
    kill(driver, number)
    if number == signal.SIGSTOP:
        os.kill(os.getpid(), signal.SIGCONT)
supervisor._Driver._kill = revoked
"""
    process = start(lives, UNTIL_TOLD, first=first + "LIMIT_S = 600")
    wait_until(lambda: lives.exists() and "ready" in lives.read_text())
    process.send_signal(signal.SIGTSTP)
    Path(f"{lives}.end").touch()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "on time\nsupervisor 0\n", "")


def test_a_driver_may_write_to_a_terminal_that_stops_background_jobs(lives: Path) -> None:
    """The driver's process group is not the terminal's, and `stty tostop` stops those that write."""
    code = DRIVER.format(lives=str(lives), first="", body="print('written', flush=True)")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("sh", ["sh", "-c", 'stty tostop; exec "$0" -c "$1"', sys.executable, code])
    out = b""
    try:
        while b"supervisor 0" not in out:
            assert select.select([terminal], [], [], 60)[0], f"the driver is stopped: {out!r}"
            out += os.read(terminal, 4096)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    assert out.splitlines() == [b"written", b"supervisor 0"]


@pytest.mark.parametrize(("body", "is_told"), [("os._exit(1)", True), ("flight.ends_by_itself(); os._exit(1)", False)])
def test_a_driver_that_ends_without_a_word_is_told(body: str, is_told: bool, lives: Path) -> None:
    """`--runner auto` may have started Ray, which ends the driver by `_exit(1)` when its raylet has died."""
    code, _, err = run(lives, f"flight.committed(3); {body}")
    assert code == 1 and ("error: the driver ended without a word" in err) == is_told
