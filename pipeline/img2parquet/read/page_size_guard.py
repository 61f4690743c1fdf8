"""Wrap a Parquet file so that reading raises before a page unpacks to far more than its size.

pyarrow allocates a whole page as its header says, up to 2 GiB for a few kB, and allocates a dictionary's value again
for each row that refers to it. Headers are checked in the bytes that pyarrow reads, so little is read twice. The footer
is parsed here once more, because pyarrow's own description of a column in a damaged one aborts the process.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

FREE_BYTES = 64 << 20  # any page may unpack to this
MAX_RATIO = 64  # above it, to so many times its own bytes: zstd reaches 30 for a flat BMP, and 30,000 for zeros
MAX_PAGE_BYTES = 1 << 30  # a thousand images of 1 MB, which is pyarrow's default page
HEADER_BYTES = 64 << 10
MAX_HEADER_BYTES = 16 << 20  # pyarrow's limit; statistics hold whole values
DICTIONARY_PAGE = 2
AT_NO_PAGE = 1 << 62


class OversizedPage(ValueError):
    """A page that may not be unpacked, or whose header is too large."""


class NoPage(ValueError):
    """A struct that lacks the fields of a page header. pyarrow stops there too: some writers pad their chunks."""


class GuardedFile(io.RawIOBase):
    """Read `file`, raising OversizedPage when a read reaches the header of a page that may not be unpacked."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.groups: list[list[Chunk]] | None = None
        self.pages: dict[int, int] = {}  # position of the next page header of each chunk: end of the chunk

    def watch(self, group: int, columns: Collection[int]) -> int:
        """Check the pages of a row group from now on. Return the bytes of the largest dictionary of these columns.

        Raises OversizedPage for a dictionary, ValueError for a footer without that group."""
        chunks = self.chunks(group)
        self.pages = {chunk.start: chunk.stop for chunk in chunks}
        firsts = (self._page_at(chunks[i].start) for i in columns if i < len(chunks))
        return max((page.unpacked for page in firsts if page.kind == DICTIONARY_PAGE), default=0)

    def chunks(self, group: int) -> list[Chunk]:
        """Return the chunk of every column of a row group. Raises ValueError for a footer without that group."""
        if self.groups is None:
            self.groups = _chunks(self.file)
        if group >= len(self.groups):
            raise ValueError(f"the footer holds no row group {group}")
        return self.groups[group]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        start = self.file.tell()
        data = self.file.read(size)
        stop = start + len(data)
        for at, end in list(self.pages.items()):
            if at < stop and start < end:
                del self.pages[at]
                at = self._check_until(at, min(stop, end), start, data)
                self.pages[at] = end
        self.file.seek(stop)
        return data

    def _check_until(self, at: int, stop: int, start: int, data: bytes) -> int:
        """Check every page whose header starts before `stop`, and return where the next one starts."""
        while at < stop:
            try:
                page = self._page_at(at, data[at - start : at - start + HEADER_BYTES] if at >= start else b"")
            except NoPage:
                return AT_NO_PAGE
            at += page.header + page.packed
        return at

    def _page_at(self, at: int, data: bytes = b"") -> Page:
        while True:
            page = _page(data)
            if page is not None:
                _check(at, page)
                return page
            if len(data) >= MAX_HEADER_BYTES:
                raise OversizedPage(f"the page header at byte {at} has no end")
            self.file.seek(at)
            more = self.file.read(max(HEADER_BYTES, 2 * len(data)))
            if len(more) <= len(data):
                raise ValueError(f"the file ends in the page header at byte {at}")
            data = more


def _check(at: int, page: Page) -> None:
    if page.unpacked < 0 or page.packed < 0:
        raise OversizedPage(f"the page at byte {at} claims {page.unpacked} bytes, packed in {page.packed}")
    most = min(MAX_PAGE_BYTES, max(FREE_BYTES, MAX_RATIO * page.packed))
    if page.unpacked > most:
        raise OversizedPage(
            f"the page at byte {at} unpacks from {page.packed} bytes to {page.unpacked}, more than {most}: write the "
            "file again with smaller pages (pyarrow: write_batch_size=16)"
        )


# --- Thrift's compact protocol ---------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A page header: its own length, and the size of the page unpacked and packed."""

    header: int
    kind: int
    unpacked: int
    packed: int


class Chunk(NamedTuple):
    """The byte range of one column of one row group."""

    start: int
    stop: int


BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
MAX_DEPTH = 16
Fields = dict[int, Any]
Wanted = Mapping[int, "Wanted"]


def _page(data: bytes) -> Page | None:
    """Parse a PageHeader: 1 type, 2 uncompressed_page_size, 3 compressed_page_size. None if the data ends inside it."""
    reader = _Compact(data)
    try:
        fields = reader.struct({1: {}, 2: {}, 3: {}})
    except IndexError:
        return None
    kind, unpacked, packed = (fields.get(i) for i in (1, 2, 3))
    if not (isinstance(kind, int) and isinstance(unpacked, int) and isinstance(packed, int)):
        raise NoPage("a page header does not say how large its page is")
    return Page(reader.at, kind, unpacked, packed)


# FileMetaData.row_groups.columns.meta_data: 7 total_compressed_size, 9 data_page_offset, 11 dictionary_page_offset
_PLACES: Wanted = {4: {1: {3: {7: {}, 9: {}, 11: {}}}}}


def _chunks(file: BinaryIO) -> list[list[Chunk]]:
    """Return the chunks of each row group. Raises ValueError for a footer that does not say where its columns are."""
    stop = file.seek(0, io.SEEK_END) - 8
    file.seek(max(0, stop))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, stop - length))
    try:
        footer = _Compact(file.read(length)).struct(_PLACES)
    except IndexError:
        raise ValueError("the footer is cut short") from None
    return [[_chunk(column) for column in _structs(group, 1)] for group in _structs(footer, 4)]


def _chunk(column: Fields) -> Chunk:
    where = column.get(3)
    size, data, dictionary = (where.get(i) if isinstance(where, dict) else None for i in (7, 9, 11))
    if not (isinstance(size, int) and isinstance(data, int)) or size < 0 or data < 0:
        raise ValueError("the footer does not say where a column lies")
    # the same rule as pyarrow's
    start = dictionary if isinstance(dictionary, int) and 0 < dictionary < data else data
    return Chunk(start, start + size)


def _structs(fields: Fields, number: int) -> Sequence[Fields]:
    found = fields.get(number)
    return found if isinstance(found, list) else []


class _Compact:
    """Parse a struct. Raises IndexError at the end of the data, ValueError for malformed data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, wanted: Wanted, depth: int = 0) -> Fields:
        """Return the wanted fields: integers, structs and lists of structs, which hold wanted fields in turn."""
        found: Fields = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else _zigzag(self._varint())
            value = self._value(byte & 15, wanted.get(number, {}), depth)
            if number in wanted and value is not None:
                found[number] = value
        return found

    def _value(self, kind: int, wanted: Wanted, depth: int) -> int | Fields | list[Fields] | None:
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if kind in INTEGERS:
            return _zigzag(self._varint())
        if kind == STRUCT:
            return self.struct(wanted, depth + 1)
        if kind in LISTS:
            return self._list(wanted, depth)
        if kind in (BYTE, DOUBLE, BINARY):
            self._skip({BYTE: 1, DOUBLE: 8}.get(kind) or self._varint())
        elif kind not in BOOLEANS:  # neither headers nor footers have maps
            raise ValueError(f"it holds a field of type {kind}")
        return None

    def _list(self, wanted: Wanted, depth: int) -> list[Fields]:
        byte = self._byte()
        count, kind = byte >> 4, byte & 15
        count = self._varint() if count == 15 else count
        if kind in BOOLEANS:
            self._skip(count)
            return []
        values = [self._value(kind, wanted, depth + 1) for _ in range(count)]
        return [value for value in values if isinstance(value, dict)] if wanted else []

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError(self.at)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("it holds a number of more than 64 bits")


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
