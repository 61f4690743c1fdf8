"""What `make demo` runs once the environment is there: shards from photos, the job on them, and what came out.

    python infra/demo/demo.py [--runner local]      # from the repository's root

A second run finds every part committed and computes nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from make_shards import make_shards

import pipeline
from pipeline.errors import Img2ParquetError

ROOT = Path(__file__).parents[2]
JOB = "jobs/demo.yaml"
SHARDS = "out/demo/shards"
RESULTS = "out/demo/results"
MODEL = "levit-photos"
QUERY = (
    "select label, count(*) as images, round(avg((labels[1].name = label)::int), 3) as accuracy "
    f"from '{RESULTS}/model={MODEL}/*.parquet' group by label order by accuracy"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", choices=["ray", "local"], default="ray")
    given = parser.parse_args()
    os.chdir(ROOT)  # the job file's paths begin there
    try:
        prepare()
        run(given.runner)
    except Img2ParquetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show_accuracy()
    show_query()
    return 0


def prepare() -> None:
    shards = make_shards(Path(SHARDS))
    done = "made" if shards["made"] else "already there"
    faults = ", ".join(f"{count} {fault}" for fault, count in shards["broken"].items())
    print(f"shards     {len(shards['files'])} tars with {shards['crops']:,} crops in {SHARDS}, {done}")
    print(f"           and broken on purpose: {faults}", flush=True)


def run(runner: str) -> None:
    summary = pipeline.run(pipeline.load_job(JOB), runner=runner)
    rejected = sum(summary.rejected.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.rejected.items()))
    print(
        f"rows       {summary.rows_in:,} in, {summary.rows_written[MODEL]:,} written, {rejected:,} rejected ({reasons})"
    )
    if summary.parts_done_before == summary.parts:
        print(f"work       none: all {summary.parts} parts were already committed")
        return
    speed = f"{summary.images_per_s:,.0f} images/s ({runner})"
    print(f"work       {summary.parts - summary.parts_done_before} parts in {summary.seconds:.1f} s, {speed}")


def show_accuracy() -> None:
    """The share of rows whose best label is the photo that the crop came from, out of the committed files."""
    table = pipeline.open_results(RESULTS, MODEL).to_table(columns=["label", "labels"])
    print(f"accuracy   {accuracy(table):.4f} of {table.num_rows:,} crops, from regions held out of training")


def accuracy(table: pa.Table) -> float:
    rows = table.to_pylist()
    right: int = sum(bool(row["labels"]) and row["labels"][0]["name"] == row["label"] for row in rows)
    return right / len(rows)


def show_query() -> None:
    """The line that a user would type, run as they would run it."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
    line = f"""{shlex.quote(python)} -c "import duckdb; print(duckdb.sql('''{QUERY}'''))\""""
    print(f"results    {RESULTS}/model={MODEL}/\n\n{line}\n", flush=True)
    subprocess.run(line, shell=True, check=True)


if __name__ == "__main__":
    sys.exit(main())
