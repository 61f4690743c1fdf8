"""A driver in a process of its own, begun again where an image or a shard took it down; then that is done apart.

    supervise()   None in the driver, which goes on; in the supervisor, which stays behind, how the driver ended

* The supervisor knows only the flight record, which it shares with the driver: it loads neither torch nor ray.
* The driver is a fork of it, in a process group of its own, so that a signal reaches it once. It dies with its parent.
* A driver that dies of a signal that nobody sends on purpose is begun again. What it was at is a suspect, and never
  again done inside the driver; after a second death without a commit between them neither is any of those parts, after
  a third nothing is.
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

from pipeline import flight, logs
from pipeline.flight import Moment, Record, Suspects, Watch

ACCIDENTS = {
    signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGKILL,
    signal.SIGTRAP, signal.SIGSYS,
}  # fmt: skip
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}
FORGIVEN = {signal.SIGHUP, signal.SIGUSR1}  # which need not mean that the driver is to end
DUMP = signal.SIGUSR2
DEATHS = 5  # without a commit between them
TICK_S, DUMP_S = 0.5, 1.0
SHOWN = 4
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl.h


def supervise() -> int | None:
    """Fork. None in the driver; its exit code in the supervisor, when all is over. Call it before any thread begins.

    A driver that ends by a signal that was meant ends the supervisor the same way."""
    if not sys.platform.startswith("linux"):
        return None  # sigtimedwait and prctl are Linux's; the driver runs without a net
    record, suspects, deaths, supervisor = Record(), Suspects(), 0, os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an ignored one would lose the driver's end
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD, signal.SIGTSTP})
    while True:
        record.clear()
        driver = _Driver.fork(record)
        if driver is None:
            _become_driver(record, suspects, mask, supervisor)
            return None
        ended = driver.wait()
        if ended.code >= 0 or ended.is_wanted or -ended.code not in ACCIDENTS:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return _end_likewise(ended.code)
        deaths = 1 if record.parts_committed else deaths + 1
        if deaths >= DEATHS:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _say(_gives_up(ended))
            return 1
        at = [*ended.slow, *record.moments().values()]  # the first may have ended between our word and its death
        suspects.add(at, whole_parts=deaths >= 2)
        suspects.everything = suspects.everything or deaths >= 3
        _say(_goes_on(ended, at, suspects.everything))


@dataclass(frozen=True)
class _Ended:
    """code: as subprocess has it, negative for a signal; is_wanted: it had been asked to end."""

    code: int
    is_wanted: bool
    slow: Sequence[Moment] = ()

    @property
    def how(self) -> str:
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


class _Driver:
    """The driver as the supervisor has it."""

    def __init__(self, pid: int, record: Record) -> None:
        self.pid, self.watch, self.is_wanted = pid, Watch(record), False
        self.slow: list[Moment] = []

    @classmethod
    def fork(cls, record: Record) -> _Driver | None:
        """None in the driver."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            return None
        with suppress(OSError):
            os.setpgid(pid, pid)  # by whoever is first: a signal must not find it in the old one
        return cls(pid, record)

    def wait(self) -> _Ended:
        """Until its end: signals passed on, and what takes too long ended."""
        looked = time.monotonic()
        while True:
            info = signal.sigtimedwait(FORWARDED | {signal.SIGCHLD, signal.SIGTSTP}, TICK_S)
            if info:
                self._pass_on(signal.Signals(info.si_signo))
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return _Ended(os.waitstatus_to_exitcode(status), self.is_wanted, self.slow)
            now = time.monotonic()
            # a watcher that was not there itself, machine and all, has seen no more than two ticks
            self._look(0.0 if self._is_stopped() else min(now - looked, 2 * TICK_S))
            looked = now

    def _pass_on(self, number: signal.Signals) -> None:
        if number == signal.SIGTSTP:
            self._kill(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._kill(signal.SIGCONT)
        elif number in FORWARDED:
            self.is_wanted = self.is_wanted or number not in FORGIVEN
            self._kill(number)

    def _look(self, passed_s: float) -> None:
        slow = self.watch.look(passed_s)
        if slow and not self.slow:
            self.slow = slow
            self._kill(DUMP)  # where it hangs, to stderr
            time.sleep(DUMP_S)
            self._kill(signal.SIGKILL)

    def _is_stopped(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def _kill(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _become_driver(record: Record, suspects: Suspects, mask: set[int | signal.Signals], supervisor: int) -> None:
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)  # it died before we asked
    faulthandler.register(DUMP, all_threads=True)
    flight.use(record.slot, suspects, record)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_likewise(code: int) -> int:
    if code < 0:
        number = signal.Signals(-code)
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return code if code >= 0 else 128 - code


def _goes_on(ended: _Ended, at: Sequence[Moment], everything: bool) -> str:
    died = "took longer than resources.image_timeout_s" if ended.slow else f"died of {ended.how}"
    named = list(ended.slow or at)
    where = ", ".join(map(str, named[:SHOWN])) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
    then = "every image" if everything else "that"
    place = f" at {where}" if where else ", at no image and no shard"
    return f"img2parquet: the driver {died}{place}; it goes on" + (f" with {then} in a process apart" if at else "")


def _gives_up(ended: _Ended) -> str:
    memory = "SIGKILL is usually the kernel, out of memory: use fewer workers or a smaller batch_size; " * (
        ended.code == -signal.SIGKILL
    )
    return (
        f"error: the driver died {DEATHS} times without committing a part in between, the last time of {ended.how}\n"
        f"hint: {memory}what is committed stays; run the same command to try again"
    )


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        if logs.is_json():
            logs.tell(line, level="warning")
        else:
            print(line, file=sys.stderr, flush=True)
