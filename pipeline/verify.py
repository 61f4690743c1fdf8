"""An output to the list of everything wrong with it: empty when each planned row is there exactly once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import MANIFEST, PLAN, REJECTS, RUN, SUCCESS, Footer, Output, model_of, parse_footer
from pipeline.errors import InputError, StorageError
from pipeline.plan import Plan, plan_hash
from pipeline.schema import Part
from pipeline.storage import Entry, join
from pipeline.write import is_intact


@dataclass(frozen=True)
class Checked:
    """One part's file, read whole."""

    footer: Footer
    keys: dict[str, list[str]]  # by shard
    size_bytes: int


def verify(output: Output) -> list[str]:
    """Problems, one sentence each. Reads every byte of every part. Raises InputError where there is no plan."""
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is no output of img2parquet")
    files = output.part_files()
    expected = {plan.file_name(model, part): (model, part) for model in plan.identities for part in plan.parts}
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
    except (pa.ArrowException, OSError, StorageError, KeyError, ValueError) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
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
    run = output.run_record()
    if run is None:
        yield f"missing: {RUN}"
    elif run["plan_sha256"] != plan_hash(output.store.read(join(output.uri, PLAN))):
        yield f"{RUN} was written for another plan"
    if not output.store.exists(join(output.uri, SUCCESS)):
        yield f"missing: {SUCCESS} (the job has not ended, or it failed)"
        return
    totals = json.loads(output.store.read(join(output.uri, SUCCESS)))
    yield from _check_table(output, MANIFEST, lambda table: _manifest_problems(table, good))
    yield from _check_table(output, REJECTS, lambda table: _reject_problems(table, good))
    if complete:
        written = dict.fromkeys(plan.identities, 0)
        for name, checked in good.items():
            written[model_of(name)] += checked.footer.rows
        if written != totals["rows_written"]:
            yield f"{SUCCESS} says {totals['rows_written']} rows, the parts hold {sum(written.values())}"


def _check_table(output: Output, name: str, problems: object) -> Iterator[str]:
    try:
        table = pq.read_table(pa.BufferReader(output.store.read(join(output.uri, name))))
    except (StorageError, pa.ArrowException) as error:
        yield f"{name}: cannot be read: {str(error).splitlines()[0]}"
        return
    yield from problems(table)  # type: ignore[operator]


def _manifest_problems(table: pa.Table, good: dict[str, Checked]) -> Iterator[str]:
    said = {row["file"]: row for row in table.to_pylist()}
    for name, checked in good.items():
        row = said.get(name)
        if row is None:
            yield f"{MANIFEST} does not name {name}"
        elif (row["rows"], row["rows_in"], row["size_bytes"]) != (
            checked.footer.rows, checked.footer.rows_in, checked.size_bytes,
        ):  # fmt: skip
            yield f"{MANIFEST} disagrees with {name} on rows or size"


def _reject_problems(table: pa.Table, good: dict[str, Checked]) -> Iterator[str]:
    said = Counter((row["model"], row["part"]) for row in table.to_pylist())
    for name, checked in good.items():
        model = model_of(name)
        count = said[(model, checked.footer.part_index)]
        if count != len(checked.footer.rejects):
            yield f"{REJECTS} has {count} rejects of {name}, its footer {len(checked.footer.rejects)}"
