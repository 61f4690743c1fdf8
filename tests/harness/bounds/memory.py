"""A command -> the largest memory of its processes: the driver's, and its workers'.

Of the driver the kernel's own peak (VmHWM), looked at until it ends. Of Ray's workers the largest of many looks without
the pages of the object store: these are shared, bounded by Ray, and count for each process that ever touched them. What
ran for less than a look is not seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LOOK_EACH_S = 0.05


@dataclass(frozen=True)
class Taken:
    """Peaks in MB; `worker_mb` is the largest Ray worker's, 0 without Ray. `summary` is what `run --json` printed."""

    driver_mb: float
    worker_mb: float
    workers: int
    seconds: float
    summary: dict[str, Any]


def take(job: Path, runner: str, timeout_s: float = 1800) -> Taken:
    """Raises AssertionError with the command's last words where it fails."""
    command = [sys.executable, "-m", "img2parquet.cli", "run", str(job), "--runner", runner, "--json"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peaks: dict[int, tuple[str, float]] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended), daemon=True)
    watcher.start()
    try:
        said, words = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        ended.set()
        watcher.join()
    assert process.returncode == 0, words[-3000:]
    workers = [peak for name, peak in peaks.values() if name.startswith("ray::")]
    return Taken(
        driver_mb=max(peak for name, peak in peaks.values() if "img2parquet.cli" in name),
        worker_mb=max(workers, default=0.0),
        workers=len(workers),
        seconds=time.monotonic() - started,
        summary=json.loads(said),
    )


def _watch(root: int, peaks: dict[int, tuple[str, float]], ended: threading.Event) -> None:
    """Each process below `root`: its name and its peak."""
    while not ended.wait(LOOK_EACH_S):
        for pid in _below(root):
            with suppress(OSError, IndexError, ValueError):
                name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                status = Path(f"/proc/{pid}/status").read_text()
                peaks[pid] = name, max(_held_mb(name, status), peaks.get(pid, ("", 0.0))[1])


def _held_mb(name: str, status: str) -> float:
    def said(field: str) -> int:
        return int(status.partition(f"{field}:")[2].split(maxsplit=1)[0])

    return (said("VmRSS") - said("RssShmem") if name.startswith("ray::") else said("VmHWM")) / 1024


def _below(root: int) -> set[int]:
    parents = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
