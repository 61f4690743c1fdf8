"""What lies in an output, for readers: committed rows, rejects, and how far a run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.commit import PLAN, REJECT_SCHEMA, SUCCESS, Output, encode_rejects, parse_name
from pipeline.errors import InputError, nearest
from pipeline.plan import Plan
from pipeline.storage import join


def open_results(uri: str, model: str | None = None, **storage_options: Any) -> ds.Dataset:
    """A pyarrow dataset over the committed files of one model, with `model` as partition column.

    `model` may be left out where the output has one model, or several with the same columns.
    Raises InputError where there are none."""
    output = _output(uri, storage_options)
    plan = _plan(output)
    files = _committed(output, plan)
    names = sorted({parsed[0] for name in files if (parsed := parse_name(name))})
    if model is not None and model not in plan.identities:
        known = sorted(plan.identities)
        raise InputError(f"{uri}: no model `{model}`", known=known, hint=nearest(model, known))
    wanted = [name for name in files if model is None or name.startswith(f"model={model}/")]
    if not wanted:
        raise InputError(f"{uri}: nothing is committed yet", known=names)
    filesystem, root = output.store.arrow_filesystem(output.uri)
    return ds.dataset(
        [f"{root}/{name}" for name in wanted],
        format="parquet",
        filesystem=filesystem,
        partitioning=ds.partitioning(pa.schema([("model", pa.string())]), flavor="hive"),
        partition_base_dir=root,
    )


def read_rejects(uri: str, **storage_options: Any) -> pa.Table:
    """Every reject of the committed parts, one row per model and image, gathered from the footers."""
    output = _output(uri, storage_options)
    plan = _plan(output)
    files = _committed(output, plan)
    footers = output.footers(files.values())
    table = pq.read_table(pa.BufferReader(encode_rejects(zip(files, footers, strict=True))))
    return table.cast(REJECT_SCHEMA)


@dataclass(frozen=True)
class Status:
    uri: str
    parts: int
    parts_done: dict[str, int]  # by model
    rows_in: int  # of the parts that are done for every model
    rows_planned: int | None
    rows_written: dict[str, int]
    rejected: int
    size_bytes: int
    is_complete: bool


def status(uri: str, **storage_options: Any) -> Status:
    """How far a run is, from its files alone: works while it runs, from anywhere. Raises InputError."""
    output = _output(uri, storage_options)
    plan = _plan(output)
    files = _committed(output, plan)
    footers = dict(zip(files, output.footers(files.values()), strict=True))
    by_model = {
        model: [f for name, f in footers.items() if name.startswith(f"model={model}/")] for model in plan.identities
    }
    indices = [{footer.part_index for footer in of_model} for of_model in by_model.values()]
    whole = set.intersection(*indices)
    first = {footer.part_index: footer for of_model in by_model.values() for footer in of_model}
    rejected = {(f.part_index, reject["row"]) for f in footers.values() for reject in f.rejects}
    return Status(
        uri=output.uri,
        parts=len(plan.parts),
        parts_done={model: len(of_model) for model, of_model in by_model.items()},
        rows_in=sum(first[index].rows_in for index in whole),
        rows_planned=plan.rows,
        rows_written={model: sum(f.rows for f in of_model) for model, of_model in by_model.items()},
        rejected=len(rejected),
        size_bytes=sum(entry.size_bytes for entry in files.values()),
        is_complete=output.store.exists(join(output.uri, SUCCESS)),
    )


def _output(uri: str, storage_options: dict[str, Any]) -> Output:
    from pipeline.storage import Store

    return Output.at(uri, Store(storage_options))


def _plan(output: Output) -> Plan:
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is no output of img2parquet")
    return plan


def _committed(output: Output, plan: Plan) -> dict[str, Any]:
    """The files that this plan names and that are there, by name, sorted."""
    files = output.part_files()
    names = sorted(plan.file_name(model, part) for model in plan.identities for part in plan.parts)
    return {name: files[name] for name in names if name in files}
