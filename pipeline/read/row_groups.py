"""What the sources that read Parquet share: footers to pieces, a row range to record batches, columns by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import Img2ParquetError, InputError, nearest
from pipeline.read import PartLimits
from pipeline.read.fetch import fetch_in_order
from pipeline.read.keep import Kept, to_valid_text
from pipeline.read.pages import GuardedFile
from pipeline.schema import Piece
from pipeline.storage import Entry, Store, redact
from pipeline.storage.pinned import announce

FOOTERS_AT_ONCE = 16
BUFFER_BYTES = 1 << 20
BATCH_BYTES = 32 << 20
MAX_BATCH_ROWS = 1024
MOST_ROWS, MOST_BYTES = 1 << 31, 1 << 40  # of one row group: beyond, the footer is damaged
# what pyarrow raises for bytes that are not Parquet; a store's errors are ours and pass through it
UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning needs of a file: its columns, and for each row group the rows and bytes of one column."""

    entry: Entry
    schema: pa.Schema
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class BrokenRows:
    """Rows [first, stop) of a file whose pages could not be read."""

    first: int
    stop: int
    message: str


def read_footers(store: Store, entries: Iterable[Entry]) -> Iterator[Footer]:
    """In the entries' order, many at a time. Raises InputError for a file that is no Parquet."""
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
    """Without read-ahead of whole column chunks, and with bounded pages, so that memory is bounded."""

    def __init__(self, file: BinaryIO) -> None:
        self.guard = GuardedFile(file)
        super().__init__(self.guard, pre_buffer=False, buffer_size=BUFFER_BYTES)

    def announce(self, start: int, stop: int, columns: Sequence[str]) -> None:
        """Rows [start, stop) of these columns will be read: a remote file's next blocks are then always under way."""
        ends = [0, *itertools.accumulate(self.metadata.row_group(i).num_rows for i in range(self.num_row_groups))]
        wanted = [i for i in range(self.num_row_groups) if ends[i] < stop and ends[i + 1] > start]
        with suppress(*UNREADABLE):  # of a damaged footer; who reads the group will say so
            chunks = [self.guard.chunks(group) for group in wanted]
            leaves = self._leaves(columns)
            announce(self.guard.file, [[(of[i].start, of[i].stop) for of in chunks if i < len(of)] for i in leaves])

    def _leaves(self, columns: Sequence[str]) -> list[int]:
        leaves = [self.schema.column(i).path.split(".")[0] for i in range(len(self.schema))]
        return [i for i, name in enumerate(leaves) if name in columns]

    def watch(self, group: int, columns: Sequence[str]) -> int:
        """Before a row group's columns are read; the bytes that a dictionary may give each of its rows."""
        return self.guard.watch(group, self._leaves(columns))


def open_parquet(file: BinaryIO, uri: str) -> GuardedParquet:
    """Raises InputError."""
    with _parquet_errors(uri):
        return GuardedParquet(file)


@contextmanager
def _parquet_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except Img2ParquetError:
        raise
    except UNREADABLE as error:
        raise InputError(
            f"{redact(uri)}: cannot be read as Parquet: {_first_line(error)}",
            hint="is the file whole? upload it again, or take it out of `input.uris`",
        ) from None


def pieces_of(footer: Footer, limits: PartLimits) -> Iterator[Piece]:
    """One piece for each row group; several of equal length where one alone is above the limits."""
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
    """Rows [start, stop) of a file as (number of the first row, batch), in bounded memory; what is damaged in a row
    group costs the rest of that group."""
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
    """Rows [low, high) of one row group."""
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
    """Raises InputError that names the columns and the nearest."""
    if schema.names.count(name) != 1:
        problem = "no column" if name not in schema.names else "more than one column"
        hint = nearest(name, schema.names) or f"set `input.{setting}`"
        raise InputError(f"{redact(uri)}: {problem} `{name}`", known=schema.names, hint=hint)
    return schema.field(name)


def kept_fields(kept: Sequence[Kept], schema: pa.Schema, uri: str) -> list[pa.Field]:
    """The passthrough columns: of the named type, or the file's own."""
    fields = []
    for column in kept:
        own = find_column(schema, column.name, uri, "keep")
        fields.append(column.field() if column.type_name else pa.field(column.name, _plain(own.type), nullable=True))
    return fields


def check_same_fields(first: Footer, other: Footer, kept: Sequence[Kept]) -> None:
    """Raises InputError that names both files."""
    ours, theirs = (kept_fields(kept, footer.schema, footer.entry.uri) for footer in (first, other))
    for our, their in zip(ours, theirs, strict=True):
        if our.type != their.type:
            raise InputError(
                f"column `{our.name}` is {our.type} in {redact(first.entry.uri)} and {their.type} in "
                f"{redact(other.entry.uri)}",
                hint=f"say which type is wanted: keep: [{our.name}:string]",
            )


def is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def to_values(column: pa.Array) -> list[Any]:
    """Python values of a column, of what an extension type is stored as. Other writers leave text that is not UTF-8."""
    stored = column.storage if isinstance(column, pa.ExtensionArray) else column
    stored = stored.dictionary_decode() if pa.types.is_dictionary(stored.type) else stored
    try:
        values: list[Any] = stored.to_pylist()
    except UnicodeDecodeError:
        if not is_text(stored.type):
            raise
        values = [None if text is None else to_valid_text(text) for text in stored.cast(pa.large_binary()).to_pylist()]
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
