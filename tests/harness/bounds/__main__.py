"""`python -m tests.harness.bounds`: whole jobs over large inputs, each within a bound that is told before it runs.

A process may hold what a job of nothing needs (`BASE_MB`) and the batches that may be in memory at one time, three for
each worker and the one that is being read, as compressed bytes; and of each image that a worker decodes, RGB and what
Pillow holds beside it (7 bytes a pixel).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from infra.bench import machine
from infra.bench.growth_inputs import make_model
from tests.harness.bounds.inputs import many_bytes, many_images, many_pixels
from tests.harness.bounds.memory import take

BASE_MB = 900.0  # torch, pyarrow, the models and glibc's arenas
WORKERS, BATCH = 2, 32
MB = 1_000_000
PIXEL_BYTES = 7


@dataclass(frozen=True)
class Case:
    """`beyond_mb` is what whoever does the work, the driver or each Ray worker, may hold beyond the base."""

    name: str
    runner: str
    images: int
    make: Callable[[Path], None]
    beyond_mb: float
    batch: int = BATCH

    @property
    def driver_bound_mb(self) -> float:
        return BASE_MB + (self.beyond_mb if self.runner == "local" else 100)

    @property
    def worker_bound_mb(self) -> float:
        return BASE_MB + self.beyond_mb


def cases(scale: float) -> Iterator[Case]:
    """At scale 1: 100,000 images, 4 GB, 80 megapixels."""
    count, large = round(100_000 * scale), round(1000 * scale)
    height, width = round(8000 * scale**0.5), round(10_000 * scale**0.5)
    each, held = 4 << 20, 3 * WORKERS + 1
    megabytes = _sized(many_bytes, large, each)
    pixels = _sized(many_pixels, height, width, 3)
    of_bytes, of_pixels = held * BATCH * each / MB, WORKERS * height * width * PIXEL_BYTES / MB + held * 4 * 30
    yield Case(f"a tar of {large * each / 1e9:.1f} GB", "local", large, megabytes, of_bytes)
    yield Case(f"JPEGs and PNGs of {height * width / 1e6:.0f} megapixels", "local", 6, pixels, of_pixels, batch=2)
    yield Case(f"{count:,} images in one tar", "local", count, _sized(many_images, count), 100)
    yield Case(f"a tar of {large * each / 1e9:.1f} GB", "ray", large, megabytes, of_bytes)
    yield Case(f"{count:,} images in one tar", "ray", count, _sized(many_images, count), 100)


def _sized(make: Callable[..., None], *sizes: int) -> Callable[[Path], None]:
    return lambda path: make(path, *sizes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.bounds", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="how large, of the sizes above")
    parser.add_argument("--runner", choices=("local", "ray"), help="these cases alone")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose names have these, as `images in one`")
    parser.add_argument("--out", type=Path, help="peaks and bounds as JSON")
    arguments = parser.parse_args()
    started, rows = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="img2parquet-bounds-") as folder:
        model = make_model(Path(folder) / "model")
        for case in cases(arguments.scale):
            if arguments.runner in (None, case.runner) and arguments.only in case.name:
                rows.append(measure(case, model, Path(folder)))
                print(_line(rows[-1]), flush=True)
                _write(rows, arguments.scale, time.monotonic() - started, arguments.out)
    held = all(row["held"] for row in rows)
    print(f"bounds: {len(rows)} jobs, {'all within theirs' if held else 'NOT all within theirs'}")
    return 0 if held else 1


def _write(rows: list[dict[str, Any]], scale: float, seconds: float, out: Path | None) -> None:
    """After each job: a suite that is stopped leaves what it had."""
    versions = {name: version(name) for name in ("torch", "pyarrow", "ray", "pillow", "simplejpeg")}
    record = {
        "jobs": rows,
        "seconds": round(seconds),
        "scale": scale,
        "machine": machine.cpu(),
        "versions": {"python": sys.version.split()[0], **versions},
    }
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def measure(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """The job's peaks beside its bounds, and whether every image became a row."""
    shard, out = folder / "shard.tar", folder / "out"
    case.make(shard)
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(_job(case, model, shard, out)))
    size_bytes = shard.stat().st_size
    try:
        taken = take(job, case.runner)
    finally:
        shard.unlink()
        shutil.rmtree(out, ignore_errors=True)  # the next job's would be another run there
    written = sum(taken.summary["rows_written"].values())
    within = taken.driver_mb <= case.driver_bound_mb and taken.worker_mb <= case.worker_bound_mb
    return {
        "job": case.name,
        "runner": case.runner,
        "images": case.images,
        "shard, MB": round(size_bytes / MB),
        "driver, MB": round(taken.driver_mb),
        "driver may, MB": round(case.driver_bound_mb),
        **(
            {"worker, MB": round(taken.worker_mb), "worker may, MB": round(case.worker_bound_mb)}
            if case.runner == "ray"
            else {}
        ),
        "rows written": written,
        "seconds": round(taken.seconds, 1),
        "held": within and written == taken.summary["rows_in"] == case.images,
    }


def _job(case: Case, model: Path, shard: Path, out: Path) -> dict[str, Any]:
    return {
        "input": {"kind": "webdataset", "uris": [str(shard)], "split_above_bytes": 32 << 20},
        "models": [{"model": str(model), "outputs": [{"kind": "embedding"}]}],
        "output": {"uri": str(out)},
        "dtype": "float32",
        "resources": {"workers": WORKERS, "batch_size": case.batch, "device": "cpu"},
    }


def _line(row: dict[str, Any]) -> str:
    worker = f", worker {row['worker, MB']} of {row['worker may, MB']}" if row["runner"] == "ray" else ""
    driver = f"driver {row['driver, MB']} of {row['driver may, MB']} MB"
    return f"{row['job']}, {row['runner']}: {driver}{worker}, {row['rows written']} rows, {row['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
