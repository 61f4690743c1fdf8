"""An output's own records -> what it says of itself. Reads no rows; what cannot be read becomes a note.

* Totals are those of `_SUCCESS`; of an unfinished output they are summed from footers, where these are few.
* Rejects are a bounded choice, some of each reason.
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

from pipeline.commit import METER, REJECTS, RUN, SUCCESS, Footer, Output, model_of, read_footer
from pipeline.derived import derived_history, derived_names, records_of
from pipeline.errors import Img2ParquetError, InputError, StorageError
from pipeline.finish import Counting
from pipeline.generations import History, of_generation, read_history
from pipeline.plan import Plan
from pipeline.read.fetch import fetch_in_order
from pipeline.storage import Entry, Store, names_in

State = Literal["complete", "unfinished", "empty", "foreign"]
FEW_FILES = 1000  # footers that are read to count an unfinished output
REJECTS_OF_A_REASON = 6
REJECT_GROUPS = 4  # row groups of _rejects.parquet that are looked at
MOST_METERS = 48
NO_MODEL = "(no model)"  # of files in no partition
UNREADABLE = (pa.ArrowException, OSError, Img2ParquetError, LookupError, TypeError, ValueError, zlib.error)


@dataclass
class Account:
    """What the records of an output say. Counts are None where nobody has counted."""

    output: Output
    state: State
    history: History | None = None  # the plan, and those of retries
    derived: Mapping[str, History] = field(default_factory=dict)  # partitions made from others, with their own plans
    fitted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of these: how good the classifier is
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
        """The files of one model, or of a partition that was derived from one; all files where there is no plan."""
        if model in self.derived:
            return [name for name in self.derived[model].names_by_part() if name in self.files]
        return [name for name in self.part_names if model in (NO_MODEL, model_of(name))]

    @property
    def part_names(self) -> list[str]:
        """Parquet files with rows, by name; of a planned output only its own, of all generations, without those of
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


def read_account(uri: str, storage_options: Mapping[str, Any]) -> Account:
    """Raises InputError where there is neither a plan nor a Parquet file, StorageError for a store that says no."""
    output = Output.at(uri, Store(dict(storage_options)))
    account = Account(output, "foreign", files=output.files())
    plan: Plan | None = _tried(account, output.stored_plan, "the plan cannot be read")
    if plan is not None:
        read = partial(read_history, output, plan, account.files)
        account.history = _tried(account, read, "the plans of retries cannot be read") or History(plan)
    if not account.part_names and account.plan is None:
        raise InputError(
            f"{output.uri}: nothing here: no plan and no Parquet files, so there is nothing to report on",
            hint="give the job's output.uri",
        )
    if account.plan is None:
        account.note("This is no output of img2parquet, or its plan is gone: identities and counts are not known.")
        return account
    account.record = (
        (_tried(account, output.run_record, "the run's record cannot be read") or {}) if (RUN in account.files) else {}
    )
    account.meters = list(_meters(account))
    _count(account)
    _read_derived(account)
    return account


def _read_derived(account: Account) -> None:
    """Plans, totals and classifiers of the partitions that were made from this output's rows."""
    output, derived, fitted = account.output, dict(account.derived), dict(account.fitted)
    for name in derived_names(account.files):
        read = partial(derived_history, output, name, account.files)
        history = _tried(account, read, f"the plans of {name} cannot be read")
        if history is None:
            continue
        derived[name], records = history, records_of(output, name)
        success = partial(records.success, of_generation(SUCCESS, history.generation))
        totals = _tried(account, success, f"the totals of {name} cannot be read")
        if totals:
            account.rows_written = {**account.rows_written, **totals["rows_written"]}
        else:
            account.note(f"{name} has no labels for some of the rows yet: `img2parquet probe` goes on.")
        fitted[name] = (_tried(account, records.run_record, f"the record of {name} cannot be read") or {}).get(
            "report", {}
        )
    account.derived, account.fitted = derived, fitted


def _count(account: Account) -> None:
    assert account.history is not None
    name = of_generation(SUCCESS, account.history.generation)
    read = partial(account.output.success, name)
    totals = _tried(account, read, f"{name} cannot be read") if name in account.files else None
    account.state = "complete" if totals else "unfinished" if account.part_names else "empty"
    if totals:
        _take(account, totals)
        account.losses, account.scores = totals.get("losses", {}), totals.get("scores", {})
        account.rejects = _tried(account, lambda: _stored_rejects(account), "the rejects cannot be read") or []
    elif account.state == "empty":
        account.note("Nothing is committed yet: the job was planned, and has not finished its first part.")
    else:
        account.note("The job, or its last retry, has not ended: this page shows the parts that are committed so far.")
        _count_footers(account)


def _count_footers(account: Account) -> None:
    names = account.part_names
    if len(names) > FEW_FILES:
        account.note(f"Rows and rejects of {len(names):,} files are not counted before the job ends.")
    counting = Counting()
    good = list(_footers(account, names[:FEW_FILES]))
    try:
        account.rejects = _few(counting.rejects(good))
    except StorageError as error:
        return account.note(str(error))
    if len(names) <= FEW_FILES:
        assert account.plan is not None
        _take(account, counting.totals(len(account.plan.parts)))
    return None


def _take(account: Account, totals: Mapping[str, Any]) -> None:
    account.rows_in, account.rows_written = totals["rows_in"], totals["rows_written"]
    account.rejected = totals["rejected"]


def _footers(account: Account, names: list[str]) -> Iterator[tuple[str, Footer]]:
    def fetch(name: str) -> Footer | None:
        read = partial(read_footer, account.output.store, account.files[name])
        footer: Footer | None = _tried(account, read, f"{name} is damaged")
        return footer

    for name, footer in fetch_in_order(names, fetch, 16):
        if footer is not None:
            yield name, footer


def _stored_rejects(account: Account) -> list[dict[str, Any]]:
    """From a few row groups of a file that may hold millions."""
    assert account.history is not None
    name = of_generation(REJECTS, account.history.generation)
    with account.output.store.open(account.files[name].uri) as raw:
        file = pq.ParquetFile(raw)
        step = max(1, file.num_row_groups // REJECT_GROUPS)
        groups = list(range(0, file.num_row_groups, step))[:REJECT_GROUPS]
        return _few(row for batch in file.iter_batches(row_groups=groups) for row in batch.to_pylist())


def _few(rejects: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of each reason, each image once."""
    kept: dict[str, list[dict[str, Any]]] = {}
    seen: set[tuple[int, int]] = set()
    for reject in rejects:
        some = kept.setdefault(reject["reason"], [])
        if len(some) < REJECTS_OF_A_REASON and (reject["part"], reject["row"]) not in seen:
            seen.add((reject["part"], reject["row"]))
            some.append(reject)
    return [reject for reason in sorted(kept) for reject in kept[reason]]


def _meters(account: Account) -> Iterator[dict[str, Any]]:
    names = sorted(name for name in account.files if name.startswith(METER))
    for name in names[-MOST_METERS:]:
        data = _tried(account, partial(account.output.store.read, account.files[name].uri), f"{name} cannot be read")
        try:
            meter = json.loads(data or b"")
            if isinstance(meter, dict) and isinstance(meter.get("stages"), dict):
                yield meter
        except ValueError:
            account.note(f"{name} is no JSON")


def _tried(account: Account, read: Any, what: str) -> Any:
    """What `read` gives, or None and a note."""
    try:
        return read()
    except UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        account.note(f"{what}: {first}")
        return None
