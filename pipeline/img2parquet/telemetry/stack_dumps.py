"""Dump the stacks of other processes on this machine, even of those that hang in C code.

    answer(name)      make this process write its stacks to memory when it receives SIGUSR1
    of_machine(name)  signal every process that answers to the name, and collect the stacks of threads in our code

faulthandler writes them, without Python's lock, to a file in memory that ends with the process; the caller reads it
through /proc. Stacks show files, lines and functions but no values, so no secrets. On other systems than Linux no
process answers.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

DUMP_SIGNAL = signal.SIGUSR1
OURS = f"{Path(__file__).parents[1]}{os.sep}"
WAIT_S, POLL_S = 5.0, 0.05
SHOWN_FRAMES = 8
_files: dict[str, int] = {}


def answer(name: str) -> None:
    """Register the handler for SIGUSR1; later calls with the same name do nothing."""
    if name in _files or not hasattr(os, "memfd_create"):
        return
    _files[name] = os.memfd_create(f"img2parquet-{name}")
    faulthandler.register(DUMP_SIGNAL, file=_files[name], all_threads=True)


def of_machine(name: str, ours: str = OURS) -> list[tuple[str, str]]:
    """Return a title and the stacks for each process that answers to the name.

    Threads are shown when a file on their stack has `ours` in its path; processes without one are left out."""
    signalled = [(pid, file, file.stat().st_size) for pid, file in _answering(name)]
    for pid, _, _ in signalled:
        with suppress(OSError):
            os.kill(pid, DUMP_SIGNAL)
    shown = []
    for pid, file, size in signalled:
        with suppress(OSError):
            if threads := _our_threads(_appended(file, size), ours):
                shown.append((_title(pid), "\n".join(threads)))
    return shown


def _answering(name: str) -> Iterator[tuple[int, Path]]:
    """Yield processes and their dump files, but only processes that catch the signal: it would end any other."""
    for folder in Path("/proc").glob("[0-9]*"):
        if folder.name == str(os.getpid()):
            continue
        with suppress(OSError):
            for file in (folder / "fd").iterdir():
                if file.readlink().name.startswith(f"memfd:img2parquet-{name} ") and _catches(folder):
                    yield int(folder.name), file
                    break


def _catches(process: Path) -> bool:
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", (process / "status").read_text(), re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (DUMP_SIGNAL - 1) & 1)


def _appended(file: Path, size: int) -> str:
    """Return what was appended since the file had that size, once it stops growing."""
    deadline, before = time.monotonic() + WAIT_S, -1
    while time.monotonic() < deadline and (before != (now := file.stat().st_size) or now == size):
        before = now
        time.sleep(POLL_S)
    return file.read_bytes()[size:].decode(errors="replace")


def _our_threads(dump: str, ours: str) -> list[str]:
    """Return the stacks of threads with a frame of ours, from the innermost frame out to our outermost one."""
    wanted = []
    for thread in re.split(r"^(?=(?:Current t|T)hread )", dump, flags=re.MULTILINE):
        frames = [line.strip() for line in thread.splitlines()[1:] if line.strip()]
        if last := max((number for number, frame in enumerate(frames, 1) if ours in frame), default=0):
            wanted.append("\n".join(f"    {frame}" for frame in frames[: min(last, SHOWN_FRAMES)]))
    return wanted


def _title(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return f"{words[:60]} (process {pid})"
