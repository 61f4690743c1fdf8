"""Run a job from start to end: plan it, work in a session, finalize it.

A job is generation 0 of its output; extensions and retries run and end in the same way. The driver alone commits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from img2parquet.batch import Work
from img2parquet.dataset.commit import RUN, SUCCESS, Output
from img2parquet.dataset.extension import start_extension, started_extension
from img2parquet.dataset.finalize import FooterTotals, finalize, mark_complete, stored_totals
from img2parquet.dataset.generations import Extension, History, describe, of_generation, read_history, read_newer
from img2parquet.dataset.packed_parts import Parts
from img2parquet.dataset.plan import Plan, cut_whole_input, identities, make_plan, most_rows
from img2parquet.dataset.slices import WHOLE, Slice, announce, left_by_slice, parse_slice
from img2parquet.engine.class_weights import stored_class_weights
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.engine.run_report import Tally
from img2parquet.engine.session import Session
from img2parquet.errors import InputError, ModelError, RejectLimitExceeded
from img2parquet.inference.capabilities import Capabilities, recorded_capabilities
from img2parquet.job import JobSpec, as_job
from img2parquet.results.evaluation.evaluate import scores_by_truth
from img2parquet.results.evaluation.mean_loss import mean_losses
from img2parquet.runners import check_runner, choose_automatically, choose_runner
from img2parquet.storage import Entry, Store
from img2parquet.telemetry.logs import log_step, set_run

log = logging.getLogger(__name__)
NOT_FINITE_HINT = (
    "; most values were not finite: the weights may be damaged, or need `dtype: float32` for the job and its outputs"
)


@dataclass(frozen=True)
class Summary:
    """A finished job, or a slice of one. Rows are those of the whole output; `seconds` and `images_per_s` are this
    session's."""

    output_uri: str
    models: tuple[str, ...]
    parts: int
    parts_done_before: int
    rows_in: int
    rows_written: dict[str, int]
    rejected: dict[str, int]  # images by reason; an image that several models rejected counts once
    seconds: float
    images_per_s: float
    bottleneck: str = ""  # what limited this session and what would help; empty when there was nothing to do
    meter: dict[str, Any] = field(default_factory=dict)  # this session's stages, as in the manifest's metadata
    losses: dict[str, float | None] = field(default_factory=dict)  # `model.column` to the mean over rows with a loss
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # `model.column` to top1, mean_iou, ...
    shard: str = ""  # the requested slice, as `2/8`; parts are its own, and so are rows while `parts_left`
    parts_left: int = 0  # of the whole output: the driver that commits the last part finalizes the job
    left: dict[str, int] = field(default_factory=dict)  # parts left by slice
    generation: int = 0  # the last one of the output
    added: int = 0  # input files in extensions that this command started or continued


def run(
    job: JobSpec | Mapping[str, Any] | str | Path,
    runner: Literal["auto", "local", "ray"] | str = "auto",
    *,
    address: str | None = None,
    shard: tuple[int, int] | str | None = None,
    extend: bool = False,
    signals: StopSignals | None = None,
    on_change: Callable[[Tally], None] = lambda tally: None,
) -> Summary:
    """Run a job, or resume it: the same call commits the parts that are missing, and never repeats one.

    job: a parsed job, the path of a job file, or its content as dicts and lists.
    runner: `local` works in this process; `ray` on the cluster of `address` or RAY_ADDRESS, or one that it starts here;
    `auto` chooses as `runners.choose_automatically` does. Neither starts when every part is committed.
    shard: (i, n), the slice of every n-th part from part i on. Several drivers, on any machines, each with another i,
    run one job together: the first stores the plan, the driver that commits the last part finalizes the job, the others
    return with `parts_left`.
    extend: once the planned job is complete, also process the files that were added to the input since, as a new
    generation; without it, a job covers what was planned at its first start.

    The local runner works in this process: an image that crashes its decoder takes the process down, which a library
    call cannot survive. The command line and the ray runner do.

    Raises UserError before anything is read, JobFailed when parts failed, RejectLimitExceeded after committing the good
    rows, StorageError when the output cannot be written, and Stopped after the first of `signals`, where a command
    passes them; without them, Ctrl-C raises KeyboardInterrupt, and SIGTERM does what the caller has set up."""
    check_runner(runner)
    job = as_job(job)
    own, output = parse_slice(shard), Output.at(job.output.uri, Store(job.output.storage_options))
    stored, recorded = output.stored_plan(), output.run_record()
    parts = None if stored else _listed(job)
    complete = None if extend or stored is None else _complete_files(output, stored)
    probe = None if complete is None or recorded is None else _recorded_probe(job, recorded)
    if probe:
        runner = "local"  # to do nothing
    elif runner == "auto":
        parts_in = stored.parts if stored else parts
        runner, why = choose_automatically(address, lambda: sum(part.size_bytes for part in parts_in or ()))
        log_step("Running in this process" if runner == "local" else f"Running on Ray: {why}")
    module = choose_runner(runner)
    probe = probe or module.start(_with_recorded_batch_size(job, recorded), address)
    _log_notes(probe)
    ids = identities(job, probe.cards, probe.dtype)
    plan, digest = output.begin(ids, lambda: make_plan(job, probe.cards, probe.dtype, parts))
    record = output.record_run(_record(job, plan, digest, probe))
    work = make_work(job, probe, record, output)
    files = complete if complete else output.files()
    history = read_history(output, plan, files)
    session = _session(output, plan, work, files, on_change, own)
    if signals:
        signals.listen()
    session.run(module, signals)
    summary = end_generation(job, session, history, files)
    while extend and not summary.parts_left:
        files = output.files()
        history = read_history(output, plan, files)
        started = started_extension(output, history, files)
        before = history.upto(history.generation - 1) if started else history
        planned = started or start_extension(output, before, job, probe.cards)
        if planned is None:
            break
        added, digest, covers_all = planned
        details = {**_record(job, added, digest, probe), **describe(added, digest), "batch_size": work.batch_size}
        output.record(of_generation(RUN, added.generation), details)
        session = _session(output, added, work, files, on_change, own)
        session.run(module, signals)
        summary = _combine(summary, end_generation(job, session, before.then(added), files), added)
        extend = not covers_all
    return summary


def _session(
    output: Output, plan: Plan, work: Work, files: Mapping[str, Entry], on_change: Callable[[Tally], None], own: Slice
) -> Session:
    """Create a session for the uncommitted parts. Raises RunMismatch when our slice overlaps one that was started."""
    session = Session(output, plan, work, files, on_change, own)
    if session.left:
        announce(output, plan, own, files)
    return session


def _combine(before: Summary, after: Summary, added: Extension) -> Summary:
    """Add the parts that this command did before an extension to the extension's summary; rows cover the whole output
    already."""
    files = before.added + len({piece.uri for part in added.parts for piece in part.pieces})
    summary = replace(after, generation=max(added.generation, after.generation), added=files)
    if after.parts_left:  # it describes our slice of this extension alone
        return summary
    done_before = before.parts_done_before + after.parts_done_before
    return replace(summary, parts=before.parts + after.parts, parts_done_before=done_before)


def _listed(job: JobSpec) -> Parts:
    """List the input before anything that takes long is started. Raises InputError, StorageError."""
    log_step("Listing the input")
    return cut_whole_input(job, job.output.rows_per_part)


def _complete_files(output: Output, plan: Plan) -> Mapping[str, Entry] | None:
    """List the output of a finished job; return None where it is not finished, or parts are missing."""
    if output.read(SUCCESS) is None:
        return None
    files = output.files()
    return None if plan.left(files) else files


def _recorded_probe(job: JobSpec, record: Mapping[str, Any]) -> Capabilities | None:
    """Return what the workers of a finished job could do; None where only a worker can read the models."""
    try:
        return recorded_capabilities(job, record)
    except ModelError:
        return None


def _with_recorded_batch_size(job: JobSpec, record: Mapping[str, Any] | None) -> JobSpec:
    """Take over the batch size that the output's run has recorded, so that a resumed job does not probe sizes again."""
    if record is None or job.resources.batch_size != "auto":
        return job
    resources = job.resources.model_copy(update={"batch_size": record["batch_size"]})
    return job.model_copy(update={"resources": resources})


def _record(job: JobSpec, plan: Plan, digest: str, probe: Capabilities) -> dict[str, Any]:
    """Return the contents of _run.json. Storage options may name accounts and are left out."""
    resolved = job.model_dump(mode="json", exclude={"input": {"storage_options"}, "output": {"storage_options"}})
    notes = {name: list(card.notes) for name, card in probe.cards.items() if card.notes}
    return {
        "identities": {name: {"hash": plan.identity(name), **what} for name, what in plan.identities.items()},
        "job": resolved,
        "plan_sha256": digest,
        "parts": len(plan.parts),
        "dtype": probe.dtype,
        "batch_size": probe.batch_size,
        "threads_per_worker": job.resources.threads_per_worker,
        "versions": dict(probe.versions),
        **({"notes": notes} if notes else {}),
    }


def _log_notes(probe: Capabilities) -> None:
    """Tell the user what was assumed about each checkpoint, and where its results differ from the reference's."""
    for name, card in probe.cards.items():
        for note in card.notes:
            log.warning("model `%s`: %s", name, note)


def make_work(job: JobSpec, probe: Capabilities, record: Mapping[str, Any], output: Output) -> Work:
    """Describe the work to the workers. record: of the run, or of a retry. Raises StorageError when what the output
    stores for them is damaged."""
    return Work(
        job,
        probe.cards,
        probe.dtype,
        probe.device,
        batch_size=record["batch_size"],
        threads=record["threads_per_worker"],
        most_rows=most_rows(job, probe.cards),
        class_weights=stored_class_weights(job, probe.cards, output),
        log_as=set_run(record["plan_sha256"]),
    )


def end_generation(job: JobSpec, session: Session, history: History, files: Mapping[str, Entry]) -> Summary:
    """Finalize the session's generation; return the summary of the output, or that of a slice while parts are missing.

    history: up to this generation, or beyond where this one is repeated. files: the output as listed before the
    session. Raises InputError where nothing was read, and RejectLimitExceeded, judged over all generations, before
    _SUCCESS is written."""
    output, generation = session.output, session.plan.generation
    images_per_s = session.tally.images_per_s  # before finalizing, which is no part of it
    stored = None
    if session.plan.left(files):
        if partial := of_slice(session, images_per_s):
            return partial
        files = output.files()
        history = read_newer(output, history, files)
    else:
        stored = stored_totals(output, history, files, generation)
    own = history.upto(generation)
    if stored is None:
        meter = session.report or output.last_meter(files)
        totals = finalize(output, history, generation, files, known=session.footers, meter=meter)
        if history.generation > generation:  # a lost part is restored: later generations count as before
            stored = stored_totals(output, history, output.files(), generation)
    if stored is None:
        means = {"losses": mean_losses(job, output, own.names), "scores": scores_by_truth(job, output, own)}
        totals |= {name: values for name, values in means.items() if values}
    summary = summarise(session, stored or totals, images_per_s)
    judge(job, output, stored or totals)
    if stored is None:
        mark_complete(output, own, totals)
    return replace(summary, generation=history.generation)


def summarise(session: Session, totals: Mapping[str, Any], images_per_s: float) -> Summary:
    """Combine a session's figures with the totals of the output, or of a slice."""
    tally, plan, meter = session.tally, session.plan, session.report
    return Summary(
        output_uri=session.output.uri,
        models=tuple(plan.identities),
        parts=tally.parts,
        parts_done_before=tally.parts_done_before,
        rows_in=totals["rows_in"],
        rows_written=totals["rows_written"],
        rejected=totals["rejected"],
        seconds=time.monotonic() - tally.started,
        images_per_s=images_per_s,
        bottleneck=meter.get("bottleneck", ""),
        meter=meter,
        losses=totals.get("losses", {}),
        scores=totals.get("scores", {}),
        shard="" if session.own == WHOLE else str(session.own),
    )


def of_slice(session: Session, images_per_s: float) -> Summary | None:
    """Summarise our slice from the footers of its parts; None once the parts of all slices are committed."""
    if session.own == WHOLE:
        return None
    output, plan, own = session.output, session.plan, session.own
    files = output.files()
    left = left_by_slice(plan, files, own.count)
    if not left:
        return None
    names = (name for _, index, name in plan.indexed() if index in own)
    totals = FooterTotals.of(output.footers(names, files, session.footers)).totals(session.tally.parts)
    summary = summarise(session, totals, images_per_s)
    return replace(summary, parts_left=sum(left.values()), left={str(one): parts for one, parts in left.items()})


def judge(job: JobSpec, output: Output, totals: Mapping[str, Any]) -> None:
    """Raise InputError when the input gave neither rows nor rejects, and RejectLimitExceeded when more images were
    rejected than the job allows. totals: of all generations."""
    if not totals["rows_in"]:
        raise InputError(
            f"{output.uri}: the input gave neither rows nor rejects",
            hint="check `input.kind`, and the names of the images in it; use another output.uri for the right input",
        )
    rejected = sum(totals["rejected"].values())
    if rejected > job.reject_limit * totals["rows_in"]:
        by_reason = ", ".join(f"{reason} {count}" for reason, count in totals["rejected"].items())
        raise RejectLimitExceeded(
            f"{rejected} of {totals['rows_in']} images were rejected ({by_reason}), "
            f"more than reject_limit {job.reject_limit:g}",
            hint=f"the good rows are committed; look at `img2parquet rejects {output.uri}`, "
            "and run again with a higher --set reject_limit=... to accept the result"
            + NOT_FINITE_HINT
            * (totals["rejected"].get("not_finite", 0) * 2 > rejected),
        )
