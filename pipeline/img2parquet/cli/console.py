"""Run the command `img2parquet`: parse, call one function, print.

Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from img2parquet.cli import analysis, inspection, start, submit
from img2parquet.cli import export as exports
from img2parquet.cli.output import json_line, print_retry, print_summary, say
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.engine.stall_detector import LEFT_BEHIND
from img2parquet.errors import Img2ParquetError, Stopped, UserError
from img2parquet.inference.allocator import share_one_arena
from img2parquet.isolation.sudden_end import report_sudden_end
from img2parquet.isolation.supervisor import supervise
from img2parquet.runners import RUNNERS, needs_cluster
from img2parquet.telemetry import flight_recorder, logs

DONE, FAILED, MISUSE = 0, 1, 2
RUN_EXAMPLES = """examples:
  img2parquet run jobs/demo.yaml --runner local --set output.uri=out/try
  img2parquet run jobs/label_photos.yaml --shard 0/4
  img2parquet run jobs/label_photos.yaml --extend"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 misuse, 143 after SIGTERM, 130 after Ctrl-C.

    argv: None reads `sys.argv`, and local jobs run below a supervisor; a list runs in this process."""
    share_one_arena()
    arguments = build_parser().parse_args(argv)
    if getattr(arguments, "log_format", "text") == "json":
        logs.use_json()
    try:
        return _main(argv, arguments)
    finally:
        if logs.is_json():
            logs.end()


def _main(argv: Sequence[str] | None, arguments: argparse.Namespace) -> int:
    signals = StopSignals()
    if argv is None and getattr(arguments, "is_supervised", False):
        if not _may_be_local(arguments):
            signals.before_exit = report_sudden_end()
        elif (code := supervise()) is not None:
            return code  # this process was the supervisor; the driver continues below
    with signals:
        arguments.signals = signals
        code = _run_command(arguments)
        signals.before_exit()
        flight_recorder.ends_by_itself()
    if any(hangs() for hangs in LEFT_BEHIND):  # these threads have made nothing visible yet
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _may_be_local(arguments: argparse.Namespace) -> bool:
    return arguments.runner == "local" or (arguments.runner == "auto" and not needs_cluster(arguments.address))


def _run_command(arguments: argparse.Namespace) -> int:
    try:
        code: int = arguments.command(arguments)
    except Stopped as stopped:
        say(str(stopped), file=sys.stderr)
        return stopped.exit_code
    except Img2ParquetError as error:
        say(f"error: {_without_secrets(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted: committed parts stay; run the same command again to continue", file=sys.stderr)
        return int(arguments.signals.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing more can be printed
        return FAILED
    except Exception as error:  # a bug of ours; its traceback is redacted like every other message
        say(_without_secrets("".join(traceback.format_exception(error))).rstrip(), file=sys.stderr)
        return FAILED
    return code


def _without_secrets(text: str) -> str:
    """Remove signatures and logins from every URL in a message, whoever wrote it."""
    from img2parquet.storage import names_in

    return names_in(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2parquet", description="Embed, label and segment image shards into Parquet."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    start.add_commands(commands, _command, _run, _add_run_options)
    run = _command(commands, "run", _run, "run a job, or what is left of it; the same command resumes")
    run.epilog = RUN_EXAMPLES
    inspection.add_job(run)
    run.set_defaults(is_supervised=True)
    _add_run_options(run)
    run.add_argument(
        "--shard", metavar="I/N", help="process slice I (from 0) of N: several drivers share a job, each with another I"
    )
    run.add_argument(
        "--extend", action="store_true", help="also process the files added to the input since the job was planned"
    )
    submit.add_arguments(_command(commands, "submit", None, "run a job on a Ray cluster, through its Jobs API"))
    inspection.add_commands(commands, _command)
    _add_retry(commands)
    report = _command(
        commands, "report", _report, "write one HTML page about an output, with pictures; needs no network"
    )
    report.epilog = "example: img2parquet report out/demo/results --to report.html --images"
    report.add_argument("uri", help="the job's output.uri")
    report.add_argument(
        "--to", default="report.html", metavar="FILE.html", help="the page to write (default: report.html)"
    )
    report.add_argument(
        "--sample", type=int, default=2000, metavar="ROWS", help="number of rows to sample (default: 2000)"
    )
    report.add_argument("--truth", metavar="COLUMN", help="the ground-truth column; default: detected")
    report.add_argument("--images", action="store_true", help="also write PNG sheets beside the page")
    exports.add_arguments(_command(commands, "export", None, "write committed rows in the format of another tool"))
    analysis.add_commands(commands, _command)
    demo = _command(
        commands, "demo", _demo, "make shards of real photographs, then label and segment them (needs a checkout)"
    )
    demo.epilog = "example: img2parquet demo --runner local"
    demo.add_argument("--runner", choices=RUNNERS, default="ray")
    return parser


class _Version(argparse.Action):
    def __call__(self, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"img2parquet {version('img2parquet')}")
        raise SystemExit(0)


def _command(commands: Any, name: str, function: object, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a rewrapped example could not be copied
    )
    parser.set_defaults(command=function)
    return parser


def _add_retry(commands: Any) -> None:
    retry = _command(
        commands, "retry", _retry, "process the rejected images of an output again; the same command resumes"
    )
    retry.epilog = "example: img2parquet retry out/demo/results --reason not_found --runner local"
    retry.set_defaults(is_supervised=True)
    retry.add_argument("uri", help="the job's output.uri")
    retry.add_argument(
        "--reason",
        action="append",
        metavar="R",
        help="only rejects with this reason (not_found, worker_died, ...); default: all that can be retried",
    )
    retry.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the job")
    _add_run_options(retry)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runner", choices=RUNNERS, default="auto",
        help="local: this process; ray: a Ray cluster; auto (default): ray where a cluster is named, for several GPUs, "
        "and for a large input on many CPUs, else local",
    )  # fmt: skip
    parser.add_argument(
        "--address", help="Ray cluster to join; default: RAY_ADDRESS, or with ray, a new cluster on this machine"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, default="text",
        help="json: write each line on stderr, also the workers', as an object with the ids of run and part",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-port", metavar="[HOST:]PORT",
        help="serve Prometheus metrics at http://127.0.0.1:PORT/metrics meanwhile; Ray's own exporter has them too",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from img2parquet.engine.driver import run
    from img2parquet.job import load_job

    def job(progress: Callable[[Any], None]) -> Any:
        return run(
            load_job(arguments.job, arguments.set),
            arguments.runner,
            address=arguments.address,
            shard=arguments.shard,
            extend=arguments.extend,
            signals=arguments.signals,
            on_change=progress,
        )

    return _run_with_progress(job, arguments, print_summary)


def _retry(arguments: argparse.Namespace) -> int:
    from img2parquet.engine.retry import retry

    def job(progress: Callable[[Any], None]) -> Any:
        return retry(
            arguments.uri,
            arguments.reason,
            arguments.runner,
            address=arguments.address,
            overrides=arguments.set,
            signals=arguments.signals,
            on_change=progress,
        )

    return _run_with_progress(job, arguments, print_retry)


def _run_with_progress(
    job: Callable[[Any], Any], arguments: argparse.Namespace, print_text: Callable[[Any], None]
) -> int:
    """Run a job with its progress on the terminal, then print its summary, as one line of JSON or as text."""
    from img2parquet.cli.progress import Progress
    from img2parquet.telemetry.prometheus import served

    with Progress() as progress, served(arguments.metrics_port):
        summary = job(progress)
    if arguments.json:
        print(json_line(summary.__dict__))
    else:
        print_text(summary)
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from img2parquet.results.report import report

    options = {"sample": arguments.sample, "truth": arguments.truth, "images": arguments.images}
    for path in report(arguments.uri, arguments.to, **options):
        say(str(path))
    return DONE


def _demo(arguments: argparse.Namespace) -> int:
    import runpy

    script = Path(__file__).parents[3] / "infra" / "demo" / "demo.py"
    if not script.is_file():
        raise UserError(
            "the demo is part of the repository, not of the installed package", hint="run `make demo` in a checkout"
        )
    sys.argv = [str(script), "--runner", arguments.runner]
    runpy.run_path(str(script), run_name="__main__")
    return DONE
