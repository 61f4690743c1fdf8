"""Compare a store with latency to a local disk: `python -m infra.bench.latency [--quick] [--out FOLDER]`

Two questions, for tars and for Parquet, in interleaved rounds of one run: how fast the reader alone hands on images,
with one request at a time ("plain") and as it is; and what share of its local speed a whole job keeps. The server,
`static_s3.py`, runs on the same machine and takes CPU from the job's workers, which a real store would not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.job import parse_job
from img2parquet.read import PartLimits, Source, read_part
from img2parquet.schema import Part, Row
from infra.bench import machine
from infra.bench.images import shards
from infra.bench.report import Bar, Report
from infra.bench.static_s3 import BUCKET, serving

LATENCY_S = 0.020
FLOOR = 0.9
TARS, ROUNDS = 48, 5  # of 32 images each
RESULTS = Path(__file__).parent / "results"
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}


def report(folder: Path, tars: int = TARS, rounds: int = ROUNDS) -> Report:
    images = make_inputs(folder, tars)
    before = machine.load()
    with serving(folder, LATENCY_S) as endpoint, mock.patch.dict(os.environ, KEYS):
        reading = in_turns(readers(folder, endpoint), rounds)
        jobs = in_turns(whole_jobs(folder, endpoint), rounds)
    size_mb = sum(path.stat().st_size for path in (folder / "tars").iterdir()) / 1e6
    rows, bars = [], []
    for what, found, unit in (("reader alone", reading, size_mb), ("whole job", jobs, float(images))):
        for kind in ("tars", "parquet"):
            local = unit / found[f"{kind}, local"]
            for name in [name for name in found if name.startswith(kind)]:
                speed = unit / found[name]
                shown = f"{speed:,.0f} {'MB/s' if found is reading else 'images/s'}"
                rows.append([f"{what}: {name}", shown, f"{found[name]:.2f}", f"{speed / local:.2f}"])
                if found is jobs and "s3" in name:
                    bars.append(Bar(f"{what}: {name}", speed / local, FLOOR))
    return Report(
        name="latency",
        title="Reading from a store 20 ms away",
        about=[
            f"{machine.cpu()}; load average {before} at the start, {machine.load()} at the end",
            machine.versions(["torch", "pyarrow", "s3fs", "aiobotocore", "aiohttp"]),
            f"{images:,} generated ImageNet-like JPEGs ({size_mb:.0f} MB), in {tars} tars and 4 Parquet files",
            f"the store: static_s3.py, a process of its own on this machine, each answer {LATENCY_S * 1e3:.0f} ms late",
            f"medians of {rounds} interleaved rounds; `plain`: one request at a time; whole jobs: `local` runner, "
            "LeViT-128S with seeded weights, embeddings",
        ],
        columns=["what", "speed", "seconds", "x local"],
        rows=rows,
        bars=bars,
        agrees=True,
    )


def make_inputs(folder: Path, tars: int) -> int:
    """Make tars, and the same images as Parquet; return how many there are."""
    from img2parquet.read.webdataset import WebDataset

    shards(tars, folder / "tars")
    source = WebDataset(uris=(f"{folder}/tars/*.tar",))
    rows = [row for part in parts_of(source) for row in read_part(source, part) if isinstance(row, Row)]
    (folder / "parquet").mkdir(exist_ok=True)
    for number in range(4):
        mine = rows[len(rows) * number // 4 : len(rows) * (number + 1) // 4]
        table = pa.table({"key": [row.key for row in mine], "image": [row.image for row in mine]})
        pq.write_table(table, folder / "parquet" / f"{number}.parquet", row_group_size=128, compression="none")
    return len(rows)


def parts_of(source: Source) -> list[Part]:
    return [Part(index, pieces) for index, pieces in enumerate(source.plan(PartLimits()))]


def places(folder: Path, endpoint: str) -> dict[str, dict[str, Any]]:
    """Return the `input:` of a job, by name."""
    options = {"endpoint_url": endpoint}
    kinds = {"tars": ("webdataset", "*.tar", {}), "parquet": ("parquet", "*.parquet", {"key": "key"})}
    found: dict[str, dict[str, Any]] = {}
    for name, (kind, files, more) in kinds.items():
        found[f"{name}, local"] = {"kind": kind, "uris": [f"{folder}/{name}/{files}"], **more}
        uri = f"s3://{BUCKET}/{name}/{files}"
        found[f"{name}, s3"] = {"kind": kind, "uris": [uri], "storage_options": options, **more}
    return found


def readers(folder: Path, endpoint: str) -> dict[str, Callable[[], float]]:
    """Return the readers; each measures the seconds to hand on every image."""
    turns: dict[str, Callable[[], float]] = {}
    for name, place in places(folder, endpoint).items():
        source = parse_job(_document(place, Path("unused"))).input
        turns[name] = lambda source=source: _read(source)  # type: ignore[misc]
        if name.endswith("s3"):
            turns[f"{name}, plain"] = lambda source=source: _plainly(source)  # type: ignore[misc]
    return turns


def _read(source: Any) -> float:
    started = time.perf_counter()
    count = sum(1 for part in parts_of(source) for _ in read_part(source, part))
    assert count
    return time.perf_counter() - started


def _plainly(source: Any) -> float:
    with one_at_a_time():
        return _read(source)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Send each request only when the one before it has been answered and used."""
    with (
        mock.patch("img2parquet.read.prefetch.REQUESTS", 1),
        mock.patch("img2parquet.read.row_groups.announce", lambda *_: None),
    ):
        yield


def whole_jobs(folder: Path, endpoint: str) -> dict[str, Callable[[], float]]:
    from img2parquet.engine.driver import run
    from infra.bench import jobs, models

    levit = next(model for model in models.SUBJECTS if model.name == "levit-128S")
    weights = jobs.checkpoint(levit)

    def turn(place: dict[str, Any]) -> float:
        with tempfile.TemporaryDirectory() as out:
            summary = run(parse_job(_document(place, weights, out)), "local")
            return summary.rows_in / summary.images_per_s

    return {name: lambda place=place: turn(place) for name, place in places(folder, endpoint).items()}  # type: ignore[misc]


def _document(place: dict[str, Any], weights: Path, out: str = "unused") -> dict[str, Any]:
    model = {"model": str(weights), "name": "m", "outputs": [{"kind": "embedding"}]}
    return {"input": place, "models": [model], "output": {"uri": out}, "dtype": "float32"}


def in_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            taken = turn()
            if number:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few images, for looking whether it works")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = {"tars": 4, "rounds": 1} if options.quick else {"rounds": options.rounds}
        made = report(Path(folder), **size)
    print(made.markdown())
    print(f"written: {', '.join(map(str, made.write(options.out)))}")


if __name__ == "__main__":
    main()
