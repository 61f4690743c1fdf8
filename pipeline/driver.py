"""A job from start to end: plan, session, finish. The driver alone commits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

from pipeline.batch import Work
from pipeline.commit import Output
from pipeline.errors import JobError, RejectLimitExceeded, nearest
from pipeline.evaluate import scores_by_truth
from pipeline.finish import finish, stored_totals
from pipeline.generations import History, read_history
from pipeline.job import JobSpec
from pipeline.logs import of_run
from pipeline.losses import mean_losses
from pipeline.plan import Plan, identities, make_plan, most_rows
from pipeline.probe import Probe
from pipeline.session import Session, Tally
from pipeline.signals import Signals
from pipeline.storage import Store

RUNNERS = ("ray", "local")


@dataclass(frozen=True)
class Summary:
    """A finished job. Rows are those of the whole output; `seconds` and `images_per_s` are this session's."""

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


def run(
    job: JobSpec,
    runner: Literal["ray", "local"] | str = "ray",
    *,
    address: str | None = None,
    signals: Signals | None = None,
    on_change: Callable[[Tally], None] = lambda tally: None,
) -> Summary:
    """Do what is left of a job. The same call resumes; what is done is never done twice.

    The local runner works in this process, which an image that crashes its decoder takes down: a library cannot
    outlive that. The command does, and so does the ray runner.

    Raises UserError before anything is read, JobFailed when parts could not be done, RejectLimitExceeded after
    committing what is good, StorageError when the output cannot be written; and where a command gives its `signals`,
    Stopped after the first of them: without, Ctrl-C is a KeyboardInterrupt, and SIGTERM what the caller made of it."""
    module = choose_runner(runner)
    output = Output.at(job.output.uri, Store(job.output.storage_options))
    asked = _as_begun(job, output)
    probe: Probe = module.start(asked, address) if runner == "ray" else module.start(asked)
    ids = identities(job, probe.cards, probe.dtype)
    plan, digest = output.begin(ids, lambda: make_plan(job, probe.cards, probe.dtype))
    record = output.record_run(_record(job, plan, digest, probe))
    session, history, totals = _begin(output, plan, make_work(job, probe, record), on_change)
    if signals:
        signals.listen()
    session.run(module, signals)
    return _finish(job, session, history, totals)


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
    output: Output, plan: Plan, work: Work, on_change: Callable[[Tally], None]
) -> tuple[Session, History, dict[str, Any] | None]:
    """What is left, from one listing; and the totals, where nothing is left and all that is derived is there too."""
    files = output.files()
    session, history = Session(output, plan, work, files, on_change), read_history(output, plan, files)
    return session, history, None if session.left else stored_totals(output, history, files)


def _finish(job: JobSpec, session: Session, history: History, stored: dict[str, Any] | None) -> Summary:
    """Gather, judge the rejects, and mark the output as complete. Raises RejectLimitExceeded."""
    output, plan = session.output, session.plan
    images_per_s = session.tally.images_per_s  # before gathering, which is no part of it
    totals = stored or finish(output, plan, session.footers, session.report)
    if not stored and history.later:  # a part that was gone is back: what retries have added counts as before
        stored = stored_totals(output, history, output.files())
        totals = stored or totals
    losses = totals.get("losses", {}) if stored else mean_losses(job, output, plan.names)
    scores = totals.get("scores", {}) if stored else scores_by_truth(job, output, History(plan))
    summary = replace(summarise(session, totals, losses, images_per_s), scores=scores)
    judge(job, output, totals)
    if not stored:
        told = {"losses": losses, "scores": scores}
        output.succeed({**totals, **{name: values for name, values in told.items() if values}})
    return summary


def summarise(
    session: Session, totals: Mapping[str, Any], losses: dict[str, float | None], images_per_s: float
) -> Summary:
    """totals: of the whole output."""
    tally, plan, meter = session.tally, session.plan, session.report
    return Summary(
        output_uri=session.output.uri,
        models=tuple(plan.identities),
        parts=len(plan.parts),
        parts_done_before=tally.parts_done_before,
        rows_in=totals["rows_in"],
        rows_written=totals["rows_written"],
        rejected=totals["rejected"],
        seconds=time.monotonic() - tally.started,
        images_per_s=images_per_s,
        bottleneck=meter.get("bottleneck", ""),
        meter=meter,
        losses=losses,
    )


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
