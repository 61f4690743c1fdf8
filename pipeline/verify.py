"""An output to the list of everything wrong with it: empty when each planned row is there exactly once.

`_SUCCESS` has a digest of each record, the manifest one of each part, and every file one of itself. There is no key in
it: who can write here can write all of it anew, and only a digest of `_SUCCESS` that was kept elsewhere tells.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import (
    MANIFEST,
    PLAN,
    REJECTS,
    RUN,
    SUCCESS,
    Footer,
    Output,
    is_sealed,
    is_visible,
    model_of,
    parse_footer,
)
from pipeline.errors import InputError, NotFound, StorageError
from pipeline.finish import Counting
from pipeline.plan import Plan, plan_hash
from pipeline.schema import Part
from pipeline.storage import Entry, join
from pipeline.write import is_intact

UNREADABLE = (pa.ArrowException, OSError, StorageError, LookupError, TypeError, ValueError, zlib.error)


@dataclass(frozen=True)
class Checked:
    """One part's file, read whole."""

    footer: Footer
    keys: dict[str, list[str]]  # by shard
    size_bytes: int


def verify(output: Output) -> list[str]:
    """Problems, one sentence each. Reads every byte of every part. Raises InputError where there is no plan."""
    try:
        plan = output.stored_plan()
    except UNREADABLE as error:
        return [f"{PLAN}: cannot be read: {_first_line(error)}"]
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is no output of img2parquet")
    files = {name: entry for name, entry in output.files().items() if is_visible(name)}
    expected = {
        name: (model, part) for model, names in plan.names.items() for name, part in zip(names, plan.parts, strict=True)
    }
    problems = [f"missing: {name}" for name in sorted(expected.keys() - files.keys())]
    problems += [f"not of this run: {name}" for name in sorted(files.keys() - expected.keys())]
    present = sorted(expected.keys() & files.keys())
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda name: _check_file(output, files[name], *expected[name], plan), present)
        checked = dict(zip(present, results, strict=True))
    problems += [f"{name}: {result}" for name, result in checked.items() if isinstance(result, str)]
    good = {name: result for name, result in checked.items() if isinstance(result, Checked)}
    problems += _duplicate_keys(good, expected)
    problems += _between_models(good)
    return problems + list(_check_records(output, plan, good, complete=len(good) == len(expected)))


def _check_file(output: Output, entry: Entry, model: str, part: Part, plan: Plan) -> Checked | str:
    """A part read whole with its page checksums, or what is wrong with it."""
    try:
        data = output.store.read(entry.uri)
        if not is_intact(data):
            return "its bytes are not those that were written"
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        footer = parse_footer(file.metadata)
        table = file.read()
    except UNREADABLE as error:
        return f"cannot be read: {_first_line(error)}"
    if footer.identity != plan.identity(model):
        return "its footer names another run"
    if footer.part_index != part.index:
        return f"its footer says part {footer.part_index}"
    if footer.rows != table.num_rows or footer.rows_in != footer.rows + len(footer.rejects):
        return f"{footer.rows_in} rows in, but {table.num_rows} rows and {len(footer.rejects)} rejects"
    if part.rows is not None and part.rows != footer.rows_in:
        return f"{footer.rows_in} rows in, where the plan has {part.rows}"
    table.validate(full=True)
    keys: dict[str, list[str]] = {}
    for key, shard in zip(table.column("key").to_pylist(), table.column("shard").to_pylist(), strict=True):
        keys.setdefault(shard, []).append(key)
    return Checked(footer, keys, entry.size_bytes)


def _duplicate_keys(good: dict[str, Checked], expected: dict[str, tuple[str, Part]]) -> Iterator[str]:
    """A key twice in one shard, within a model: within a part the reader rejects it, across parts only we can see."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for name, checked in good.items():
        model = expected[name][0]
        for shard, keys in checked.keys.items():
            counts.update((model, shard, key) for key in keys)
    for (model, shard, key), count in counts.items():
        if count > 1:
            yield f"model `{model}`: key `{key}` of {shard} is there {count} times"


def _between_models(good: dict[str, Checked]) -> Iterator[str]:
    rows_in: dict[int, int] = {}
    for name, checked in good.items():
        index = checked.footer.part_index
        if rows_in.setdefault(index, checked.footer.rows_in) != checked.footer.rows_in:
            yield f"{name}: {checked.footer.rows_in} rows in, another model's file of part {index} has {rows_in[index]}"


def _check_records(output: Output, plan: Plan, good: dict[str, Checked], complete: bool) -> Iterator[str]:
    """_run.json, manifest, rejects and _SUCCESS against the parts. They may be absent only while a run is on."""
    run = _record(output, RUN)
    if isinstance(run, str):
        yield run
    elif run.get("plan_sha256") != plan_hash(output.store.read(join(output.uri, PLAN))):
        yield f"{RUN} was written for another plan"
    totals = _record(output, SUCCESS)
    if isinstance(totals, str):
        yield totals + (" (the job has not ended, or it failed)" if totals.startswith("missing") else "")
    else:
        yield from _success_problems(output, plan, good if complete else None, totals)
    ended = not isinstance(totals, str)
    yield from _check_table(output, MANIFEST, ended, lambda table: _manifest_problems(table, good))
    yield from _check_table(output, REJECTS, ended, lambda table: _reject_problems(table, good))


def _record(output: Output, name: str) -> dict[str, Any] | str:
    """A sealed JSON record, or what is wrong with it."""
    try:
        data = output.store.read(join(output.uri, name))
    except NotFound:
        return f"missing: {name}"
    if not is_sealed(data):
        return f"{name}: its bytes are not those that were written"
    values: dict[str, Any] = json.loads(data)
    return values


def _success_problems(
    output: Output, plan: Plan, parts: dict[str, Checked] | None, totals: dict[str, Any]
) -> Iterator[str]:
    said = totals.get("files", {})
    found = output.digests(said)
    yield from (f"{name}: {SUCCESS} has another digest of it" for name in said if found.get(name) != said[name])
    if parts is None:
        return
    counting = Counting()
    for _ in counting.rejects((name, parts[name].footer) for name in plan.names_by_part()):
        pass
    for name, counted in counting.totals(len(plan.parts)).items():
        if totals.get(name) != counted:
            yield f"{SUCCESS} says {name} {totals.get(name)}, the parts hold {counted}"


def _check_table(
    output: Output, name: str, ended: bool, problems: Callable[[pa.Table], Iterable[str]]
) -> Iterator[str]:
    try:
        table = pq.read_table(pa.BufferReader(output.store.read(join(output.uri, name))))
        yield from problems(table)
    except NotFound:
        if ended:
            yield f"missing: {name}"
    except UNREADABLE as error:
        yield f"{name}: cannot be read: {_first_line(error)}"


def _manifest_problems(table: pa.Table, good: dict[str, Checked]) -> Iterator[str]:
    said = {row["file"]: row for row in table.to_pylist()}
    for name, checked in good.items():
        row = said.get(name)
        if row is None:
            yield f"{MANIFEST} does not name {name}"
        elif (row["rows"], row["rows_in"], row["size_bytes"], row.get("sha256")) != (
            checked.footer.rows, checked.footer.rows_in, checked.size_bytes, checked.footer.digest,
        ):  # fmt: skip
            yield f"{MANIFEST} disagrees with {name} on rows, size or digest"
    yield from (f"{MANIFEST} names {name}, which is not there" for name in sorted(said.keys() - good.keys()))


def _reject_problems(table: pa.Table, good: dict[str, Checked]) -> Iterator[str]:
    said = Counter((row["model"], row["part"]) for row in table.to_pylist())
    for name, checked in good.items():
        model = model_of(name)
        count = said[(model, checked.footer.part_index)]
        if count != len(checked.footer.rejects):
            yield f"{REJECTS} has {count} rejects of {name}, its footer {len(checked.footer.rejects)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
