"""URIs to parts, fixed once: the plan, its Parquet form, and how large a part may be.

The stored plan is authority: whoever finds one reads it and does not list the input again.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, JobError, RunMismatch, StorageError
from pipeline.job import JobSpec, differences, identity, identity_hash
from pipeline.models import Card
from pipeline.packed import SCHEMA, Names, Parts, checked
from pipeline.read import PartLimits
from pipeline.schema import Part, part_id
from pipeline.storage import Entry

PART_BYTES = 64 << 20  # of the widest model's columns: a part is always one plain PUT
MOST_PART_BYTES = 256 << 20  # for parts whose rows nobody could count before reading them
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


def decode_plan(data: bytes) -> Plan:
    """Raises one of several errors where the bytes are damaged: see `readable`."""
    file = pq.ParquetFile(pa.BufferReader(data))
    identities = json.loads(file.schema_arrow.metadata[b"img2parquet.identities"])
    return Plan(Parts(checked(file.read(["index", "pieces"]))), identities)


@contextmanager
def readable(uri: str) -> Iterator[None]:
    """Whatever decoding stumbles over in the damaged plan at `uri` is a StorageError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0] or "its pages are damaged"
        raise StorageError(f"{uri}: cannot be read: {what}", hint="put back the file that the run wrote") from None


def plan_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
