"""Parquet files with image bytes to rows; footers are read when the job is planned, row groups split large files.

* The image column is binary, or Hugging Face's struct of `bytes` and `path`.
* Kept columns have the files' own types, on which all files must agree.
* Rows whose pages are damaged are one reject each, so that rows in equals the plan's count.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.errors import InputError
from pipeline.read import PartLimits
from pipeline.read.fetch import fetch_in_order
from pipeline.read.keep import convert_all, to_valid_text
from pipeline.read.pack import pack
from pipeline.read.row_groups import (
    BrokenRows,
    Footer,
    GuardedParquet,
    check_same_fields,
    find_column,
    is_text,
    kept_fields,
    open_parquet,
    pieces_of,
    read_footers,
    read_rows,
    to_values,
)
from pipeline.read.settings import SourceSettings, entry_of_slice, input_exists, part_fails
from pipeline.schema import Part, Piece, Reason, Reject, Row
from pipeline.storage import Entry, redact


class ParquetRows(SourceSettings):
    """Parquet files that hold the images' bytes."""

    kind: Literal["parquet"] = Field(default="parquet", description="Parquet files that hold the images' bytes")
    image: str = Field(
        default="image", description="The column with the bytes: binary, or a struct of `bytes` and `path`"
    )
    key: str | None = Field(
        default=None,
        description="The column that names a row: text or integer. Required unless the image struct has a `path`",
    )
    keep: tuple[str, ...] = Field(
        default=(),
        description="Columns to carry through, with the files' own type; `name:type` converts to string, int64, "
        "float64 or bool",
    )

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """Row groups packed into parts, cut where one alone is too large. Raises InputError, StorageError."""
        with input_exists():
            parts = pack((piece for footer in self._footers(known) for piece in pieces_of(footer, limits)), limits)
            first = next(parts, None)
            if first is None and known:
                return
            if first is None:
                raise InputError(f"{', '.join(map(redact, self.names))}: the Parquet files hold no rows")
            yield from itertools.chain([first], parts)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Every row of a part, in order. Raises PartFailed."""
        rows: Iterator[int] = itertools.count()
        pieces = list(_to_read(part))
        opened = fetch_in_order([piece for _, piece in pieces], self._open, threads=1, at_most=2)
        for passed_over, piece in pieces:
            rows = itertools.islice(rows, passed_over, None)
            with part_fails(piece.uri):
                for item in self._read_piece(piece, next(opened)[1]):
                    yield from _numbered(item, piece.uri, rows)

    def passthrough(self) -> pa.Schema:
        return self._passthrough

    @cached_property
    def _passthrough(self) -> pa.Schema:
        # kept on the instance and pickled with it: a worker that asks for each batch must not read a footer each time
        if not self.keep:
            return pa.schema([])
        with input_exists():
            footer = next(read_footers(self.store, self.store.expand(self.names[:1])[:1]))
        return pa.schema(kept_fields(self.kept, footer.schema, footer.entry.uri))

    def _entries(self) -> list[Entry]:
        return sorted(self.store.expand(self.names), key=lambda entry: entry.uri)

    def _footers(self, known: Container[Entry]) -> Iterator[Footer]:
        """Of every file that is not known, each checked for the columns and against the first that is, or of all."""
        entries = self._entries()
        new = [entry for entry in entries if entry not in known]
        old = next((entry for entry in entries if entry in known), None) if new else None
        first = None
        for footer in read_footers(self.store, [*([old] if old else []), *new]):
            first = first or footer
            if footer.entry == old:
                continue
            self._check_columns(footer)
            check_same_fields(first, footer, self.kept)
            yield footer

    def _check_columns(self, footer: Footer) -> None:
        schema, uri = footer.schema, footer.entry.uri
        kind = find_column(schema, self.image, uri, "image").type
        if not _is_binary(kind) and not (_has(kind, "bytes") and _is_binary(kind.field("bytes").type)):
            raise InputError(
                f"{redact(uri)}: column `{self.image}` is {kind}; expected binary, or a struct with binary `bytes`",
                hint="a column of URIs is read with `kind: table`" if is_text(kind) else "set `input.image`",
            )
        if self.key is None and not _has(kind, "path"):
            message = f"{redact(uri)}: nothing names the rows: `{self.image}` has no `path`, and `input.key` is not set"
            raise InputError(message, known=schema.names, hint="set `input.key` to a column of unique names")
        if self.key is not None:
            key_type = find_column(schema, self.key, uri, "key").type
            if not is_text(key_type) and not pa.types.is_integer(key_type):
                raise InputError(f"{redact(uri)}: the key column `{self.key}` is {key_type}; expected text or integers")

    def _open(self, piece: Piece) -> GuardedParquet:
        """A piece's file, while the one before it is read. Raises PartFailed, StorageError, InputError."""
        return open_parquet(self.store.open(piece.uri, expect=entry_of_slice(self.store, piece)), piece.uri)

    def _read_piece(self, piece: Piece, parquet: GuardedParquet) -> Iterator[Found | Fault]:
        columns = list(dict.fromkeys([self.image, *([self.key] if self.key else []), *(c.name for c in self.kept)]))
        with parquet.guard.file:
            for item in read_rows(parquet, piece.start, piece.stop or parquet.metadata.num_rows, columns):
                if isinstance(item, BrokenRows):
                    yield from (("shard_damaged", item.message, f"row {row}") for row in range(item.first, item.stop))
                    continue
                first, batch = item
                try:
                    found = list(self._items(first, batch))
                except ValueError as error:  # values that Python cannot hold
                    where = range(first, first + batch.num_rows)
                    found = [("shard_damaged", f"the values cannot be read: {error}", f"row {row}") for row in where]
                yield from found

    def _items(self, first: int, batch: pa.RecordBatch) -> Iterator[Found | Fault]:
        image = batch.column(self.image)
        is_struct = pa.types.is_struct(image.type)
        bytes_ = pc.struct_field(image, "bytes") if is_struct else image
        keys = to_values(batch.column(self.key) if self.key else pc.struct_field(image, "path"))
        kept = {column.name: to_values(batch.column(column.name)) for column in self.kept}
        for i, key in enumerate(keys):
            if key is None or key == "":
                column = self.key or f"{self.image}.path"
                yield "no_key", f"column `{column}` is {'null' if key is None else 'empty'}", f"row {first + i}"
            elif not bytes_[i].is_valid:
                yield "empty", f"column `{self.image}` is null", to_valid_text(str(key))
            else:
                columns, remarks = convert_all(self.kept, {name: values[i] for name, values in kept.items()}, None)
                yield bytes_[i].as_py(), to_valid_text(str(key)), columns, remarks


Found = tuple[bytes, str, Mapping[str, Any], tuple[str, ...]]  # image, key, passthrough, warnings
Fault = tuple[Reason, str, str]  # reason, message, key


def _to_read(part: Part) -> Iterator[tuple[int, Piece]]:
    """Each piece, after so many rows that need not be read; of a part that names its rows, the stretches they span."""
    if part.only is None:
        yield from ((0, piece) for piece in part.pieces)
        return
    first = done = 0
    for piece in part.pieces:
        stop = first + (piece.rows or 0)
        rows = [wanted.row for wanted in part.only if first <= wanted.row < stop]
        if rows:
            start = piece.start + rows[0] - first
            yield rows[0] - done, replace(piece, start=start, stop=start + rows[-1] + 1 - rows[0])
            done = rows[-1] + 1
        first = stop


def _numbered(item: Found | Fault, shard: str, rows: Iterator[int]) -> Iterator[Row | Reject]:
    if len(item) == 3:
        reason, message, key = item
        yield Reject(next(rows), key, shard, "read", reason, message)
    else:
        image, key, columns, remarks = item
        yield Row(next(rows), key, shard, image, columns, warnings=remarks)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _has(kind: pa.DataType, field: str) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index(field) >= 0)
