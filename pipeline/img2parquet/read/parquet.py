"""Read Parquet files that hold image bytes. Planning reads their footers, and splits large files by row groups.

* The image column is binary, or Hugging Face's struct of `bytes` and `path`.
* Where the struct has a path and no bytes, the image is read from that path: a local file, or an object of the store
  that the Parquet file is in.
* A row's key is a column, or the struct's `path`; where neither names it, its number in the file. A path that occurs
  again in its file is followed by the number: `0.png#17`.
* Kept columns have the files' own types, which must be the same in all files. A folder `year=2020` is a column too.
* Each row of a damaged page is a reject, so that the number of rows equals that of the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from img2parquet.errors import InputError
from img2parquet.read import PartLimits
from img2parquet.read.linked_images import LOCAL, LinkedImages, address_of
from img2parquet.read.part_packing import pack
from img2parquet.read.passthrough import convert_all, to_valid_text
from img2parquet.read.row_groups import (
    BrokenRows,
    Footer,
    GuardedParquet,
    check_same_fields,
    find_column,
    hive_columns,
    is_bytes,
    is_text,
    kept_fields,
    open_parquet,
    pieces_of,
    read_footers,
    read_rows,
    stored_form,
    to_cells,
    to_convertible,
    to_values,
)
from img2parquet.read.settings import SourceSettings, entry_of_slice, input_exists, part_fails
from img2parquet.read.uri_lists import Broken
from img2parquet.schema import Part, Piece, Reason, Reject, Row
from img2parquet.storage import Entry, redact
from img2parquet.storage.backend import scheme_of
from img2parquet.storage.parallel import fetch_in_order
from img2parquet.storage.uri_secrets import WEB

ROW_NUMBER = "row_number"
MAX_LINKED_BYTES = 256 << 20
THREADS = 16  # that read linked images


class ParquetRows(SourceSettings):
    """Parquet files that hold the images' bytes."""

    kind: Literal["parquet"] = Field(default="parquet", description="Parquet files that hold the images' bytes")
    image: str = Field(
        default="image", description="The column with the bytes: binary, or a struct of `bytes` and `path`"
    )
    key: str | None = Field(
        default=None,
        description="The column that names a row: text or integer; `row_number` numbers the rows of each file that has "
        "no such column. Required unless the image struct has a `path`",
    )
    keep: tuple[str, ...] = Field(
        default=(),
        description="Columns to carry through, with the files' own type; `name:type` converts to string, int64, "
        "float64 or bool",
    )

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """Pack row groups into parts, splitting those above the limits. Raises InputError, StorageError."""
        with input_exists():
            parts = pack((piece for footer in self._footers(known) for piece in pieces_of(footer, limits)), limits)
            first = next(parts, None)
            if first is None and known:
                return
            if first is None:
                raise InputError(f"{', '.join(map(redact, self.names))}: the Parquet files hold no rows")
            yield from itertools.chain([first], parts)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Yield every row of a part, in order. Raises PartFailed."""
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
        # cached on the instance and pickled with it, so that a worker need not read a footer for each batch
        if not self.keep:
            return pa.schema([])
        with input_exists():
            footer = next(read_footers(self.store, self.store.expand(self.names[:1])[:1]))
        return pa.schema(kept_fields(self.kept, footer.schema, footer.entry.uri))

    def _entries(self) -> list[Entry]:
        return sorted(self.store.expand(self.names), key=lambda entry: entry.uri)

    def _footers(self, known: Container[Entry]) -> Iterator[Footer]:
        """Yield the footer of every file that is not known, after checking its columns.

        Each must have the same types as the first known file, or as the first of all if none is known."""
        entries = self._entries()
        new = [entry for entry in entries if entry not in known]
        old = next((entry for entry in entries if entry in known), None) if new else None
        first = None
        for footer in read_footers(self.store, [*([old] if old else []), *new]):
            first = first or footer
            if footer.entry == old or (not footer.rows and footer.entry != entries[0]):
                continue  # writers give the columns of an empty file any type
            self._check_columns(footer)
            check_same_fields(first, footer, self.kept)
            yield footer

    def _check_columns(self, footer: Footer) -> None:
        schema, uri = footer.schema, footer.entry.uri
        kind = find_column(schema, self.image, uri, "image").type
        if not _may_be_image(kind) and not (_has(kind, "bytes") and _may_be_image(kind.field("bytes").type)):
            hint = "a column of URIs is read with `kind: table`" if is_text(kind) else "set `input.image`"
            if pa.types.is_nested(kind) and not pa.types.is_struct(kind):
                hint = "a row must have one image: unnest the list first (DuckDB: `select unnest(...)`)"
            raise InputError(
                f"{redact(uri)}: column `{self.image}` is {kind}; expected binary, or a struct with binary `bytes`",
                hint=hint,
            )
        if self.key is None and not _has(kind, "path"):
            message = f"{redact(uri)}: the rows have no key: `{self.image}` has no `path`, and `input.key` is not set"
            hint = f"set `input.key` to a column of unique names, or to `{ROW_NUMBER}`"
            raise InputError(message, known=schema.names, hint=hint)
        if self.key is not None and not self._numbers(schema):
            key_type = find_column(schema, self.key, uri, "key").type
            if not is_text(key_type) and not pa.types.is_integer(key_type):
                raise InputError(f"{redact(uri)}: the key column `{self.key}` is {key_type}; expected text or integers")

    def _open(self, piece: Piece) -> GuardedParquet:
        """Open a piece's file, while the one before it is read. Raises PartFailed, StorageError, InputError."""
        return open_parquet(self.store.open(piece.uri, expect=entry_of_slice(self.store, piece)), piece.uri)

    def _numbers(self, schema: pa.Schema) -> bool:
        """Whether the rows of a file are named by their numbers."""
        return self.key == ROW_NUMBER and ROW_NUMBER not in schema.names

    def _read_piece(self, piece: Piece, parquet: GuardedParquet) -> Iterator[Found | Fault]:
        key = [self.key] if self.key and not self._numbers(parquet.schema_arrow) else []
        schema = parquet.schema_arrow
        folders = hive_columns(schema, piece.uri)
        columns = list(dict.fromkeys([self.image, *key, *(c.name for c in self.kept if c.name not in folders)]))
        images = LinkedImages(self.store, MAX_LINKED_BYTES)
        with parquet.guard.file:
            seen = set() if self.key else self._paths_before(parquet, piece.start)
            for item in read_rows(parquet, piece.start, piece.stop or parquet.metadata.num_rows, columns):
                if isinstance(item, BrokenRows):
                    yield from (("shard_damaged", item.message, f"row {row}") for row in range(item.first, item.stop))
                    continue
                first, batch = item
                try:
                    found = list(self._items(first, batch, seen, folders))
                except ValueError as error:  # values that Python cannot hold
                    where = range(first, first + batch.num_rows)
                    found = [("shard_damaged", f"the values cannot be read: {error}", f"row {row}") for row in where]
                if any(isinstance(one, Linked) for one in found):
                    fetch = partial(_fetch, images, piece.uri)
                    yield from (fetched for _, fetched in fetch_in_order(found, fetch, THREADS))
                else:
                    yield from (one for one in found if not isinstance(one, Linked))

    def _paths_before(self, parquet: GuardedParquet, start: int) -> set[str]:
        """Return the paths of the rows before a piece, so that keys do not depend on where a file is cut."""
        seen: set[str] = set()
        for item in read_rows(parquet, 0, start, [f"{self.image}.path"]) if start else ():
            if not isinstance(item, BrokenRows):
                paths = to_values(pc.struct_field(item[1].column(self.image), "path"))
                seen.update(to_valid_text(path) for path in paths if path)
        return seen

    def _items(
        self, first: int, batch: pa.RecordBatch, seen: set[str], folders: Mapping[str, str | None]
    ) -> Iterator[Found | Fault | Linked]:
        image = batch.column(self.image)
        is_struct = pa.types.is_struct(image.type)
        bytes_ = stored_form(pc.struct_field(image, "bytes") if is_struct else image)
        paths = to_values(pc.struct_field(image, "path")) if _has(image.type, "path") else [None] * batch.num_rows
        keys = self._keys(first, batch, seen)
        own = (c for c in self.kept if c.name not in folders)
        kept = {c.name: (to_convertible if c.type_name else to_cells)(batch.column(c.name)) for c in own}
        for i, key in enumerate(keys):
            if not key:
                yield "no_key", f"column `{self.key}` is {'null' if key is None else 'empty'}", f"row {first + i}"
            elif not bytes_[i].is_valid and not paths[i]:
                yield "empty", f"column `{self.image}` is null", key
            else:
                columns, remarks = convert_all(
                    self.kept, {**folders, **{n: values[i] for n, values in kept.items()}}, None
                )
                bytes_of_row = bytes_[i].as_py() if bytes_[i].is_valid else b""
                found: Found = (bytes_of_row, key, columns, remarks)
                yield found if bytes_[i].is_valid else Linked(str(paths[i]), found)

    def _keys(self, first: int, batch: pa.RecordBatch, seen: set[str]) -> list[str | None]:
        """Return the key of each row; null or empty where the key column is. seen: paths of the file so far."""
        if self.key and self.key in batch.schema.names:
            return [None if key is None else to_valid_text(str(key)) for key in to_values(batch.column(self.key))]
        if self.key:
            return [str(first + i) for i in range(batch.num_rows)]
        keys: list[str | None] = []
        for row, path in enumerate(to_values(pc.struct_field(batch.column(self.image), "path")), first):
            name = to_valid_text(path or "")
            keys.append(f"{name}#{row}" if name in seen else name or str(row))
            seen.update([name] if name else [])
        return keys


Found = tuple[bytes, str, Mapping[str, Any], tuple[str, ...]]  # image, key, passthrough, warnings
Fault = tuple[Reason, str, str]  # reason, message, key


@dataclass(frozen=True, slots=True)
class Linked:
    """A row whose image is a file of its own."""

    path: str
    row: Found


def _fetch(images: LinkedImages, parquet_uri: str, item: Found | Fault | Linked) -> Found | Fault:
    """Read the file that a row names, if it has no bytes of its own."""
    if not isinstance(item, Linked):
        return item
    _, key, columns, remarks = item.row
    address = address_of(to_valid_text(item.path), parquet_uri, ())
    if not isinstance(address, Broken) and scheme_of(address) not in {*LOCAL, scheme_of(parquet_uri)} - {*WEB}:
        hint = "embed the bytes in the file, or read the paths with `kind: table`"
        address = Broken("empty", f"the row has a path on another store and no bytes: {hint}")
    image = address if isinstance(address, Broken) else images.fetch(address)
    return (image.reason, image.message, key) if isinstance(image, Broken) else (image, key, columns, remarks)


def _to_read(part: Part) -> Iterator[tuple[int, Piece]]:
    """Yield each piece to read, with the number of rows that are skipped before it.

    If a part names its rows, a piece is cut down to the range that they span."""
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


def _may_be_image(kind: pa.DataType) -> bool:
    """Whether a column may hold images; one without any value has the type null."""
    return is_bytes(kind) or bool(pa.types.is_null(kind))


def _has(kind: pa.DataType, field: str) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index(field) >= 0)
