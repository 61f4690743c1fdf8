"""Run the command `img2parquet submit`, and end with the job's own exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from img2parquet.errors import UserError, printable

EXAMPLE = """examples:
  img2parquet submit jobs/embed_for_search.yaml --address http://head:8265 --set output.uri=s3://photos/vectors
  img2parquet submit job.yaml --address http://localhost:8265 --install image --no-wait

Ctrl-C leaves the job running; the same command follows it again. Once the job has ended, it runs what is left."""
INSTALL = """upload (default): send this package; its dependencies are in the cluster's image; pip: also have Ray
install the dependencies on each node; image: send only the job; the image has this version of the package"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    parser.add_argument("job", help="a job file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the job")
    parser.add_argument("--address", help="the head's Jobs API, http://head:8265; default: RAY_API_SERVER_ADDRESS")
    parser.add_argument("--install", choices=["upload", "pip", "image"], default="upload", help=INSTALL)
    parser.add_argument(
        "--shared-paths", action="store_true", help="paths in the job are on a disk that all nodes share"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="return once the job is submitted, and print how to follow it"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the job's id, its status and the run's summary as JSON"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    from img2parquet.job import load_job
    from img2parquet.submit.bundle import make_bundle

    job = load_job(arguments.job, arguments.set)
    made = make_bundle(job, arguments.job, arguments.install, arguments.shared_paths)
    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("no cluster is named", hint="pass --address http://head:8265, or set RAY_API_SERVER_ADDRESS")

    from img2parquet.submit.jobs_client import JobsClient, check

    head = JobsClient(address)
    facts, resources = head.facts(), job.resources
    counted = resources.gpus_per_worker not in ("auto", 0)
    notes = check(facts, resources.device == "cuda" or counted, counted)
    _say(f"cluster    {head.address}: {facts}")
    for note in notes:
        _say(f"note: {note}")
    job_id, already_there = head.submit(made, arguments.json)
    _say(f"job        {job_id}" + (", which is already running: nothing was submitted" if already_there else ""))
    if arguments.no_wait:
        _print_how_to_follow(head.address, job_id)
        _print(arguments, {"job_id": job_id, "address": head.address, "status": "SUBMITTED"}, job_id)
        return 0
    return _follow(arguments, head, job_id)


def _follow(arguments: argparse.Namespace, head: Any, job_id: str) -> int:
    last = _LastLine(sys.stderr if arguments.json else sys.stdout)
    try:
        end = head.follow(job_id, last.write)
    except KeyboardInterrupt:
        _say(f"left       {job_id} keeps running")
        _print_how_to_follow(head.address, job_id)
        return int(arguments.signals.exit_code)
    _say(f"ended      {job_id}: {end.status.lower()}, exit code {end.exit_code}")
    if end.message:
        _say(f"error: {end.message}")
    ended = {"job_id": job_id, "address": head.address, "status": end.status, "exit_code": end.exit_code}
    _print(arguments, {**ended, "summary": last.summary}, "")
    return int(end.exit_code)


class _LastLine:
    """Copy a log to a terminal, and keep the run's summary: its one line that is a JSON object."""

    def __init__(self, sink: Any) -> None:
        self.sink, self.rest = sink, ""
        self.summary: dict[str, Any] | None = None

    def write(self, text: str) -> None:
        self.sink.write(printable(text.expandtabs()))
        self.sink.flush()
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith('{"output_uri"'):
                self.summary = json.loads(line)


def _print_how_to_follow(address: str, job_id: str) -> None:
    _say("follow     run the same command again, or: " + f"ray job logs {job_id} --follow --address {address}")
    _say(f"stop       ray job stop {job_id} --address {address}")


def _print(arguments: argparse.Namespace, values: dict[str, Any], plain: str) -> None:
    if arguments.json:
        print(json.dumps(values).replace("\x7f", "\\u007f"))
    elif plain:
        print(plain)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)
