"""Divide the input into parts, once, and store the plan as Parquet.

The stored plan is authoritative: a driver that finds one reads it, and does not list the input again.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.packed_parts import SCHEMA, Names, Parts, checked
from img2parquet.errors import InputError, JobError, RunMismatch
from img2parquet.job import JobSpec
from img2parquet.models import Card
from img2parquet.read import PartLimits
from img2parquet.run_identity import differences, identity, identity_hash
from img2parquet.schema import Part, part_id
from img2parquet.storage import Entry

PART_BYTES = 64 << 20  # of the widest model's columns, so that a part is always one plain PUT
MOST_PART_BYTES = 256 << 20  # for parts whose rows cannot be counted before reading them
ROW_OVERHEAD_BYTES = 256  # key, shard, sizes and a caption of ordinary length

PLAN_SCHEMA = pa.schema(
    [
        SCHEMA.field("index"),
        pa.field("id", pa.string(), nullable=False),
        pa.field("rows", pa.int64()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        SCHEMA.field("pieces"),
    ]
)


@dataclass(frozen=True)
class Plan:
    """The parts of one generation, and for each model's partition the values that make up its run identity."""

    parts: Sequence[Part]
    identities: Mapping[str, Mapping[str, Any]]
    generation: int = 0  # of the job; retries and extensions are the later ones

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {model: identity_hash(what) for model, what in self.identities.items()}

    def identity(self, model: str) -> str:
        return self._hashes[model]

    def file_name(self, model: str, part: Part) -> str:
        """Return the name of a part's file for one model, relative to the output."""
        return f"model={model}/part-{part.index:06d}-{part.id(self.identity(model))}.parquet"

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """File names by model, in the order of the parts. What a part covers is hashed once for all models."""
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
        """Yield (model, part, name) of every file, by part, then by model."""
        models = sorted(self.names)
        for part, *names in zip(self.parts, *(self.names[model] for model in models), strict=True):
            yield from ((model, part, name) for model, name in zip(models, names, strict=True))

    def indexed(self) -> Iterator[tuple[str, int, str]]:
        """Yield (model, part index, name) of every file in the same order, without decoding the parts."""
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
        """Return the models that lack a part, by part index; complete parts are left out. there: names of files."""
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
    """Parts of a plan by index; the indices of a job's plan are contiguous, those of a retry have gaps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.places = None if isinstance(plan.parts, Parts) else {part.index: n for n, part in enumerate(plan.parts)}
        self.first = plan.parts[0].index if plan.parts else 0

    def place(self, index: int) -> int:
        """Return the position of a part in the plan. Raises KeyError."""
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


def make_plan(job: JobSpec, cards: Mapping[str, Card], dtype: str, parts: Parts | None = None) -> Plan:
    """List the input and divide it into parts. Raises InputError, StorageError.

    parts: those of `cut_whole_input`, where the caller has them already. They are cut again if the models' columns are
    too wide for them."""
    if parts is None or rows_per_part(job, cards) < job.output.rows_per_part:
        parts = cut_whole_input(job, rows_per_part(job, cards))
    return Plan(parts, identities(job, cards, dtype))


def cut_whole_input(job: JobSpec, rows: int) -> Parts:
    """Divide the input into parts of at most so many rows. Raises InputError when there is none, StorageError."""
    parts = cut_input(job, rows)
    if not parts:
        raise InputError("the input has no images", hint="check `input.uris` and `input.kind`")
    return parts


def cut_input(job: JobSpec, rows: int, known: Container[Entry] = (), first_index: int = 0) -> Parts:
    """Divide the files that are not `known` into parts of at most so many rows. Raises InputError, StorageError."""
    limits = PartLimits(rows=rows)
    return Parts.of(Part(index, pieces) for index, pieces in enumerate(job.input.plan(limits, known), first_index))


def identities(job: JobSpec, cards: Mapping[str, Card], dtype: str) -> dict[str, dict[str, Any]]:
    return {model.name: identity(job, model, cards[model.name], dtype, cards.values()) for model in job.models}


def rows_per_part(job: JobSpec, cards: Mapping[str, Card]) -> int:
    """Return the job's `rows_per_part`, or fewer where PART_BYTES of the widest model's columns hold fewer."""
    return min(job.output.rows_per_part, PART_BYTES // _widest_row_bytes(job, cards))


def most_rows(job: JobSpec, cards: Mapping[str, Card]) -> int:
    """Return the row count above which a part fails; needed where only reading can count the rows of a shard."""
    return max(job.output.rows_per_part, MOST_PART_BYTES // _widest_row_bytes(job, cards))


def _widest_row_bytes(job: JobSpec, cards: Mapping[str, Card]) -> int:
    widest = 0
    for model in job.models:
        row_bytes = ROW_OVERHEAD_BYTES + sum(output.bytes_per_row(cards[model.name]) for output in model.outputs)
        if row_bytes > PART_BYTES:
            raise JobError(
                f"model `{model.name}`: one row of its outputs may take {row_bytes:,} bytes, "
                f"but a whole part at most {PART_BYTES:,}",
                hint="request fewer layers or stages, or a smaller image_size",
            )
        widest = max(widest, row_bytes)
    return widest


def check_same_run(stored: Plan, ours: Mapping[str, Mapping[str, Any]], uri: str) -> None:
    """Refuse to resume under another identity. Raises RunMismatch that lists the differences."""
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
    """Encode a plan as Parquet; equal plans give equal bytes. about: further metadata of the file."""
    metadata: dict[bytes | str, bytes | str] = {"img2parquet.identities": json.dumps(plan.identities, sort_keys=True)}
    for name, value in (about or {}).items():
        metadata[name] = value
    schema = PLAN_SCHEMA.with_metadata(metadata)
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


def decode_plan(data: bytes) -> Plan:
    """Decode a stored plan. Damaged bytes raise one of several errors; use it inside `damage.reading_record`."""
    file = pq.ParquetFile(pa.BufferReader(data))
    identities = json.loads(file.schema_arrow.metadata[b"img2parquet.identities"])
    return Plan(Parts(checked(file.read(["index", "pieces"]))), identities)


def plan_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
