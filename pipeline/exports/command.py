"""The command `img2parquet export`: its arguments, one call, and what it says."""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import printable
from pipeline.exports import EXPORTS, export

EXAMPLE = """examples:
  img2parquet export out/demo/masks --to coco masks.json --masks polygons
  img2parquet export out/demo/results --to label-studio tasks --images "https://cdn.example/{key}.jpg"
  img2parquet export s3://photos/labels --to npy s3://photos/vectors --model levit-256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    parser.add_argument("uri", help="the job's output.uri")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(EXPORTS))
    parser.add_argument("destination", help="a path or URI outside of the output, that is not there yet")
    parser.add_argument("--model", help="the partition; needed where the output has several")
    parser.add_argument("--columns", default="", metavar="A,B", help="what of the rows goes along; default: all")
    parser.add_argument("--images", metavar="TEMPLATE", help="where the target finds an image, with {key} and {shard}")
    parser.add_argument("--masks", metavar="rle|polygons", help="coco: how masks are written (default: rle)")
    parser.add_argument("--name", help="of the table, task or dataset; default: the model's")
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
