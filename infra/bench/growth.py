"""Measure how a job's costs grow with its images (small model, tiny images) and with its parts (empty ones).

* Each number comes from a separate process, as a user starts it, measured from outside: CPU time and peak memory as
  the kernel reports them at its end, for the driver alone.
* The cost of an image is computed from the images beyond the next smaller job's, so that start-up drops out.
* A resumed job was killed 100 parts before its end. Finalizing reads the footer of each part that another session
  committed, once; starting does not.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from infra.bench import machine
from infra.bench.contest import Rules
from infra.bench.growth_inputs import commit_all_but, make_empty, make_images, make_model, write_job
from infra.bench.report import Bar, Report

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "pyarrow", "ray")
SAME_COST = 1 / 1.1  # an image of the largest job costs at most a tenth more than one of the next smaller
SAME_MEMORY = 0.9
LEAST_MS = 1e-3
LIMITS_S = {"plan": 15.0, "status": 10.0, "resume": 15.0, "run again": 15.0}  # of the largest job's parts


@dataclass(frozen=True)
class Sizes:
    images: Mapping[str, Sequence[int]]  # by runner
    per_shard: int
    parts: Sequence[int]
    left: int  # parts that a resumed job has to process
    turns: int  # of each local job but the largest


FULL = Sizes({"local": (1_000, 10_000, 100_000), "ray": (1_000, 10_000)}, 1000, (1_000, 10_000, 100_000), 100, 3)
QUICK = Sizes({"local": (40, 80, 160), "ray": (40,)}, 20, (10, 20, 40), 3, 1)


@dataclass(frozen=True)
class Taken:
    """One command: the kernel's numbers for its process, when it first reported its parts, and what it printed."""

    wall_s: float
    cpu_s: float  # since it told of its parts
    peak_mb: float
    until_planned_s: float
    said: str

    @property
    def summary(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.said)
        return made


def report(rules: Rules, threads: int, only: Sequence[str]) -> Report:
    sizes = QUICK if rules.quick else FULL
    load = machine.load()
    with tempfile.TemporaryDirectory(prefix="img2parquet-growth-") as folder:
        model = make_model(Path(folder) / "model")
        images = measure_images(Path(folder), model, sizes)
        parts = measure_parts(Path(folder), model, sizes)
    about = [
        f"{machine.cpu()}; load average {load} at the start, {machine.load()} at the end",
        machine.versions(PACKAGES),
        "images of 80x72 pixels, a LeViT of three blocks at 64 pixels in float32, 1,000 images to a part",
        "CPU and memory are those of the driver's process: with `local` all work is in it, with `ray` only the "
        "driver's; an image's CPU time is that of the images beyond the next smaller job's",
    ]
    return Report(
        name="growth",
        title="Growth with images and with parts",
        about=about,
        columns=IMAGE_COLUMNS,
        rows=[row for runner, taken in images.items() for row in image_rows(runner, taken)],
        bars=[*image_bars(images["local"]), *part_bars(parts)],
        agrees=all(taken.summary["rows_in"] == count for of in images.values() for count, taken in of.items()),
        notes=[PARTS_ABOUT, table(PART_COLUMNS, part_rows(parts))],
    )


# ---- images ------------------------------------------------------------------------------------------------------

IMAGE_COLUMNS = (
    "runner", "images", "until first result, s", "wall s", "images/s then", "CPU ms/image", "driver's peak MB",
)  # fmt: skip


def measure_images(folder: Path, model: Path, sizes: Sizes) -> dict[str, dict[int, Taken]]:
    """Measure the smaller jobs before and after the largest, so that rising load does not look like growth."""
    taken: dict[str, dict[int, Taken]] = {}
    for runner, counts in sizes.images.items():
        turns: dict[int, list[Taken]] = {count: [] for count in counts}
        for count in schedule(counts, sizes.turns if runner == "local" else 1):
            shards = folder / f"images-{count}"
            if not shards.exists():
                make_images(shards, count, sizes.per_shard)
            job = write_job(folder / "job.yaml", model, shards, folder / f"{runner}-{count}-{len(turns[count])}")
            turns[count].append(take("run", job, "--runner", runner, "--json"))
            _progress(f"{runner}, {count:,} images", turns[count][-1])
        taken[runner] = {count: median(of) for count, of in turns.items()}
    return taken


def schedule(counts: Sequence[int], turns: int) -> list[int]:
    """Order the turns: all smaller sizes `turns` times, the largest once, in the middle."""
    *smaller, largest = sorted(counts)
    before = (turns + 1) // 2
    return smaller * before + [largest] + smaller * (turns - before)


def median(turns: Sequence[Taken]) -> Taken:
    """Return the turn of median wall time, with the median CPU time: short jobs are noisy."""
    middle = sorted(turns, key=lambda turn: turn.wall_s)[len(turns) // 2]
    return replace(middle, cpu_s=statistics.median(turn.cpu_s for turn in turns))


def image_rows(runner: str, taken: Mapping[int, Taken]) -> list[list[str]]:
    costs = cost_ms(taken)
    return [
        [
            runner,
            f"{count:,}",
            f"{one.until_planned_s + one.summary['meter']['startup_s']:.1f}",
            f"{one.wall_s:.1f}",
            f"{count / one.summary['meter']['seconds']:,.0f}",
            f"{costs[count]:.3f}" if count in costs else "",
            f"{one.peak_mb:.0f}",
        ]
        for count, one in taken.items()
    ]


def cost_ms(taken: Mapping[int, Taken]) -> dict[int, float]:
    """Compute CPU milliseconds per image beyond the next smaller job's; at least `LEAST_MS`, since jobs of a second or
    two may show no difference."""
    return {
        more: max(LEAST_MS, (taken[more].cpu_s - taken[less].cpu_s) / (more - less) * 1e3)
        for less, more in pairwise(sorted(taken))
    }


def image_bars(taken: Mapping[int, Taken]) -> list[Bar]:
    costs, (*_, less, most) = cost_ms(taken), sorted(taken)
    return [
        Bar(f"cost of an image, {less:,} / {most:,}", costs[less] / costs[most], SAME_COST),
        Bar(f"driver's memory, {less:,} / {most:,}", taken[less].peak_mb / taken[most].peak_mb, SAME_MEMORY),
    ]


# ---- parts -------------------------------------------------------------------------------------------------------

PART_COLUMNS = (
    "empty parts", "plan, s", "status, s", "resume: until it works, s", "resumed job, s", "run again, s",
    "driver's peak MB",
)  # fmt: skip
PARTS_ABOUT = (
    "Jobs of empty parts, with the local runner. `status` and `resume` find all parts committed but 100; `resume` is "
    "until the first part is begun, `resumed job` the whole command with its end; `run again` finds all done. The "
    f"bars are limits over seconds at the largest size: {', '.join(f'{k} {v:g} s' for k, v in LIMITS_S.items())}."
)


def measure_parts(folder: Path, model: Path, sizes: Sizes) -> dict[int, dict[str, Taken]]:
    """Measure each command at each size, `plan` before anything is committed."""
    taken: dict[int, dict[str, Taken]] = {}
    for count in sizes.parts:
        shards, output = folder / f"empty-{count}", folder / f"parts-{count}"
        make_empty(shards, count)
        job = write_job(folder / "job.yaml", model, shards, output)
        of_size = taken[count] = {"plan": take("plan", job)}
        commit_all_but(job, sizes.left)
        of_size["status"] = take("status", output)
        of_size["resume"] = take("run", job, "--runner", "local", "--json")
        of_size["run again"] = take("run", job, "--runner", "local", "--json")
        for name, one in of_size.items():
            _progress(f"{count:,} empty parts, {name}", one)
    return taken


def part_rows(taken: Mapping[int, Mapping[str, Taken]]) -> list[list[str]]:
    return [
        [
            f"{count:,}",
            *(f"{one[name].wall_s:.1f}" for name in ("plan", "status")),
            f"{one['resume'].until_planned_s:.1f}",
            *(f"{one[name].wall_s:.1f}" for name in ("resume", "run again")),
            f"{one['resume'].peak_mb:.0f}",
        ]
        for count, one in taken.items()
    ]


def part_bars(taken: Mapping[int, Mapping[str, Taken]]) -> list[Bar]:
    most = max(taken)
    seconds = {name: one.wall_s for name, one in taken[most].items()}
    seconds["resume"] = taken[most]["resume"].until_planned_s
    return [Bar(f"{name}, {most:,} parts", limit_s / seconds[name], 1.0) for name, limit_s in LIMITS_S.items()]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [columns, ["---:"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


# ---- measuring ---------------------------------------------------------------------------------------------------


def take(*arguments: object) -> Taken:
    """Run `img2parquet ARGUMENTS`. Raises SystemExit with its last output when it fails."""
    command = [sys.executable, "-m", "img2parquet.cli", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as said:
        started_s = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.PIPE, text=True)
        memory = _Memory(process.pid)
        planned_s, planned_cpu_s, words = _watch(process, started_s)
        _, status, used = os.wait4(process.pid, 0)
        wall_s, process.returncode = time.perf_counter() - started_s, os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{words}\nerror: `{' '.join(command)}` failed with {process.returncode}")
        said.seek(0)
        cpu_s = used.ru_utime + used.ru_stime - planned_cpu_s
        return Taken(wall_s, cpu_s, memory.peak_mb(), planned_s, said.read())


def _watch(process: subprocess.Popen[str], started_s: float) -> tuple[float, float, str]:
    """Return wall and CPU seconds until it first reported its parts (0 if never), and its last output."""
    wall_s, cpu_s, words = 0.0, 0.0, list[str]()
    assert process.stderr is not None
    for line in process.stderr:
        words = [*words[-25:], line]
        if " parts " in line and not wall_s:
            wall_s, cpu_s = time.perf_counter() - started_s, _cpu_s(process.pid)
    return wall_s, cpu_s, "".join(words)


def _driver(pid: int) -> int:
    """Find the working process of a local job: the fork below its small supervisor."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_bytes() == command != b"":
                return int(child)
    return pid


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{_driver(pid)}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Memory:
    """Sample a process's peak memory until it ends. `ru_maxrss` would start from ours when it is forked."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak_kb = pid, 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def peak_mb(self) -> float:
        self.thread.join()
        return self.peak_kb / 1024

    def _run(self) -> None:
        with suppress(OSError):
            while re.search(r"VmHWM:", Path(f"/proc/{self.pid}/status").read_text()):
                with suppress(OSError):  # the driver ends before its supervisor
                    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{_driver(self.pid)}/status").read_text())
                    self.peak_kb = max(self.peak_kb, int(found[1]) if found else 0)
                time.sleep(0.02)


def _progress(what: str, taken: Taken) -> None:
    text = f"{what}: {taken.wall_s:.1f} s, CPU {taken.cpu_s:.1f} s, {taken.peak_mb:.0f} MB"
    print(text, file=sys.stderr, flush=True)
