"""The generations of an output: generation 0 is the job's, each later one adds to it; their names, plans and union.

* Records of generation g are `_plan-g`, `_run-g`, `_manifest-g`, `_rejects-g` and `_SUCCESS-g`, each created once.
* The plan of a retry is the list of the rejects that it tries again; that of an extension has parts, as a job's has,
  whose indices continue. Each names its parent, by a digest of the manifest.
* A part's files supersede each other row by row, never as a whole: a reject stands until a retry's footer lists it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import PLAN, RECORDS, REJECTS, SUCCESS, Footer, Output
from pipeline.errors import RunMismatch
from pipeline.listing import parse_name
from pipeline.packed import joined
from pipeline.plan import Plan, decode_plan, encode_plan, plan_hash, readable
from pipeline.schema import Part, Reject, Wanted
from pipeline.storage import join

REJECT_SCHEMA = pa.schema(
    [
        ("model", pa.string()), ("part", pa.int32()), ("shard", pa.string()), ("key", pa.string()), ("row", pa.int64()),
        ("stage", pa.string()), ("reason", pa.string()), ("message", pa.string()), ("offset", pa.int64()),
    ]
)  # fmt: skip
LATER_PLAN = re.compile(r"_plan-([1-9]\d*)\.parquet")
ABOUT_KEY = b"img2parquet.generation"
ROWS_AT_ONCE = 16_384


def of_generation(name: str, generation: int) -> str:
    """(`_plan.parquet`, 2) -> `_plan-2.parquet`."""
    stem, dot, extension = name.partition(".")
    return f"{stem}-{generation}{dot}{extension}" if generation else name


@dataclass(frozen=True)
class LaterPlan(Plan):
    """What one generation adds."""

    generation: int
    parent_sha256: str  # of the parent's manifest


@dataclass(frozen=True)
class Extension(LaterPlan):
    """Parts of files that came later."""


@dataclass(frozen=True)
class RetryPlan(LaterPlan):
    """The rejects that one retry tries again. `parts` are those they lie in, with these rows alone."""

    reasons: tuple[str, ...]  # that were asked for; none: all that can be tried again
    rejects: Mapping[int, Mapping[str, tuple[Reject, ...]]]  # by part and model, in the order of the rows

    def file_name(self, model: str, part: Part) -> str:
        return super().file_name(model, part).replace(".parquet", f"-retry{self.generation}.parquet")

    def files(self) -> Iterator[tuple[str, Part, str]]:
        for part in self.parts:
            yield from ((model, part, self.file_name(model, part)) for model in sorted(self.rejects[part.index]))

    def indexed(self) -> Iterator[tuple[str, int, str]]:
        return ((model, part.index, name) for model, part, name in self.files())

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """Of each model, those of the parts that it has rejects in."""
        named = list(self.files())
        return {model: tuple(name for of, _, name in named if of == model) for model in self.identities}

    @property
    def models(self) -> set[str]:
        return {model for of_part in self.rejects.values() for model in of_part}

    @property
    def images(self) -> int:
        return sum(len(part.only or ()) for part in self.parts)


@dataclass(frozen=True)
class History:
    """An output's plan, and those of its later generations, oldest first."""

    first: Plan
    later: tuple[LaterPlan, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """Every part: the job's, and those that extensions added."""
        added = [plan for plan in self.later if isinstance(plan, Extension)]
        return (
            Plan(joined([self.first.parts, *(plan.parts for plan in added)]), self.first.identities)
            if added
            else (self.first)
        )

    @property
    def retries(self) -> tuple[RetryPlan, ...]:
        return tuple(plan for plan in self.later if isinstance(plan, RetryPlan))

    @property
    def generation(self) -> int:
        """The last that was begun."""
        return len(self.later)

    def upto(self, generation: int) -> History:
        return History(self.first, self.later[:generation])

    def indexed(self) -> Iterator[tuple[str, int, str]]:
        """(model, index of the part, name) of every file: part after part, model after model, the oldest first."""
        added: dict[tuple[int, str], list[tuple[str, int, str]]] = {}
        for retry in self.retries:
            for model, index, name in retry.indexed():
                added.setdefault((index, model), []).append((model, index, name))
        for model, index, name in self.plan.indexed():
            yield model, index, name
            yield from added.get((index, model), ())

    def names_by_part(self) -> Iterator[str]:
        return (name for _, _, name in self.indexed())

    def __contains__(self, name: object) -> bool:
        """Whether a file of this name is planned."""
        parsed = parse_name(name) if isinstance(name, str) else None
        if parsed is None or parsed[0] not in self.plan.identities:
            return False
        model, index, _ = parsed
        place = self.plan.by_index.find(index)
        return (place is not None and self.plan.names[model][place] == name) or name in self._retried

    @cached_property
    def _retried(self) -> set[str]:
        return {name for retry in self.retries for name in retry.names_by_part()}

    @property
    def names(self) -> Mapping[str, Sequence[str]]:
        """The file names of each model, oldest generation first."""
        if not self.retries:
            return self.plan.names
        plans = (self.plan, *self.retries)
        return {model: tuple(name for plan in plans for name in plan.names[model]) for model in self.plan.identities}

    def ended(self, there: Iterable[str]) -> int | None:
        """The last generation that has ended well; None where none has."""
        names = set(there)
        ended = [g for g in range(self.generation + 1) if of_generation(SUCCESS, g) in names]
        return max(ended, default=None)

    def records(self) -> list[str]:
        """Names of every record but _SUCCESS of the last generation, whose digests that holds."""
        names = [of_generation(name, g) for g in range(self.generation + 1) for name in RECORDS]
        return names + [of_generation(SUCCESS, g) for g in range(self.generation)]


def read_history(output: Output, plan: Plan, there: Iterable[str]) -> History:
    """The plans of the generations after `plan`. Raises RunMismatch for one that is missing or of another kind,
    StorageError for one that is damaged."""
    numbers = sorted(int(match[1]) for name in there if (match := LATER_PLAN.fullmatch(name)))
    history = History(plan)
    for number in range(1, (numbers[-1] if numbers else 0) + 1):
        name = of_generation(PLAN, number)
        data = output.read(name)
        if data is None:
            raise RunMismatch(
                f"{output.uri}: {name} is gone, and later ones are there", hint="put it back, or use another output.uri"
            )
        with readable(join(output.uri, name)):
            history = History(plan, (*history.later, decode_later(data, history)))
    return history


def store_later(output: Output, data: bytes, before: History) -> tuple[LaterPlan, str]:
    """The stored plan of the generation after `before`, ours (`data`) if we are first, and its hash. Raises
    RunMismatch, StorageError where it is damaged."""
    name = of_generation(PLAN, before.generation + 1)
    if output.put_once(name, data) == "done":
        data = output.read(name) or data
    with readable(join(output.uri, name)):
        return decode_later(data, before), plan_hash(data)


def describe(plan: LaterPlan, digest: str) -> dict[str, Any]:
    """What every _run-g.json says of its generation. digest: of the stored plan."""
    kind, more = "extension", dict[str, Any]()
    if isinstance(plan, RetryPlan):
        kind, more = "retry", {"reasons": list(plan.reasons), "images": plan.images}
    return {
        "kind": kind,
        "generation": plan.generation,
        "parent": plan.generation - 1,
        "parent_manifest_sha256": plan.parent_sha256,
        "plan_sha256": digest,
        "parts": len(plan.parts),
        **more,
    }


def encode_extension(plan: Plan, generation: int, parent: bytes) -> bytes:
    """The plan of an extension: new parts alone. parent: the manifest's bytes."""
    return encode_plan(plan, {ABOUT_KEY: _about("extension", generation, parent)})


def _about(kind: str, generation: int, parent: bytes, **more: object) -> str:
    digest = hashlib.sha256(parent).hexdigest()
    about = {"kind": kind, "generation": generation, "parent": generation - 1, "parent_manifest_sha256": digest}
    return json.dumps({**about, **more}, sort_keys=True)


def decode_later(data: bytes, before: History) -> LaterPlan:
    """The plan of the generation after `before`. Raises RunMismatch for one of an unknown kind, or of another place."""
    about = json.loads((pq.read_metadata(pa.BufferReader(data)).metadata or {}).get(ABOUT_KEY, b"{}"))
    decode = {"retry": _decode_retry, "extension": _decode_extension}.get(about.get("kind"))
    if decode is None or about.get("generation") != before.generation + 1:
        name = of_generation(PLAN, before.generation + 1)
        raise RunMismatch(
            f"{name} is no plan of a retry or of an extension",
            hint="was it written by a newer version? update img2parquet",
        )
    return decode(data, before, about)


def _decode_extension(data: bytes, before: History, about: Mapping[str, Any]) -> Extension:
    plan = decode_plan(data)
    if plan.identities != before.first.identities or plan.parts[0].index != len(before.plan.parts):
        raise RunMismatch(f"{of_generation(PLAN, about['generation'])} does not continue the plans before it")
    return Extension(plan.parts, before.first.identities, about["generation"], about["parent_manifest_sha256"])


def encode_retry(rejects: pa.Table, generation: int, parent: bytes, reasons: Sequence[str]) -> bytes:
    """The plan of a retry. rejects: of REJECT_SCHEMA, sorted by part, model and row. parent: the manifest's bytes."""
    said = _about("retry", generation, parent, reasons=sorted(reasons))
    return _parquet(rejects.replace_schema_metadata({ABOUT_KEY: said}))


def _decode_retry(data: bytes, before: History, about: Mapping[str, Any]) -> RetryPlan:
    table = pq.read_table(pa.BufferReader(data))
    table.validate(full=True)
    models = set(table["model"].unique().to_pylist())
    if table.schema.types != REJECT_SCHEMA.types or not models <= before.plan.identities.keys():
        raise ValueError("its rejects are not of this run")
    rejects = by_part_and_model(table)
    parts = before.plan.parts  # the index of a part is its place
    return RetryPlan(
        parts=tuple(replace(parts[index], only=_wanted(rejects[index])) for index in sorted(rejects)),
        identities=before.plan.identities,
        generation=about["generation"],
        parent_sha256=about["parent_manifest_sha256"],
        reasons=tuple(about["reasons"]),
        rejects=rejects,
    )


def by_part_and_model(table: pa.Table) -> dict[int, dict[str, tuple[Reject, ...]]]:
    """Rows of REJECT_SCHEMA, in their order."""
    found: dict[int, dict[str, list[Reject]]] = {}
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            part, model = row.pop("part"), row.pop("model")
            found.setdefault(part, {}).setdefault(model, []).append(Reject(**row))
    return {part: {model: tuple(rows) for model, rows in of_part.items()} for part, of_part in found.items()}


def to_table(rejects: Mapping[int, Mapping[str, Iterable[Reject]]]) -> pa.Table:
    """The reverse."""
    rows = (
        {"model": model, "part": part, **reject.to_dict()}
        for part, of_part in rejects.items()
        for model, of_model in of_part.items()
        for reject in of_model
    )
    return pa.Table.from_pylist(list(rows), schema=REJECT_SCHEMA)


def _wanted(of_models: Mapping[str, Iterable[Reject]]) -> tuple[Wanted, ...]:
    """The rows that at least one model tries again."""
    rows = {reject.row: reject for rejects in of_models.values() for reject in rejects}
    return tuple(Wanted(row, rows[row].key, rows[row].shard, rows[row].offset) for row in sorted(rows))


def read_standing(output: Output, generation: int = 0) -> pa.Table | None:
    """The rejects that stood when a generation had come to its end, sorted by part, model and row; None before that."""
    data = output.read(of_generation(REJECTS, generation))
    return None if data is None else pq.read_table(pa.BufferReader(data)).cast(REJECT_SCHEMA)


def supersede(standing: pa.Table, retried: pa.Table, again: pa.Table) -> pa.Table:
    """What stands after a retry: without the rejects that it tried, with those that it has again."""
    keys = ["part", "model", "row"]
    kept = standing.join(retried.select(keys), keys, join_type="left anti").select(REJECT_SCHEMA.names)
    return pa.concat_tables([kept, again.cast(REJECT_SCHEMA)]).sort_by([(key, "ascending") for key in keys])


class Standing:
    """One part's footers of one model, oldest first -> the rejects that stand, by row."""

    def __init__(self) -> None:
        self.rejects: dict[int, dict[str, Any]] = {}

    def add(self, footer: Footer) -> list[dict[str, Any]]:
        """Returns what the footer supersedes and does not stand."""
        unknown = []
        for reject in footer.superseded:
            if self.rejects.pop(reject["row"], None) != reject:
                unknown.append(reject)
        self.rejects.update((reject["row"], reject) for reject in footer.rejects)
        return unknown


def encode_rejects(rows: Iterator[dict[str, Any]] | pa.Table) -> bytes:
    """Rows of REJECT_SCHEMA as Parquet, in bounded memory."""
    if isinstance(rows, pa.Table):
        rows = (row for batch in rows.to_batches(max_chunksize=ROWS_AT_ONCE) for row in batch.to_pylist())
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECT_SCHEMA, compression="zstd") as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=REJECT_SCHEMA))
    return bytes(sink.getvalue())


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
