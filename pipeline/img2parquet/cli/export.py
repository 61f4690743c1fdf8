"""Run the command `img2parquet export`."""

from __future__ import annotations

import argparse
import sys

from img2parquet.errors import printable
from img2parquet.results.exports import EXPORTS, export

EXAMPLE = """examples:
  img2parquet export out/demo/masks --to coco masks.json --masks polygons
  img2parquet export out/demo/results --to label-studio tasks --images "https://cdn.example/{key}.jpg"
  img2parquet export s3://photos/labels --to npy s3://photos/vectors --model levit-256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    parser.add_argument("uri", help="the job's output.uri")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(EXPORTS))
    parser.add_argument("destination", help="a path or URI outside the output, which must not exist yet")
    parser.add_argument("--model", help="the partition to export; required when the output has several")
    parser.add_argument("--columns", default="", metavar="A,B", help="columns to export; default: all")
    parser.add_argument(
        "--images", metavar="TEMPLATE", help="where the other tool finds an image, with {key} and {shard}"
    )
    parser.add_argument("--masks", metavar="rle|polygons", help="coco: the encoding of masks (default: rle)")
    parser.add_argument("--name", help="name of the table, task or dataset; default: the model's")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    done = export(
        arguments.uri,
        arguments.to,
        arguments.destination,
        model=arguments.model,
        columns=tuple(filter(None, arguments.columns.split(","))),
        images=arguments.images,
        masks=arguments.masks,
        name=arguments.name,
        force=arguments.force,
    )
    print(printable(f"exported   {done.rows:,} rows to {done.destination}"))
    for note in done.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    return 0
