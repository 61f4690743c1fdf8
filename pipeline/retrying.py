"""The rejects of an output, tried again: a new generation of its rows, and of the rejects that still stand.

* Its plan is fixed once, as a job's is: the same command goes on with a retry that was killed.
* What it reads is what the job's plan covers, pinned as it was: a shard, or loose file, that changed fails its part. So
  it helps rejects whose cause lay elsewhere: a dead worker, an old decoder, an object that a table names, which is not
  pinned and may have been mended.
* Named `retrying`, since a module `pipeline.retry` would hide the function of that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.batch import Embedded, Work
from pipeline.commit import MANIFEST, PLAN, REJECTS, RUN, SUCCESS, Output, is_sealed
from pipeline.driver import Summary, choose_runner, finish_later_run, make_work
from pipeline.errors import InputError, JobError, RunMismatch, nearest
from pipeline.finish import read_manifests, totals
from pipeline.generations import (
    History,
    LaterPlan,
    RetryPlan,
    by_part_and_model,
    describe,
    encode_retry,
    of_generation,
    read_history,
    read_standing,
    store_later,
    to_table,
)
from pipeline.job import JobSpec, override, parse_job
from pipeline.plan import check_same_run, decode_plan, identities, plan_hash
from pipeline.probe import Probe
from pipeline.read.fetch import fetch_in_order
from pipeline.schema import REASONS
from pipeline.session import Session, Tally
from pipeline.signals import Signals
from pipeline.storage import Entry, Store
from pipeline.write import EncodedPart, Gathering, encode_part

FINAL = {  # trying again could not help: these follow from the shards alone, which are pinned
    "duplicate_key": "its part has another row of that key",
    "no_key": "the shard names no key for the row",
    "shard_damaged": "the shard's own bytes are damaged",
}
KEY_READERS = 16
LATER_RUN = re.compile(r"_run-[1-9]\d*\.json")


@dataclass(frozen=True)
class RetrySummary(Summary):
    """A finished retry. Rows in, written and rejected are those of all generations; parts and speed are the retry's."""

    tried: int = 0  # images
    recovered: Mapping[str, int] | None = None  # rows that this retry wrote, by model


def retry(
    uri: str,
    reasons: Iterable[str] | None = None,
    runner: Literal["ray", "local"] | str = "ray",
    *,
    address: str | None = None,
    overrides: Sequence[str] = (),
    signals: Signals | None = None,
    on_change: Callable[[Tally], None] = lambda tally: None,
) -> RetrySummary:
    """Read, decode and embed again what an output's job has rejected, under the same run identity.

    uri: of the output. reasons: those alone; None is all that can be tried again. overrides: `a.b=c` for what the run's
    record leaves out or names without what opens it (storage options, signed URLs), and for resources.

    Raises UserError before anything is read, RunMismatch where another retry was begun or the identity changed,
    JobFailed when parts could not be done, RejectLimitExceeded, judged over all generations, after committing what is
    good, StorageError when the output cannot be written, Stopped after the first of `signals`, as `run` does."""
    module, asked = choose_runner(runner), _checked(reasons)
    output, job, recorded = _as_recorded(uri, overrides)
    history = _history(output, recorded)
    before, planned = _to_do(output, history, asked)
    if planned is None:
        return _nothing(output, history)
    probe: Probe = module.start(job, address) if runner == "ray" else module.start(job)
    check_same_run(history.plan, identities(job, probe.cards, probe.dtype), output.uri)
    plan, digest = _begin(output, before, planned, asked)
    record = output.record(of_generation(RUN, plan.generation), _record(plan, digest, probe, recorded))
    session = RetrySession(output, plan, _work(job, probe, plan, record), output.files(), on_change)
    if signals:
        signals.listen()
    session.run(module, signals)
    return _finish(job, session, before, plan)


class RetrySession(Session):
    """Its parts' files hold, of each model, the rows that this model had rejected."""

    def _encode(self, model: str, gathering: Gathering) -> EncodedPart:
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
    """Without the rows that other models had rejected and this one has. rows: of the batch."""
    again = {reject.row for reject in batch.rejects[model]}
    is_own = pa.array([row in own for row in rows if row not in again], pa.bool_())
    return replace(
        batch,
        tables={model: batch.tables[model].filter(is_own)},
        rejects={model: tuple(reject for reject in batch.rejects[model] if reject.row in own)},
        rows_in=None if batch.rows_in is None else len(own),
    )


def _checked(reasons: Iterable[str] | None) -> tuple[str, ...]:
    asked = tuple(sorted(set(reasons or ())))
    for reason in asked:
        if reason in FINAL:
            raise JobError(f"`{reason}` cannot be tried again: {FINAL[reason]}", known=_tried(()))
        if reason not in REASONS:
            raise JobError(f"unknown reason `{reason}`", known=_tried(()), hint=nearest(reason, REASONS))
    return asked


def _tried(asked: Sequence[str]) -> list[str]:
    return list(asked) or [reason for reason in REASONS if reason not in FINAL]


def _as_recorded(uri: str, overrides: Sequence[str]) -> tuple[Output, JobSpec, dict[str, Any]]:
    """The output, its job as it was resolved, and the rest of its run's record."""
    place: dict[str, Any] = {"output": {}}
    for text in overrides:
        if text.startswith("output.storage_options"):
            override(place, text)
    output = Output.at(uri, Store(place["output"].get("storage_options", {})))
    data = output.read(RUN)
    if data is None:
        raise InputError(f"{output.uri}: no {RUN} here, so there is no run whose rejects could be tried again")
    if not is_sealed(data):
        raise RunMismatch(f"{output.uri}/{RUN}: its bytes are not those that were written")
    recorded: dict[str, Any] = json.loads(data)
    given = {**recorded["job"]["input"], "uris": _all_uris(output, recorded)}
    document = {**recorded["job"], "input": given, "dtype": recorded["dtype"]}
    job = parse_job(document, [*overrides, f"output.uri={json.dumps(output.uri)}"], where=f"{output.uri}/{RUN}")
    resources = job.resources.model_copy(update={"batch_size": recorded["batch_size"]})
    return output, job.model_copy(update={"resources": resources}), recorded


def _all_uris(output: Output, recorded: Mapping[str, Any]) -> list[str]:
    """Those of the job, then those that extensions were given besides."""
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


def _to_do(output: Output, history: History, asked: tuple[str, ...]) -> tuple[History, bytes | None]:
    """The plan of the retry that was begun and has not ended, or of a new one, with what was there before it; None
    where there is nothing to do."""
    files = output.files()
    if history.later and of_generation(SUCCESS, history.generation) not in files:
        last = history.later[-1]
        if not isinstance(last, RetryPlan):
            raise _extending(output, last)
        _check_reasons(output, last, asked)
        return history.upto(history.generation - 1), output.read(of_generation(PLAN, history.generation))
    missing = set(history.names_by_part()) - files.keys()
    records = [of_generation(name, history.generation) for name in (REJECTS, MANIFEST)]
    parent, standing = output.read(records[1]), read_standing(output, history.generation)
    if missing or parent is None or standing is None:
        what = f"{len(missing)} files of parts are missing" if missing else f"no {' or no '.join(records)}"
        raise InputError(
            f"{output.uri}: the job has not come to its end: {what}",
            hint="`img2parquet run` it first; a retry begins where it has ended",
        )
    chosen = standing.filter(pc.is_in(standing.column("reason"), pa.array(_tried(asked), pa.string())))
    chosen = _without_written(output, history, files, chosen)
    return history, encode_retry(chosen, history.generation + 1, parent, asked) if chosen.num_rows else None


def _without_written(output: Output, history: History, files: Mapping[str, Entry], rejects: pa.Table) -> pa.Table:
    """Without those whose key their part has rows of already: a list may name one key twice, and the first row of it
    have led nowhere."""
    left = {part: dict(of_models) for part, of_models in by_part_and_model(rejects).items()}
    wanted = (file for file in history.indexed() if file[0] in left.get(file[1], ()))

    def keys(of: tuple[str, int, str]) -> set[str]:
        with output.store.open(files[of[2]].uri, expect=files[of[2]]) as file:
            return set(pq.read_table(file, columns=["key"]).column("key").to_pylist())

    for (model, part, _), written in fetch_in_order(wanted, keys, KEY_READERS):
        left[part][model] = tuple(reject for reject in left[part][model] if reject.key not in written)
    return to_table(left)


def _begin(output: Output, before: History, data: bytes, asked: tuple[str, ...]) -> tuple[RetryPlan, str]:
    """The stored plan of this retry, ours if we are first, and its hash."""
    plan, digest = store_later(output, data, before)
    if not isinstance(plan, RetryPlan):
        raise _extending(output, plan)
    _check_reasons(output, plan, asked)
    return plan, digest


def _extending(output: Output, plan: LaterPlan) -> RunMismatch:
    return RunMismatch(
        f"{output.uri}: extension {plan.generation} was begun and has to come to its end before a retry begins",
        hint="run the job again with `--extend`",
    )


def _check_reasons(output: Output, plan: RetryPlan, asked: tuple[str, ...]) -> None:
    if plan.reasons != asked:
        begun = " ".join(f"--reason {reason}" for reason in plan.reasons)
        raise RunMismatch(
            f"{output.uri}: retry {plan.generation} was begun {f'with {begun}' if begun else 'for every reason'}, and "
            "has to come to its end before another begins",
            hint=f"img2parquet retry {output.uri}{f' {begun}' if begun else ''}",
        )


def _record(plan: RetryPlan, digest: str, probe: Probe, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What _run-g.json says; the job and the identities are in _run.json."""
    return {
        **describe(plan, digest),
        "dtype": probe.dtype,
        "batch_size": recorded["batch_size"],
        "threads_per_worker": recorded["threads_per_worker"],
        "versions": dict(probe.versions),
    }


def _work(job: JobSpec, probe: Probe, plan: RetryPlan, record: Mapping[str, Any]) -> Work:
    """For the models that have rejects. With `preprocess: fast`, all of the job's decide how images are decoded."""
    models = tuple(model for model in job.models if model.name in plan.models)
    cards = {name: card for name, card in probe.cards.items() if job.preprocess == "fast" or name in plan.models}
    return make_work(job.model_copy(update={"models": models}), replace(probe, cards=cards), record)


def _finish(job: JobSpec, session: RetrySession, before: History, plan: RetryPlan) -> RetrySummary:
    """Gather, judge the rejects of all generations, and mark this one as complete. Raises RejectLimitExceeded."""
    summary = finish_later_run(job, session, before)
    written = _union(session.output, before)["rows_written"]
    recovered = {model: rows - written[model] for model, rows in summary.rows_written.items()}
    return RetrySummary(**summary.__dict__, tried=plan.images, recovered=recovered)


def _nothing(output: Output, history: History) -> RetrySummary:
    found = _union(output, history)
    return RetrySummary(
        output_uri=output.uri,
        models=tuple(history.plan.identities),
        parts=0,
        parts_done_before=0,
        rows_in=found["rows_in"],
        rows_written=found["rows_written"],
        rejected=found["rejected"],
        seconds=0.0,
        images_per_s=0.0,
        generation=history.generation,
    )


def _union(output: Output, history: History) -> dict[str, Any]:
    standing = read_standing(output, history.generation)
    assert standing is not None, "read before"
    return totals(history, read_manifests(output, history), standing)
