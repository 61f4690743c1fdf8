"""URIs to parts, fixed once: the plan, its Parquet form, and how large a part may be.

The stored plan is authority: whoever finds one reads it and does not list the input again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, JobError, RunMismatch
from pipeline.job import JobSpec, differences, identity, identity_hash
from pipeline.models import Card
from pipeline.read import PartLimits
from pipeline.schema import Part, Piece, part_id
from pipeline.storage import Entry

PART_BYTES = 64 << 20  # of the widest model's columns: a part is always one plain PUT
MOST_PART_BYTES = 256 << 20  # for parts whose rows nobody could count before reading them
ROW_OVERHEAD_BYTES = 256  # key, shard, sizes and a caption of ordinary length

NEIGHBOURS = 64  # made when one is asked for: the next ones are, soon
PARTS_AT_ONCE = 4096  # decoded: there may be 1e5, and what Python needs for them on the way is several times the plan

PIECE_TYPE = pa.struct(
    [
        ("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string()),
        ("start", pa.int64()), ("stop", pa.int64()), ("rows", pa.int64()),
    ]
)  # fmt: skip
PIECES_TYPE = pa.list_(PIECE_TYPE)
PLAN_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("rows", pa.int64()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("pieces", PIECES_TYPE, nullable=False),
    ]
)


class Parts(Sequence[Part]):
    """Parts as Arrow columns, made into objects when they are asked for: 1e5 of them as objects would be 50 MB."""

    def __init__(self, table: pa.Table) -> None:
        """table: `index` and `pieces` of PLAN_SCHEMA."""
        self.table = table.select(["index", "pieces"]).replace_schema_metadata(None).combine_chunks()
        self.last: tuple[range, list[Part]] = range(0), []  # a run of them that was made; set in one step, for threads

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Parts:
        iterator = iter(parts)
        tables = [PLAN_SCHEMA.empty_table().select(["index", "pieces"])]
        while some := list(itertools.islice(iterator, PARTS_AT_ONCE)):
            index = pa.array([part.index for part in some], pa.int32())
            tables.append(pa.Table.from_arrays([index, _pieces(some)], schema=tables[0].schema))
        return cls(pa.concat_tables(tables))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Part: ...
    @overload
    def __getitem__(self, place: slice) -> Parts: ...
    def __getitem__(self, place: int | slice) -> Part | Parts:
        if isinstance(place, slice):
            return Parts(self.table.take(pa.array(range(*place.indices(len(self))), pa.int64())))
        if not -len(self) <= place < len(self):
            raise IndexError(f"part {place} of {len(self)}")
        place %= len(self)
        made, parts = self.last
        if place not in made:
            made = range(place, min(place + NEIGHBOURS, len(self)))
            parts = [part for batch in self._batches(made.start, len(made)) for part in _parts(batch)]
            self.last = made, parts
        return parts[place - made.start]

    def __iter__(self) -> Iterator[Part]:
        for start in range(0, len(self), PARTS_AT_ONCE):
            for batch in self._batches(start, PARTS_AT_ONCE):
                yield from _parts(batch)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Parts):
            return bool(self.table.equals(other.table))
        return isinstance(other, tuple) and tuple(self) == other

    __hash__ = None  # type: ignore[assignment]

    def _batches(self, start: int, count: int) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = self.table.slice(start, count).to_batches()
        return batches


def joined(runs: Iterable[Sequence[Part]]) -> Parts:
    """One after another."""
    return Parts(pa.concat_tables([(run if isinstance(run, Parts) else Parts.of(run)).table for run in runs]))


class Names(Sequence[str]):
    """File names of one model, from eight bytes each."""

    def __init__(self, model: str, indices: array[int], ids: bytes) -> None:
        self.model, self.indices, self.ids = model, indices, ids

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(len(self))))
        index, start = self.indices[place], 8 * (place % len(self))
        return f"model={self.model}/part-{index:06d}-{self.ids[start : start + 8].hex()}.parquet"


@dataclass(frozen=True)
class Plan:
    """The parts, and for each model's partition what its run identity is made of."""

    parts: Sequence[Part]
    identities: Mapping[str, Mapping[str, Any]]

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {model: identity_hash(what) for model, what in self.identities.items()}

    def identity(self, model: str) -> str:
        return self._hashes[model]

    def file_name(self, model: str, part: Part) -> str:
        """Where a part's rows of one model lie, below the output's folder."""
        return f"model={model}/part-{part.index:06d}-{part.id(self.identity(model))}.parquet"

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """The file names of each model, in the order of the parts. What a part covers is hashed once for all models."""
        indices, ids = array("q"), {model: bytearray() for model in self._hashes}
        for part in self.parts:
            indices.append(part.index)
            covered = part.covers
            for model, hashed in self._hashes.items():
                ids[model] += bytes.fromhex(part_id(hashed, covered))
        return {model: Names(model, indices, bytes(of_model)) for model, of_model in ids.items()}

    @cached_property
    def by_index(self) -> ByIndex:
        return ByIndex(self)

    def files(self) -> Iterator[tuple[str, Part, str]]:
        """(model, part, name) of every file: those of the first part for each model, then those of the next."""
        models = sorted(self.names)
        for part, *names in zip(self.parts, *(self.names[model] for model in models), strict=True):
            yield from ((model, part, name) for model, name in zip(models, names, strict=True))

    def indexed(self) -> Iterator[tuple[str, int, str]]:
        """(model, index of the part, name) of every file in that order, without making the parts."""
        models = sorted(self.names)
        for index, *names in zip(self.indices, *(self.names[model] for model in models), strict=True):
            yield from ((model, index, name) for model, name in zip(models, names, strict=True))

    @property
    def indices(self) -> Iterable[int]:
        if isinstance(self.parts, Parts):
            return (index for batch in self.parts.table.to_batches() for index in batch.column("index").tolist())
        return (part.index for part in self.parts)

    def names_by_part(self) -> Iterator[str]:
        return (name for _, _, name in self.indexed())

    def left(self, there: Container[str]) -> dict[int, tuple[str, ...]]:
        """Models that lack a part, by the part's index; parts that none lacks are not in it."""
        left: dict[int, tuple[str, ...]] = {}
        shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        for model, index, name in self.indexed():
            if name not in there:
                lack = (*left.get(index, ()), model)
                left[index] = shared.setdefault(lack, lack)
        return left

    @property
    def rows(self) -> int | None:
        counts = [part.rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)


class ByIndex(Mapping[int, Part]):
    """A plan's parts by their index: one after the other in a job's plan, with gaps in that of a retry."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.places = None if isinstance(plan.parts, Parts) else {part.index: n for n, part in enumerate(plan.parts)}
        self.first = plan.parts[0].index if plan.parts else 0

    def place(self, index: int) -> int:
        """Where the part stands in the plan. Raises KeyError."""
        place = self.find(index)
        if place is None:
            raise KeyError(index)
        return place

    def find(self, index: int) -> int | None:
        if self.places is not None:
            return self.places.get(index)
        return index - self.first if 0 <= index - self.first < len(self.plan.parts) else None

    def __getitem__(self, index: int) -> Part:
        return self.plan.parts[self.place(index)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.plan.indices)

    def __len__(self) -> int:
        return len(self.plan.parts)


def make_plan(job: JobSpec, cards: Mapping[str, Card], dtype: str) -> Plan:
    """List the input and cut it into parts. Raises InputError, StorageError."""
    parts = cut_input(job, cards)
    if not parts:
        raise InputError("the input holds no images", hint="look at `input.uris` and `input.kind`")
    return Plan(parts, identities(job, cards, dtype))


def cut_input(job: JobSpec, cards: Mapping[str, Card], known: Container[Entry] = (), first_index: int = 0) -> Parts:
    """The parts of files that are not known. Raises InputError, StorageError."""
    limits = PartLimits(rows=rows_per_part(job, cards))
    return Parts.of(Part(index, pieces) for index, pieces in enumerate(job.input.plan(limits, known), first_index))


def identities(job: JobSpec, cards: Mapping[str, Card], dtype: str) -> dict[str, dict[str, Any]]:
    return {model.name: identity(job, model, cards[model.name], dtype, cards.values()) for model in job.models}


def rows_per_part(job: JobSpec, cards: Mapping[str, Card]) -> int:
    """The smaller of the job's number and what fits PART_BYTES of the widest model's columns."""
    return min(job.output.rows_per_part, PART_BYTES // _widest_row_bytes(job, cards))


def most_rows(job: JobSpec, cards: Mapping[str, Card]) -> int:
    """Where a part fails whose rows only reading could count: a shard of very many small images."""
    return max(job.output.rows_per_part, MOST_PART_BYTES // _widest_row_bytes(job, cards))


def _widest_row_bytes(job: JobSpec, cards: Mapping[str, Card]) -> int:
    widest = 0
    for model in job.models:
        row_bytes = ROW_OVERHEAD_BYTES + sum(output.bytes_per_row(cards[model.name]) for output in model.outputs)
        if row_bytes > PART_BYTES:
            raise JobError(
                f"model `{model.name}`: one row of its outputs may take {row_bytes:,} bytes, "
                f"more than a whole part may ({PART_BYTES:,})",
                hint="ask for fewer layers or stages, or for a smaller image_size",
            )
        widest = max(widest, row_bytes)
    return widest


def check_same_run(stored: Plan, ours: Mapping[str, Mapping[str, Any]], uri: str) -> None:
    """Refuse to resume under another identity. Raises RunMismatch that names what differs."""
    if stored.identities.keys() != ours.keys():
        theirs, mine = ", ".join(sorted(stored.identities)), ", ".join(sorted(ours))
        raise RunMismatch(
            f"{uri} belongs to a run of models [{theirs}]; this job has [{mine}]", hint="use another output.uri"
        )
    for name, what in ours.items():
        lines = differences(json.loads(json.dumps(what)), stored.identities[name])
        if lines:
            more = f" (and {len(lines) - 6} more)" if len(lines) > 6 else ""
            raise RunMismatch(
                f"{uri} belongs to another run; for model `{name}` these differ:\n  " + "\n  ".join(lines[:6]) + more,
                hint="use another output.uri, or the job file that started this one",
            )


def encode_plan(plan: Plan, about: Mapping[bytes, str] | None = None) -> bytes:
    """The plan as a Parquet file, the same bytes for the same plan. about: more of the file's metadata."""
    said: dict[bytes | str, bytes | str] = {"img2parquet.identities": json.dumps(plan.identities, sort_keys=True)}
    for name, value in (about or {}).items():
        said[name] = value
    schema = PLAN_SCHEMA.with_metadata(said)
    parts = plan.parts if isinstance(plan.parts, Parts) else Parts.of(plan.parts)
    own = [
        pa.array((part.covers[:16] for part in parts), pa.string()),
        pa.array((part.rows for part in parts), pa.int64()),
        pa.array((part.size_bytes for part in parts), pa.int64()),
    ]
    table = pa.Table.from_arrays([parts.table.column("index"), *own, parts.table.column("pieces")], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _pieces(parts: Sequence[Part]) -> pa.ListArray:
    """The pieces of each part, column by column: a job may have 1e5 parts."""
    pieces = [piece for part in parts for piece in part.pieces]
    columns = [pa.array([getattr(piece, field.name) for piece in pieces], field.type) for field in PIECE_TYPE]
    offsets = list(itertools.accumulate((len(part.pieces) for part in parts), initial=0))
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(columns, fields=list(PIECE_TYPE)), PIECES_TYPE
    )


def decode_plan(data: bytes) -> Plan:
    file = pq.ParquetFile(pa.BufferReader(data))
    identities = json.loads(file.schema_arrow.metadata[b"img2parquet.identities"])
    return Plan(Parts(file.read(["index", "pieces"])), identities)


def _parts(batch: pa.RecordBatch) -> Iterator[Part]:
    pieces_of = batch.column("pieces")
    flat = pieces_of.flatten()
    pieces = itertools.starmap(Piece, zip(*(flat.field(field.name).to_pylist() for field in PIECE_TYPE), strict=True))
    counts = pieces_of.value_lengths().to_pylist()
    for index, count in zip(batch.column("index").to_pylist(), counts, strict=True):
        yield Part(index, tuple(itertools.islice(pieces, count)))


def plan_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
