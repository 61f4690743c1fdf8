"""Print an error when the driver of a Ray run ends without a word.

When the node process (raylet) of its own machine dies, Ray's C++ half ends the driver by `_exit`: no Python code runs
any more. So does SIGKILL, as from a kernel that has run out of memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from img2parquet.telemetry import logs

BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # they reach the whole process group
ERROR = (
    "error: the driver ended without a word: Ray's process on this machine has died, or the driver was killed\n"
    "hint: committed parts are kept; run the same command again. SIGKILL usually means that the kernel ran out of "
    "memory; Ray's logs are in /tmp/ray/session_latest/logs"
)


def report_sudden_end() -> Callable[[], None]:
    """Fork a process that prints an error if this one ends before it has called the returned function.

    Call it before any thread starts."""
    ending, driver = os.pipe()  # not inherited by programs that the driver starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    pid = os.fork()
    if pid == 0:
        os.close(driver)
        _watch(ending)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(ending)

    def ends_by_itself() -> None:
        with suppress(OSError):
            os.write(driver, b"!")
            os.close(driver)
            os.waitpid(pid, 0)

    return ends_by_itself


def _watch(ending: int) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):  # a reader of the driver's stdout waits for its end
            os.dup2(nowhere, stream)
        if not os.read(ending, 1):
            if logs.is_json():
                logs.write_line(ERROR, level="error")
            else:
                print(ERROR, file=sys.stderr, flush=True)
    finally:
        os._exit(0)
