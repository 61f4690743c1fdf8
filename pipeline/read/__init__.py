"""Shards to rows: one file per input format, one line each in `SOURCES`.

A source is a frozen settings model (the job's `input:`) with three methods; it is pickled to workers, so it holds
settings only. Row numbers count everything that a part yields, faults included, from 0 without gaps: they are what
batches are cut by, so they must not depend on anything but the part.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from pipeline.schema import Part, Piece, Reject, Row
from pipeline.storage import Entry

SOURCES = {
    "webdataset": ("pipeline.read.webdataset", "WebDataset"),
    "folder": ("pipeline.read.folder", "Folder"),
    "parquet": ("pipeline.read.parquet", "ParquetRows"),
    "table": ("pipeline.read.table", "Table"),
}


@dataclass(frozen=True)
class PartLimits:
    """How much one part may hold: rows (of the widest model's result) and bytes of input."""

    rows: int = 16_384
    size_bytes: int = 1 << 30


class Source(Protocol):
    """What every input format offers. `kind` and the fields are what a job file says under `input:`."""

    @property
    def kind(self) -> str: ...

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """The parts, as the pieces that each covers, in an order that depends on the input alone. Files that are
        `known` are left out, and need not be opened; there may be no others then.

        Raises InputError for missing or empty input, StorageError when the store does not answer."""

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Every row of a part, in order. A fault inside the data is a Reject; an input that changed since the plan,
        or a store that gave up, raises PartFailed or StorageError. Rows that `part.only` does not name may be left
        out, and should be where that spares reading them; the others keep their numbers."""

    def passthrough(self) -> pa.Schema:
        """Names and types of the columns that `keep` asks for, the same for every part."""


def read_part(source: Source, part: Part) -> Iterator[Row | Reject]:
    """A part's rows with a key that it already had turned into rejects."""
    seen: set[str] = set()
    for item in _wanted(source, part):
        if isinstance(item, Row) and item.key in seen:
            message = f"key `{item.key}` appears twice in this part; the first row was kept"
            yield Reject(item.row, item.key, item.shard, "read", "duplicate_key", message, item.offset)
            continue
        if isinstance(item, Row):
            seen.add(item.key)
        yield item


def _wanted(source: Source, part: Part) -> Iterator[Row | Reject]:
    """A part's rows, or those alone that it names."""
    left, wanted = part.rows if part.only is not None else None, part.wanted_rows
    if left == 0:
        return
    for item in source.read(part):
        if left is None:
            yield item
        elif item.row in wanted:
            yield item
            left -= 1
            if not left:
                return
