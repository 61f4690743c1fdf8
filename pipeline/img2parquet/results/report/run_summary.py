"""Read an output's own records for a report, without reading rows. What cannot be read becomes a note on the page.

* Totals come from `_SUCCESS`; for an unfinished output they are summed from footers, when these are few.
* Rejects are a bounded selection, some of each reason.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import METER, REJECTS, RUN, SUCCESS, Output, model_of
from img2parquet.dataset.derived import derived_history, derived_names, records_of
from img2parquet.dataset.finalize import FooterTotals
from img2parquet.dataset.footer import Footer, read_footer
from img2parquet.dataset.generations import History, of_generation, read_history
from img2parquet.dataset.plan import Plan
from img2parquet.errors import Img2ParquetError, InputError, StorageError
from img2parquet.storage import Entry, Store, names_in
from img2parquet.storage.parallel import fetch_in_order

State = Literal["complete", "unfinished", "empty", "foreign"]
FEW_FILES = 1000  # footers that are read to count an unfinished output
REJECTS_OF_A_REASON = 6
REJECT_GROUPS = 4  # row groups of _rejects.parquet that are looked at
MOST_METERS = 48
NO_MODEL = "(no model)"  # of files in no partition
UNREADABLE = (pa.ArrowException, OSError, Img2ParquetError, LookupError, TypeError, ValueError, zlib.error)


@dataclass
class RunSummary:
    """The content of an output's records. Counts are None where nothing has counted them."""

    output: Output
    state: State
    history: History | None = None  # the plan, and those of retries
    derived: Mapping[str, History] = field(
        default_factory=dict
    )  # partitions made from other models, with their own plans
    fitted: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # how good the classifier of each derived partition is
    record: Mapping[str, Any] = field(default_factory=dict)  # _run.json
    files: Mapping[str, Entry] = field(default_factory=dict)
    rows_in: int | None = None
    rows_written: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] | None = None  # images by reason
    losses: Mapping[str, float | None] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of all rows: `model.column` -> top1, ...
    rejects: list[dict[str, Any]] = field(default_factory=list)  # a few of each reason
    meters: list[dict[str, Any]] = field(default_factory=list)  # in the order of time
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan | None:
        return self.history.plan if self.history else None

    @property
    def models(self) -> list[str]:
        if self.plan is not None:
            return [*sorted(self.plan.identities), *self.derived]
        return sorted({model_of(name) for name in self.part_names if name.startswith("model=")} or {NO_MODEL})

    @property
    def identities(self) -> dict[str, Mapping[str, Any]]:
        plans = [self.plan, *(history.plan for history in self.derived.values())]
        return {name: identity for plan in plans if plan is not None for name, identity in plan.identities.items()}

    def identity_hash(self, model: str) -> str:
        plan = self.derived[model].plan if model in self.derived else self.plan
        return plan.identity(model) if plan else ""

    def names_of(self, model: str) -> list[str]:
        """List the files of a model or a derived partition; all files when there is no plan."""
        if model in self.derived:
            return [name for name in self.derived[model].names_by_part() if name in self.files]
        return [name for name in self.part_names if model in (NO_MODEL, model_of(name))]

    @property
    def part_names(self) -> list[str]:
        """Names of the Parquet files with rows. With a plan: the planned files of all generations, but not those of
        derived partitions."""
        if self.history is not None:
            return [name for name in self.history.names_by_part() if name in self.files]
        hidden = (".", "_")
        names = (n for n in sorted(self.files) if not any(s.startswith(hidden) for s in n.split("/")))
        return [name for name in names if name.endswith(".parquet")]

    @property
    def parts_done(self) -> dict[str, int]:
        return {model: len(self.names_of(model)) for model in self.models}

    @property
    def size_bytes(self) -> int:
        derived = [name for model in self.derived for name in self.names_of(model)]
        return sum(self.files[name].size_bytes for name in [*self.part_names, *derived])

    def note(self, text: str) -> None:
        text = names_in(text).strip()
        if text not in self.notes:
            self.notes.append(text)


def read_run_summary(uri: str, storage_options: Mapping[str, Any]) -> RunSummary:
    """Read the records of an output.

    Raises InputError when there is neither a plan nor a Parquet file, StorageError when the store refuses."""
    output = Output.at(uri, Store(dict(storage_options)))
    summary = RunSummary(output, "foreign", files=output.files())
    plan: Plan | None = _tried(summary, output.stored_plan, "the plan cannot be read")
    if plan is not None:
        read = partial(read_history, output, plan, summary.files)
        summary.history = _tried(summary, read, "the plans of retries cannot be read") or History(plan)
    if not summary.part_names and summary.plan is None:
        raise InputError(
            f"{output.uri}: no plan and no Parquet files, so there is nothing to report on",
            hint="give the job's output.uri",
        )
    if summary.plan is None:
        summary.note("This is not an output of img2parquet, or its plan is missing: identities and counts are unknown.")
        return summary
    summary.record = (
        (_tried(summary, output.run_record, "the run's record cannot be read") or {}) if (RUN in summary.files) else {}
    )
    summary.meters = list(_meters(summary))
    _count(summary)
    _read_derived(summary)
    return summary


def _read_derived(summary: RunSummary) -> None:
    """Read plans, totals and classifiers of the partitions that were made from this output's rows."""
    output, derived, fitted = summary.output, dict(summary.derived), dict(summary.fitted)
    for name in derived_names(summary.files):
        read = partial(derived_history, output, name, summary.files)
        history = _tried(summary, read, f"the plans of {name} cannot be read")
        if history is None:
            continue
        derived[name], records = history, records_of(output, name)
        success = partial(records.success, of_generation(SUCCESS, history.generation))
        totals = _tried(summary, success, f"the totals of {name} cannot be read")
        if totals:
            summary.rows_written = {**summary.rows_written, **totals["rows_written"]}
        else:
            summary.note(f"{name} does not label all rows yet: run the command that made it again to continue.")
        fitted[name] = (_tried(summary, records.run_record, f"the record of {name} cannot be read") or {}).get(
            "report", {}
        )
    summary.derived, summary.fitted = derived, fitted


def _count(summary: RunSummary) -> None:
    assert summary.history is not None
    name = of_generation(SUCCESS, summary.history.generation)
    read = partial(summary.output.success, name)
    totals = _tried(summary, read, f"{name} cannot be read") if name in summary.files else None
    summary.state = "complete" if totals else "unfinished" if summary.part_names else "empty"
    if totals:
        _take(summary, totals)
        summary.losses, summary.scores = totals.get("losses", {}), totals.get("scores", {})
        summary.rejects = _tried(summary, lambda: _stored_rejects(summary), "the rejects cannot be read") or []
    elif summary.state == "empty":
        summary.note("Nothing is committed yet: the job is planned, but has not finished its first part.")
    else:
        summary.note("The job or its last retry has not finished: this page shows the parts that are committed so far.")
        _count_footers(summary)


def _count_footers(summary: RunSummary) -> None:
    names = summary.part_names
    if len(names) > FEW_FILES:
        summary.note(f"Rows and rejects of {len(names):,} files are not counted until the job finishes.")
    counting = FooterTotals()
    good = list(_footers(summary, names[:FEW_FILES]))
    try:
        summary.rejects = _few(counting.rejects(good))
    except StorageError as error:
        return summary.note(str(error))
    if len(names) <= FEW_FILES:
        assert summary.plan is not None
        _take(summary, counting.totals(len(summary.plan.parts)))
    return None


def _take(summary: RunSummary, totals: Mapping[str, Any]) -> None:
    summary.rows_in, summary.rows_written = totals["rows_in"], totals["rows_written"]
    summary.rejected = totals["rejected"]


def _footers(summary: RunSummary, names: list[str]) -> Iterator[tuple[str, Footer]]:
    def fetch(name: str) -> Footer | None:
        read = partial(read_footer, summary.output.store, summary.files[name])
        footer: Footer | None = _tried(summary, read, f"{name} is damaged")
        return footer

    for name, footer in fetch_in_order(names, fetch, 16):
        if footer is not None:
            yield name, footer


def _stored_rejects(summary: RunSummary) -> list[dict[str, Any]]:
    """Read rejects from a few row groups of a file that may hold millions."""
    assert summary.history is not None
    name = of_generation(REJECTS, summary.history.generation)
    with summary.output.store.open(summary.files[name].uri) as raw:
        file = pq.ParquetFile(raw)
        step = max(1, file.num_row_groups // REJECT_GROUPS)
        groups = list(range(0, file.num_row_groups, step))[:REJECT_GROUPS]
        return _few(row for batch in file.iter_batches(row_groups=groups) for row in batch.to_pylist())


def _few(rejects: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep some rejects of each reason, each image once."""
    kept: dict[str, list[dict[str, Any]]] = {}
    seen: set[tuple[int, int]] = set()
    for reject in rejects:
        some = kept.setdefault(reject["reason"], [])
        if len(some) < REJECTS_OF_A_REASON and (reject["part"], reject["row"]) not in seen:
            seen.add((reject["part"], reject["row"]))
            some.append(reject)
    return [reject for reason in sorted(kept) for reject in kept[reason]]


def _meters(summary: RunSummary) -> Iterator[dict[str, Any]]:
    names = sorted(name for name in summary.files if name.startswith(METER))
    for name in names[-MOST_METERS:]:
        data = _tried(summary, partial(summary.output.store.read, summary.files[name].uri), f"{name} cannot be read")
        try:
            meter = json.loads(data or b"")
            if isinstance(meter, dict) and isinstance(meter.get("stages"), dict):
                yield meter
        except ValueError:
            summary.note(f"{name} is not JSON")


def _tried(summary: RunSummary, read: Any, what: str) -> Any:
    """Call `read`; on failure add a note and return None."""
    try:
        return read()
    except UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        summary.note(f"{what}: {first}")
        return None
