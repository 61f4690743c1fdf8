"""The command `img2parquet`: parse, call one function, print. Results to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from pipeline import logs
from pipeline.ask import add_commands
from pipeline.errors import Img2ParquetError, Stopped, UserError, printable
from pipeline.exports import command as exports
from pipeline.signals import Signals
from pipeline.supervise import supervise
from pipeline.watch import LEFT_BEHIND

DONE, FAILED, MISUSE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """argv: None for the command itself, whose local jobs run below a supervisor; a list is done in this process.

    Exit code 0 done, 1 failed, 2 misuse; 143 after SIGTERM, 130 after Ctrl-C."""
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


def say(text: str, file: TextIO | None = None) -> None:
    """One message to a terminal. Keys, names and server's words in it are of others, and may hold escape sequences."""
    if file is sys.stderr and logs.is_json():
        logs.tell(text, level="error" if text.startswith(("error:", "Traceback")) else "info")
        return
    print(printable(text), file=file)


def _by_name(text: str) -> str:
    """The last look at what is said: no URL in it holds what opens it, whoever wrote the text."""
    from pipeline.storage import names_in

    return names_in(text)


def _json_line(values: object) -> str:
    """ASCII, without a control character."""
    return json.dumps(values).replace("\x7f", "\\u007f")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2parquet", description="Image shards in, Parquet datasets of what models see in them out."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", _run, "do what is left of a job; the same command resumes")
    _add_job(run)
    run.set_defaults(is_supervised=True)
    run.add_argument(
        "--runner", choices=["ray", "local"], default="ray", help="a Ray cluster (default), or this process"
    )
    run.add_argument("--address", help="Ray cluster to join; default: RAY_ADDRESS, or one started here")
    run.add_argument("--json", action="store_true", help="print the summary as JSON")
    _add_watching(run)
    _add_job(_command(commands, "plan", _plan, "what a run would do: parts, bytes, what is committed; writes nothing"))
    status = _command(commands, "status", _status, "how far a run is; works while it runs")
    status.add_argument("uri", help="the job's output.uri")
    status.add_argument(
        "--rejects",
        action="store_true",
        help="count rows and rejects also where that needs a read for each of many parts",
    )
    verify = "check every byte of an output against its plan; exit 1 and a list if anything is wrong"
    _command(commands, "verify", _verify, verify).add_argument("uri", help="the job's output.uri")
    rejects = _command(commands, "rejects", _rejects, "the rejected images that stand, as JSON lines")
    rejects.add_argument("uri", help="the job's output.uri")
    rejects.add_argument("--superseded", action="store_true", help="those that retries have tried again, instead")
    _add_retry(commands)
    report = _command(commands, "report", _report, "one HTML page about an output, with pictures; needs no network")
    report.epilog = "example: img2parquet report out/demo/results --to report.html --images"
    report.add_argument("uri", help="the job's output.uri")
    report.add_argument("--to", default="report.html", metavar="FILE.html", help="default: report.html here")
    report.add_argument("--sample", type=int, default=2000, metavar="ROWS", help="rows to look at (default 2000)")
    report.add_argument("--truth", metavar="COLUMN", help="the column with the right answers; default: found by itself")
    report.add_argument("--images", action="store_true", help="also write PNG sheets beside the page")
    _command(commands, "models", _models, "the families and published checkpoints, with what each can give")
    _command(commands, "schema", _schema, "the job file's JSON Schema, for editors")
    exports.add_arguments(_command(commands, "export", None, "committed rows in the format of another tool"))
    add_commands(commands, _command)
    demo = _command(commands, "demo", _demo, "make shards of real photographs and label them (in a checkout)")
    demo.add_argument("--runner", choices=["ray", "local"], default="ray")
    return parser


def _command(commands: Any, name: str, function: object, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser


def _add_retry(commands: Any) -> None:
    retry = _command(commands, "retry", _retry, "try the rejects of an output again; the same command resumes")
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


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", help="a job file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the job")


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.driver import run
    from pipeline.job import load_job

    def job(progress: Callable[[Any], None]) -> Any:
        return run(
            load_job(arguments.job, arguments.set),
            arguments.runner,
            address=arguments.address,
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
        print(_json_line(summary.__dict__))
    else:
        tell(summary)
    return DONE


def print_retry(summary: Any) -> None:
    """A finished retry in a few lines; rows are those of the whole output."""
    if not summary.tried:
        say("retry      nothing to do: no reject stands that could be tried again for these reasons")
    else:
        recovered = ", ".join(f"{rows:,} rows to model={name}" for name, rows in summary.recovered.items() if rows)
        say(f"retry      no. {summary.generation}: {summary.tried:,} images tried again, {recovered or 'no rows'}")
    print_summary(summary)


def print_summary(summary: Any) -> None:
    """A finished job in a few lines."""
    done_now = summary.parts - summary.parts_done_before
    if not summary.parts:
        pass  # of a retry with nothing to do
    elif done_now:
        say(f"parts      {summary.parts} ({done_now} now, {summary.parts_done_before} before)")
    else:
        say(f"parts      {summary.parts}, all committed before: nothing to do")
    say(f"rows in    {summary.rows_in:,}")
    for name, rows in summary.rows_written.items():
        say(f"written    {rows:,} to model={name}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary.rejected.items())
    say(f"rejected   {sum(summary.rejected.values()):,}" + (f" ({reasons})" if reasons else ""))
    for name, loss in summary.losses.items():
        say(f"loss       {name} {'none: no row has a truth' if loss is None else format(loss, '.4f')}")
    for name, scores in summary.scores.items():
        say(f"scores     {name} " + ", ".join(f"{kind} {score:.4f}" for kind, score in scores.items()))
    if done_now:
        say(f"speed      {summary.images_per_s:,.0f} images/s, {summary.seconds:.1f} s in all")
    if summary.bottleneck:
        say(f"bottleneck {summary.bottleneck}")
    say(f"results    {summary.output_uri}")


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline.commit import Output
    from pipeline.job import load_job
    from pipeline.plan import check_same_run, identities, make_plan
    from pipeline.probe import probe
    from pipeline.storage import Store

    job = load_job(arguments.job, arguments.set)
    probed = probe(job)
    output = Output.at(job.output.uri, Store(job.output.storage_options))
    plan = output.stored_plan()
    where = "stored in the output" if plan else "not stored yet"
    if plan is None:
        plan = make_plan(job, probed.cards, probed.dtype)
    else:
        check_same_run(plan, identities(job, probed.cards, probed.dtype), output.uri)
    files = output.files()
    rows = f"{plan.rows:,}" if plan.rows is not None else "known when read"
    size = f"{sum(part.size_bytes for part in plan.parts):,} bytes of input"
    say(f"plan       {len(plan.parts)} parts, {size}, rows {rows}; {where}")
    say(f"dtype      {probed.dtype} on {probed.device}, batches of {probed.batch_size}")
    for name, names in plan.names.items():
        done = sum(name_of_part in files for name_of_part in names)
        say(f"model      {name}: {done} of {len(plan.parts)} parts committed, identity {plan.identity(name)}")
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    from pipeline.results import status

    print_status(status(arguments.uri, read_footers=True if arguments.rejects else None))
    return DONE


def print_status(now: Any) -> None:
    """How far a run is, in a few lines."""
    unknown = "not counted; --rejects reads each part's footer"
    rows = f"{now.rows_in:,}" if now.rows_in is not None else unknown
    planned = f" of {now.rows_planned:,}" if now.rows_planned is not None else ""
    say(f"state      {'complete' if now.is_complete else 'not complete'}")
    if now.generation:
        left = f", {now.retry_files_left} files of the last one are left" if now.retry_files_left else ""
        say(f"retried    {now.generation} times{left}")
    for name, done in now.parts_done.items():
        written = f", {now.rows_written[name]:,} rows" if now.rows_written is not None else ""
        say(f"model      {name}: {done} of {now.parts} parts{written}")
    say(f"rows in    {rows}{planned}")
    say(f"rejected   {f'{now.rejected:,}' if now.rejected is not None else unknown}")
    say(f"bytes      {now.size_bytes:,}")
    if now.bottleneck:
        here = f"{now.meter['parts_here']} parts of session {now.meter['session']}"
        say(f"bottleneck {now.bottleneck} ({here})")
    if now.retries:
        kinds = ", ".join(f"{kind} {times:,}" for kind, times in sorted(now.retries.items()))
        say(f"retries    {sum(now.retries.values()):,} requests to stores were sent again: {kinds}")


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.commit import Output
    from pipeline.verify import verify

    problems = verify(Output.at(arguments.uri))
    for problem in problems:
        say(problem.replace("\n", "\\n"))  # one line each, whatever a key holds
    say(f"{len(problems)} problems" if problems else "ok: every planned row is there exactly once", file=sys.stderr)
    return FAILED if problems else DONE


def _rejects(arguments: argparse.Namespace) -> int:
    from pipeline.results import read_rejects

    table = read_rejects(arguments.uri, superseded=arguments.superseded)
    counts: Counter[str] = Counter()
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            print(_json_line(row))
            counts[row["reason"]] += 1
    say(f"{table.num_rows} rejects: " + ", ".join(f"{k} {v}" for k, v in counts.most_common()), file=sys.stderr)
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from pipeline.report import report

    given = arguments
    for path in report(given.uri, given.to, sample=given.sample, truth=given.truth, images=given.images):
        say(str(path))
    return DONE


def _models(arguments: argparse.Namespace) -> int:
    from pipeline.catalogue import lines

    for line in lines():
        say(line)
    return DONE


def _schema(arguments: argparse.Namespace) -> int:
    from pipeline.job import json_schema

    print(json.dumps(json_schema(), indent=1))
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
