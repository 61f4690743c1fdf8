"""Where the threads of processes on this machine are, asked from outside, also of those that hang in C code.

    answer(name)      from now on this process writes its stacks down when it gets SIGUSR1
    of_machine(name)  asks all that answer to the name -> title and the stacks of threads in our code, of each

faulthandler writes them, without Python's lock, to a file in memory that goes with the process; whoever asks reads it
through /proc. Files, lines and functions; no values, so no secrets. Linux only: elsewhere nobody answers.
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

ASK = signal.SIGUSR1
OURS = f"{os.sep}pipeline{os.sep}"
WAIT_S, LOOK_S = 5.0, 0.05
SHOWN_FRAMES = 8
_files: dict[str, int] = {}


def answer(name: str) -> None:
    """Once for a process, whatever is called again."""
    if name in _files or not hasattr(os, "memfd_create"):
        return
    _files[name] = os.memfd_create(f"img2parquet-{name}")
    faulthandler.register(ASK, file=_files[name], all_threads=True)


def of_machine(name: str, ours: str = OURS) -> list[tuple[str, str]]:
    """`ours` is in the path of files whose threads are shown. A process without such a thread is left out."""
    asked = [(pid, file, file.stat().st_size) for pid, file in _answering(name)]
    for pid, _, _ in asked:
        with suppress(OSError):
            os.kill(pid, ASK)
    shown = []
    for pid, file, size in asked:
        with suppress(OSError):
            if threads := _of_interest(_written(file, size), ours):
                shown.append((_title(pid), "\n".join(threads)))
    return shown


def _answering(name: str) -> Iterator[tuple[int, Path]]:
    """Processes and their files; only those where the signal is caught, which would end any other."""
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
    return bool(caught and int(caught[1], 16) >> (ASK - 1) & 1)


def _written(file: Path, size: int) -> str:
    """What was added since the file had that size, once nothing more comes."""
    deadline, before = time.monotonic() + WAIT_S, -1
    while time.monotonic() < deadline and (before != (now := file.stat().st_size) or now == size):
        before = now
        time.sleep(LOOK_S)
    return file.read_bytes()[size:].decode(errors="replace")


def _of_interest(said: str, ours: str) -> list[str]:
    """Threads with a frame of ours: from the innermost frame out to the last of ours."""
    wanted = []
    for thread in re.split(r"^(?=(?:Current t|T)hread )", said, flags=re.MULTILINE):
        frames = [line.strip() for line in thread.splitlines()[1:] if line.strip()]
        if last := max((number for number, frame in enumerate(frames, 1) if ours in frame), default=0):
            wanted.append("\n".join(f"    {frame}" for frame in frames[: min(last, SHOWN_FRAMES)]))
    return wanted


def _title(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return f"{words[:60]} (process {pid})"
