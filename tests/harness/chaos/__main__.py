"""`python -m tests.harness.chaos`: seeded runs of the small job under fire, one summary line at the end."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tests.harness.chaos.warm  # noqa: F401 - before anything that reads it

# isort: split
from tests.harness.chaos.bed import Bed, make_input, run_undisturbed, upload
from tests.harness.chaos.forks import fork, result_of
from tests.harness.chaos.plans import KINDS, Plan, plan_of
from tests.harness.chaos.runs import Outcome, carry_out
from tests.harness.chaos.safeguards import SAFEGUARDS
from tests.harness.chaos.stores import BUCKET, Server


def main() -> int:
    arguments = _arguments()
    if arguments.without:
        SAFEGUARDS[arguments.without].turn_off()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    server = None if arguments.disk else Server()
    try:
        bed = _bed(folder, server)
        print(f"an undisturbed run takes {bed.seconds:.2f} s; everything lies in {folder}", flush=True)
        plans = list(_plans(arguments, bed))
        counts, failures = _all(plans, bed, folder, server, arguments.jobs, verbose=arguments.seed is not None)
    finally:
        if server:
            server.close()
    seconds = time.monotonic() - started
    if not failures and arguments.seed is None:
        shutil.rmtree(folder)
    for failure in failures:
        print(failure)
    if arguments.out:
        arguments.out.write_text(json.dumps(_record(counts, failures, seconds, arguments), indent=1) + "\n")
    print(_summary(counts, failures, seconds))
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one alone, verbosely; its folder is kept")
    parser.add_argument("--each", type=int, help="so many seeds of each kind of trouble")
    parser.add_argument("--kind", choices=list(KINDS), help="only seeds of this kind")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--disk", action="store_true", help="no runs on S3")
    parser.add_argument("--without", choices=list(SAFEGUARDS), help="turn a safeguard off, to see the runs fail")
    parser.add_argument("--out", type=Path, help="the counts as JSON")
    return parser.parse_args()


def _bed(folder: Path, server: Server | None) -> Bed:
    shards = {"disk": result_of(lambda: make_input(folder))}
    result_of(lambda: run_undisturbed(folder, shards["disk"], str(folder / "warm")))  # files read, code compiled
    started = time.monotonic()
    undisturbed = {"disk": result_of(lambda: run_undisturbed(folder, shards["disk"], str(folder / "undisturbed")))}
    seconds = time.monotonic() - started
    if server:
        os.environ["AWS_ENDPOINT_URL"] = server.url
        shards["s3"] = result_of(lambda: upload(folder, BUCKET))
        undisturbed["s3"] = result_of(lambda: run_undisturbed(folder, shards["s3"], f"{BUCKET}/undisturbed"))
    return Bed(folder, shards, undisturbed, seconds)


def _plans(arguments: argparse.Namespace, bed: Bed) -> Iterable[Plan]:
    if arguments.seed is not None:
        yield plan_of(arguments.seed, bed.seconds)
        return
    every = (plan_of(seed, bed.seconds) for seed in itertools.count(arguments.first))
    possible = (plan for plan in every if plan.store in bed.shards)
    if arguments.each is None:
        yield from itertools.islice((p for p in possible if arguments.kind in (None, p.kind)), arguments.runs)
        return
    wanted = Counter({kind: arguments.each for kind in KINDS if kind != "store" or "s3" in bed.shards})
    while +wanted:
        plan = next(possible)
        if wanted[plan.kind] > 0:
            wanted[plan.kind] -= 1
            yield plan


def _all(
    plans: list[Plan], bed: Bed, folder: Path, server: Server | None, jobs: int, verbose: bool
) -> tuple[Counter[str], list[str]]:
    """Counts and failures. Each of `jobs` processes takes every n-th plan, and leaves what it found in a file."""
    children = []
    for number in range(jobs):
        found = folder / f"found-{number}"

        def work(mine: list[Plan] = plans[number::jobs], found: Path = found) -> None:
            found.write_bytes(pickle.dumps(_some(mine, bed, folder, server, verbose)))

        children.append((fork(work), found))
    counts, failures = Counter[str](), list[str]()
    for child, found in children:
        status = os.waitpid(child, 0)[1]
        if status:
            failures.append(f"a worker of the suite ended with {os.waitstatus_to_exitcode(status)}")
            continue
        more, failed = pickle.loads(found.read_bytes())
        counts.update(more)
        failures += failed
    return counts, failures


def _some(
    plans: list[Plan], bed: Bed, folder: Path, server: Server | None, verbose: bool
) -> tuple[Counter[str], list[str]]:
    counts, failures = Counter[str](), list[str]()
    for done, plan in enumerate(plans):
        if verbose:
            print(plan, flush=True)
        place = folder / f"seed-{plan.seed}"
        outcome = _one(plan, bed, place, server)
        counts.update(outcome.counts)
        if outcome.problems:
            failures.append(_told(plan, outcome))
            print(failures[-1], flush=True)
        elif not verbose:
            shutil.rmtree(place)
        if done % 50 == 49:
            print(f"  {done + 1} of {len(plans)} plans of this process", flush=True)
    return counts, failures


def _one(plan: Plan, bed: Bed, place: Path, server: Server | None) -> Outcome:
    try:
        return carry_out(plan, bed, place, server)
    except Exception as error:
        return Outcome([f"{type(error).__name__}: {error}"])


def _told(plan: Plan, outcome: Outcome) -> str:
    shown = "\n  ".join(problem[:1500] for problem in outcome.problems[:5])
    return f"FAILED {plan}\n  {shown}\n  again: python -m tests.harness.chaos --seed {plan.seed}"


def _record(counts: Counter[str], failures: list[str], seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    versions = {package: version(package) for package in ("torch", "pyarrow", "s3fs", "moto")}
    return {
        "counts": dict(sorted(counts.items())),
        "failures": failures,
        "seconds": round(seconds),
        "processes": arguments.jobs,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": sys.version.split()[0], **versions},
    }


def _summary(counts: Counter[str], failures: list[str], seconds: float) -> str:
    kills = sum(n for name, n in counts.items() if name.startswith("kills "))
    faults = sum(n for name, n in counts.items() if name.startswith("fault "))
    stops, clocks = counts["drivers stopped and continued"], counts["drivers with a jumping clock"]
    return (
        f"chaos: {counts['runs']} runs, {counts['drivers']} drivers, {kills} kills, {stops} stops, {clocks} clocks, "
        f"{faults} storage faults, {counts['bad inputs']} bad inputs, {counts['rows checked']} rows checked, "
        f"rows lost = {counts['rows lost']}, rows twice = {counts['rows twice']}, {len(failures)} failures, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
