"""URIs to parts, fixed once: the plan, its Parquet form, and how large a part may be.

The stored plan is authority: whoever finds one reads it and does not list the input again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, JobError, RunMismatch
from pipeline.job import JobSpec, differences, identity, identity_hash
from pipeline.models import Card
from pipeline.read import PartLimits
from pipeline.schema import Part, Piece, part_id

PART_BYTES = 64 << 20  # of the widest model's columns: a part is always one plain PUT
MOST_PART_BYTES = 256 << 20  # for parts whose rows nobody could count before reading them
ROW_OVERHEAD_BYTES = 256  # key, shard, sizes and a caption of ordinary length

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


@dataclass(frozen=True)
class Plan:
    """The parts, and for each model's partition what its run identity is made of."""

    parts: tuple[Part, ...]
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
    def names(self) -> dict[str, tuple[str, ...]]:
        """The file names of each model, in the order of the parts. What a part covers is hashed once for all models."""
        covers = [part.covers for part in self.parts]
        return {
            model: tuple(
                f"model={model}/part-{part.index:06d}-{part_id(identity, covered)}.parquet"
                for part, covered in zip(self.parts, covers, strict=True)
            )
            for model, identity in self._hashes.items()
        }

    def files(self) -> Iterator[tuple[str, Part, str]]:
        """(model, part, name) of every file: those of the first part for each model, then those of the next."""
        models = sorted(self.names)
        for part, *names in zip(self.parts, *(self.names[model] for model in models), strict=True):
            yield from ((model, part, name) for model, name in zip(models, names, strict=True))

    def names_by_part(self) -> Iterator[str]:
        return (name for _, _, name in self.files())

    def left(self, there: Container[str]) -> dict[int, tuple[str, ...]]:
        """Models that lack a part, by the part's index; parts that none lacks are not in it."""
        left: dict[int, tuple[str, ...]] = {}
        for model, part, name in self.files():
            if name not in there:
                left[part.index] = (*left.get(part.index, ()), model)
        return left

    @property
    def rows(self) -> int | None:
        counts = [part.rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)


def make_plan(job: JobSpec, cards: Mapping[str, Card], dtype: str) -> Plan:
    """List the input and cut it into parts. Raises InputError, StorageError."""
    limits = PartLimits(rows=rows_per_part(job, cards))
    parts = tuple(Part(index, pieces) for index, pieces in enumerate(job.input.plan(limits)))
    if not parts:
        raise InputError("the input holds no images", hint="look at `input.uris` and `input.kind`")
    return Plan(parts, identities(job, cards, dtype))


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


def encode_plan(plan: Plan) -> bytes:
    """The plan as a Parquet file, the same bytes for the same plan."""
    parts = plan.parts
    columns = [
        [part.index for part in parts],
        [part.covers[:16] for part in parts],
        [part.rows for part in parts],
        [part.size_bytes for part in parts],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, PLAN_SCHEMA, strict=False)]
    schema = PLAN_SCHEMA.with_metadata({"img2parquet.identities": json.dumps(plan.identities, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([*arrays, _pieces(parts)], schema=schema), sink, compression="zstd")
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
    batches = file.iter_batches(PARTS_AT_ONCE, columns=["index", "pieces"])
    return Plan(tuple(part for batch in batches for part in _parts(batch)), identities)


def _parts(batch: pa.RecordBatch) -> Iterator[Part]:
    pieces_of = batch.column("pieces")
    flat = pieces_of.flatten()
    pieces = itertools.starmap(Piece, zip(*(flat.field(field.name).to_pylist() for field in PIECE_TYPE), strict=True))
    counts = pieces_of.value_lengths().to_pylist()
    for index, count in zip(batch.column("index").to_pylist(), counts, strict=True):
        yield Part(index, tuple(itertools.islice(pieces, count)))


def plan_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
