"""Lists of URIs in a file: their columns, pieces of so many records, and the records of a piece.

CSV is read with Python's own parser, not pyarrow's: it tells where in the file a record ends, also when a quoted cell
holds line breaks, and a line that does not fit costs one row and not the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from pipeline.errors import InputError, nearest
from pipeline.read import PartLimits
from pipeline.read.keep import Kept
from pipeline.read.row_groups import (
    BrokenRows,
    find_column,
    is_text,
    kept_fields,
    open_parquet,
    pieces_of,
    read_footers,
    read_rows,
    to_values,
)
from pipeline.read.settings import entry_of_slice
from pipeline.schema import Piece, Reason
from pipeline.storage import Entry, Store, redact

MAX_LINE_BYTES = 16 << 20
HEADER_CHUNK_BYTES = 64 << 10
LOOK_AT_LINES = 100


@dataclass(frozen=True, slots=True)
class Broken:
    """A record, or what it names, that cannot be used."""

    reason: Reason
    message: str


Values = Mapping[str, Any]


class List(Protocol):
    """What each format offers."""

    def fields(self, store: Store, entry: Entry, kept: Sequence[Kept]) -> list[pa.Field]:
        """The passthrough columns. Raises InputError for a column that is not there."""

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        """Runs of at most `limits.rows` records. Raises InputError for a list that cannot be read or lacks a column."""

    def read(self, store: Store, piece: Piece, needed: Sequence[str]) -> Iterator[tuple[str, Values | Broken]]:
        """Each record of a piece, with where it lies; at least the needed columns."""


@dataclass(frozen=True)
class CsvList:
    """A header, then records; everything is text, and an empty cell is missing."""

    delimiter: str

    def fields(self, store: Store, entry: Entry, kept: Sequence[Kept]) -> list[pa.Field]:
        return [column.field() for column in kept]

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        header, start = self._header(store, entry)
        _check_names(header, needed, entry.uri)
        lines = Lines(store.stream(entry.uri, start, expect=entry), start, entry.uri)
        yield from _runs(entry, start, (lines.position for _ in self._records(lines)), limits)

    def read(self, store: Store, piece: Piece, needed: Sequence[str]) -> Iterator[tuple[str, Values | Broken]]:
        entry = entry_of_slice(store, piece, piece.stop)
        header, _ = self._header(store, entry)
        lines = Lines(store.stream(piece.uri, piece.start, piece.stop, expect=entry), piece.start, piece.uri)
        where = piece.start
        for cells in self._records(lines):
            if len(cells) != len(header):
                message = f"the record has {len(cells)} cells, the header {len(header)}"
                yield f"byte {where}", Broken("shard_damaged", message)
            else:
                yield f"byte {where}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
            where = lines.position

    def _header(self, store: Store, entry: Entry) -> tuple[list[str], int]:
        """The names of the columns, and where the records begin."""
        lines = Lines(store.stream(entry.uri, expect=entry, chunk_bytes=HEADER_CHUNK_BYTES), 0, entry.uri)
        header = next(self._records(lines), None)
        if header is None:
            raise InputError(f"{redact(entry.uri)}: the list is empty", hint="its first line must name the columns")
        return [name.removeprefix("\ufeff").strip() for name in header], lines.position

    def _records(self, lines: Lines) -> Iterator[list[str]]:
        try:
            for cells in csv.reader(lines, delimiter=self.delimiter):
                if cells:
                    yield cells
        except csv.Error as error:
            raise InputError(
                f"{redact(lines.uri)}: not CSV at byte {lines.position}: {error}",
                hint="is a quote left open, or is it another format? set `input.format`",
            ) from None


@dataclass(frozen=True)
class JsonList:
    """One JSON object to a line; a name that an object lacks is missing there."""

    def fields(self, store: Store, entry: Entry, kept: Sequence[Kept]) -> list[pa.Field]:
        return [column.field() for column in kept]

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        _check_names(self._names(store, entry, needed), needed, entry.uri)
        lines = Lines(store.stream(entry.uri, expect=entry), 0, entry.uri)
        yield from _runs(entry, 0, (lines.position for line in lines if line.strip()), limits)

    def read(self, store: Store, piece: Piece, needed: Sequence[str]) -> Iterator[tuple[str, Values | Broken]]:
        entry = entry_of_slice(store, piece, piece.stop)
        lines = Lines(store.stream(piece.uri, piece.start, piece.stop, expect=entry), piece.start, piece.uri)
        where = piece.start
        for line in lines:
            if line.strip():
                yield f"byte {where}", _parse_object(line)
            where = lines.position

    def _names(self, store: Store, entry: Entry, needed: Sequence[str]) -> list[str]:
        """The names in the first lines; objects need not all have the same."""
        names: dict[str, None] = {}
        lines = Lines(store.stream(entry.uri, expect=entry), 0, entry.uri)
        for number, line in enumerate(lines):
            values = _parse_object(line) if line.strip() else {}
            names.update(dict.fromkeys(values if isinstance(values, Mapping) else ()))
            if number >= LOOK_AT_LINES or names.keys() >= set(needed):
                break
        return list(names)


@dataclass(frozen=True)
class ParquetList:
    """Columns with their own types."""

    def fields(self, store: Store, entry: Entry, kept: Sequence[Kept]) -> list[pa.Field]:
        footer = next(read_footers(store, [entry]))
        return kept_fields(kept, footer.schema, entry.uri)

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        footer = next(read_footers(store, [entry]))
        for name in needed:
            find_column(footer.schema, name, entry.uri, "uri" if name == needed[0] else "key")
        kind = footer.schema.field(needed[0]).type
        if not is_text(kind):
            raise InputError(f"{redact(entry.uri)}: column `{needed[0]}` is {kind}; expected text")
        yield from pieces_of(footer, limits)

    def read(self, store: Store, piece: Piece, needed: Sequence[str]) -> Iterator[tuple[str, Values | Broken]]:
        with store.open(piece.uri, expect=entry_of_slice(store, piece)) as file:
            parquet = open_parquet(file, piece.uri)
            names = list(dict.fromkeys(needed))
            for item in read_rows(parquet, piece.start, piece.stop or parquet.metadata.num_rows, names):
                if isinstance(item, BrokenRows):
                    for row in range(item.first, item.stop):
                        yield f"row {row}", Broken("shard_damaged", item.message)
                    continue
                first, batch = item
                columns = [to_values(batch.column(name)) for name in names]
                for row, cells in enumerate(zip(*columns, strict=True), first):
                    yield f"row {row}", dict(zip(names, cells, strict=True))


class Lines:
    """Text lines with their ends, and in `position` where the last one handed out ends in the file."""

    def __init__(self, chunks: Iterator[bytes], position: int, uri: str) -> None:
        self.chunks, self.position, self.uri = chunks, position, uri
        self.lines = self._split()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.position += len(line)
        return line.decode("utf-8", "backslashreplace")

    def _split(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if len(rest) > MAX_LINE_BYTES:
                raise InputError(
                    f"{redact(self.uri)}: a line of more than {MAX_LINE_BYTES} bytes, at byte {self.position}",
                    hint="is this a list of URIs? set `input.format`",
                )
        if rest:
            yield rest


def _runs(entry: Entry, start: int, ends: Iterator[int], limits: PartLimits) -> Iterator[Piece]:
    """Pieces of at most `limits.rows` records, from where each record ends."""
    rows, stop = 0, start
    for stop in ends:
        rows += 1
        if rows == limits.rows:
            yield Piece(entry.uri, stop - start, entry.etag, start, stop, rows)
            start, rows = stop, 0
    if rows:
        yield Piece(entry.uri, stop - start, entry.etag, start, stop, rows)


def _parse_object(line: str) -> Values | Broken:
    try:
        values = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return Broken("shard_damaged", f"the line is not JSON: {error}")
    if not isinstance(values, dict):
        return Broken("shard_damaged", "the line is JSON, but no object")
    return values


def _check_names(names: Sequence[str], needed: Sequence[str], uri: str) -> None:
    for name in needed:
        if name not in names:
            shown = [known[:60] for known in names[:30]]
            raise InputError(f"{redact(uri)}: the list has no column `{name}`", known=shown, hint=nearest(name, names))
