"""Parse lists of URIs: find their columns, cut them into pieces, and read the records of a piece.

* CSV is read with Python's own parser, not pyarrow's: it knows where in the file a record ends, even if a quoted cell
  holds line breaks, and a line with the wrong number of cells costs one row and not the file.
* Cells may be separated otherwise than the list's format says; the header tells.
* Lists are UTF-8. Bytes of a line that are not become escapes, with a warning in the log.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa

from img2parquet.errors import InputError, nearest
from img2parquet.read import PartLimits
from img2parquet.read.gzip_stream import MAGIC as GZIP_MAGIC
from img2parquet.read.passthrough import Passthrough
from img2parquet.read.row_groups import (
    BrokenRows,
    find_column,
    hive_columns,
    is_text,
    kept_fields,
    open_parquet,
    pieces_of,
    read_footers,
    read_rows,
    to_cells,
    to_convertible,
    to_values,
)
from img2parquet.read.settings import IMAGE_EXTENSIONS, entry_of_slice
from img2parquet.schema import Piece, Reason
from img2parquet.storage import Entry, Store, name_of, redact
from img2parquet.storage.backend import scheme_of
from img2parquet.storage.stand_ins import stand_in

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 << 20
HEADER_CHUNK_BYTES = 64 << 10
HEADER_LINES = 100
DELIMITERS = ",;\t|"
SEP_LINE = re.compile(r'"?sep=(.)"?\s*')  # which Excel writes above the header
NOT_UTF8 = (
    "%s: the line at byte %d is not UTF-8, and its bytes become escapes such as \\xe9; if the list is in another "
    "encoding, convert it: iconv -f LATIN1 -t UTF-8 LIST > NEW"
)
NO_TEXT = {  # start of a file -> what it is, and what to try
    GZIP_MAGIC: ("compressed with gzip", "unpack it: gzip -d"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -d"),
    b"BZh": ("compressed with bzip2", "unpack it: bzip2 -d"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it: xz -d"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save the sheet as CSV"),
    b"PAR1": ("Parquet", "set `input.format: parquet`"),
    codecs.BOM_UTF16_LE: ("in UTF-16", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 LIST > NEW"),
    codecs.BOM_UTF16_BE: ("in UTF-16", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 LIST > NEW"),
}


@dataclass(frozen=True, slots=True)
class Broken:
    """The reason why a record, or the object that it names, cannot be used."""

    reason: Reason
    message: str


Values = Mapping[str, Any]


class List(Protocol):
    """A format of lists."""

    def fields(self, store: Store, entry: Entry, kept: Sequence[Passthrough]) -> list[pa.Field]:
        """Return the passthrough columns. Raises InputError for a column that does not exist."""

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        """Yield pieces of at most `limits.rows` records. Raises InputError if unreadable or lacking a column."""

    def read(
        self, store: Store, piece: Piece, needed: Sequence[str], kept: Sequence[Passthrough] = ()
    ) -> Iterator[tuple[str, Values | Broken]]:
        """Yield each record of a piece with its position, and at least the needed and the kept columns.

        Kept columns of a Parquet list are as `row_groups.to_cells` and `to_convertible` give them."""


@dataclass(frozen=True)
class CsvList:
    """A header and records. All values are text, and an empty cell is a missing value.

    A quote that opens a cell and does not close it is text: its line is a record of its own, so that one quote never
    takes other records with it."""

    delimiter: str

    def fields(self, store: Store, entry: Entry, kept: Sequence[Passthrough]) -> list[pa.Field]:
        return [column.field() for column in kept]

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        form, header, start = self._opened(store, entry, needed)
        _check_names(header, needed, entry.uri)
        lines = Lines(store.stream(entry.uri, start, expect=entry), start, entry.uri)
        records = form._records(lines, len(header), header.index(needed[0]))
        yield from _runs(entry, lines, records, limits)

    def read(
        self, store: Store, piece: Piece, needed: Sequence[str], kept: Sequence[Passthrough] = ()
    ) -> Iterator[tuple[str, Values | Broken]]:
        entry = entry_of_slice(store, piece, piece.stop)
        form, header, first = self._opened(store, entry, [*needed, *(column.name for column in kept)])
        where = max(first, piece.start)  # a piece that is the whole list begins with the header
        lines = Lines(store.stream(piece.uri, where, piece.stop, expect=entry), where, piece.uri)
        for cells in form._records(lines, len(header), header.index(needed[0])):
            if isinstance(cells, Broken):
                yield f"byte {where}", cells
            elif len(cells) != len(header):
                message = f"the record has {len(cells)} cells, the header {len(header)}"
                yield f"byte {where}", Broken("shard_damaged", message)
            else:
                yield f"byte {where}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
            where = lines.position

    def _opened(self, store: Store, entry: Entry, needed: Sequence[str]) -> tuple[CsvList, list[str], int]:
        """Return the format with the delimiter that gives the needed columns (or its own, where none does), the names
        of the columns, and the byte at which the records start."""
        forms = (self, *(replace(self, delimiter=delimiter) for delimiter in DELIMITERS))
        opened = (form._header(store, entry) for form in forms)
        return next((found for found in opened if set(needed) <= set(found[1])), None) or self._header(store, entry)

    def _header(self, store: Store, entry: Entry) -> tuple[CsvList, list[str], int]:
        lines = Lines(store.stream(entry.uri, expect=entry, chunk_bytes=HEADER_CHUNK_BYTES), 0, entry.uri)
        first = next(lines, "")
        form, separator = self, SEP_LINE.fullmatch(first)
        if separator:
            form = replace(self, delimiter=separator[1])
        else:
            lines.put_back([(first, lines.position)])
        header = next(form._records(lines), None)
        if header is None:
            raise InputError(f"{redact(entry.uri)}: the list is empty", hint="its first line must name the columns")
        if isinstance(header, Broken):
            raise InputError(
                f"{redact(entry.uri)}: the first line: {header.message}",
                hint="if the list has another format, set `input.format`",
            )
        return form, [name.strip() for name in header], lines.position

    def _records(self, lines: Lines, width: int = 0, uri_at: int = 0) -> Iterator[list[str] | Broken]:
        """Yield the cells of each record. width: of the header; uri_at: the place of the URI among the cells."""
        while True:
            record = _RecordLines(lines)
            try:
                cells = next(csv.reader(record, delimiter=self.delimiter, strict=True), None)
                is_record = len(record.taken) < 2 or not self._holds_records(record.taken, width, uri_at)
            except csv.Error:
                is_record = False
            if not is_record:
                lines.put_back(record.taken[1:])
                yield self._cells_of_line(record.taken[0][0])
            elif cells is None:
                return
            elif cells:
                yield cells

    def _holds_records(self, taken: Sequence[tuple[str, int]], width: int, uri_at: int) -> bool:
        """Tell a cell with line breaks from records between two quotes that do not belong together.

        It is the latter if a line inside is a record by itself, with a URI of the kind that the first line has."""
        kinds = []
        for line, _ in taken:
            cells = self._cells_of_line(line)
            kinds.append(("", "") if isinstance(cells, Broken) or len(cells) != width else _kind_of_uri(cells[uri_at]))
        return any(kinds[0]) and kinds[0] in kinds[1:]

    def _cells_of_line(self, line: str) -> list[str] | Broken:
        """Split one line whose quotes are text, except a pair around a whole cell."""
        try:
            tidy = re.sub(rf'" +(?={re.escape(self.delimiter)}|[\r\n]*$)', '"', line)
            if tidy != line and _is_strict(tidy, self.delimiter):  # nothing but blanks behind closing quotes
                return next(csv.reader([line], delimiter=self.delimiter))
            cells = next(csv.reader([line], delimiter=self.delimiter, quoting=csv.QUOTE_NONE))
        except csv.Error as error:
            return Broken("shard_damaged", f"the line cannot be split into cells: {error}")
        return [_unquoted(cell) for cell in cells]


class LineList:
    """A list of one record a line. Blank lines are passed over."""

    def fields(self, store: Store, entry: Entry, kept: Sequence[Passthrough]) -> list[pa.Field]:
        return [column.field() for column in kept]

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        _check_names(self._names(store, entry, needed), needed, entry.uri)
        lines = Lines(store.stream(entry.uri, expect=entry), 0, entry.uri)
        yield from _runs(entry, lines, (line for line in lines if line.strip()), limits)

    def read(
        self, store: Store, piece: Piece, needed: Sequence[str], kept: Sequence[Passthrough] = ()
    ) -> Iterator[tuple[str, Values | Broken]]:
        entry = entry_of_slice(store, piece, piece.stop)
        lines = Lines(store.stream(piece.uri, piece.start, piece.stop, expect=entry), piece.start, piece.uri)
        where = piece.start
        for line in lines:
            if line.strip():
                yield f"byte {where}", self._parse(line, needed[0])
            where = lines.position

    def _names(self, store: Store, entry: Entry, needed: Sequence[str]) -> Sequence[str]:
        raise NotImplementedError

    def _parse(self, line: str, uri: str) -> Values | Broken:
        raise NotImplementedError


class JsonList(LineList):
    """One JSON object a line; a name that an object lacks is a missing value."""

    def _names(self, store: Store, entry: Entry, needed: Sequence[str]) -> Sequence[str]:
        """Return the names in the first lines, and the needed ones wherever they are: objects may leave names out."""
        names: dict[str, None] = {}
        fault = ""
        lines = Lines(store.stream(entry.uri, expect=entry), 0, entry.uri)
        for number, line in enumerate(lines):
            if number == 0 and line.lstrip().startswith("["):
                hint = "jq -c '.[]' LIST > NEW.jsonl"
                raise InputError(f"{redact(entry.uri)}: a JSON array, not one object a line", hint=hint)
            values = _parse_object(line) if line.strip() else {}
            if isinstance(values, Broken):
                fault = fault or values.message
            else:
                names.update(dict.fromkeys(values if number < HEADER_LINES else values.keys() & set(needed)))
            if names.keys() >= set(needed):
                break
        if fault and not names:
            hint = "write each object into a line of its own: jq -c . LIST > NEW.jsonl"
            raise InputError(f"{redact(entry.uri)}: no line is a JSON object; the first: {fault}", hint=hint)
        return list(names)

    def _parse(self, line: str, uri: str) -> Values | Broken:
        return _parse_object(line)


class TextList(LineList):
    """One URI a line, without a header."""

    def _names(self, store: Store, entry: Entry, needed: Sequence[str]) -> Sequence[str]:
        return needed[:1]

    def _parse(self, line: str, uri: str) -> Values | Broken:
        return {uri: line.strip()}


@dataclass(frozen=True)
class ParquetList:
    """A Parquet file, whose columns have types of their own."""

    def fields(self, store: Store, entry: Entry, kept: Sequence[Passthrough]) -> list[pa.Field]:
        footer = next(read_footers(store, [entry]))
        return kept_fields(kept, footer.schema, entry.uri)

    def pieces(self, store: Store, entry: Entry, needed: Sequence[str], limits: PartLimits) -> Iterator[Piece]:
        footer = next(read_footers(store, [entry]))
        kind = find_column(footer.schema, needed[0], entry.uri, "uri").type
        for name in needed[1:]:
            if name not in hive_columns(footer.schema, entry.uri):
                find_column(footer.schema, name, entry.uri, "key")
        if not is_text(kind):
            raise InputError(f"{redact(entry.uri)}: column `{needed[0]}` is {kind}; expected text")
        yield from pieces_of(footer, limits)

    def read(
        self, store: Store, piece: Piece, needed: Sequence[str], kept: Sequence[Passthrough] = ()
    ) -> Iterator[tuple[str, Values | Broken]]:
        with store.open(piece.uri, expect=entry_of_slice(store, piece)) as file:
            parquet = open_parquet(file, piece.uri)
            forms = {column.name: to_convertible if column.type_name else to_cells for column in kept}
            forms |= dict.fromkeys(needed, to_values)
            folders = hive_columns(parquet.schema_arrow, piece.uri)
            names = [name for name in forms if name not in folders]
            for item in read_rows(parquet, piece.start, piece.stop or parquet.metadata.num_rows, names):
                if isinstance(item, BrokenRows):
                    for row in range(item.first, item.stop):
                        yield f"row {row}", Broken("shard_damaged", item.message)
                    continue
                first, batch = item
                columns = [forms[name](batch.column(name)) for name in names]
                for row, cells in enumerate(zip(*columns, strict=True), first):
                    yield f"row {row}", folders | dict(zip(names, cells, strict=True))


class Lines:
    """Iterate over text lines with their line ends; `position` is where the last one ends in the file.

    Raises InputError for a line that is too long, and for a file that is no text in UTF-8."""

    def __init__(self, chunks: Iterator[bytes], position: int, uri: str) -> None:
        self.chunks, self.position, self.uri = chunks, position, uri
        self.lines = self._split()
        self.returned: list[tuple[str, int]] = []  # put back, last first
        self.not_utf8_at: int | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, size_bytes = self.returned.pop() if self.returned else self._next()
        self.position += size_bytes
        return line

    def put_back(self, lines: Sequence[tuple[str, int]]) -> None:
        """Put back the lines that were taken last, each with its bytes in the file."""
        self.returned.extend(reversed(lines))
        self.position -= sum(size_bytes for _, size_bytes in lines)

    def _next(self) -> tuple[str, int]:
        line = next(self.lines)
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode("utf-8", "backslashreplace")
            self.not_utf8_at = self.position if self.not_utf8_at is None else self.not_utf8_at
        return (text.removeprefix("\ufeff") if self.position == 0 else text), len(line)

    def _split(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self.chunks:
            if self.position == 0 and not rest:
                _check_is_text(chunk, self.uri)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if len(rest) > MAX_LINE_BYTES:
                raise InputError(
                    f"{redact(self.uri)}: a line of more than {MAX_LINE_BYTES} bytes, at byte {self.position}",
                    hint="is this a list of URIs? set `input.format`",
                )
        if rest:
            yield rest


class _RecordLines:
    """Pass the lines of one record on; `taken` has each with its bytes in the file."""

    def __init__(self, lines: Lines) -> None:
        self.lines, self.taken = lines, list[tuple[str, int]]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        start = self.lines.position
        line = next(self.lines)
        self.taken.append((line, self.lines.position - start))
        return line


def _check_is_text(start: bytes, uri: str) -> None:
    """Raise InputError for a list that is no lines of UTF-8, or a stand-in for the real one."""
    known = stand_in(start)
    if known:
        raise InputError(f"{redact(uri)}: {known[0]}", hint=known[1])
    for mark, (what, hint) in NO_TEXT.items():
        if start.startswith(mark):
            raise InputError(f"{redact(uri)}: the list is {what}", hint=hint)
    if b"\0" in start[:4]:
        hint = "save it as UTF-8: iconv -f UTF-16 -t UTF-8 LIST > NEW"
        raise InputError(f"{redact(uri)}: the list is in UTF-16 (or no text at all)", hint=hint)
    if b"\r" in start.strip() and b"\n" not in start:
        hint = "save it with other line ends: tr '\\r' '\\n' < LIST > NEW"
        raise InputError(f"{redact(uri)}: the list's lines end in a carriage return alone", hint=hint)


def _kind_of_uri(text: str) -> tuple[str, str]:
    """Return the scheme and the extension of a URI, each empty where it has none."""
    scheme, name = scheme_of(text.strip()), re.split(r"[?#]", text.strip(), maxsplit=1)[0].rpartition("/")[2]
    stem, _, extension = name.rpartition(".")
    return scheme, extension.lower() if stem and re.fullmatch(r"\w{1,5}", extension) else ""


def _is_location(text: str) -> bool:
    scheme, extension = _kind_of_uri(text)
    return bool(scheme) or extension in IMAGE_EXTENSIONS


def _is_strict(line: str, delimiter: str) -> bool:
    try:
        next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def _unquoted(cell: str) -> str:
    match = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', cell)
    return match[1].replace('""', '"') if match else cell


def _runs(entry: Entry, lines: Lines, records: Iterator[object], limits: PartLimits) -> Iterator[Piece]:
    """Yield pieces of at most `limits.rows` of the records that the lines are."""
    rows, start = 0, lines.position
    stop = start
    for _ in records:
        rows, stop = rows + 1, lines.position
        if rows == limits.rows:
            yield Piece(entry.uri, stop - start, entry.etag, start, stop, rows)
            start, rows = stop, 0
    if rows:
        yield Piece(entry.uri, stop - start, entry.etag, start, stop, rows)
    if lines.not_utf8_at is not None:
        log.warning(NOT_UTF8, redact(entry.uri), lines.not_utf8_at)


def _parse_object(line: str) -> Values | Broken:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Broken("shard_damaged", f"the line is not JSON: {error}")
    if not isinstance(values, dict):
        return Broken("shard_damaged", "the line is JSON, but no object")
    return values


def _check_names(names: Sequence[str], needed: Sequence[str], uri: str) -> None:
    for name in needed:
        if names.count(name) != 1:
            shown = [name_of(known)[:60] for known in names[:30]]
            hint = "the first line looks like data: add a line above it that names the columns"
            if names.count(name) > 1:
                hint = "give each column a name of its own"
            elif not any(map(_is_location, names)):
                hint = nearest(name, names)
            problem = "more than one column" if name in names else "no column"
            raise InputError(f"{redact(uri)}: the list has {problem} `{name}`", known=shown, hint=hint)
