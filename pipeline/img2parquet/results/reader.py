"""Read an output: its committed rows, its rejects and the progress of its run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from img2parquet.dataset.commit import PLAN, SUCCESS, Output, model_of
from img2parquet.dataset.damage import reading_parts
from img2parquet.dataset.derived import derived_names, history_with
from img2parquet.dataset.finalize import FooterTotals
from img2parquet.dataset.footer import Footer
from img2parquet.dataset.generations import History, of_generation, read_history, read_open_rejects
from img2parquet.dataset.plan import Plan
from img2parquet.dataset.rejects import REJECT_SCHEMA, encode_rejects
from img2parquet.errors import InputError, nearest
from img2parquet.outputs.vectors import is_vector, length
from img2parquet.schema import Part
from img2parquet.storage import Entry, Store

COUNTS = ("part", "rows_in", "file")
FEW_FILES = 1000  # footers that `status` reads by default: seconds on any store


def open_results(uri: str, model: str | None = None, *, storage_options: Mapping[str, Any] | None = None) -> ds.Dataset:
    """Open the committed files of an output as a pyarrow dataset, with `model` as its partition column.

    Files that retries and extensions added are included; files that are not committed never are.

    uri: the job's `output.uri`. model: by default all models, and a column that some of them lack is null in their
    rows; a probe's partition is `<model>+probe`. storage_options: as under `output` in the job file.

    Raises InputError when nothing is committed, the model is unknown, or a column differs between models, such as
    vectors of another width; StorageError when a model's first file is damaged."""
    output, plan = _open(uri, storage_options)
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
    firsts = [names[0] for m, names in sorted(committed.items()) if model in (None, m) and names]

    def opened(names: list[str], schema: pa.Schema | None = None) -> ds.Dataset:
        return ds.dataset(
            [f"{root}/{name}" for name in names],
            schema=schema,
            format="parquet",
            filesystem=filesystem,
            partitioning=ds.partitioning(pa.schema([("model", pa.string())]), flavor="hive"),
            partition_base_dir=root,
        )

    with reading_parts(output.uri):
        if len(firsts) == 1:
            return opened(wanted)
        return opened(wanted, _joined(output.uri, {model_of(name): opened([name]).schema for name in firsts}))


def _joined(uri: str, schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """Join the columns of several models. Metadata on which they differ, such as class names, is left out."""
    fields: dict[str, tuple[str, pa.Field]] = {}
    for model, schema in schemas.items():
        for field in schema:
            first, known = fields.setdefault(field.name, (model, field))
            if _stored_as(field) != _stored_as(known):
                ours, theirs = f"{_described(known)} in model `{first}`", f"{_described(field)} in `{model}`"
                raise InputError(
                    f"{uri}: column `{field.name}` is {ours}, and {theirs}: one dataset cannot hold both",
                    hint=f'open one model at a time: `open_results(uri, "{first}")`',
                )
            both = dict((known.metadata or {}).items() & (field.metadata or {}).items())
            fields[field.name] = first, known.with_metadata(both)
    fields["model"] = fields.pop("model")  # stays the last column
    everywhere = set.intersection(*(set(schema.names) for schema in schemas.values()))
    return pa.schema([f if f.name in everywhere else f.with_nullable(True) for _, f in fields.values()])


def _stored_as(field: pa.Field) -> list[Any]:
    """Return what decides how a column's values are decoded."""
    return [field.type, *((field.metadata or {}).get(name) for name in (b"encoding", b"shape", b"scale"))]


def _described(field: pa.Field) -> str:
    vector = is_vector(field)
    encoding = (field.metadata or {}).get(b"encoding", b"").decode()
    return f"a vector of {length(field)} values ({encoding or field.type.value_type})" if vector else str(field.type)


def read_rejects(uri: str, *, superseded: bool = False, storage_options: Mapping[str, Any] | None = None) -> pa.Table:
    """Read the open rejects of the committed parts: one row per model and image, part by part.

    They come from `_rejects` of the last generation when it is finalized, otherwise from the footer of each file.

    uri: the job's `output.uri`. superseded: return instead the rejects that retries tried again, once for each retry,
    oldest first. storage_options: as under `output` in the job file.

    Raises InputError when there is no output at `uri`, StorageError when a file cannot be read."""
    output, plan = _open(uri, storage_options)
    files = output.files()
    history = read_history(output, plan, files)
    if superseded:
        footers = [found for retry in history.retries for found in _footers(output, retry.files(), files)]
        rows = ({"model": model, "part": f.part_index, **reject} for model, f in footers for reject in f.superseded)
        return pa.Table.from_pylist(list(rows), schema=REJECT_SCHEMA)
    open_rejects = read_open_rejects(output, history.generation)
    if open_rejects is not None:
        return open_rejects
    footers_of_all = output.footers([name for name in history.names_by_part() if name in files], files)
    data = encode_rejects(FooterTotals().rejects(footers_of_all))
    return pq.read_table(pa.BufferReader(data)).cast(REJECT_SCHEMA)


def _footers(
    output: Output, planned: Iterable[tuple[str, Part, str]], files: Mapping[str, Entry]
) -> Iterator[tuple[str, Footer]]:
    """Read model and footer of the files that exist."""
    models = {name: model for model, _, name in planned if name in files}
    return ((models[name], footer) for name, footer in output.footers(models, files))


@dataclass(frozen=True)
class Status:
    """The progress of a run, over all generations. Counts are None where they would need more footer reads than
    `status` does by default."""

    uri: str
    parts: int
    parts_done: dict[str, int]  # by model
    rows_in: int | None  # of the parts that every model has finished
    rows_planned: int | None
    rows_written: dict[str, int] | None
    rejected: int | None
    size_bytes: int
    is_complete: bool  # includes the last retry or extension that was started
    generation: int  # the last one started: the number of retries and extensions
    retries_begun: int
    retry_files_left: int  # of the last retry, when no extension followed
    meter: dict[str, Any]  # the last one that a session stored; {} when there is none

    @property
    def bottleneck(self) -> str:
        return str(self.meter.get("bottleneck", ""))

    @property
    def retries(self) -> dict[str, int]:
        """Storage requests that were sent again, by the store's answer."""
        return dict(self.meter.get("retries", {}))


def status(uri: str, *, read_footers: bool | None = None, storage_options: Mapping[str, Any] | None = None) -> Status:
    """Report the progress of a run from its files alone, so it works from anywhere and while the job runs.

    It takes one listing. Rows and rejects come from `_SUCCESS` when the job is complete, otherwise from the footers of
    the parts, at one read each.

    uri: the job's `output.uri`. read_footers: whether to read the footers; by default they are read when there are at
    most `FEW_FILES`. storage_options: as under `output` in the job file.

    Raises InputError when there is no output at `uri`, StorageError when it cannot be read."""
    output, plan = _open(uri, storage_options)
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
    """Sum totals from the footers; rows in are those of the parts that every model has finished."""
    names = [name for name in history.names_by_part() if name in files]
    counting, plan = FooterTotals(), history.plan
    for _ in counting.rejects(output.footers(names, files)):
        pass
    table = counting.table()
    rows = zip(*(table.column(name).to_pylist() for name in COUNTS), strict=True)
    started = [(part, rows_in) for part, rows_in, name in rows if "-retry" not in name.rpartition("/")[2]]
    models = Counter(part for part, _ in started)
    whole = {part: rows_in for part, rows_in in started if models[part] == len(plan.identities)}
    written = {model: counting.written[model] for model in plan.identities}
    return {**counting.totals(len(plan.parts)), "rows_written": written, "rows_in": sum(whole.values())}


def _planned_rows(plan: Plan, done: Iterable[bool]) -> int | None:
    """Count the rows of finished parts, when the plan knows them."""
    counts = [part.rows for part, is_done in zip(plan.parts, done, strict=True) if is_done]
    return None if None in counts else sum(count or 0 for count in counts)


def _open(uri: str, storage_options: Mapping[str, Any] | None) -> tuple[Output, Plan]:
    output = Output.at(uri, Store(storage_options or {}))
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is not an output of img2parquet")
    return output, plan
