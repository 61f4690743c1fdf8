"""A job from start to end: plan, runner, gather, commit, finish. The driver alone commits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from pipeline.batch import Embedded, Failed, Work
from pipeline.commit import Footer, Output
from pipeline.errors import JobError, JobFailed, RejectLimitExceeded, StorageError, nearest
from pipeline.job import JobSpec
from pipeline.losses import mean_losses
from pipeline.plan import Plan, identities, make_plan, most_rows
from pipeline.probe import Probe
from pipeline.schema import Part
from pipeline.storage import Store
from pipeline.write import EncodedPart, Gathering, encode_part

RUNNERS = ("ray", "local")
COMMIT_THREADS = 4
MAX_PARTS_TO_COMMIT = 8  # encoded or being encoded; the stream waits for them, so the driver's memory is bounded


@dataclass
class Tally:
    """What a run has done so far; `on_change` is called with it whenever it changes."""

    output_uri: str
    parts: int = 0
    parts_done_before: int = 0
    parts_committed: int = 0
    rows_planned: int | None = None
    rows_in: int = 0  # of this session
    rows_rejected: int = 0
    step_seconds: Counter[str] = field(default_factory=Counter)  # summed over workers
    started: float = field(default_factory=time.monotonic)
    working_since: float = 0.0

    @property
    def images_per_s(self) -> float:
        seconds = time.monotonic() - self.working_since
        return self.rows_in / seconds if self.working_since and seconds > 0 else 0.0


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
    step_seconds: dict[str, float]
    losses: dict[str, float | None] = field(default_factory=dict)  # `model.column` -> mean over rows that have one


def run(
    job: JobSpec,
    runner: Literal["ray", "local"] | str = "ray",
    *,
    address: str | None = None,
    on_change: Callable[[Tally], None] = lambda tally: None,
) -> Summary:
    """Do what is left of a job. The same call resumes; what is done is never done twice.

    Raises UserError before anything is read, JobFailed when parts could not be done, RejectLimitExceeded after
    committing what is good, StorageError when the output cannot be written."""
    module = _runner(runner)
    probe: Probe = module.start(job, address) if runner == "ray" else module.start(job)
    output = Output.at(job.output.uri, Store(job.output.storage_options))
    ids = identities(job, probe.cards, probe.dtype)
    plan, digest = output.begin(ids, lambda: make_plan(job, probe.cards, probe.dtype))
    record = output.record_run(_record(job, plan, digest, probe))
    work = Work(
        job,
        probe.cards,
        probe.dtype,
        probe.device,
        batch_size=record["batch_size"],
        threads=record["threads_per_worker"],
        most_rows=most_rows(job, probe.cards),
    )
    session = _Session(output, plan, work, on_change)
    session.run(module)
    return _finish(job, output, plan, session.tally)


def _runner(name: str) -> ModuleType:
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


class _Session:
    """What this call does: the runner's results gathered by part, whole parts committed by a few threads."""

    def __init__(self, output: Output, plan: Plan, work: Work, on_change: Callable[[Tally], None]) -> None:
        self.output, self.plan, self.work, self.on_change = output, plan, work, on_change
        self.files = output.part_files()
        self.pending = [part for part in plan.parts if self._models_left(part)]
        done = len(plan.parts) - len(self.pending)
        self.tally = Tally(output.uri, len(plan.parts), done, rows_planned=plan.rows)
        self.gathering: dict[int, Gathering] = {}
        self.failed: dict[int, str] = {}

    def _models_left(self, part: Part) -> list[str]:
        return [name for name in self.plan.identities if self.plan.file_name(name, part) not in self.files]

    def run(self, runner: ModuleType) -> None:
        self.on_change(self.tally)
        if not self.pending:
            return
        self.output.check_store()
        commits: set[Future[None]] = set()
        with ThreadPoolExecutor(COMMIT_THREADS, "img2parquet-commit") as pool:
            for whole in self._whole_parts(runner.stream(self.pending, self.work)):
                if len(commits) >= MAX_PARTS_TO_COMMIT:
                    finished, commits = wait(commits, return_when=FIRST_COMPLETED)
                    self._settle(finished)
                commits.add(pool.submit(self._commit, whole))
            self._settle(commits)
        if self.failed:
            raise self._failure()

    def _whole_parts(self, results: Iterator[Embedded | Failed]) -> Iterator[Gathering]:
        parts = {part.index: part for part in self.pending}
        self.tally.working_since = time.monotonic()
        for result in results:
            if isinstance(result, Failed):
                self.failed[result.part_index] = result.message
                self.gathering.pop(result.part_index, None)
                continue
            if result.part_index in self.failed:
                continue
            gathering = self.gathering.setdefault(result.part_index, Gathering(parts[result.part_index]))
            gathering.add(result, self.work.batch_size)
            self._count(result)
            if gathering.is_whole:
                yield self.gathering.pop(result.part_index)

    def _count(self, result: Embedded) -> None:
        self.tally.rows_in += result.images
        self.tally.rows_rejected += len(_images(result))
        self.tally.step_seconds.update(result.seconds)
        self.on_change(self.tally)

    def _commit(self, gathering: Gathering) -> None:
        """Encode and create a part's file of every model that lacks it."""
        for name in self._models_left(gathering.part):
            encoded = self._encode(name, gathering)
            self.output.put_once(self.plan.file_name(name, gathering.part), encoded.data)
        self.tally.parts_committed += 1
        self.on_change(self.tally)

    def _encode(self, model: str, gathering: Gathering) -> EncodedPart:
        identity = self.plan.identity(model)
        return encode_part(gathering.part, model, identity, gathering.in_order(), self.plan.identities[model])

    def _settle(self, futures: set[Future[None]]) -> None:
        for future in futures:
            future.result()

    def _failure(self) -> JobFailed:
        shown = [f"  part {index}: {message}" for index, message in sorted(self.failed.items())[:5]]
        more = f"\n  and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        return JobFailed(
            f"{len(self.failed)} of {len(self.plan.parts)} parts could not be done:\n" + "\n".join(shown) + more,
            hint="the other parts are committed; run the same command again to do what is left",
        )


def _images(result: Embedded) -> set[int]:
    """Source rows that at least one model rejected."""
    return {reject.row for rejects in result.rejects.values() for reject in rejects}


def _finish(job: JobSpec, output: Output, plan: Plan, tally: Tally) -> Summary:
    """Gather, judge the rejects, and mark the output as complete. Raises RejectLimitExceeded."""
    totals = _totals(plan, output.finish(plan))
    losses = mean_losses(job, output, plan)
    seconds = time.monotonic() - tally.started
    summary = Summary(
        output_uri=output.uri,
        models=tuple(plan.identities),
        parts=len(plan.parts),
        parts_done_before=tally.parts_done_before,
        rows_in=totals["rows_in"],
        rows_written=totals["rows_written"],
        rejected=totals["rejected"],
        seconds=seconds,
        images_per_s=tally.rows_in / max(time.monotonic() - tally.working_since, 1e-9) if tally.rows_in else 0.0,
        step_seconds=dict(tally.step_seconds),
        losses=losses,
    )
    rejected = sum(totals["rejected"].values())
    if rejected > job.reject_limit * totals["rows_in"]:
        by_reason = ", ".join(f"{reason} {count}" for reason, count in totals["rejected"].items())
        raise RejectLimitExceeded(
            f"{rejected} of {totals['rows_in']} images were rejected ({by_reason}), "
            f"more than reject_limit {job.reject_limit:g}",
            hint=f"what was good is committed; look at `img2parquet rejects {output.uri}`, "
            "and run again with a higher --set reject_limit=... to accept it",
        )
    output.succeed({**totals, "losses": losses} if losses else totals)
    return summary


def _totals(plan: Plan, footers: list[tuple[str, Footer]]) -> dict[str, Any]:
    """Counts over the whole output, from each file's footer and the model that it belongs to."""
    written: Counter[str] = Counter()
    reasons: dict[tuple[int, int], str] = {}
    rows_in: dict[int, int] = {}
    for name, footer in footers:
        written[name] += footer.rows
        if rows_in.setdefault(footer.part_index, footer.rows_in) != footer.rows_in:
            raise StorageError(f"part {footer.part_index}: its models do not agree on how many rows came in")
        for reject in footer.rejects:
            reasons.setdefault((footer.part_index, reject["row"]), reject["reason"])
    by_reason = dict(sorted(Counter(reasons.values()).items(), key=lambda item: (-item[1], item[0])))
    return {
        "parts": len(plan.parts),
        "rows_in": sum(rows_in.values()),
        "rows_written": dict(written),
        "rejected": by_reason,
    }
