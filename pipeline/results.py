"""What lies in an output, for readers: committed rows, rejects, and how far a run is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.commit import PLAN, SUCCESS, Footer, Output
from pipeline.derived import derived_names, history_with
from pipeline.errors import InputError, nearest
from pipeline.evaluate import telling_damage
from pipeline.finish import Counting
from pipeline.generations import (
    REJECT_SCHEMA,
    History,
    encode_rejects,
    of_generation,
    read_history,
    read_standing,
)
from pipeline.plan import Plan
from pipeline.schema import Part
from pipeline.storage import Entry

COUNTS = ("part", "rows_in", "file")
FEW_FILES = 1000  # footers that `status` reads unasked: seconds on any store


def open_results(uri: str, model: str | None = None, **storage_options: Any) -> ds.Dataset:
    """A pyarrow dataset over the committed files of one model, retries' too, with `model` as partition column.

    `model` may be left out where the output has one model, or several with the same columns.
    Raises InputError where there are none, StorageError where the first is damaged."""
    output = _output(uri, storage_options)
    plan = _plan(output)
    there = output.files()
    history = history_with(output, plan, model, there)
    plan = history.plan
    committed = {m: [name for name in names if name in there] for m, names in history.names.items()}
    if model is not None and model not in plan.identities:
        known = [*sorted(plan.identities), *derived_names(there)]
        raise InputError(f"{uri}: no model `{model}`", known=known, hint=nearest(model, known))
    wanted = [name for m in sorted(committed) if model in (None, m) for name in committed[m]]
    if not wanted:
        raise InputError(f"{uri}: nothing is committed yet", known=[m for m, names in committed.items() if names])
    filesystem, root = output.store.arrow_filesystem(output.uri)
    with telling_damage(output.uri):
        return ds.dataset(
            [f"{root}/{name}" for name in wanted],
            format="parquet",
            filesystem=filesystem,
            partitioning=ds.partitioning(pa.schema([("model", pa.string())]), flavor="hive"),
            partition_base_dir=root,
        )


def read_rejects(uri: str, *, superseded: bool = False, **storage_options: Any) -> pa.Table:
    """Every reject of the committed parts that stands, one row per model and image, part by part.

    From `_rejects` of the last generation where that has come to its end, else from the footer of each file.
    superseded: those that a retry has tried again, instead: once for each retry that did, the oldest first."""
    output = _output(uri, storage_options)
    plan = _plan(output)
    files = output.files()
    history = read_history(output, plan, files)
    if superseded:
        footers = [found for retry in history.retries for found in _footers(output, retry.files(), files)]
        rows = ({"model": model, "part": f.part_index, **reject} for model, f in footers for reject in f.superseded)
        return pa.Table.from_pylist(list(rows), schema=REJECT_SCHEMA)
    standing = read_standing(output, history.generation)
    if standing is not None:
        return standing
    footers_of_all = output.footers([name for name in history.names_by_part() if name in files], files)
    data = encode_rejects(Counting().rejects(footers_of_all))
    return pq.read_table(pa.BufferReader(data)).cast(REJECT_SCHEMA)


def _footers(
    output: Output, planned: Iterable[tuple[str, Part, str]], files: Mapping[str, Entry]
) -> Iterator[tuple[str, Footer]]:
    """Model and footer of the files that are there."""
    models = {name: model for model, _, name in planned if name in files}
    return ((models[name], footer) for name, footer in output.footers(models, files))


@dataclass(frozen=True)
class Status:
    """How far a run is. Counts are None where only footers tell them and they were too many to be read unasked; they
    are of all generations."""

    uri: str
    parts: int
    parts_done: dict[str, int]  # by model
    rows_in: int | None  # of the parts that are done for every model
    rows_planned: int | None
    rows_written: dict[str, int] | None
    rejected: int | None
    size_bytes: int
    is_complete: bool  # and so is the last later generation that was begun, if any
    generation: int  # the last that was begun: so many retries and extensions
    retries_begun: int
    retry_files_left: int  # of the last retry, where no extension has come after it
    meter: dict[str, Any]  # of the last session that worked, as it was a while ago; {} where none has said

    @property
    def bottleneck(self) -> str:
        return str(self.meter.get("bottleneck", ""))

    @property
    def retries(self) -> dict[str, int]:
        """Requests to stores that were sent again, by what the store had said."""
        return dict(self.meter.get("retries", {}))


def status(uri: str, *, read_footers: bool | None = None, **storage_options: Any) -> Status:
    """How far a run is, from its files alone: works while it runs, from anywhere. Raises InputError.

    One listing. Rows and rejects are those of `_SUCCESS` where the job is complete; else they are in the parts'
    footers, one read each: done where these are `FEW_FILES` at most, or as `read_footers` says."""
    output = _output(uri, storage_options)
    plan = _plan(output)
    files = output.files()
    history = read_history(output, plan, files)
    plan = history.plan
    done = {model: [name in files for name in names] for model, names in plan.names.items()}
    names = [name for name in history.names_by_part() if name in files]
    wants_footers = len(names) <= FEW_FILES if read_footers is None else read_footers
    is_complete = of_generation(SUCCESS, history.generation) in files
    totals = _success(output, history) if is_complete else _counted(output, history, files) if wants_footers else {}
    return Status(
        uri=output.uri,
        parts=len(plan.parts),
        parts_done={model: sum(flags) for model, flags in done.items()},
        rows_in=totals["rows_in"] if totals else _planned_rows(plan, list(map(all, zip(*done.values(), strict=True)))),
        rows_planned=plan.rows,
        rows_written=totals["rows_written"] if totals else None,
        rejected=sum(totals["rejected"].values()) if totals else None,
        size_bytes=sum(files[name].size_bytes for name in names),
        is_complete=is_complete,
        generation=history.generation,
        retry_files_left=sum(
            name not in files for last in history.later[-1:] if last in history.retries for name in last.names_by_part()
        ),
        retries_begun=len(history.retries),
        meter=output.last_meter(files),
    )


def _success(output: Output, history: History) -> dict[str, Any]:
    return output.success(of_generation(SUCCESS, history.generation)) or {}


def _counted(output: Output, history: History, files: Mapping[str, Entry]) -> dict[str, Any]:
    """Totals from the footers that are there; rows in are those of parts that are done for every model."""
    names = [name for name in history.names_by_part() if name in files]
    counting, plan = Counting(), history.plan
    for _ in counting.rejects(output.footers(names, files)):
        pass
    table = counting.table()
    begun = [(part, rows_in) for part, rows_in, name in zip(*(table.column(c).to_pylist() for c in COUNTS), strict=True)
             if "-retry" not in name.rpartition("/")[2]]  # fmt: skip
    models = Counter(part for part, _ in begun)
    whole = {part: rows_in for part, rows_in in begun if models[part] == len(plan.identities)}
    written = {model: counting.written[model] for model in plan.identities}
    return {**counting.totals(len(plan.parts)), "rows_written": written, "rows_in": sum(whole.values())}


def _planned_rows(plan: Plan, done: Iterable[bool]) -> int | None:
    """Rows of the parts that are done, where the plan has counted them."""
    counts = [part.rows for part, is_done in zip(plan.parts, done, strict=True) if is_done]
    return None if None in counts else sum(count or 0 for count in counts)


def _output(uri: str, storage_options: dict[str, Any]) -> Output:
    from pipeline.storage import Store

    return Output.at(uri, Store(storage_options))


def _plan(output: Output) -> Plan:
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is no output of img2parquet")
    return plan
