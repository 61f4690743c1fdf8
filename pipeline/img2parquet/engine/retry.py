"""Retry the rejects of an output: a new generation of the rows that succeed now, and of the rejects that stay open.

* The plan is stored once, as a job's is: the same command continues a retry that was killed.
* A retry reads what the job's plan covers, pinned as it was: when a shard or a loose file has changed, its part fails.
  So it helps with rejects whose cause lay elsewhere: a worker that died, an old decoder, or an object that a table
  names, which is not pinned and may have been repaired.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from img2parquet.batch import Embedded, Work
from img2parquet.dataset.commit import PLAN, RUN, Output
from img2parquet.dataset.finalize import union_totals
from img2parquet.dataset.generations import History, RetryPlan, describe, of_generation, read_history
from img2parquet.dataset.part_file import EncodedPart, PartBuffer, encode_part
from img2parquet.dataset.plan import check_same_run, decode_plan, identities, plan_hash
from img2parquet.dataset.retry_plan import FINAL, plan_retry, retryable, start_retry
from img2parquet.dataset.sealed_json import is_sealed
from img2parquet.engine.driver import Summary, end_generation, make_work
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.engine.run_report import Tally
from img2parquet.engine.session import Session
from img2parquet.errors import InputError, JobError, RunMismatch, nearest
from img2parquet.inference.capabilities import Capabilities
from img2parquet.job import JobSpec, override, parse_job
from img2parquet.runners import check_runner, choose_automatically, choose_runner
from img2parquet.schema import REASONS
from img2parquet.storage import Store

LATER_RUN = re.compile(r"_run-[1-9]\d*\.json")


@dataclass(frozen=True)
class RetrySummary(Summary):
    """A finished retry. Row and reject counts cover all generations; parts and speed are the retry's own."""

    tried: int = 0  # images
    recovered: Mapping[str, int] | None = None  # rows that this retry wrote, by model


def retry(
    uri: str,
    reasons: Iterable[str] | None = None,
    runner: Literal["auto", "local", "ray"] | str = "auto",
    *,
    address: str | None = None,
    overrides: Sequence[str] = (),
    signals: StopSignals | None = None,
    on_change: Callable[[Tally], None] = lambda tally: None,
) -> RetrySummary:
    """Read, decode and embed the rejected images of an output again, under the same run identity.

    uri: of the output. reasons: retry only these; None retries every reason that can be retried. overrides: `a.b=c` for
    values that the run's record leaves out or names without credentials (storage options, signed URLs), and for
    resources.

    Raises UserError before anything is read, RunMismatch when another retry is unfinished or the identity changed,
    JobFailed when parts failed, RejectLimitExceeded, judged over all generations, after committing the good rows,
    StorageError when the output cannot be written, Stopped after the first of `signals`, as `run` does."""
    check_runner(runner)
    wanted = _check_reasons(reasons)
    output, job, recorded = _as_recorded(uri, overrides)
    history = _history(output, recorded)
    before, planned = plan_retry(output, history, wanted)
    if planned is None:
        return _nothing_to_retry(output, history)
    if runner == "auto":
        runner, _ = choose_automatically(address, lambda: 0)  # rejects are few
    module = choose_runner(runner)
    probe: Capabilities = module.start(job, address)
    check_same_run(history.plan, identities(job, probe.cards, probe.dtype), output.uri)
    plan, digest = start_retry(output, before, planned, wanted)
    record = output.record(of_generation(RUN, plan.generation), _record(plan, digest, probe, recorded))
    files = output.files()
    session = RetrySession(output, plan, _work(job, probe, plan, record, output), files, on_change)
    if signals:
        signals.listen()
    session.run(module, signals)
    summary = end_generation(job, session, before.then(plan), files)
    written, now = (union_totals(output, history)["rows_written"] for history in (before, before.then(plan)))
    recovered = {model: rows - written[model] for model, rows in now.items()}
    return RetrySummary(**summary.__dict__, tried=plan.images, recovered=recovered)


class RetrySession(Session):
    """A session whose part files hold, for each model, the rows that this model had rejected."""

    def _encode(self, model: str, gathering: PartBuffer) -> EncodedPart:
        plan, part = self.plan, gathering.part
        assert isinstance(plan, RetryPlan) and part.only is not None
        rejects, size = plan.rejects[part.index][model], self.work.batch_size
        own = {reject.row for reject in rejects}
        rows = [wanted.row for wanted in part.only]
        batches = [_of_model(batch, model, rows[batch.k * size : (batch.k + 1) * size], own)
                   for batch in gathering.in_order()]  # fmt: skip
        return encode_part(
            part,
            model,
            plan.identity(model),
            batches,
            plan.identities[model],
            generation=plan.generation,
            superseded=rejects,
        )


def _of_model(batch: Embedded, model: str, rows: Sequence[int], own: set[int]) -> Embedded:
    """Drop the rows that only other models had rejected. rows: of the batch. own: those this model had rejected."""
    again = {reject.row for reject in batch.rejects[model]}
    is_own = pa.array([row in own for row in rows if row not in again], pa.bool_())
    return replace(
        batch,
        tables={model: batch.tables[model].filter(is_own)},
        rejects={model: tuple(reject for reject in batch.rejects[model] if reject.row in own)},
        rows_in=None if batch.rows_in is None else len(own),
    )


def _check_reasons(reasons: Iterable[str] | None) -> tuple[str, ...]:
    wanted = tuple(sorted(set(reasons or ())))
    for reason in wanted:
        if reason in FINAL:
            raise JobError(f"`{reason}` cannot be retried: {FINAL[reason]}", known=retryable(()))
        if reason not in REASONS:
            raise JobError(f"unknown reason `{reason}`", known=retryable(()), hint=nearest(reason, REASONS))
    return wanted


def _as_recorded(uri: str, overrides: Sequence[str]) -> tuple[Output, JobSpec, dict[str, Any]]:
    """Return the output, its job as the run's record has it, and that record."""
    place: dict[str, Any] = {"output": {}}
    for text in overrides:
        if text.startswith("output.storage_options"):
            override(place, text)
    output = Output.at(uri, Store(place["output"].get("storage_options", {})))
    data = output.read(RUN)
    if data is None:
        raise InputError(f"{output.uri}: no {RUN} here, so there is no run to retry")
    if not is_sealed(data):
        raise RunMismatch(f"{output.uri}/{RUN}: its bytes are not those that were written")
    recorded: dict[str, Any] = json.loads(data)
    given = {**recorded["job"]["input"], "uris": _all_uris(output, recorded)}
    document = {**recorded["job"], "input": given, "dtype": recorded["dtype"]}
    job = parse_job(document, [*overrides, f"output.uri={json.dumps(output.uri)}"], where=f"{output.uri}/{RUN}")
    resources = job.resources.model_copy(update={"batch_size": recorded["batch_size"]})
    return output, job.model_copy(update={"resources": resources}), recorded


def _all_uris(output: Output, recorded: Mapping[str, Any]) -> list[str]:
    """List the job's input URIs, then those that extensions added."""
    uris = dict.fromkeys(recorded["job"]["input"]["uris"])
    for name in output.files():
        if LATER_RUN.fullmatch(name):
            uris.update(
                dict.fromkeys(json.loads(output.read(name) or b"{}").get("job", recorded["job"])["input"]["uris"])
            )
    return list(uris)


def _history(output: Output, recorded: Mapping[str, Any]) -> History:
    data = output.read(PLAN)
    if data is None or plan_hash(data) != recorded["plan_sha256"]:
        raise RunMismatch(f"{output.uri}: {RUN} was written for another plan than {PLAN}")
    return read_history(output, decode_plan(data), output.files())


def _record(plan: RetryPlan, digest: str, probe: Capabilities, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of _run-g.json; the job and the identities are in _run.json."""
    return {
        **describe(plan, digest),
        "dtype": probe.dtype,
        "batch_size": recorded["batch_size"],
        "threads_per_worker": recorded["threads_per_worker"],
        "versions": dict(probe.versions),
    }


def _work(job: JobSpec, probe: Capabilities, plan: RetryPlan, record: Mapping[str, Any], output: Output) -> Work:
    """Describe the work for the models that have rejects. With `preprocess: fast`, how images are decoded depends on
    all models of the job, so the cards of all are kept."""
    models = tuple(model for model in job.models if model.name in plan.models)
    cards = {name: card for name, card in probe.cards.items() if job.preprocess == "fast" or name in plan.models}
    return make_work(job.model_copy(update={"models": models}), replace(probe, cards=cards), record, output)


def _nothing_to_retry(output: Output, history: History) -> RetrySummary:
    totals = union_totals(output, history)
    return RetrySummary(
        output_uri=output.uri,
        models=tuple(history.plan.identities),
        parts=0,
        parts_done_before=0,
        rows_in=totals["rows_in"],
        rows_written=totals["rows_written"],
        rejected=totals["rejected"],
        seconds=0.0,
        images_per_s=0.0,
        generation=history.generation,
    )
