"""List everything that is wrong with an output: nothing when each planned row exists exactly once, in any generation.

`_SUCCESS` holds a digest of each record, the manifest one of each part, and every file one of itself. They are not
signed: whoever can write here can rewrite all of it, and only a digest of `_SUCCESS` kept elsewhere would reveal it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import MANIFEST, PLAN, REJECTS, RUN, SUCCESS, Output, is_part_file, is_visible, model_of
from img2parquet.dataset.derived import are_derived, derived_history, derived_names, mirror_problems, records_of
from img2parquet.dataset.finalize import FooterTotals
from img2parquet.dataset.footer import Footer, parse_footer
from img2parquet.dataset.generations import History, RetryPlan, of_generation, read_history
from img2parquet.dataset.part_file import is_intact
from img2parquet.dataset.plan import Plan, plan_hash
from img2parquet.dataset.rejects import OpenRejects
from img2parquet.dataset.sealed_json import is_sealed
from img2parquet.errors import InputError, NotFound, RunMismatch, StorageError
from img2parquet.models.prompts import decode_weights, weights_file
from img2parquet.schema import Part
from img2parquet.storage import Entry, Store, join
from img2parquet.storage.parallel import fetch_in_order

KeysOf = dict[str, list[str]]  # by shard
ROWS_AT_ONCE = 4096
UNREADABLE = (pa.ArrowException, OSError, StorageError, LookupError, TypeError, ValueError, zlib.error)


@dataclass(frozen=True)
class ExpectedPart:
    """A file that the plan of a generation names."""

    model: str
    part: Part
    plan: Plan

    @property
    def generation(self) -> int:
        """The generation that the file's footer names: 0 unless a retry wrote it."""
        return self.plan.generation if isinstance(self.plan, RetryPlan) else 0

    @property
    def rows_in(self) -> int | None:
        """Rows to expect; None when they are known only by reading."""
        if isinstance(self.plan, RetryPlan):
            return len(self.plan.rejects[self.part.index][self.model])
        return self.part.rows


@dataclass(frozen=True, slots=True)
class CheckedPart:
    """A part's file that was read whole and found intact. keys: a digest of its keys, in order, by shard."""

    footer: Footer
    keys: bytes
    size_bytes: int


def verify(uri: str, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Check every byte of an output against its plan, and list what is wrong: one sentence each, none when all is well.

    uri: the job's `output.uri`. storage_options: as under `output` in the job file.

    Raises InputError when there is no output at `uri`, StorageError when the store refuses to list it."""
    return find_problems(Output.at(uri, Store(storage_options or {})))


def find_problems(output: Output) -> list[str]:
    """List what is wrong with an open output, as `verify` does."""
    try:
        plan = output.stored_plan()
    except UNREADABLE as error:
        return [f"{PLAN}: cannot be read: {_first_line(error)}"]
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is not an output of img2parquet")
    there = output.files()
    try:
        history = read_history(output, plan, there)
    except (*UNREADABLE, RunMismatch) as error:
        return [f"the plan of a later generation cannot be read: {_first_line(error)}"]
    theirs = are_derived(there)
    ours = (name for name in there if (is_visible(name) or is_part_file(name)) and name not in theirs)
    problems, good = _check_run(output, output, history, there, ours)
    problems += _check_class_weights(output, plan, there)
    return problems + list(_check_derived(output, there, good))


def _check_class_weights(output: Output, plan: Plan, there: Mapping[str, Entry]) -> list[str]:
    """Check the classifiers of models whose classes are prompts. One that is not there is made when it is needed."""
    problems = []
    for model, identity in plan.identities.items():
        name = weights_file(model)
        if "prompts" not in identity or name not in there:
            continue
        try:
            decode_weights(output.read(name) or b"", identity["prompts"])
        except (*UNREADABLE, ValueError) as error:
            problems.append(f"{name}: {_first_line(error)}")
    return problems


def _check_derived(output: Output, there: Mapping[str, Entry], good: dict[str, CheckedPart]) -> Iterator[str]:
    """Check partitions that were made from a model's rows, each with its own plan and records. good: the files of that
    model which are intact."""
    for name in derived_names(there):
        records = records_of(output, name)
        try:
            history = derived_history(output, name, there)
        except (*UNREADABLE, RunMismatch) as error:
            yield f"{records.uri}: the plans cannot be read: {_first_line(error)}"
            continue
        assert history is not None, "it was listed"
        its = (file for file in are_derived(there) if model_of(file) == name)
        problems, own = _check_run(output, records, history, there, its)
        yield from problems
        yield from mirror_problems(history, {file: checked.keys for file, checked in (good | own).items()})


def _check_run(
    output: Output, records: Output, history: History, files: Mapping[str, Entry], found: Iterable[str]
) -> tuple[list[str], dict[str, CheckedPart]]:
    """Check the parts and records of one run and its later generations. Returns the problems and the intact files.

    found: the names of files that should belong to this run."""
    names = set[str]()
    problems, good, keys = [], dict[str, CheckedPart](), RepeatedKeys(history.plan)

    def planned() -> Iterator[tuple[str, ExpectedPart]]:
        for name, expected in _expected(history):
            names.add(name)
            if name in files:
                yield name, expected
            else:
                problems.append(f"missing: {name}")

    for (name, expected), result in fetch_in_order(
        planned(), lambda one: _check_file(output, files[one[0]], one[1]), 8
    ):
        if isinstance(result, str):
            problems.append(f"{name}: {result}")
        else:
            good[name], of_file = result
            keys.add(expected.model, expected.part.index, of_file)
    problems.sort(key=lambda problem: not problem.startswith("missing: "))
    problems += [f"not of this run: {name}" for name in sorted(name for name in found if name not in names)]
    problems += keys.problems()
    problems += _between_models(good)
    for generation in range(history.generation + 1):
        problems += _check_generation(records, history.upto(generation), good, is_last=generation == history.generation)
    return problems, good


def _expected(history: History) -> Iterator[tuple[str, ExpectedPart]]:
    """Yield every planned file: part by part, model by model, the oldest first."""
    retried: dict[tuple[int, str], list[tuple[str, ExpectedPart]]] = {}
    for retry in history.retries:
        for model, part, name in retry.files():
            retried.setdefault((part.index, model), []).append((name, ExpectedPart(model, part, retry)))
    for model, part, name in history.plan.files():
        yield name, ExpectedPart(model, part, history.first)
        yield from retried.get((part.index, model), ())


def _check_file(output: Output, entry: Entry, expected: ExpectedPart) -> tuple[CheckedPart, KeysOf] | str:
    """Read a part whole, checking its digest and page checksums. Returns it with its keys by shard, or the problem."""
    try:
        data = output.store.read(entry.uri)
        if not is_intact(data):
            return "its digest does not match its bytes"
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        footer = parse_footer(file.metadata)
        table = file.read()
    except UNREADABLE as error:
        return f"cannot be read: {_first_line(error)}"
    if footer.identity != expected.plan.identity(expected.model):
        return "its footer names another run"
    if (footer.part_index, footer.generation) != (expected.part.index, expected.generation):
        return f"its footer says part {footer.part_index} of generation {footer.generation}"
    if footer.rows != table.num_rows or footer.rows_in != footer.rows + len(footer.rejects):
        return f"{footer.rows_in} rows in, but {table.num_rows} rows and {len(footer.rejects)} rejects"
    if expected.rows_in not in (None, footer.rows_in):
        return f"{footer.rows_in} rows in, where the plan has {expected.rows_in}"
    if isinstance(expected.plan, RetryPlan):
        planned = expected.plan.rejects[expected.part.index][expected.model]
        if footer.superseded != tuple(reject.to_dict() for reject in planned):
            return "it does not supersede the rejects that its plan names"
    table.validate(full=True)
    keys = _by_shard(table)
    digest = hashlib.sha256(json.dumps(sorted(keys.items())).encode()).digest()
    return CheckedPart(footer, digest, entry.size_bytes), keys


def _by_shard(table: pa.Table) -> KeysOf:
    keys, shards = table.column("key").to_pylist(), table.column("shard")
    found: KeysOf = {shard: [] for shard in shards.unique().to_pylist()}
    if len(found) == 1:  # as in most parts
        return dict.fromkeys(found, keys)
    for key, shard in zip(keys, shards.to_pylist(), strict=True):
        found[shard].append(key)
    return found


class RepeatedKeys:
    """Find keys that occur twice in one shard, within a model.

    A shard's keys are kept until the last part that has rows of it, as digests when several parts do: whole tars need
    no memory, while one list or folder that holds everything needs some for each row."""

    def __init__(self, plan: Plan) -> None:
        self.last, self.whole = dict[str, int](), set[str]()  # part, by shard; the shards that lie in one part
        for part in plan.parts:
            for piece in part.pieces:
                if piece.uri not in self.last:
                    self.whole.add(piece.uri)
                elif self.last[piece.uri] != part.index:
                    self.whole.discard(piece.uri)
                self.last[piece.uri] = part.index
        self.kept: dict[tuple[str, str], set[str] | set[bytes]] = {}  # by model and shard
        self.twice: Counter[tuple[str, str, str]] = Counter()
        self.part = -1

    def add(self, model: str, part: int, keys: KeysOf) -> None:
        """Add the keys of one file; files must come part by part."""
        if self.part != part:
            self.kept = {of: kept for of, kept in self.kept.items() if self.last.get(of[1], part) >= part}
            self.part = part
        for shard, of_shard in keys.items():
            kept: set[Any] = self.kept.setdefault((model, shard), set())
            digests: Sequence[Any] = of_shard if shard in self.whole else [_digest(key) for key in of_shard]
            new = set(digests)
            if len(new) < len(digests) or not kept.isdisjoint(new):
                for key, one in zip(of_shard, digests, strict=True):
                    if one in kept:
                        self.twice[model, shard, key] += 1
                    kept.add(one)
            else:
                kept |= new

    def problems(self) -> Iterator[str]:
        for (model, shard, key), more in self.twice.items():
            yield f"model `{model}`: key `{key}` of {shard} occurs {more + 1} times"


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _between_models(good: dict[str, CheckedPart]) -> Iterator[str]:
    rows_in: dict[int, int] = {}
    for name, checked in good.items():
        index = checked.footer.part_index
        if checked.footer.generation:
            continue  # a retry's rows in are those that this model alone rejected
        if rows_in.setdefault(index, checked.footer.rows_in) != checked.footer.rows_in:
            yield f"{name}: {checked.footer.rows_in} rows in, another model's file of part {index} has {rows_in[index]}"


def _check_generation(output: Output, history: History, good: dict[str, CheckedPart], is_last: bool) -> Iterator[str]:
    """Check the records of the last generation of `history` against its parts and those before.

    They may be missing only while a run is unfinished; `_SUCCESS` also when a later generation exists, since this one
    may have ended with too many rejects."""
    generation = history.generation
    plan, run, manifest, rejects, success = (
        of_generation(name, generation) for name in (PLAN, RUN, MANIFEST, REJECTS, SUCCESS)
    )
    recorded = _record(output, run)
    if isinstance(recorded, str):
        yield recorded
    elif recorded.get("plan_sha256") != plan_hash(output.store.read(join(output.uri, plan))):
        yield f"{run} was written for another plan"
    if generation:
        parent = of_generation(MANIFEST, generation - 1)
        if output.digests([parent]).get(parent) != history.later[-1].parent_sha256:
            yield f"{plan} was made after another {parent}"
    totals = _record(output, success)
    ended = not isinstance(totals, str)
    of_union = _of(good, history)
    of_this = _of(good, history.later[-1] if generation else history.first)
    if not isinstance(totals, str):
        yield from _success_problems(output, success, history, of_union, totals)
    elif is_last or not totals.startswith("missing"):
        yield totals + (" (the job has not finished, or it failed)" if totals.startswith("missing") else "")
    yield from _check_table(output, manifest, ended, lambda table: _manifest_problems(manifest, table, of_this))
    yield from _check_table(output, rejects, ended, lambda table: _reject_problems(rejects, table, history, of_union))


def _of(good: dict[str, CheckedPart], planned: History | Plan) -> dict[str, CheckedPart]:
    """Select the intact files of a history or of one generation: part by part, the oldest first."""
    return {name: good[name] for name in planned.names_by_part() if name in good}


def _record(output: Output, name: str) -> dict[str, Any] | str:
    """Read a sealed JSON record. Returns its values, or the problem."""
    try:
        data = output.store.read(join(output.uri, name))
    except NotFound:
        return f"missing: {name}"
    if not is_sealed(data):
        return f"{name}: its bytes are not those that were written"
    values: dict[str, Any] = json.loads(data)
    return values


def _success_problems(
    output: Output, name: str, history: History, parts: dict[str, CheckedPart], totals: dict[str, Any]
) -> Iterator[str]:
    said = totals.get("files", {})
    # the _SUCCESS of an earlier generation may be younger than this one
    found = output.digests([*said, *(record for record in history.records() if not record.startswith(SUCCESS))])
    yield from (f"{record}: {name} has another digest of it" for record in found if found[record] != said.get(record))
    yield from (f"missing: {record}, which {name} names" for record in said if record not in found)
    if len(parts) < sum(1 for _ in history.names_by_part()):
        return
    counting = FooterTotals()
    for _ in counting.rejects((name, checked.footer) for name, checked in parts.items()):
        pass
    for field, counted in counting.totals(len(history.plan.parts)).items():
        if totals.get(field) != counted:
            yield f"{name} says {field} {totals.get(field)}, the parts hold {counted}"


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


def _manifest_problems(manifest: str, table: pa.Table, good: dict[str, CheckedPart]) -> Iterator[str]:
    said = set[str]()
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            name, checked = row["file"], good.get(row["file"])
            said.add(name)
            if checked is None:
                yield f"{manifest} names {name}, which does not exist or is damaged"
            elif (row["rows"], row["rows_in"], row["size_bytes"], row.get("sha256")) != (
                checked.footer.rows, checked.footer.rows_in, checked.size_bytes, checked.footer.digest,
            ):  # fmt: skip
                yield f"{manifest} disagrees with {name} on rows, size or digest"
    yield from (f"{manifest} does not name {name}" for name in good if name not in said)


def _reject_problems(name: str, table: pa.Table, history: History, good: dict[str, CheckedPart]) -> Iterator[str]:
    """Compare the record of open rejects with the footers, applied one after another."""
    said: dict[tuple[str, int], dict[int, str]] = {}
    for row in table.select(["model", "part", "row", "reason"]).to_pylist():
        said.setdefault((row["model"], row["part"]), {})[row["row"]] = row["reason"]
    standing: dict[tuple[str, int], OpenRejects] = {}
    for file, checked in good.items():
        of_both = standing.setdefault((model_of(file), checked.footer.part_index), OpenRejects())
        if of_both.add(checked.footer) and checked.footer.generation == history.generation:
            yield f"{file} supersedes rejects that no earlier file has"
    for (model, part), of_both in standing.items():
        found = {row: reject["reason"] for row, reject in of_both.rejects.items()}
        if said.get((model, part), {}) != found:
            yield f"{name} lists other rejects of part {part} of `{model}` than the footers, which have {len(found)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
