"""Run the read-only commands: plan, status, verify, rejects, models, schema."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from img2parquet.cli.output import json_line, print_measured, print_plan, print_status, say
from img2parquet.errors import UserError

Command = Callable[[argparse.Namespace], int]
Add = Callable[[Any, str, Command, str], argparse.ArgumentParser]
DONE, FAILED = 0, 1
PLAN_EXAMPLES = """examples:
  img2parquet plan jobs/demo.yaml
  img2parquet plan jobs/demo.yaml --measure --workers 64 --price-per-hour 0.34"""


def add_commands(commands: Any, add: Add) -> None:
    """Add these six commands to the command line."""
    plan = add(commands, "plan", _plan, "show the parts and bytes of a job and how far it is; writes nothing")
    plan.epilog = PLAN_EXAMPLES
    add_job(plan)
    plan.add_argument(
        "--measure", action="store_true", help="process a sample here: speed, bottleneck, time, bytes, cost"
    )
    plan.add_argument("--seconds", type=float, metavar="S", help="roughly how long to measure (default: 20)")
    plan.add_argument(
        "--workers", type=int, metavar="N", help="estimate for this many CPUs or GPUs; default: as on this machine"
    )
    plan.add_argument(
        "--price-per-hour", type=float, metavar="X", help="price of one machine like this one; adds the cost"
    )
    plan.add_argument("--json", action="store_true", help="print the plan and the measurements as JSON")
    status = add(commands, "status", _status, "show how far a run is; works while it runs")
    status.epilog = "example: img2parquet status out/demo/results"
    status.add_argument("uri", help="the job's output.uri")
    status.add_argument(
        "--rejects",
        action="store_true",
        help="count rows and rejects even if that takes a read for each of many parts",
    )
    status.add_argument("--json", action="store_true", help="print the progress as JSON")
    text = "check every byte of an output against its plan; exit 1 and a list if anything is wrong"
    verify = add(commands, "verify", _verify, text)
    verify.epilog = "example: img2parquet verify out/demo/results"
    verify.add_argument("uri", help="the job's output.uri")
    verify.add_argument("--json", action="store_true", help="print the problems as a JSON list")
    rejects = add(commands, "rejects", _rejects, "print the rejected images as JSON lines")
    rejects.epilog = "example: img2parquet rejects out/demo/results"
    rejects.add_argument("uri", help="the job's output.uri")
    rejects.add_argument(
        "--superseded", action="store_true", help="print the rejects that retries have processed again, instead"
    )
    models = add(commands, "models", _models, "list the model families and published checkpoints with their outputs")
    models.epilog = "example: img2parquet models"
    schema = add(commands, "schema", _schema, "print the job file's JSON Schema, for editors")
    schema.epilog = "example: img2parquet schema > job.schema.json"


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a job; `run` has them too."""
    parser.add_argument("job", help="a job file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the job")


def _plan(arguments: argparse.Namespace) -> int:
    from img2parquet.dataset.commit import Output
    from img2parquet.dataset.generations import read_history
    from img2parquet.dataset.plan import check_same_run, identities, make_plan
    from img2parquet.inference.capabilities import probe_capabilities
    from img2parquet.job import load_job
    from img2parquet.storage import Store

    _check_measure_options(arguments)
    job = load_job(arguments.job, arguments.set)
    probed = probe_capabilities(job)
    output = Output.at(job.output.uri, Store(job.output.storage_options))
    plan = output.stored_plan()
    is_stored = plan is not None
    if plan is None:
        plan = make_plan(job, probed.cards, probed.dtype)
    else:
        check_same_run(plan, identities(job, probed.cards, probed.dtype), output.uri)
    files = output.files()
    plan = read_history(output, plan, files).plan
    done = {name: sum(file in files for file in names) for name, names in plan.names.items()}
    if not arguments.json:
        print_plan(plan, probed, done, is_stored)
    measured = _measured(arguments, job, probed, plan) if arguments.measure else {}
    if arguments.json:
        print(json_line({**_plan_values(plan, probed, done, is_stored), **measured}))
    return DONE


def _check_measure_options(arguments: argparse.Namespace) -> None:
    options = {
        "--seconds": arguments.seconds, "--workers": arguments.workers, "--price-per-hour": arguments.price_per_hour,
    }  # fmt: skip
    unused = [name for name, value in options.items() if value is not None]
    if unused and not arguments.measure:
        raise UserError(f"{', '.join(unused)}: needs --measure", hint="add --measure")


def _measured(arguments: argparse.Namespace, job: Any, probed: Any, plan: Any) -> dict[str, Any]:
    from img2parquet.engine.measure import SECONDS, check_request, estimate, measure

    workers, price = arguments.workers, arguments.price_per_hour
    check_request(workers, price)  # before time is spent on measuring
    found = measure(job, probed, plan, SECONDS if arguments.seconds is None else arguments.seconds)
    expected = estimate(found, workers, price)
    if not arguments.json:
        print_measured(found, expected, job.resources.batch_size == "auto")
    return {"measured": vars(found), "estimate": vars(expected)}


def _plan_values(plan: Any, probed: Any, done: dict[str, int], is_stored: bool) -> dict[str, Any]:
    return {
        "parts": len(plan.parts),
        "bytes_in": sum(part.size_bytes for part in plan.parts),
        "rows": plan.rows,
        "is_stored": is_stored,
        "dtype": probed.dtype,
        "device": probed.device,
        "batch_size": probed.batch_size,
        "models": {
            name: {"parts_done": count, "identity": plan.identity(name), "notes": _notes(probed, name)}
            for name, count in done.items()
        },
    }


def _notes(probed: Any, name: str) -> list[str]:
    return list(probed.cards[name].notes) if name in probed.cards else []


def _status(arguments: argparse.Namespace) -> int:
    from img2parquet.results.reader import status

    now = status(arguments.uri, read_footers=True if arguments.rejects else None)
    if arguments.json:
        print(json_line(vars(now)))
    else:
        print_status(now)
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from img2parquet.results.verify import verify

    problems = verify(arguments.uri)
    if arguments.json:
        print(json_line(problems))
        return FAILED if problems else DONE
    for problem in problems:
        say(problem.replace("\n", "\\n"))  # one line each, whatever a key contains
    say(f"{len(problems)} problems" if problems else "ok: every planned row is present exactly once", file=sys.stderr)
    return FAILED if problems else DONE


def _rejects(arguments: argparse.Namespace) -> int:
    from img2parquet.results.reader import read_rejects

    table = read_rejects(arguments.uri, superseded=arguments.superseded)
    counts: Counter[str] = Counter()
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            print(json_line(row))
            counts[row["reason"]] += 1
    say(f"{table.num_rows} rejects: " + ", ".join(f"{k} {v}" for k, v in counts.most_common()), file=sys.stderr)
    return DONE


def _models(arguments: argparse.Namespace) -> int:
    from img2parquet.models.catalog import lines

    for line in lines():
        say(line)
    return DONE


def _schema(arguments: argparse.Namespace) -> int:
    from img2parquet.job import json_schema

    print(json.dumps(json_schema(), indent=1))
    return DONE
