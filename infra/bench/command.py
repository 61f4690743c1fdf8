"""Measure a command: wall seconds, CPU seconds of all its processes, and the share of the processors others used.

`run` starts this file as a separate process, which adopts what the command leaves behind (Linux: child subreaper):
Ray's workers are no longer its children when they end. Some parents (raylet) never ask what a child has used, and then
the kernel reports it to nobody: so the whole tree is also sampled every `LOOK_S`.

Two sizes of one job separate start-up from the steady state: (N2 - N1) / (t2 - t1) images per second, for any tool.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.bench.contest import PAUSE_S, Record, Rules, Turn, busy_s

PR_SET_CHILD_SUBREAPER = 36
LEFT_BEHIND_S = 15.0  # time for the command's processes to end by themselves
LOOK_S = 0.1
PATIENCE = 3
ROOT = Path(__file__).parents[2]


@dataclass
class Pair:
    """One contestant's turns at both sizes; results are computed from their medians."""

    images: tuple[int, int]
    small: Record = field(default_factory=lambda: Record(np.empty(0)))
    large: Record = field(default_factory=lambda: Record(np.empty(0)))

    @property
    def clean(self) -> int:
        return min(self.small.clean, self.large.clean)

    @property
    def images_per_s(self) -> float:
        """Compute images per second; NaN when the large job took no longer than the small one."""
        more_s = self.large.wall_s - self.small.wall_s
        return self._more / more_s if more_s > 0 else math.nan

    @property
    def cpu_ms_per_image(self) -> float:
        return (self.large.cpu_s - self.small.cpu_s) / self._more * 1e3

    @property
    def startup_s(self) -> float:
        return self.small.wall_s - self.images[0] / self.images_per_s

    @property
    def _more(self) -> int:
        return self.images[1] - self.images[0]


Take = Callable[[int], Turn]  # one turn with this many images


def take_turns(
    takes: Mapping[str, Take], pairs: Mapping[str, Pair], rules: Rules, rounds: int, pause_s: float = PAUSE_S
) -> None:
    """Repeat until each of `takes` has `rounds` clean turns at both sizes, or has had `PATIENCE` times as many."""
    for _ in range(rounds * (1 if rules.quick else PATIENCE)):
        wanting = [name for name in takes if rules.quick or pairs[name].clean < rounds]
        for name in wanting:
            for record, images in zip((pairs[name].small, pairs[name].large), pairs[name].images, strict=True):
                if rules.quick or record.clean < rounds:
                    record.turns.append(takes[name](images))
        if not rules.quick and any(pairs[name].clean < rounds for name in wanting):
            time.sleep(pause_s)


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, limit_s: float = 900) -> Turn:
    """Run one turn. Raises SystemExit with the end of the command's log when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    watched = [sys.executable, "-m", "infra.bench.command", str(log), str(limit_s), *command]
    done = subprocess.run(watched, cwd=ROOT, env={**_clean_environment(), **(env or {})}, stdout=subprocess.PIPE)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{tail}\nerror: `{' '.join(command)}` failed with {done.returncode}; its log is {log}")
    return Turn(**json.loads(done.stdout))


def _clean_environment() -> dict[str, str]:
    """Return the environment without thread counts: a user who runs the command has none set."""
    return {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def main(log: str, limit_s: str, *command: str) -> int:
    """Watch a command: print its turn as JSON, and exit with its code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    busy_before_s, started_s = busy_s(), time.perf_counter()
    tree = _Tree()
    tree.start()
    with Path(log).open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=float(limit_s))
    wall_s = time.perf_counter() - started_s
    if process.poll() is None:
        _end(process.pid)
    _reap()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = max(used.ru_utime + used.ru_stime, tree.cpu_s)
    watched_s = (time.perf_counter() - started_s) * (os.cpu_count() or 1)
    foreign = max(0.0, busy_s() - busy_before_s - cpu_s) / watched_s
    print(json.dumps(asdict(Turn(wall_s, cpu_s, foreign))))
    return 124 if process.returncode is None else process.returncode


class _Tree(threading.Thread):
    """Track what each process below this one had used when it was last seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used_s: dict[tuple[int, str], float] = {}  # by process id and start time: ids are reused

    @property
    def cpu_s(self) -> float:
        return sum(self.used_s.values())

    def run(self) -> None:
        while True:
            self._look()
            time.sleep(LOOK_S)

    def _look(self) -> None:
        found = dict(filter(None, map(_process, Path("/proc").iterdir())))
        ours = {os.getpid()}
        while more := {pid for pid, one in found.items() if one.parent in ours} - ours:
            ours |= more
        for pid in ours - {os.getpid()}:
            self.used_s[pid, found[pid].began] = found[pid].used_s


class _Process(NamedTuple):
    parent: int
    began: str
    used_s: float


def _process(folder: Path) -> tuple[int, _Process] | None:
    """Read an entry of /proc; None if it is not, or no longer, a process."""
    if not folder.name.isdigit():
        return None
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()  # the name before it may contain anything
    except OSError:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return int(folder.name), _Process(int(fields[1]), fields[19], ticks / os.sysconf("SC_CLK_TCK"))


def _reap() -> None:
    """Wait for adopted processes, and end those that remain."""
    give_up_s = time.monotonic() + LEFT_BEHIND_S
    with suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                time.sleep(0.02)
            if time.monotonic() > give_up_s:
                for child in _children():
                    _end(child)


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
