"""Hold many parts and the names of their files in little memory: a plan of 1e5 parts would take 50 MB as objects.

Parts    parts as Arrow columns, decoded on access
Names    file names of one model, from eight bytes each
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc

from img2parquet.schema import Part, Piece

NEIGHBOURS = 64  # decoded together with the requested part, since the next ones are usually requested soon
PARTS_AT_ONCE = 4096  # decoded at a time: decoding 1e5 parts in one go takes several times the plan's memory

PIECE_TYPE = pa.struct(
    [
        ("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string()),
        ("start", pa.int64()), ("stop", pa.int64()), ("rows", pa.int64()),
    ]
)  # fmt: skip
PIECES_TYPE = pa.list_(PIECE_TYPE)
SCHEMA = pa.schema([pa.field("index", pa.int32(), nullable=False), pa.field("pieces", PIECES_TYPE, nullable=False)])


class Parts(Sequence[Part]):
    """Parts as Arrow columns, decoded on access."""

    def __init__(self, table: pa.Table) -> None:
        """Wrap a table with the columns `index` and `pieces` of `SCHEMA`."""
        self.table = table.select(["index", "pieces"]).replace_schema_metadata(None).combine_chunks()
        self.last: tuple[range, list[Part]] = range(0), []  # the last decoded run, set in one step for threads

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Parts:
        iterator = iter(parts)
        tables = [SCHEMA.empty_table()]
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


def checked(table: pa.Table) -> pa.Table:
    """Check the columns of a stored plan, which are decoded later. Raises ValueError when they are damaged."""
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise ValueError(f"its columns are {', '.join(f'{field.name}: {field.type}' for field in table.schema)}")
    table.validate(full=True)
    pieces = pa.chunked_array([chunk.flatten() for chunk in table["pieces"].chunks], PIECE_TYPE)
    of_each = [pc.struct_field(pieces, name) for name in ("uri", "size_bytes", "etag", "start")]
    if any(column.null_count for column in (*table.columns, pieces, *of_each)):
        raise ValueError("a value is missing")
    return table


def joined(runs: Iterable[Sequence[Part]]) -> Parts:
    """Concatenate parts."""
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


def _pieces(parts: Sequence[Part]) -> pa.ListArray:
    """Encode the pieces of each part column by column, since a job may have 1e5 parts."""
    pieces = [piece for part in parts for piece in part.pieces]
    columns = [pa.array([getattr(piece, field.name) for piece in pieces], field.type) for field in PIECE_TYPE]
    offsets = list(itertools.accumulate((len(part.pieces) for part in parts), initial=0))
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(columns, fields=list(PIECE_TYPE)), PIECES_TYPE
    )


def _parts(batch: pa.RecordBatch) -> Iterator[Part]:
    pieces_of = batch.column("pieces")
    flat = pieces_of.flatten()
    pieces = itertools.starmap(Piece, zip(*(flat.field(field.name).to_pylist() for field in PIECE_TYPE), strict=True))
    counts = pieces_of.value_lengths().to_pylist()
    for index, count in zip(batch.column("index").to_pylist(), counts, strict=True):
        yield Part(index, tuple(itertools.islice(pieces, count)))
