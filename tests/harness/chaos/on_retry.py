"""`python -m tests.harness.chaos.on_retry`: kill a retry at every step of each object it creates, then rerun it.

    --each 1      kills at every step of each object; beyond, so many seeded runs: at any moment, in turn, two at once
    --every 3     every third of these runs alone
    --store s3    on a store alone, and not also on a disk

After each, the output must be the undisturbed retry's, file by file, `verify` must find nothing, and whoever looked in
between must have seen no row twice. `on_extend` asks the same of an extension.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tests.harness.chaos.warm  # noqa: F401 - before anything that reads it

# isort: split
from img2parquet.dataset.commit import Output
from img2parquet.engine.driver import run
from img2parquet.engine.retry import retry
from img2parquet.job import parse_job
from img2parquet.results.verify import verify
from img2parquet.storage import Store, join
from tests.harness.chaos.bed import count_keys, read_parts
from tests.harness.chaos.drivers import Blow, Driver
from tests.harness.chaos.forks import result_of
from tests.harness.chaos.plans import STEPS
from tests.harness.chaos.reader import Reader
from tests.harness.chaos.runs import Outcome, wait_for
from tests.harness.chaos.stores import BUCKET, Server
from tests.support.small_job import job_dict, jpeg, make_checkpoint

ROWS, PER_PART = 24, 4
RETRIED = r"-retry1\.parquet"
GONE, STAYS = {1, 2, 9, 13, 21, 22}, {13, 22}  # not there when the job ran; nor when it is tried again
OBJECTS = ("_probe-", "_plan-1", "_run-1", "PART", "_meter-", "_rejects-1", "_manifest-1", "_SUCCESS-1")
UNLIKE = ("_meter-", "_manifest-1", "_SUCCESS-1", "_probe-")  # they hold what was measured, or a digest of it
LATER = re.compile(r"-(retry)?[2-9](\.\w+)?$")
LIMIT_S = 300.0
Wave = tuple[Blow | None, ...]


@dataclass(frozen=True)
class Subject:
    """A command that adds one generation to an output. `make(folder, root)`: the input and the job's output, then what
    the generation is about; `add(root, uri)`: the command."""

    name: str
    make: Callable[[Path, str], None]
    add: Callable[[str, str], object]
    part: str  # a pattern of the names of the files that it adds
    rows: int  # of the output in the end, of each of two models
    unlike: tuple[str, ...] = UNLIKE

    @property
    def objects(self) -> list[str]:
        return [self.part if name == "PART" else name for name in OBJECTS]


@dataclass(frozen=True)
class Bed:
    """root: a folder, or a prefix; below it the input, and `base`: the output of the job, before any generation."""

    subject: Subject
    root: str
    undisturbed: dict[str, str]
    seconds: float


def main(subject: Subject | None = None) -> int:
    subject = subject or Subject("retry", _make, lambda _, uri: retry(uri, runner="local"), RETRIED, ROWS - len(STAYS))
    name = subject.name
    parser = argparse.ArgumentParser(prog=f"python -m tests.harness.chaos.on_{name}", description=__doc__)
    parser.add_argument("--each", type=int, default=1, help="1: every step once; more: so many seeded runs as well")
    parser.add_argument("--every", type=int, default=1, help="3: every third of these runs")
    parser.add_argument("--store", choices=["disk", "s3"], help="this one alone")
    parser.add_argument("--out", type=Path, help="the counts as JSON")
    arguments = parser.parse_args()
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix=f"{name}-"))
    counts, failures, server = Counter[str](), list[str](), None
    try:
        for store in (arguments.store,) if arguments.store else ("disk", "s3"):
            if store == "s3":
                server = Server()
                os.environ["AWS_ENDPOINT_URL"] = server.url
            bed = _bed(subject, folder, str(folder) if store == "disk" else f"{BUCKET}/{name}")
            plans = enumerate(_plans(subject, store, bed.seconds, arguments.each - 1))
            for number, waves in islice(plans, 0, None, arguments.every):
                outcome = _one(bed, waves, folder / f"{store}-{number}", server)
                counts.update({"runs": 1, f"runs on {store}": 1, **outcome.counts})
                told = "; then ".join(" with ".join(str(blow or f"a quiet {name}") for blow in wave) for wave in waves)
                failures += [f"FAILED on {store}: {told}: {problem}" for problem in outcome.problems]
    finally:
        if server:
            server.close()
    for failure in failures:
        print(failure)
    if not failures:
        shutil.rmtree(folder)
    seconds = time.monotonic() - started
    if arguments.out:
        record = {"counts": dict(sorted(counts.items())), "failures": failures, "seconds": round(seconds)}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{name}: {counts['runs']} runs, {counts['kills']} kills, {counts['rows checked']} rows checked, rows lost = "
        f"{counts['rows lost']}, rows twice = {counts['rows twice']}, {len(failures)} failures, {seconds:.0f} s"
    )
    return 1 if failures else 0


def _plans(subject: Subject, store: str, seconds: float, seeded: int) -> Iterator[Sequence[Wave]]:
    for name in subject.objects:
        for step in STEPS[store]:
            yield [(Blow("kill", step, name, nth),) for nth in ((2, 1) if name == subject.part else (1,))]
    yield [(None, None)]
    for seed in range(seeded):
        rng = random.Random(seed)
        yield [
            tuple(_blow(subject, rng, store, seconds) for _ in range(rng.choice((1, 1, 2))))
            for _ in range(rng.choice((1, 3)))
        ]


def _blow(subject: Subject, rng: random.Random, store: str, seconds: float) -> Blow | None:
    if rng.random() < 0.2:
        return None
    if rng.random() < 0.4:
        return Blow("kill", after_s=rng.uniform(0.0, 1.1 * seconds))
    return Blow("kill", rng.choice(STEPS[store]), rng.choice(subject.objects), 1)


def _bed(subject: Subject, folder: Path, root: str) -> Bed:
    result_of(lambda: subject.make(folder, root))
    started = time.monotonic()
    undisturbed = result_of(lambda: _undisturbed(subject, root))
    return Bed(subject, root, undisturbed, time.monotonic() - started)


def _make(folder: Path, root: str) -> None:
    """The input, the job's output, and then what was mended."""
    if not (folder / "model").exists():
        make_checkpoint(folder / "model")
    store = Store()
    for number in set(range(ROWS)) - GONE:
        store.create(join(root, f"img/{number}.jpg"), jpeg(number))
    store.create(join(root, "list.csv"), ("uri\n" + "".join(f"img/{number}.jpg\n" for number in range(ROWS))).encode())
    document = job_dict("unused", folder / "model", join(root, "base"), reject_limit=1.0)
    document["input"] = {"kind": "table", "uris": [join(root, "list.csv")]}
    document["output"]["rows_per_part"] = PER_PART
    document["models"].append({**document["models"][0], "name": "twin", "outputs": [{"kind": "logits"}]})
    run(parse_job(document), "local")
    for number in GONE - STAYS:
        store.create(join(root, f"img/{number}.jpg"), jpeg(number))


def _undisturbed(subject: Subject, root: str) -> dict[str, str]:
    uri = join(root, "undisturbed")
    _copy(root, uri)
    subject.add(root, uri)
    assert verify(uri) == []
    return _digests(subject, uri)


def _copy(root: str, uri: str) -> None:
    """The job's output to another place: nothing in it says where it lies."""
    output = Output.at(join(root, "base"))
    for name, entry in output.files().items():
        output.store.create(join(uri, name), output.store.read(entry.uri))


def _digests(subject: Subject, uri: str) -> dict[str, str]:
    """Of what the first generation wrote; where a retry ended before its blow, the same command began another, of the
    rest."""
    output = Output.at(uri)
    files = {
        name: entry
        for name, entry in output.files().items()
        if not name.startswith(subject.unlike) and not LATER.search(name)
    }
    return {name: hashlib.sha256(output.store.read(entry.uri)).hexdigest() for name, entry in files.items()}


def _one(bed: Bed, waves: Sequence[Wave], place: Path, server: Server | None) -> Outcome:
    place.mkdir()
    uri, outcome = join(bed.root, f"out-{place.name}"), Outcome()
    result_of(lambda: _copy(bed.root, uri))
    reader = Reader(uri, server.url if server else "")
    try:
        for number, wave in enumerate([*waves, (None,)]):
            drivers = [
                Driver.doing(lambda _: bed.subject.add(bed.root, uri), blow, place / f"{number}-{n}.log")
                for n, blow in enumerate(wave)
            ]
            wait_for(drivers, LIMIT_S)
            for driver in drivers:
                if driver.code == -9 and driver.blow:
                    outcome.counts["kills"] += 1
                elif driver.code != 0:
                    outcome.problems.append(f"ended with {driver.code}: {driver.log.read_text()[-1500:]}")
    finally:
        outcome.problems += reader.stop().problems
    problems, counts = result_of(lambda: _judged(bed, uri))
    outcome.problems += problems
    outcome.counts.update(counts)
    return outcome


def _judged(bed: Bed, uri: str) -> tuple[list[str], dict[str, int]]:
    """Problems, and rows checked, lost and twice."""
    problems, digests, keys = verify(uri), _digests(bed.subject, uri), count_keys(read_parts(uri))
    if digests != bed.undisturbed:
        names = digests.keys() | bed.undisturbed.keys()
        differ = sorted(name for name in names if digests.get(name) != bed.undisturbed.get(name))
        problems.append(f"not as after an undisturbed {bed.subject.name}: {', '.join(differ[:5])}")
    lost, twice = 2 * bed.subject.rows - len(keys), sum(keys.values()) - len(keys)
    if lost or twice:
        problems.append(f"{lost} rows lost, {twice} rows twice")
    return problems, {"rows checked": len(keys), "rows lost": lost, "rows twice": twice}


if __name__ == "__main__":
    sys.exit(main())
