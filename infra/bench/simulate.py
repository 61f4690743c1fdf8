"""Measure a driver under a very large job, with reading and model stubbed: time, memory, and storage requests.

    python -m infra.bench simulate [--shards 1000 10000 100000] [--images 10000] [--left 100] [--out FOLDER]

* Everything a driver does is real: listing and planning 1e5 shards, collecting, encoding and committing a part for
  each, resuming, finalizing, status, verifying. Only the workers' results are made up: 1e4 rows per shard.
* Each step is a process of its own, so that its memory is its own. Storage is this machine's disk, with every request
  counted as for an object store: one LIST per 1,000 names, one GET for each whole or ranged read.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from img2parquet.batch import Embedded, Work
from img2parquet.dataset.commit import Output
from img2parquet.dataset.plan import identities, make_plan
from img2parquet.engine import driver
from img2parquet.inference.capabilities import Capabilities, probe_capabilities
from img2parquet.job import JobSpec, parse_job
from img2parquet.results.reader import status
from img2parquet.results.verify import verify
from img2parquet.runners.base import Runner
from img2parquet.runners.local import LocalRunner, LocalStream
from img2parquet.schema import Part
from img2parquet.storage import Entry, Store
from img2parquet.storage.backend import Backend
from infra.bench import machine
from infra.bench.growth_inputs import make_model
from infra.bench.report import Bar, Report

ROOT = Path(__file__).parents[2]
FULL, QUICK = (1_000, 10_000, 100_000), (50, 100)
NAMES_PER_LIST = 1000
PRICES = {"PUT": 5.0, "LIST": 5.0, "GET": 0.4, "HEAD": 0.4, "DELETE": 0.0}  # dollars for a million requests
PRICED = "S3 Standard, us-east-1, list prices as published in 2025: $0.005 for 1,000 PUT or LIST, $0.0004 for 1,000 GET"
STEPS = ("plan", "work", "resume", "status", "again", "verify")
REQUESTS = ("LIST", "GET", "HEAD", "PUT")
ABOUT_STEPS = (
    "`plan` lists the input and stores the plan; `work` commits all parts but the last few, then is killed; `resume` "
    "begins with one listing, does these few and ends the job (it reads the footer of each part that another session "
    "committed, once); `status`, and `again`, the same command once more, on the complete output; `verify` reads every "
    "byte. Memory is the most that the process ever had, and how much of that came after its imports."
)


class Stopped(Exception):
    """Raised to stop `work` early, like a kill."""


class Counted:
    """A backend that counts its requests."""

    def __init__(self, backend: Backend, asked: Counter[str]) -> None:
        self.backend, self.asked, self.lock = backend, asked, threading.Lock()

    def count(self, kind: str, times: int = 1) -> None:
        with self.lock:
            self.asked[kind] += times

    def stat(self, uri: str) -> Entry:
        self.count("HEAD")
        return self.backend.stat(uri)

    def exists(self, uri: str) -> bool:
        self.count("HEAD")
        return self.backend.exists(uri)

    def scan(self, prefix: str, *, deep: bool) -> Iterator[Entry]:
        names = 0
        for names, entry in enumerate(self.backend.scan(prefix, deep=deep), 1):  # noqa: B007 - counted
            yield entry
        self.count("LIST", max(1, -(-names // NAMES_PER_LIST)))

    def read(self, uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes:
        self.count("GET")
        return self.backend.read(uri, start, stop, expect)

    def open(self, uri: str, expect: Entry | None) -> BinaryIO:
        self.count("GET")
        return self.backend.open(uri, expect)

    def create(self, uri: str, data: bytes) -> None:
        self.count("PUT")
        self.backend.create(uri, data)

    def delete(self, uri: str) -> None:
        self.count("DELETE")
        self.backend.delete(uri)

    def sweep(self, folder: str, older_than_s: float) -> int:
        return 0  # there is nothing to sweep in an object store


def count_requests() -> Counter[str]:
    """Count the requests of every store from now on."""
    asked, real = Counter[str](), Store._backend
    Store._backend = lambda store, uri: Counted(real(store, uri), asked)  # type: ignore[method-assign]
    return asked


# ---- the steps, each in a process of its own -----------------------------------------------------------------------


def stub(probed: Capabilities, images: int, stop_after: int | None) -> Runner:
    """Return a runner whose workers have a result for every part at once."""
    keys = pa.array([f"{number:08d}" for number in range(images)])
    size = pa.array([256] * images, pa.int32())
    nothing = pa.nulls(images, pa.list_(pa.string()))
    columns = {"key": keys, "width": size, "height": size, "warnings": nothing.fill_null([])}

    def results(parts: Iterable[Part], work: Work) -> Generator[Embedded]:
        from img2parquet.inference.steps import result_schema

        model = work.job.models[0]
        schema = result_schema(work.job, model, work.cards[model.name])
        constant = {field.name: _constant(field.type, images) for field in schema if field.name not in columns}
        for done, part in enumerate(parts):
            if done == stop_after:
                raise Stopped
            own = {"shard": pa.repeat(part.pieces[0].uri, images)}
            table = pa.table({name: (columns | constant | own)[name] for name in schema.names}, schema=schema)
            yield Embedded(part.index, 0, {model.name: table}, {model.name: ()}, rows_in=images)

    class StubRunner(LocalRunner):
        def start(self, job: JobSpec, address: str | None = None) -> Capabilities:
            return probed

        def pools(self, work: Work) -> dict[str, int]:
            return {"readers": 1, "workers": 1}

        def stream(self, parts: Iterable[Part], work: Work) -> LocalStream:
            return LocalStream(results(parts, work))

    return StubRunner()


def _constant(kind: pa.DataType, rows: int) -> pa.Array:
    return pa.nulls(rows, kind) if not pa.types.is_list(kind) else pa.repeat(pa.scalar([], kind), rows)


def step(name: str, folder: Path, left: int) -> dict[str, Any]:
    job, probed, images, shards = pickle.loads((folder / "job.pickle").read_bytes())
    asked, started = count_requests(), time.perf_counter()
    before_mb, cpu_s, told = _peak_mb(), time.process_time(), _do(name, job, probed, images, shards, left)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu_s,
        "peak_mb": _peak_mb(),
        "own_mb": _peak_mb() - before_mb,
        "requests": dict(asked),
        "told": told,
    }


def _do(name: str, job: JobSpec, probed: Capabilities, images: int, shards: int, left: int) -> Any:
    uri = job.output.uri
    if name == "plan":
        output, ids = Output.at(uri), identities(job, probed.cards, probed.dtype)
        plan, _ = output.begin(ids, lambda: make_plan(job, probed.cards, probed.dtype))
        return len(plan.parts)
    if name == "status":
        return status(uri, read_footers=False).rows_in
    if name == "verify":
        return verify(uri)
    runner = stub(probed, images, shards - left if name == "work" else None)
    driver.choose_runner = lambda _: runner
    try:
        return driver.run(job, "local").rows_in
    except Stopped:
        return None


def _peak_mb() -> float:
    """Return the peak memory; `ru_maxrss` would start from the parent's."""
    told = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()
    return int(told[0]) / 1024


# ---- all of them ---------------------------------------------------------------------------------------------------


def measure(folder: Path, shards: int, images: int, left: int) -> dict[str, dict[str, Any]]:
    """Measure each step, in order. Raises SystemExit when one fails, or does not find every row exactly once."""
    inputs = folder / f"in-{shards}"
    inputs.mkdir(parents=True)
    for number in range(shards):
        (inputs / f"{number:06d}.tar").touch()
    document = {
        "input": {"kind": "webdataset", "uris": [f"{inputs}/*.tar"], "shards_per_part": 1},
        "models": [{"model": str(folder / "model"), "name": "stub", "outputs": [{"kind": "labels", "top_k": 1}]}],
        "output": {"uri": str(folder / f"out-{shards}")},
        "dtype": "float32",
        "resources": {"batch_size": images, "device": "cpu"},
    }
    job = parse_job(document)
    (folder / "job.pickle").write_bytes(pickle.dumps((job, probe_capabilities(job), images, shards)))
    taken = {}
    for name in STEPS:
        command = [sys.executable, "-m", "infra.bench.simulate", name, str(folder), str(left)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: `{' '.join(command)}` failed with {done.returncode}")
        one = taken[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{shards:,} shards, {name}: {one['wall_s']:.1f} s, {one['peak_mb']:.0f} MB", file=sys.stderr, flush=True)
    expected = {"plan": shards, "status": shards * images, "resume": shards * images, "again": shards * images}
    wrong = {name: taken[name]["told"] for name, told in expected.items() if taken[name]["told"] != told}
    if wrong or taken["verify"]["told"]:
        raise SystemExit(f"error: {shards} shards: {wrong} {taken['verify']['told'][:5]}")
    return taken


COLUMNS = ("shards", "images", "step", "wall s", "CPU s", "memory, MB", "of it own", *REQUESTS, "requests cost, $")


def rows_of(shards: int, images: int, taken: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{shards:,}", f"{shards * images:,}", name, f"{one['wall_s']:.1f}", f"{one['cpu_s']:.1f}",
            f"{one['peak_mb']:.0f}", f"{one['own_mb']:.0f}",
            *(f"{one['requests'].get(kind, 0):,}" for kind in REQUESTS), f"{cost(one['requests']):.4f}",
        ]
        for name, one in taken.items()
    ]  # fmt: skip


def cost(requests: Mapping[str, int]) -> float:
    """Compute the cost in dollars."""
    return sum(PRICES[kind] * times for kind, times in requests.items()) / 1e6


def limit(shards: int, images: int, left: int, work: Mapping[str, Any]) -> str:
    """Say where one driver is no longer enough."""
    done = shards - left
    each_s = work["cpu_s"] / done
    rate = images / each_s
    return (
        f"One driver. Gathering, encoding and creating a part of {images:,} rows took {each_s * 1e3:.1f} ms of its CPU "
        f"time, {rate:,.0f} rows a second on one core, of narrow rows (a label, no vector). A driver is enough while "
        "its workers together give fewer rows than that; `bottleneck` says `commit` when they give more. Wider rows "
        "(768 floats: about 16,000 rows a second on 2 cores) get there sooner. Then start several with `--shard i/n`: "
        "they share the plan and nothing else, so n drivers commit n times as many. The end of the job is the one step "
        "that a single driver does for all: one GET for each part that others committed, 16 at a time."
    )


def report(sizes: Sequence[int], images: int, left: int) -> Report:
    load = machine.load()
    with tempfile.TemporaryDirectory(prefix="img2parquet-simulate-") as folder:
        make_model(Path(folder) / "model")
        taken = {shards: measure(Path(folder), shards, images, left) for shards in sizes}
    most = max(taken)
    seconds = {"plan": 15.0, "status": 10.0, "again": 15.0}
    bars = [
        Bar(f"{name}, {most:,} shards", limit_s / taken[most][name]["wall_s"], 1.0) for name, limit_s in seconds.items()
    ]
    return Report(
        name="simulate",
        title="A very large job, with reading and model stubbed",
        about=[
            f"{machine.cpu()}, load average {load} at the start, {machine.load()} at the end",
            machine.versions(("pyarrow", "numpy")),
            f"{images:,} images to a shard, a shard to a part, {left} parts left for the resumed job",
            PRICED,
        ],
        columns=COLUMNS,
        rows=[row for shards, one in taken.items() for row in rows_of(shards, images, one)],
        bars=bars,
        agrees=True,
        notes=[ABOUT_STEPS, limit(most, images, left, taken[most]["work"])],
    )


def main(arguments: Sequence[str], results: Path) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.bench simulate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shards", type=int, nargs="+", default=list(FULL))
    parser.add_argument("--images", type=int, default=10_000, help="of each shard")
    parser.add_argument("--left", type=int, default=100, help="parts that the killed job leaves")
    parser.add_argument("--quick", action="store_true", help="whether it works: a few shards, result to out/bench")
    parser.add_argument("--out", type=Path, help="folder for the result")
    given = parser.parse_args(arguments)
    if min(given.shards) <= given.left:
        parser.error("--left has to be less than --shards")
    sizes, images, left = (QUICK, 20, 5) if given.quick else (given.shards, given.images, given.left)
    made = report(sizes, images, left)
    print(made.markdown())
    print(f"written: {', '.join(map(str, made.write(given.out or (Path('out/bench') if given.quick else results))))}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(step(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
