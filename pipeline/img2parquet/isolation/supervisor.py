"""Run the driver in a process of its own, restart it when an image or shard kills it, and isolate what did.

    supervise()   returns None in the driver, which continues; in the supervisor, the exit code once all is over

* The supervisor only reads the flight record that it shares with the driver: it loads neither torch nor ray.
* The driver is a fork in a process group of its own, so that a signal reaches it once. It dies with its supervisor.
* A driver that dies of a signal that nobody sends on purpose is restarted. What it was working on becomes a suspect,
  and is never again done inside the driver. After a second death without a commit in between, neither are the whole
  parts that it was working on; after a third, nothing is.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from img2parquet.isolation.sudden_end import ERROR as WITHOUT_A_WORD
from img2parquet.telemetry import flight_recorder, logs
from img2parquet.telemetry.flight_recorder import Activity, DeadlineWatcher, Record, Suspects

ACCIDENTS = {
    signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGKILL,
    signal.SIGTRAP, signal.SIGSYS,
}  # fmt: skip
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}
AWAITED = FORWARDED | {signal.SIGCHLD, signal.SIGTSTP, signal.SIGCONT}
NOT_FINAL = {signal.SIGHUP, signal.SIGUSR1}  # need not mean that the driver should end
DUMP = signal.SIGUSR2
DEATHS = 5  # without a commit in between
TICK_S, DUMP_S = 0.5, 1.0
SHOWN = 4
OUT_OF_MEMORY = (  # a resumed job keeps the batch size that it has recorded
    "SIGKILL usually means that the kernel ran out of memory: use fewer workers, or start a new output with a smaller "
    "batch_size"
)
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl.h
LIBC = ctypes.CDLL(None)
SIGNAL_SET_BYTES = 128  # sizeof(sigset_t) in glibc and musl


def supervise() -> int | None:
    """Fork a driver. Return None in the driver, and its exit code in the supervisor. Call it before any thread starts.

    When the driver ends by a signal that was sent on purpose, the supervisor ends itself by the same signal."""
    if not sys.platform.startswith("linux"):
        return None  # sigtimedwait and prctl are Linux's; elsewhere the driver runs unsupervised
    record, suspects, deaths, supervisor = Record(), Suspects(), 0, os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, the driver's exit code would be lost
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    while True:
        record.clear()
        driver = _Driver.fork(record)
        if driver is None:
            _become_driver(record, suspects, mask, supervisor)
            return None
        ended = driver.wait()
        if ended.code >= 0 or ended.is_intended or -ended.code not in ACCIDENTS:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if ended.code == 1 and not (ended.is_intended or record.ends_by_itself):
                _print(WITHOUT_A_WORD)
            return _end_the_same_way(ended.code)
        deaths = 1 if record.parts_committed else deaths + 1
        if deaths >= DEATHS:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _print(_describe_failure(ended))
            return 1
        at = [*ended.slow, *record.moments().values()]  # a slow one may have finished just before the kill
        suspects.add(at, whole_parts=deaths >= 2)
        suspects.everything = suspects.everything or deaths >= 3
        _print(_describe_restart(ended, at, suspects.everything))


@dataclass(frozen=True)
class _Ended:
    """How a driver ended.

    code: as in subprocess, negative for a signal. is_intended: somebody told it to end. slow: what took too long."""

    code: int
    is_intended: bool
    slow: Sequence[Activity] = ()

    @property
    def cause(self) -> str:
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


class _Driver:
    """The supervisor's side of the driver process."""

    def __init__(self, pid: int, record: Record) -> None:
        self.pid, self.watch, self.is_intended = pid, DeadlineWatcher(record), False
        self.is_suspended = False  # by us, after a SIGTSTP of our own
        self.slow: list[Activity] = []

    @classmethod
    def fork(cls, record: Record) -> _Driver | None:
        """Fork the driver. Return None in the driver itself."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            return None
        with suppress(OSError):
            os.setpgid(pid, pid)  # in both processes: no signal may find the driver in the old group
        return cls(pid, record)

    def wait(self) -> _Ended:
        """Wait for the driver to end; pass signals on, and end it when something takes too long."""
        checked_at = time.monotonic()
        while True:
            number = _next_signal()
            if number:
                self._pass_on(number)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return _Ended(os.waitstatus_to_exitcode(status), self.is_intended, self.slow)
            now = time.monotonic()
            # after a time in which we were stopped, or the machine slept, at most two ticks count
            self._end_slow(0.0 if self._is_stopped() else min(now - checked_at, 2 * TICK_S))
            checked_at = now

    def _pass_on(self, number: signal.Signals) -> None:
        if number == signal.SIGTSTP:
            self.is_suspended = True
            self._kill(signal.SIGSTOP)
            if signal.SIGCONT not in signal.sigpending():  # else it followed at once, and nobody sends another
                os.kill(os.getpid(), signal.SIGSTOP)
        elif number == signal.SIGCONT and self.is_suspended:
            self.is_suspended = False
            self._kill(signal.SIGCONT)
        elif number in FORWARDED:
            self.is_intended = self.is_intended or number not in NOT_FINAL
            self._kill(number)

    def _end_slow(self, passed_s: float) -> None:
        slow = self.watch.look(passed_s)
        if slow and not self.slow:
            self.slow = slow
            self._kill(DUMP)  # it writes its stacks to stderr
            time.sleep(DUMP_S)
            self._kill(signal.SIGKILL)

    def _is_stopped(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def _kill(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _next_signal() -> signal.Signals | None:
    """Return the next of the AWAITED signals, all of which are blocked, or None after about TICK_S.

    `signal.sigtimedwait` cannot be used: when its time passes while this process is stopped, CPython 3.11 returns
    uninitialised memory, which may look like any signal."""
    awaited = ctypes.create_string_buffer(SIGNAL_SET_BYTES)
    for number in AWAITED:
        LIBC.sigaddset(awaited, int(number))
    seconds, fraction = divmod(TICK_S, 1.0)
    timeout = (ctypes.c_long * 2)(int(seconds), int(fraction * 1e9))  # struct timespec
    number = LIBC.sigtimedwait(awaited, None, timeout)
    return signal.Signals(number) if number > 0 else None


def _become_driver(record: Record, suspects: Suspects, mask: set[int | signal.Signals], supervisor: int) -> None:
    LIBC.prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)  # the supervisor died before the call above
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else `stty tostop` stops it at its first line, as a background job
    faulthandler.register(DUMP, all_threads=True)
    flight_recorder.use(record.slot, suspects, record)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_the_same_way(code: int) -> int:
    if code < 0:
        number = signal.Signals(-code)
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return code if code >= 0 else 128 - code


def _describe_restart(ended: _Ended, at: Sequence[Activity], everything: bool) -> str:
    what = "took longer than resources.image_timeout_s" if ended.slow else f"died of {ended.cause}"
    named = list(ended.slow or at)
    where = ", ".join(map(str, named[:SHOWN])) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
    place = f" at {where}" if where else ", outside any image or shard"
    isolated = f", with {'every image' if everything else 'that'} in an isolated process" if at else ""
    return f"img2parquet: the driver {what}{place}; restarting it{isolated}"


def _describe_failure(ended: _Ended) -> str:
    memory = OUT_OF_MEMORY + "; " if ended.code == -signal.SIGKILL else ""
    return (
        f"error: the driver died {DEATHS} times without committing a part in between, the last time of {ended.cause}\n"
        f"hint: {memory}committed parts are kept; run the same command to try again"
    )


def _print(line: str) -> None:
    with suppress(OSError, ValueError):
        if logs.is_json():
            logs.write_line(line, level="warning")
        else:
            print(line, file=sys.stderr, flush=True)
