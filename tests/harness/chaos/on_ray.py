"""Kill Ray drivers, workers and nodes: `python -m tests.harness.chaos.on_ray [--runs N] [--seed S]`.

| kind | is killed | what must come of it |
|---|---|---|
| driver | the driver, and with it the cluster that it started | the same command does the rest |
| workers | two processes that read or embed | the job ends by itself, or asks to be run again, which is counted |
| node | a whole second raylet with all its workers | the same |
| drain, terminate, add, replace | see `two_nodes.py` | the job ends by itself, and uses what joined |
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import tests.harness.chaos.environment  # noqa: F401 - before anything that reads it

# isort: split
import yaml

from tests.harness.chaos.bed import Bed, make_input, run_undisturbed
from tests.harness.chaos.forks import result_of
from tests.harness.chaos.processes import descendants, started
from tests.harness.chaos.reader import Reader
from tests.harness.chaos.runs import Outcome, Place, compare
from tests.support.patched_workers import before_each_batch

SHARDS, PER_SHARD = 60, 10
KINDS = ("driver", "workers", "node", "drain", "terminate", "add", "replace")
OF_NODES = KINDS[2:]
SLOW = "time.sleep(0.2)"  # before each batch, so that a node has the time to come
STALL_S = 60.0
LIMIT_S = 900.0  # nothing here takes a tenth of it on a quiet machine
ASKS_FOR_MORE = "run the same command again"
DRIVE = [sys.executable, "-m", "img2parquet.cli", "run"]
DRIVE_TWO_NODES = [sys.executable, "-m", "tests.harness.chaos.two_nodes"]


@dataclass
class Job:
    """A driver in a process of its own, and every process that it or one of its children has started."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    family: dict[int, str] = field(default_factory=dict)  # pid -> when it started

    @classmethod
    def start(cls, command: list[str], document: Path, out: Path, log: Path, what: str = "") -> Job:
        """what: happens to the second node."""
        environment = dict(os.environ)
        if what:
            path = before_each_batch(document.parent / "site", SLOW)
            environment |= {"CHAOS_NODE": what, "CHAOS_OUT": str(out), "PYTHONPATH": path}
        with log.open("ab") as words:
            process = subprocess.Popen(
                [*command, str(document), "--runner", "ray"], stdout=words, stderr=words, env=environment
            )
        return cls(process, out, log)

    def wait_for_parts(self, count: int) -> bool:
        """Until so many are there; False where it ended before."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if len(list(self.out.glob("model=*/part-*.parquet"))) >= count:
                return True
            time.sleep(0.01)
        return False

    def look(self) -> dict[int, str]:
        """The family as it is now: pid -> title."""
        now = dict(descendants(self.process.pid))
        self.family.update({pid: started(pid) for pid in now})
        return now

    def wait(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LIMIT_S)
        return self.process.returncode

    def end(self) -> None:
        """It and all that it left behind, which are ours: the same process ids with the same start."""
        self.look()
        for pid in (self.process.pid, *self.family):
            if pid == self.process.pid or self.family[pid] == started(pid) != "":
                _kill(pid)
        self.process.wait()


def one(seed: int, bed: Bed, folder: Path) -> Outcome:
    rng, kind, outcome = random.Random(seed), KINDS[seed % len(KINDS)], Outcome()
    what = kind if kind in OF_NODES[1:] else ""
    folder.mkdir()
    place = Place(str(folder / "out"), folder)
    document = folder / "job.yaml"
    made = bed.document("disk", place.uri, {})
    made["resources"] |= {"workers": "auto", "stall_s": STALL_S} if what else {}
    document.write_text(yaml.safe_dump(made))
    reader = Reader(place.uri, "")
    for number in range(4):
        command = DRIVE_TWO_NODES if kind in OF_NODES and number == 0 else DRIVE
        job = Job.start(command, document, folder / "out", folder / f"{number}.log", what if number == 0 else "")
        try:
            if not what and number < (2 if kind == "driver" else 1):
                _strike(kind, job, rng, outcome)
            code = job.wait()
        finally:
            job.end()
        outcome.counts["drivers"] += 1
        said = job.log.read_text()
        if what and number == 0:
            _judge(what, said, outcome)
        if code == 0:
            break
        if code == 1 and ASKS_FOR_MORE in said and kind != "driver":
            outcome.counts[f"jobs that lost a {kind.removesuffix('s')} and asked to be run again"] += 1
        elif code != -signal.SIGKILL:
            outcome.problems.append(f"{kind}: a driver ended with {code}: {said[-2000:]}")
            break
    seen = reader.stop()
    outcome.problems += seen.problems
    problems, counts = result_of(lambda: compare(bed, "disk", place))
    outcome.problems += problems[:5]
    outcome.counts.update({"runs": 1, f"runs of {kind}": 1, "reader's looks": seen.looks, **counts})
    return outcome


def _judge(what: str, said: str, outcome: Outcome) -> None:
    used = "chaos: the new node is used" in said
    if f"chaos: {what} done" not in said or used != (what in ("add", "replace")):
        outcome.problems.append(f"{what} did not happen as it should: {said[-2000:]}")
    outcome.counts[f"nodes of kind {what}"] += 1
    restarts = ("starting the incomplete parts again", "parts again with new workers")
    outcome.counts["graphs that began anew"] += sum(map(said.count, restarts))


def _strike(kind: str, job: Job, rng: random.Random, outcome: Outcome) -> None:
    before = len(list(job.out.glob("model=*/part-*.parquet")))
    for _ in range(2 if kind == "workers" else 1):
        before += rng.randint(1, 20)
        if not job.wait_for_parts(before):
            return
        victim = _victim(kind, job, rng)
        if victim and _kill(victim):
            outcome.counts[f"kills of a {kind.removesuffix('s')}"] += 1


def _victim(kind: str, job: Job, rng: random.Random) -> int | None:
    family = job.look()
    if kind == "driver":
        return job.process.pid
    if kind == "node":
        raylets = sorted(pid for pid, title in family.items() if "raylet/raylet" in title.split()[0])
        return raylets[-1] if len(raylets) == 2 else None
    workers = sorted(pid for pid, title in family.items() if title.startswith("ray::") and "IDLE" not in title)
    return rng.choice(workers) if workers else None


def _kill(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.chaos.on_ray")
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="the first seed; kinds take turns, seed by seed")
    parser.add_argument("--seed", type=int, help="this one alone; its folder is kept")
    parser.add_argument("--out", type=Path, help="the counts as JSON, after each run")
    arguments = parser.parse_args()
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-ray-"))
    pattern = result_of(lambda: make_input(folder, SHARDS, PER_SHARD))
    quiet = result_of(lambda: run_undisturbed(folder, pattern, str(folder / "undisturbed"), SHARDS, PER_SHARD))
    bed = Bed(folder, {"disk": pattern}, {"disk": quiet})
    counts, failures = Counter[str](), list[str]()
    seeds = range(arguments.first, arguments.first + arguments.runs) if arguments.seed is None else [arguments.seed]
    for seed in seeds:
        outcome = one(seed, bed, folder / f"seed-{seed}")
        counts.update(outcome.counts)
        failures += [f"FAILED seed {seed}: {problem}" for problem in outcome.problems]
        said = "; ".join(outcome.problems)[:2000] or "well"
        print(f"seed {seed} ({KINDS[seed % len(KINDS)]}) after {time.monotonic() - began:.0f} s: {said}", flush=True)
        if arguments.out:
            record = {"counts": dict(sorted(counts.items())), "failures": failures}
            record["seconds"] = round(time.monotonic() - began)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if not failures and arguments.seed is None:
        shutil.rmtree(folder)
    kills = sum(n for name, n in counts.items() if name.startswith("kills "))
    print(
        f"chaos on ray: {counts['runs']} runs, {kills} kills, {counts['bad inputs']} bad inputs, "
        f"{counts['rows checked']} rows checked, rows lost = {counts['rows lost']}, "
        f"rows twice = {counts['rows twice']}, {len(failures)} failures, {time.monotonic() - began:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
