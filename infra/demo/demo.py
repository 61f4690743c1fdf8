"""Run the demo: make shards from photos, run three jobs on them, and print the results.

    python infra/demo/demo.py [--runner local]      # from the repository's root

The first job labels and embeds photographs, the second segments mosaics of textures, and the third runs all four model
families over the same images. A second run finds every part committed and computes nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from make_shards import make_shards
from mosaics import Confusion, make_mosaics
from PIL import Image

import img2parquet
from img2parquet.errors import Img2ParquetError

ROOT = Path(__file__).parents[2]
PHOTOS_JOB, SHARDS, RESULTS, LEVIT = "jobs/demo.yaml", "out/demo/shards", "out/demo/results", "levit-photos"
TEXTURES_JOB, MOSAICS, MASKS, BEIT = "jobs/demo_textures.yaml", "out/demo/mosaics", "out/demo/masks", "beit-textures"
FAMILIES_JOB, FAMILIES = "jobs/four_families.yaml", "out/demo/families"
CAT = "out/demo/cat.jpg"
QUERY = (
    "select label, count(*) as images, round(avg((labels[1].name = label)::int), 3) as accuracy "
    f"from '{RESULTS}/model={LEVIT}/part-*.parquet' group by label order by accuracy"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", choices=["auto", "local", "ray"], default="ray")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # the paths in the job files start there
    try:
        label_photos(arguments.runner)
        segment_textures(arguments.runner)
        run_four_families(arguments.runner)
    except Img2ParquetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def label_photos(runner: str) -> None:
    shards = make_shards(Path(SHARDS))
    faults = ", ".join(f"{count} {fault}" for fault, count in shards["broken"].items())
    print(f"photos     {len(shards['files'])} tars with {shards['crops']:,} crops in {SHARDS}, {made(shards['made'])}")
    print(f"           with deliberate faults: {faults}", flush=True)
    run(PHOTOS_JOB, runner)
    table = img2parquet.open_results(RESULTS, LEVIT).to_table(columns=["label", "labels"])
    save_a_cat()
    print(f"accuracy   {accuracy(table):.4f} of {table.num_rows:,} crops, all from regions held out of training")
    show_query()


def segment_textures(runner: str) -> None:
    mosaics = make_mosaics(Path(MOSAICS))
    print(f"textures   {mosaics['mosaics']} mosaics in {MOSAICS}, {made(mosaics['made'])}", flush=True)
    run(TEXTURES_JOB, runner)
    table = img2parquet.open_results(MASKS, BEIT).to_table(columns=["key", "mask"])
    print(f"mean IoU   {mean_iou(table):.4f} of {table.num_rows} mosaics, all from regions held out of training")
    print(f"results    {MASKS}/model={BEIT}/")


def run_four_families(runner: str) -> None:
    print("\nfamilies   LeViT, BEiT, BiT and ViTMSN in one job, with each image decoded once", flush=True)
    run(FAMILIES_JOB, runner)
    print(f"results    {FAMILIES}/model=*/")


def save_a_cat() -> None:
    """Save one crop as a file, as a query for `img2parquet search`."""
    rows = img2parquet.open_results(RESULTS, LEVIT).to_table(columns=["key", "shard", "label"]).to_pylist()
    cat = min((row for row in rows if row["label"] == "cat"), key=lambda row: (row["shard"], row["key"]))
    with tarfile.open(cat["shard"]) as tar:
        image = tar.extractfile(f"{cat['key']}.jpg")
        assert image
        Path(CAT).write_bytes(image.read())


def made(is_new: bool) -> str:
    return "newly made" if is_new else "already there"


def run(job: str, runner: str) -> None:
    """Run a job and print its summary."""
    summary = img2parquet.run(img2parquet.load_job(job), runner=runner)
    rejected = sum(summary.rejected.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.rejected.items()))
    written = sum(summary.rows_written.values())
    print(f"rows       {summary.rows_in:,} in, {written:,} written, {rejected:,} rejected{reasons and f' ({reasons})'}")
    if summary.parts_done_before == summary.parts:
        print(f"work       none: {parts(summary.parts)} already committed, nothing left to do")
        return
    speed = f"{summary.images_per_s:,.0f} images/s ({runner})"
    print(f"work       {parts(summary.parts - summary.parts_done_before)} in {summary.seconds:.1f} s, {speed}")


def parts(count: int) -> str:
    return f"{count} part{'' if count == 1 else 's'}"


def accuracy(table: pa.Table) -> float:
    """Compute the share of rows whose best label is the photo that the crop came from."""
    rows = table.to_pylist()
    right: int = sum(bool(row["labels"]) and row["labels"][0]["name"] == row["label"] for row in rows)
    return right / len(rows)


def mean_iou(table: pa.Table) -> float:
    """Compute the mean IoU of the written masks against the mosaics' ground truth."""
    confusion = Confusion()
    for row in table.to_pylist():
        truth = Image.open(Path(MOSAICS) / "truth" / f"{row['key']}.png")
        confusion.add(np.asarray(truth), np.asarray(Image.open(io.BytesIO(row["mask"]))))
    return confusion.mean_iou()


def show_query() -> None:
    """Print a query as a user would type it, and run it."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
    line = f"""{shlex.quote(python)} -c "import duckdb; print(duckdb.sql('''{QUERY}'''))\""""
    print(f"results    {RESULTS}/model={LEVIT}/\n\n{line}\n", flush=True)
    subprocess.run(line, shell=True, check=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
