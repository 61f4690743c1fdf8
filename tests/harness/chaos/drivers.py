"""A job in a forked process, and what happens to it on the way."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from img2parquet.dataset import commit
from img2parquet.engine.driver import run
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.errors import Img2ParquetError, Stopped
from img2parquet.job import parse_job
from img2parquet.runners import local
from img2parquet.storage.write_hooks import listening
from tests.harness.chaos.forks import fork

What = Literal["kill", "term", "stop", "full", "clock", "time"]
YEARS = 365 * 86_400.0
GAVE_UP = 1


@dataclass(frozen=True)
class Blow:
    """Comes the `nth` time that an object of such a name reaches a step; `kill` and `term` (SIGTERM) may come after
    some seconds instead. `full`: from there on, no byte can be written to the disk; `clock`: it jumps at every step
    from there."""

    what: Literal["kill", "term", "stop", "full", "clock"]
    step: str = ""
    name: str = ""
    nth: int = 1
    after_s: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        where = f"after {self.after_s:.2f} s" if self.after_s is not None else f"at `{self.step}` no. {self.nth}"
        return f"{self.what} {where} of {self.name or 'anything'}"


@dataclass
class Driver:
    """`code`: as the shell has it, None while it lives."""

    pid: int
    blow: Blow | None
    log: Path
    started: float
    code: int | None = None
    is_stopped: bool = False

    @classmethod
    def start(cls, document: Mapping[str, Any], blow: Blow | None, log: Path, *, careful: bool = False) -> Driver:
        """careful: as in production, where what a dead driver was at is done in processes apart, seconds each."""
        return cls.doing(
            lambda signals: run(parse_job(dict(document)), "local", signals=signals), blow, log, careful=careful
        )

    @classmethod
    def doing(
        cls, action: Callable[[StopSignals], object], blow: Blow | None, log: Path, *, careful: bool = False
    ) -> Driver:
        return cls(fork(lambda: _drive(action, blow, careful), log), blow, log, time.monotonic())

    def look(self) -> None:
        """Notice its end, or that it was stopped; kill it when its time has come."""
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            self.is_stopped = True
        elif pid:
            self.code = os.waitstatus_to_exitcode(status)
        elif self.blow and self.blow.after_s is not None and time.monotonic() - self.started >= self.blow.after_s:
            self._signal(signal.SIGTERM if self.blow.what == "term" else signal.SIGKILL)
            self.blow = replace(self.blow, after_s=None)  # once

    def go_on(self) -> None:
        self.is_stopped = False
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """At once; for one that should have ended by itself."""
        if self.code is None:
            self._signal(signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _drive(action: Callable[[StopSignals], object], blow: Blow | None, careful: bool) -> int:
    local.SHARES_PROCESS = careful  # type: ignore[attr-defined, unused-ignore]
    signals = StopSignals()
    try:
        with signals, nullcontext() if blow is None or blow.after_s is not None else listening(_Listener(blow)):
            action(signals)
    except (Stopped, KeyboardInterrupt):
        return signals.exit_code
    except Img2ParquetError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return GAVE_UP
    return 0


class _Listener:
    def __init__(self, blow: Blow) -> None:
        self.blow, self.seen, self.lock = blow, 0, threading.Lock()
        self.name = re.compile(blow.name)
        if blow.what == "full":
            commit.PUT_TRIES = 2  # nobody frees space meanwhile

    def __call__(self, step: str, uri: str) -> None:
        with self.lock:
            due = self.seen >= self.blow.nth
            if not due and step == self.blow.step and self.name.search(uri):
                self.seen += 1
                due = self.seen == self.blow.nth
        if due:
            self._strike(step)

    def _strike(self, step: str) -> None:
        if self.blow.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.blow.what == "term":
            self.blow = replace(self.blow, nth=1 << 30)
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.blow.what == "stop":
            self.blow = replace(self.blow, nth=1 << 30)  # once
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.blow.what == "full" and step in ("opened", "written"):
            raise OSError(errno.ENOSPC, "No space left on device")
        elif self.blow.what == "clock":
            _jump(random.Random(f"{self.blow.seed} {time.perf_counter_ns()}").uniform(-10, 10) * YEARS)


_REAL = (time.time, time.time_ns, time.gmtime, time.localtime)


def _jump(by_s: float) -> None:
    """The wall clock of this process; the monotonic one is the kernel's promise."""
    now, now_ns, gmtime, localtime = _REAL
    time.time = lambda: now() + by_s
    time.time_ns = lambda: now_ns() + int(by_s * 1e9)
    time.gmtime = lambda seconds=None: gmtime(now() + by_s if seconds is None else seconds)
    time.localtime = lambda seconds=None: localtime(now() + by_s if seconds is None else seconds)
