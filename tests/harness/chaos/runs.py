"""A plan carried out in a folder or a bucket, and what came of it: problems, and counts of everything that happened."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from img2parquet.dataset.commit import Output
from img2parquet.results.verify import find_problems
from tests.harness.chaos.bed import Bed, count_keys, read_parts
from tests.harness.chaos.drivers import GAVE_UP, Blow, Driver
from tests.harness.chaos.forks import result_of
from tests.harness.chaos.plans import Plan
from tests.harness.chaos.reader import Reader
from tests.harness.chaos.stores import BUCKET, Proxy, Server

LIMIT_S = 600.0  # of one wave: nothing here takes a hundredth of it, but a machine may be asleep
PEACE_TRIES = 3
OUR_ERRORS = {"AccessDenied", "JobFailed", "OutcomeUnknown", "StorageError"}
ENDED_WELL = {
    "quiet": "drivers that ended by themselves",
    "kill": "drivers that ended before their kill",
    "term": "drivers that ended before their SIGTERM",
    "stop": "drivers stopped and continued",
    "clock": "drivers with a jumping clock",
    "full": "drivers that ended before the disk was full",
}
STOPPED = (143, -15)  # the latter before it listened
CLIENT = {"backoff_s": 0.005, "read_timeout_s": 2.0}


@dataclass
class Outcome:
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class Place:
    """Where one run writes, and how its drivers reach it."""

    uri: str
    folder: Path  # for logs
    options: Mapping[str, Any] = field(default_factory=dict)
    proxy: Proxy | None = None
    server: Server | None = None

    @classmethod
    def of(cls, plan: Plan, folder: Path, server: Server | None) -> Place:
        folder.mkdir(parents=True)
        if plan.store == "disk":
            return cls(str(folder / "out"), folder)
        assert server, "a plan on S3 needs a server"
        uri = f"{BUCKET}/out-{plan.seed}-{time.time_ns()}"
        if not plan.faults:
            return cls(uri, folder, {"endpoint_url": server.url, **CLIENT}, None, server)
        proxy = Proxy(server.url, plan.faults, plan.seed)
        return cls(uri, folder, {"endpoint_url": proxy.url, **CLIENT}, proxy, server)


def carry_out(plan: Plan, bed: Bed, folder: Path, server: Server | None = None) -> Outcome:
    outcome, place = Outcome(), Place.of(plan, folder, server)
    reader = Reader(place.uri, server.url if server else "")
    try:
        for number, wave in enumerate(plan.waves):
            drivers = _wave(plan, bed, place, wave, f"{number}")
            _judge(drivers, outcome, may_give_up=bool(plan.faults) or plan.kind == "full")
        if place.proxy:
            place.proxy.set([])
        _finish(plan, bed, place, outcome)
    finally:
        seen = reader.stop()
        if place.proxy:
            outcome.counts.update({f"fault {kind}": n for kind, n in place.proxy.close().items()})
    outcome.problems += seen.problems
    outcome.counts.update({"reader's looks": seen.looks, "files read by it": seen.files})
    if not outcome.problems:
        problems, counts = result_of(lambda: compare(bed, plan.store, place))
        outcome.problems += problems
        outcome.counts.update(counts)
    outcome.counts.update({"runs": 1, f"runs of {plan.kind}": 1, f"runs on {plan.store}": 1})
    return outcome


def _wave(plan: Plan, bed: Bed, place: Place, blows: Sequence[Blow | None], name: str) -> list[Driver]:
    """Drivers at once; one that will be stopped is met by the others only then, and goes on when they have ended."""
    document = bed.document(plan.store, place.uri, place.options)

    def start(number: int, blow: Blow | None) -> Driver:
        return Driver.start(document, blow, place.folder / f"{name}-{number}.log", careful=plan.careful)

    first = [start(n, blow) for n, blow in enumerate(blows) if blow and blow.what == "stop"]
    wait_for(first)
    others = [start(n, blow) for n, blow in enumerate(blows) if not blow or blow.what != "stop"]
    wait_for(others)
    for driver in first:
        if driver.is_stopped:
            driver.go_on()
    wait_for(first)
    return first + others


def wait_for(drivers: Sequence[Driver], limit_s: float = LIMIT_S) -> None:
    """Until each has ended or is stopped. One that does neither is killed, and has no code."""
    deadline = time.monotonic() + limit_s
    while any(driver.code is None and not driver.is_stopped for driver in drivers):
        for driver in drivers:
            if driver.code is None and not driver.is_stopped:
                driver.look()
        if time.monotonic() > deadline:
            for driver in drivers:
                driver.end()
            return
        time.sleep(0.002)


def _judge(drivers: Sequence[Driver], outcome: Outcome, may_give_up: bool) -> None:
    for driver in drivers:
        outcome.counts["drivers"] += 1
        what = driver.blow.what if driver.blow else "quiet"
        if driver.code == -9 and driver.blow and what == "kill":
            outcome.counts[f"kills {_where(driver.blow)}"] += 1
        elif driver.code in STOPPED and what == "term":
            outcome.counts["drivers that SIGTERM ended"] += 1
        elif driver.code == 0:
            outcome.counts[ENDED_WELL[what]] += 1
        elif driver.code == GAVE_UP and may_give_up:
            outcome.counts["drivers that gave up with one error"] += 1
            _check_error(driver, outcome)
        else:
            said = driver.log.read_text().strip()[-2000:] if driver.log.exists() else ""
            outcome.problems.append(f"a driver ({driver.blow or 'quiet'}) ended with {driver.code}: {said}")


def _where(blow: Blow) -> str:
    return "at any moment" if blow.after_s is not None else f"at `{blow.step}`"


def _check_error(driver: Driver, outcome: Outcome) -> None:
    """One error of ours, and nothing else: no traceback, no warning of a library."""
    said = driver.log.read_text()
    if "Traceback" in said or said.splitlines()[0].partition(":")[0] not in OUR_ERRORS:
        outcome.problems.append(f"not one clear error: {said[-2000:]}")


def _finish(plan: Plan, bed: Bed, place: Place, outcome: Outcome) -> None:
    """The same command until it ends well, which it does at once when the store does."""
    for number in range(PEACE_TRIES):
        drivers = _wave(plan, bed, place, [None], f"peace-{number}")
        _judge(drivers, outcome, may_give_up=False)
        if drivers[0].code == 0 or outcome.problems:
            return


def compare(bed: Bed, store: str, place: Place) -> tuple[list[str], dict[str, int]]:
    """Problems, and rows checked, lost and twice: against `verify`, and against the undisturbed run byte for byte."""
    output, undisturbed = Output.at(place.uri), bed.undisturbed[store]
    problems = find_problems(output)
    files = read_parts(place.uri)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if digests != undisturbed.digests:
        names = digests.keys() | undisturbed.digests.keys()
        wrong = sorted(name for name in names if digests.get(name) != undisturbed.digests.get(name))
        problems.append(f"not as in an undisturbed run: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    counts = count_keys(files)
    lost, twice = undisturbed.keys - counts.keys(), sum(counts.values()) - len(counts)
    if lost or twice or counts.keys() - undisturbed.keys:
        problems.append(f"{len(lost)} rows lost, {twice} rows twice")
    if place.server:
        for entry in output.files().values():
            output.store.delete(entry.uri)  # the server holds everything in memory
    done = {"rows checked": len(counts), "bad inputs": undisturbed.bad, "rows lost": len(lost), "rows twice": twice}
    return problems, done
