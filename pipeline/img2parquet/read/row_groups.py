"""Read Parquet for the sources: plan pieces from footers, read row ranges in bounded memory, find columns by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.errors import Img2ParquetError, InputError, nearest
from img2parquet.read import PartLimits
from img2parquet.read.page_size_guard import GuardedFile
from img2parquet.read.passthrough import INVALID, Passthrough, to_valid_text
from img2parquet.schema import Piece
from img2parquet.storage import Entry, Store, redact
from img2parquet.storage.parallel import fetch_in_order
from img2parquet.storage.ranged_file import announce
from img2parquet.storage.stand_ins import stand_in

FOOTERS_AT_ONCE = 16
BUFFER_BYTES = 1 << 20
BATCH_BYTES = 32 << 20
MAX_BATCH_ROWS = 1024
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"  # Hive's and Spark's name for the folder of rows without a value
OUT_OF_RANGE = "<value out of range"  # Arrow's text for a time that a calendar does not hold
MOST_ROWS, MOST_BYTES = 1 << 31, 1 << 40  # of one row group; a footer that claims more is damaged
# what pyarrow raises for bytes that are not Parquet; errors of the store are classes of ours and pass through pyarrow
UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning needs to know of a file: its columns, and the rows and bytes of each row group."""

    entry: Entry
    schema: pa.Schema
    groups: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.groups)


@dataclass(frozen=True, slots=True)
class BrokenRows:
    """Rows [first, stop) of a file whose pages could not be read."""

    first: int
    stop: int
    message: str


def read_footers(store: Store, entries: Iterable[Entry]) -> Iterator[Footer]:
    """Yield footers in the order of the entries, reading several at once. Raises InputError for other than Parquet."""
    for _, footer in fetch_in_order(entries, partial(_read_footer, store), FOOTERS_AT_ONCE):
        yield footer


def _read_footer(store: Store, entry: Entry) -> Footer:
    with store.open(entry.uri, expect=entry) as file, _parquet_errors(entry.uri):
        parquet = open_parquet(file, entry.uri)
        # not the sizes of single columns: in a damaged footer they may be missing, and pyarrow then aborts the process
        groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
        claimed = [(group.num_rows, group.total_byte_size) for group in groups]
        for rows, size_bytes in claimed:
            if not (0 <= rows < MOST_ROWS and 0 <= size_bytes < MOST_BYTES):
                raise ValueError(f"a row group claims {rows} rows and {size_bytes} bytes")
        return Footer(entry, parquet.schema_arrow, tuple(claimed))


class GuardedParquet(pq.ParquetFile):  # type: ignore[misc]
    """A Parquet file read in bounded memory: without read-ahead of whole column chunks, and with bounded pages."""

    def __init__(self, file: BinaryIO) -> None:
        self.guard = GuardedFile(file)
        super().__init__(self.guard, pre_buffer=False, buffer_size=BUFFER_BYTES)

    def announce(self, start: int, stop: int, columns: Sequence[str]) -> None:
        """Announce that rows [start, stop) of these columns will be read, so that a remote file can be read ahead."""
        ends = [0, *itertools.accumulate(self.metadata.row_group(i).num_rows for i in range(self.num_row_groups))]
        wanted = [i for i in range(self.num_row_groups) if ends[i] < stop and ends[i + 1] > start]
        with suppress(*UNREADABLE):  # from a damaged footer; reading the group will report it
            chunks = [self.guard.chunks(group) for group in wanted]
            leaves = self._leaves(columns)
            announce(self.guard.file, [[(of[i].start, of[i].stop) for of in chunks if i < len(of)] for i in leaves])

    def _leaves(self, columns: Sequence[str]) -> list[int]:
        """Return the places of the leaf columns that belong to the given columns, or to fields `column.field`."""
        wanted = set(columns)
        paths = [self.schema.column(i).path.split(".") for i in range(len(self.schema))]
        return [i for i, path in enumerate(paths) if not wanted.isdisjoint(map(".".join, _starts(path)))]

    def watch(self, group: int, columns: Sequence[str]) -> int:
        """Check a row group before its columns are read; return the bytes that a dictionary may add to each row."""
        return self.guard.watch(group, self._leaves(columns))


def _starts(path: Sequence[str]) -> Iterator[Sequence[str]]:
    return (path[:length] for length in range(1, len(path) + 1))


def open_parquet(file: BinaryIO, uri: str) -> GuardedParquet:
    """Open a file as Parquet. Raises InputError."""
    with _parquet_errors(uri):
        try:
            return GuardedParquet(file)
        except UNREADABLE:
            file.seek(0)
            if known := stand_in(file.read(64)):
                raise InputError(f"{redact(uri)}: {known[0]}", hint=known[1]) from None
            raise


@contextmanager
def _parquet_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except Img2ParquetError:
        raise
    except UNREADABLE as error:
        raise InputError(
            f"{redact(uri)}: cannot be read as Parquet: {_first_line(error)}",
            hint="the file may be incomplete: upload it again, or remove it from `input.uris`",
        ) from None


def pieces_of(footer: Footer, limits: PartLimits) -> Iterator[Piece]:
    """Yield a piece for each row group, or several of equal length if one is above the limits."""
    entry, first = footer.entry, 0
    for rows, size_bytes in footer.groups:
        count = min(rows, max(-(-rows // limits.rows), -(-size_bytes // limits.size_bytes)))
        cuts = [rows * i // count for i in range(count + 1)] if rows else []
        for start, stop in itertools.pairwise(cuts):
            share = size_bytes * stop // rows - size_bytes * start // rows
            if stop > start:
                yield Piece(entry.uri, share, entry.etag, first + start, first + stop, stop - start)
        first += rows


def read_rows(
    parquet: GuardedParquet, start: int, stop: int, columns: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch] | BrokenRows]:
    """Yield rows [start, stop) of a file as (number of the first row, batch), in bounded memory.

    Damage costs the rest of its row group."""
    first = 0
    parquet.announce(start, stop, columns)
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        low, high = max(start, first), min(stop, first + rows)
        if low < high:
            at = low
            try:
                for batch in _batches(parquet, group, columns, low - first, high - first):
                    yield at, batch
                    at += batch.num_rows
            except Img2ParquetError:
                raise
            except UNREADABLE as error:
                yield BrokenRows(at, high, f"row group {group} cannot be read: {_first_line(error)}")
            else:
                if at < high:
                    yield BrokenRows(at, high, f"row group {group} holds fewer rows than it says")
        first += rows


def _batches(
    parquet: GuardedParquet, group: int, columns: Sequence[str], low: int, high: int
) -> Iterator[pa.RecordBatch]:
    """Yield rows [low, high) of one row group."""
    metadata = parquet.metadata.row_group(group)
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(row_bytes, parquet.watch(group, columns))))
    at = 0
    for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=list(columns), use_threads=False):
        begin, end = max(low - at, 0), min(high - at, batch.num_rows)
        if begin < end:
            yield batch.slice(begin, end - begin)
        at += batch.num_rows
        if at >= high:
            return


def find_column(schema: pa.Schema, name: str, uri: str, setting: str) -> pa.Field:
    """Return the column of that name. Raises InputError, which lists the columns and suggests the nearest name."""
    if schema.names.count(name) != 1:
        problem = "no column" if name not in schema.names else "more than one column"
        hint = nearest(name, schema.names) or f"set `input.{setting}`"
        raise InputError(f"{redact(uri)}: {problem} `{name}`", known=schema.names, hint=hint)
    return schema.field(name)


def kept_fields(kept: Sequence[Passthrough], schema: pa.Schema, uri: str) -> list[pa.Field]:
    """Return the passthrough columns with the type that `keep` names, or else the file's own.

    A column that the file lacks may be a folder of its path: `year=2020/`; its type is text."""
    fields = []
    for column in kept:
        if column.name in hive_columns(schema, uri):
            fields.append(column.field())
            continue
        own = find_column(schema, column.name, uri, "keep")
        fields.append(column.field() if column.type_name else pa.field(column.name, _plain(own.type), nullable=True))
    return fields


def hive_columns(schema: pa.Schema, uri: str) -> dict[str, str | None]:
    """Return the columns that are folders `name=value` of a file's path, without those that the file has itself."""
    folders = [folder.partition("=") for folder in redact(uri).split("/")[:-1]]
    columns = {
        unquote(name): None if value == HIVE_NULL else unquote(value) for name, equals, value in folders if equals
    }
    return {name: value for name, value in columns.items() if name not in schema.names}


def check_same_fields(first: Footer, other: Footer, kept: Sequence[Passthrough]) -> None:
    """Check that two files have the same passthrough types. Raises InputError, which names both files."""
    ours, theirs = (kept_fields(kept, footer.schema, footer.entry.uri) for footer in (first, other))
    for our, their in zip(ours, theirs, strict=True):
        if our.type != their.type:
            raise InputError(
                f"column `{our.name}` is {our.type} in {redact(first.entry.uri)} and {their.type} in "
                f"{redact(other.entry.uri)}",
                hint=f"set the type explicitly, for example `keep: [{our.name}:string]`",
            )


def is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def to_values(column: pa.Array) -> list[Any]:
    """Return the Python values of a column, using the storage of extension types.

    Other writers leave text that is not UTF-8; its invalid bytes become escapes."""
    stored = stored_form(column)
    try:
        values: list[Any] = stored.to_pylist()
    except UnicodeDecodeError:
        if not is_text(stored.type):
            raise
        values = [None if text is None else to_valid_text(text) for text in stored.cast(pa.large_binary()).to_pylist()]
    return values


def to_cells(column: pa.Array) -> list[Any]:
    """Return each value of a column as an array of its own, without going through Python's objects.

    Text that is not UTF-8 gets escapes; any other value that breaks its type's rules is INVALID."""
    stored = stored_form(column)
    try:
        stored.validate(full=True)
    except pa.ArrowInvalid:
        if is_text(stored.type):
            stored = pa.array(to_values(stored), stored.type)
    return [_cell(stored, i) for i in range(len(stored))]


def to_convertible(column: pa.Array) -> list[Any]:
    """Return values for `passthrough.convert`: JSON's own as Python has them, times and decimals as Arrow's text.

    What has neither form is INVALID."""
    stored = stored_form(column)
    if pa.types.is_nested(stored.type) or _is_of_json(stored.type) or is_bytes(stored.type):
        try:
            return to_values(stored)
        except (ValueError, OverflowError):
            return [_value(stored, i) for i in range(len(stored))]
    try:
        texts = stored.cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return [INVALID] * len(stored)
    return [INVALID if (text or "").startswith(OUT_OF_RANGE) else text for text in texts]


def stored_form(column: pa.Array) -> pa.Array:
    """Return a column without what wraps its values: an extension type, a dictionary."""
    stored = column.storage if isinstance(column, pa.ExtensionArray) else column
    return stored.dictionary_decode() if pa.types.is_dictionary(stored.type) else stored


def _cell(stored: pa.Array, i: int) -> Any:
    one = stored.slice(i, 1)
    try:
        one = stored.take(pa.array([i]))  # a copy: a slice would be pickled with all of its column
    except pa.ArrowNotImplementedError:  # views of text and bytes
        one = pa.array(one.to_pylist(), one.type)
    try:
        one.validate(full=True)
        if _has_time(one.type):
            one.to_pylist()
    except (pa.ArrowInvalid, OverflowError):
        return INVALID
    except ValueError:  # nanoseconds that Python's types do not hold; Arrow does
        pass
    return one


def _has_time(kind: pa.DataType) -> bool:
    fields = (kind.field(i) for i in range(kind.num_fields))
    return pa.types.is_temporal(kind) or any(_has_time(field.type) for field in fields)


def _value(stored: pa.Array, i: int) -> Any:
    try:
        return stored[i].as_py()
    except (ValueError, OverflowError):
        return INVALID


def _is_of_json(kind: pa.DataType) -> bool:
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return is_number or is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
