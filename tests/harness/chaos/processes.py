"""Processes of this machine, from /proc: whose children they are, their titles, when they started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def descendants(parent: int) -> Iterator[tuple[int, str]]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(above, []).append(int(folder.name))
    waiting = [parent]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            waiting.append(pid)
            with suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                yield pid, title or "?"


def started(pid: int) -> str:
    """In ticks since the machine started; with the pid it names a process for good. `` where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
