"""A job from start to end: plan, session, finish. The driver alone commits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

from pipeline.batch import Work
from pipeline.commit import RUN, SUCCESS, Output
from pipeline.errors import JobError, RejectLimitExceeded, nearest
from pipeline.evaluate import scores_by_truth
from pipeline.extending import begin_extension, begun_extension
from pipeline.finish import Counting, finish, finish_later, stored_totals
from pipeline.generations import Extension, History, LaterPlan, describe, of_generation, read_history
from pipeline.job import JobSpec
from pipeline.logs import of_run
from pipeline.losses import mean_losses
from pipeline.plan import Plan, identities, make_plan, most_rows
from pipeline.probe import Probe
from pipeline.session import Session, Tally
from pipeline.signals import Signals
from pipeline.slices import WHOLE, Slice, announce, left_by_slice, parse_slice
from pipeline.storage import Entry, Store

RUNNERS = ("ray", "local")


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
    rejected: dict[str, int]  # images, by reason; an image that several models rejected counts once
    seconds: float
    images_per_s: float
    bottleneck: str = ""  # what held this session up and what would help; `` where there was nothing to do
    meter: dict[str, Any] = field(default_factory=dict)  # this session's stages, as in the manifest's metadata
    losses: dict[str, float | None] = field(default_factory=dict)  # `model.column` -> mean over rows that have one
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # `model.column` -> top1, mean_iou, ...
    shard: str = ""  # `2/8`: the slice that was asked for; parts are its, and rows as well while `parts_left`
    parts_left: int = 0  # of the whole output: whoever does the last of them ends the job
    left: dict[str, int] = field(default_factory=dict)  # the same by slice
    generation: int = 0  # the last there is
    added: int = 0  # files that this command has found new, or found begun


def run(
    job: JobSpec,
    runner: Literal["ray", "local"] | str = "ray",
    *,
    address: str | None = None,
    shard: tuple[int, int] | str | None = None,
    extend: bool = False,
    signals: Signals | None = None,
    on_change: Callable[[Tally], None] = lambda tally: None,
) -> Summary:
    """Do what is left of a job. The same call resumes; what is done is never done twice.

    shard: (i, n), every n-th part from part i on. Any number of drivers, on any machines, each with another i, do one
    job together: the first stores the plan, who does the last part ends the job, the others return with `parts_left`.
    extend: when the job as it was planned is at its end, also do the files that have come to the input since, as a
    generation of their own; without it, what was planned at the first start is all there is.

    The local runner works in this process, which an image that crashes its decoder takes down: a library cannot
    outlive that. The command does, and so does the ray runner.

    Raises UserError before anything is read, JobFailed when parts could not be done, RejectLimitExceeded after
    committing what is good, StorageError when the output cannot be written; and where a command gives its `signals`,
    Stopped after the first of them: without, Ctrl-C is a KeyboardInterrupt, and SIGTERM what the caller made of it."""
    module, own = choose_runner(runner), parse_slice(shard)
    output = Output.at(job.output.uri, Store(job.output.storage_options))
    asked = _as_begun(job, output)
    probe: Probe = module.start(asked, address) if runner == "ray" else module.start(asked)
    ids = identities(job, probe.cards, probe.dtype)
    plan, digest = output.begin(ids, lambda: make_plan(job, probe.cards, probe.dtype))
    record = output.record_run(_record(job, plan, digest, probe))
    work = make_work(job, probe, record)
    session, history, totals = _begin(output, plan, work, on_change, own)
    if signals:
        signals.listen()
    session.run(module, signals)
    summary = _finish(job, session, history, totals)
    while extend and not summary.parts_left:
        files = output.files()
        history = read_history(output, plan, files)
        begun = begun_extension(output, history, files)
        before = history.upto(history.generation - 1) if begun else history
        planned = begun or begin_extension(output, before, job, probe.cards)
        if planned is None:
            break
        added, digest = planned
        told = {**_record(job, added, digest, probe), **describe(added, digest), "batch_size": work.batch_size}
        output.record(of_generation(RUN, added.generation), told)
        session = _session(output, added, work, files, on_change, own)
        session.run(module, signals)
        summary = _of_both(summary, finish_later_run(job, session, before), added)
        extend = begun is not None  # else all that has come is in it
    return summary


def _session(
    output: Output, plan: Plan, work: Work, files: Mapping[str, Entry], on_change: Callable[[Tally], None], own: Slice
) -> Session:
    """Of what is left. Raises RunMismatch for a slice that overlaps another one that was begun."""
    session = Session(output, plan, work, files, on_change, own)
    if session.left:
        announce(output, plan, own, plan.generation if isinstance(plan, LaterPlan) else 0, files)
    return session


def _of_both(before: Summary, after: Summary, added: Extension) -> Summary:
    """An extension's, with the parts of what this command did before it; rows are of the whole output anyway."""
    files = before.added + len({piece.uri for part in added.parts for piece in part.pieces})
    told = replace(after, generation=added.generation, added=files)
    if after.parts_left:  # the slice of this extension alone
        return told
    done_before = before.parts_done_before + after.parts_done_before
    return replace(told, parts=before.parts + after.parts, parts_done_before=done_before)


def _as_begun(job: JobSpec, output: Output) -> JobSpec:
    """With the batch size that the run here has recorded, so that a resumed job does not try sizes again."""
    record = output.run_record() if job.resources.batch_size == "auto" else None
    if record is None:
        return job
    resources = job.resources.model_copy(update={"batch_size": record["batch_size"]})
    return job.model_copy(update={"resources": resources})


def choose_runner(name: str) -> ModuleType:
    """The module behind a runner's name; ray is imported only when asked for."""
    if name == "local":
        from pipeline import local

        return local
    if name != "ray":
        raise JobError(f"unknown runner `{name}`", known=RUNNERS, hint=nearest(name, RUNNERS))
    from pipeline import cluster

    return cluster


def _record(job: JobSpec, plan: Plan, digest: str, probe: Probe) -> dict[str, Any]:
    """What _run.json says. Storage options may name accounts and are left out."""
    resolved = job.model_dump(mode="json", exclude={"input": {"storage_options"}, "output": {"storage_options"}})
    return {
        "identities": {name: {"hash": plan.identity(name), **what} for name, what in plan.identities.items()},
        "job": resolved,
        "plan_sha256": digest,
        "parts": len(plan.parts),
        "dtype": probe.dtype,
        "batch_size": probe.batch_size,
        "threads_per_worker": job.resources.threads_per_worker,
        "versions": dict(probe.versions),
    }


def make_work(job: JobSpec, probe: Probe, record: Mapping[str, Any]) -> Work:
    """record: of the run, or of a retry."""
    return Work(
        job,
        probe.cards,
        probe.dtype,
        probe.device,
        batch_size=record["batch_size"],
        threads=record["threads_per_worker"],
        most_rows=most_rows(job, probe.cards),
        log_as=of_run(record["plan_sha256"]),
    )


def _begin(
    output: Output, plan: Plan, work: Work, on_change: Callable[[Tally], None], own: Slice
) -> tuple[Session, History, dict[str, Any] | None]:
    """What is left, from one listing; and the totals, where nothing is left and all that is derived is there too."""
    files = output.files()
    session, history = _session(output, plan, work, files, on_change, own), read_history(output, plan, files)
    return session, history, None if plan.left(files) else stored_totals(output, history, files)


def _finish(job: JobSpec, session: Session, history: History, stored: dict[str, Any] | None) -> Summary:
    """Gather, judge the rejects, and mark the output as complete. Raises RejectLimitExceeded."""
    output, plan = session.output, session.plan
    images_per_s = session.tally.images_per_s  # before gathering, which is no part of it
    if not stored and (partial := of_slice(session, images_per_s)):
        return partial
    totals = stored or finish(output, plan, session.footers, session.report)
    if not stored and history.later:  # a part that was gone is back: what later generations added counts as before
        stored = stored_totals(output, history, output.files())
        totals = stored or totals
    losses = totals.get("losses", {}) if stored else mean_losses(job, output, plan.names)
    scores = totals.get("scores", {}) if stored else scores_by_truth(job, output, History(plan))
    summary = replace(summarise(session, totals, losses, images_per_s), scores=scores, generation=history.generation)
    judge(job, output, totals)
    if not stored:
        told = {"losses": losses, "scores": scores}
        output.succeed({**totals, **{name: values for name, values in told.items() if values}})
    return summary


def finish_later_run(job: JobSpec, session: Session, before: History) -> Summary:
    """The same for a generation after the first, which is the session's plan. Raises RejectLimitExceeded, judged over
    all generations."""
    output, plan = session.output, session.plan
    assert isinstance(plan, LaterPlan)
    images_per_s = session.tally.images_per_s
    if partial := of_slice(session, images_per_s):
        return partial
    history = History(before.first, (*before.later, plan))
    gathered = finish_later(output, history, session.footers, session.report)
    losses, scores = mean_losses(job, output, history.names), scores_by_truth(job, output, history)
    summary = replace(summarise(session, gathered, losses, images_per_s), scores=scores, generation=plan.generation)
    judge(job, output, gathered)
    told = {name: values for name, values in {"losses": losses, "scores": scores}.items() if values}
    output.succeed({**gathered, **told}, of_generation(SUCCESS, plan.generation), history.records())
    return summary


def summarise(
    session: Session, totals: Mapping[str, Any], losses: dict[str, float | None], images_per_s: float
) -> Summary:
    """totals: of the whole output."""
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
        losses=losses,
        shard="" if session.own == WHOLE else str(session.own),
    )


def of_slice(session: Session, images_per_s: float) -> Summary | None:
    """What came of a slice, by the footers of its parts; None where the parts of all others are there as well."""
    if session.own == WHOLE:
        return None
    output, plan, own = session.output, session.plan, session.own
    files = output.files()
    left = left_by_slice(plan, files, own.count)
    if not left:
        return None
    names = (name for _, index, name in plan.indexed() if index in own)
    counting = Counting()
    for _ in counting.rejects(output.footers(names, files, session.footers)):
        pass
    summary = summarise(session, counting.totals(session.tally.parts), {}, images_per_s)
    return replace(summary, parts_left=sum(left.values()), left={str(one): parts for one, parts in left.items()})


def judge(job: JobSpec, output: Output, totals: Mapping[str, Any]) -> None:
    """Raises RejectLimitExceeded. totals: of all generations."""
    rejected = sum(totals["rejected"].values())
    if rejected > job.reject_limit * totals["rows_in"]:
        by_reason = ", ".join(f"{reason} {count}" for reason, count in totals["rejected"].items())
        raise RejectLimitExceeded(
            f"{rejected} of {totals['rows_in']} images were rejected ({by_reason}), "
            f"more than reject_limit {job.reject_limit:g}",
            hint=f"what was good is committed; look at `img2parquet rejects {output.uri}`, "
            "and run again with a higher --set reject_limit=... to accept it",
        )
