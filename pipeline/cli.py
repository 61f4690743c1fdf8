"""The command `img2parquet`: parse, call one function, print. Results to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import ask, logs, look
from pipeline.allocator import share_one_arena
from pipeline.errors import Img2ParquetError, Stopped, UserError
from pipeline.exports import command as exports
from pipeline.signals import Signals
from pipeline.submit import command as submit
from pipeline.supervise import supervise
from pipeline.tell import json_line, print_retry, print_summary, say
from pipeline.watch import LEFT_BEHIND

DONE, FAILED, MISUSE = 0, 1, 2
RUN_EXAMPLES = """examples:
  img2parquet run jobs/demo.yaml --runner local --set output.uri=out/try
  img2parquet run jobs/label_photos.yaml --shard 0/4
  img2parquet run jobs/label_photos.yaml --extend"""


def main(argv: Sequence[str] | None = None) -> int:
    """argv: None for the command itself, whose local jobs run below a supervisor; a list is done in this process.

    Exit code 0 done, 1 failed, 2 misuse; 143 after SIGTERM, 130 after Ctrl-C."""
    share_one_arena()
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "log_format", "text") == "json":
        logs.use_json()
    try:
        return _main(argv, arguments)
    finally:
        if logs.is_json():
            logs.end()


def _main(argv: Sequence[str] | None, arguments: argparse.Namespace) -> int:
    if argv is None and getattr(arguments, "is_supervised", False) and arguments.runner == "local":
        code = supervise()
        if code is not None:
            return code  # we were the supervisor; the driver goes on here
    with Signals() as signals:
        arguments.signals = signals
        code = _carry_out(arguments)
    if any(hangs() for hangs in LEFT_BEHIND):  # nothing that they do is visible yet
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _carry_out(arguments: argparse.Namespace) -> int:
    try:
        code: int = arguments.command(arguments)
    except Stopped as stopped:
        say(str(stopped), file=sys.stderr)
        return stopped.exit_code
    except Img2ParquetError as error:
        say(f"error: {_by_name(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted: what is committed stays; run the same command again", file=sys.stderr)
        return int(arguments.signals.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; nothing more can be said
        return FAILED
    except Exception as error:  # our own mistake; its traceback goes the same way as every other word
        say(_by_name("".join(traceback.format_exception(error))).rstrip(), file=sys.stderr)
        return FAILED
    return code


def _by_name(text: str) -> str:
    """The last look at what is said: no URL in it holds what opens it, whoever wrote the text."""
    from pipeline.storage import names_in

    return names_in(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2parquet", description="Image shards in, Parquet datasets of what models see in them out."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", _run, "do what is left of a job; the same command resumes")
    run.epilog = RUN_EXAMPLES
    look.add_job(run)
    run.set_defaults(is_supervised=True)
    run.add_argument(
        "--runner", choices=["ray", "local"], default="ray", help="a Ray cluster (default), or this process"
    )
    run.add_argument("--address", help="Ray cluster to join; default: RAY_ADDRESS, or one started here")
    run.add_argument("--json", action="store_true", help="print the summary as JSON")
    _add_watching(run)
    run.add_argument(
        "--shard", metavar="I/N", help="every N-th part from part I on: several drivers do one job, each with another I"
    )
    run.add_argument(
        "--extend", action="store_true", help="also do the files that have come to the input since the job was planned"
    )
    submit.add_arguments(_command(commands, "submit", None, "run a job on a Ray cluster, by its Jobs API"))
    look.add_commands(commands, _command)
    _add_retry(commands)
    report = _command(commands, "report", _report, "one HTML page about an output, with pictures; needs no network")
    report.epilog = "example: img2parquet report out/demo/results --to report.html --images"
    report.add_argument("uri", help="the job's output.uri")
    report.add_argument("--to", default="report.html", metavar="FILE.html", help="default: report.html here")
    report.add_argument("--sample", type=int, default=2000, metavar="ROWS", help="rows to look at (default 2000)")
    report.add_argument("--truth", metavar="COLUMN", help="the column with the right answers; default: found by itself")
    report.add_argument("--images", action="store_true", help="also write PNG sheets beside the page")
    exports.add_arguments(_command(commands, "export", None, "committed rows in the format of another tool"))
    ask.add_commands(commands, _command)
    demo = _command(commands, "demo", _demo, "make shards of real photographs and label them (in a checkout)")
    demo.epilog = "example: img2parquet demo --runner local"
    demo.add_argument("--runner", choices=["ray", "local"], default="ray")
    return parser


def _command(commands: Any, name: str, function: object, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example that is broken over lines cannot be copied
    )
    parser.set_defaults(command=function)
    return parser


def _add_retry(commands: Any) -> None:
    retry = _command(commands, "retry", _retry, "try the rejects of an output again; the same command resumes")
    retry.epilog = "example: img2parquet retry out/demo/results --reason not_found --runner local"
    retry.set_defaults(is_supervised=True)
    retry.add_argument("uri", help="the job's output.uri")
    retry.add_argument(
        "--reason",
        action="append",
        metavar="R",
        help="these alone (not_found, worker_died, ...); default: all that may",
    )
    retry.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the job")
    retry.add_argument("--runner", choices=["ray", "local"], default="ray", help="as of `run`")
    retry.add_argument("--address", help="as of `run`")
    retry.add_argument("--json", action="store_true", help="print the summary as JSON")
    _add_watching(retry)


def _add_watching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, default="text",
        help="json: each line of stderr is an object with the ids of run and part, workers' lines too; no live line",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-port", metavar="[HOST:]PORT",
        help="Prometheus metrics at http://127.0.0.1:PORT/metrics while it runs; on Ray its own exporter has them too",
    )  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.driver import run
    from pipeline.job import load_job

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

    return _watched(job, arguments, print_summary)


def _retry(arguments: argparse.Namespace) -> int:
    from pipeline.retrying import retry

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

    return _watched(job, arguments, print_retry)


def _watched(job: Callable[[Any], Any], arguments: argparse.Namespace, tell: Callable[[Any], None]) -> int:
    """A job with its progress on the terminal, then what came of it: as one line of JSON, or told."""
    from pipeline.metrics import served
    from pipeline.progress import Progress

    progress = Progress()
    try:
        with served(arguments.metrics_port):
            summary = job(progress)
    finally:
        progress.close()
    if arguments.json:
        print(json_line(summary.__dict__))
    else:
        tell(summary)
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from pipeline.report import report

    given = arguments
    for path in report(given.uri, given.to, sample=given.sample, truth=given.truth, images=given.images):
        say(str(path))
    return DONE


def _demo(arguments: argparse.Namespace) -> int:
    import runpy

    script = Path(__file__).parent.parent / "infra" / "demo" / "demo.py"
    if not script.is_file():
        raise UserError(
            "the demo lives in the repository, not in the installed package", hint="clone it and run `make demo`"
        )
    sys.argv = [str(script), "--runner", arguments.runner]
    runpy.run_path(str(script), run_name="__main__")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
