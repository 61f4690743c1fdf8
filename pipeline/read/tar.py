"""Bytes of a tar to its members, and to the stretches that could not be read.

Python's `tarfile` silently drops what follows a damaged header. This reader is strict and forgiving at once:
* each header's checksum is verified, members must end inside the file, and nothing may follow the end marker;
* what breaks a rule is one `Damage` that says where and how many bytes; reading goes on at the next valid header;
* a body that holds an aligned header of another member belongs to a header with a wrong size;
* ustar, old GNU, pax (`x`, `g`) and base-256 sizes are understood; nothing is ever written to a disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.read.byte_source import ByteSource
from pipeline.read.keep import to_valid_text

BLOCK = 512
WINDOW_BYTES = 1 << 20
MAX_EXTENDED_BYTES = 1 << 20  # a name longer than this is an attack or damage
MAGIC, MAGIC_AT = b"ustar", 257
BODILESS = b"123456"  # links, devices, folders, pipes: their size field is not the length of a body
USED_RECORDS = {"path", "size", "GNU.sparse.name", "broken"}
COMPRESSIONS = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. `body` is None for what was not wanted, is too large or has none; `offset` is its first header's."""

    name: str
    kind: Literal["file", "link", "sparse", "other"]
    size_bytes: int
    offset: int
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch that could not be read as members; `name` where a header still told it."""

    offset: int
    size_bytes: int
    message: str
    name: str = ""


class Header(NamedTuple):
    name: bytes
    size_bytes: int
    type: bytes


class Archive:
    """Iterates over the members and damages of one tar, or of a slice that begins at a header.

    `wanted` says whose bodies to keep; with `bodies=False` all are passed over, for a walk over headers only.
    `has_end_marker` is known at the end; a file that is whole but for its marker is no damage."""

    def __init__(
        self, source: ByteSource, wanted: Callable[[str, int], bool], max_body_bytes: int, bodies: bool = True
    ) -> None:
        self.source, self.wanted, self.max_body_bytes, self.bodies = source, wanted, max_body_bytes, bodies
        self.global_records: dict[str, bytes] = {}
        self.has_end_marker = False

    def __iter__(self) -> Iterator[Member | Damage]:
        if self.source.size_bytes == 0:
            yield Damage(0, 0, "the file has no bytes")
            return
        while True:
            item = self._next()
            if item is None:
                break
            yield item
        if self.source.fault:
            yield Damage(self.source.position, 0, self.source.fault)

    def _next(self) -> Member | Damage | None:
        """A member with the extended headers before it, a damage, or None at the end."""
        start = self.source.position
        records: dict[str, bytes] = {}
        while True:
            block = self.source.take(BLOCK)
            if not block.strip(b"\0"):
                return self._zeros(start, block)
            header = parse_header(block)
            if header is None:
                return self._resync(start, block[1:], self._complaint(start, block))
            if header.type in b"xgXLK":
                fault = self._read_extended(header, records)
                if fault:
                    return self._resync(start, b"", fault)
                continue
            if header.type == b"S":
                self._skip_sparse_map(block)
            return self._read_member(start, header, {**self.global_records, **records})

    def _read_extended(self, header: Header, records: dict[str, bytes]) -> str:
        """Adds what an extended header says of the next member to `records`; returns what is wrong with it."""
        if header.size_bytes > MAX_EXTENDED_BYTES:
            return f"an extended header claims {header.size_bytes} bytes"
        body = self.source.take(header.size_bytes)
        if len(body) < header.size_bytes:
            self.source.unread(body)
            return "the file ends inside an extended header"
        self.source.skip(-header.size_bytes % BLOCK)
        if header.type in b"LK":
            records["path" if header.type == b"L" else "linkpath"] = body.split(b"\0", 1)[0]
        else:
            target = self.global_records if header.type == b"g" else records
            target.update(_used(parse_records(body)))
        return ""

    def _read_member(self, start: int, header: Header, records: Mapping[str, bytes]) -> Member | Damage:
        name = to_valid_text(records.get("GNU.sparse.name") or records.get("path") or header.name)
        size_bytes = _decimal(records["size"]) if "size" in records else header.size_bytes
        if size_bytes is None or "broken" in records:
            message = f"the extended header of `{name}` is damaged, so its name and size are not known"
            return self._resync(start, b"", message, name)
        size_bytes = 0 if header.type in BODILESS else size_bytes
        source = self.source
        if source.size_bytes is not None and size_bytes > source.size_bytes - source.position:
            left = source.size_bytes - source.position
            return self._resync(start, b"", f"member `{name}` claims {size_bytes} bytes where {left} are left", name)
        return self._read_body(start, name, _kind(header, records, name), size_bytes)

    def _read_body(
        self, start: int, name: str, kind: Literal["file", "link", "sparse", "other"], size_bytes: int
    ) -> Member | Damage:
        body = None
        if self.bodies and kind == "file" and size_bytes <= self.max_body_bytes and self.wanted(name, size_bytes):
            body = self.source.take(size_bytes)
            found = len(body)
            inner = find_header(body, aligned=True)
            if found < size_bytes or inner is not None:
                self.source.unread(body)
                why = (
                    "the file ends inside it" if inner is None else "another member begins inside it: its size is wrong"
                )
                return self._resync(start, b"", f"member `{name}` claims {size_bytes} bytes: {why}", name)
        else:
            found = self.source.skip(size_bytes)
            if found < size_bytes:
                message = f"member `{name}` claims {size_bytes} bytes: the file ends inside it"
                return self._damage(start, message, name)
        self.source.skip(-size_bytes % BLOCK)
        return Member(name, kind, size_bytes, start, body)

    def _zeros(self, start: int, block: bytes) -> Damage | None:
        """The end marker and what may follow it: zeros to the end of the file. Anything else is damage."""
        blocks = 0
        while block and not block.strip(b"\0"):
            blocks, block = blocks + 1, self.source.take(BLOCK)
        if not block:
            self.has_end_marker = blocks >= 2
            return None
        self.source.unread(block)
        if parse_header(block) is not None:
            return self._damage(start, "zeros where a header belongs (or the end of one of several joined archives)")
        return self._resync(start, b"", "bytes that are no header follow zeros or the end-of-archive marker")

    def _resync(self, start: int, unread: bytes, message: str, name: str = "") -> Damage:
        """Pass over everything up to the next valid header; `unread` is looked at again."""
        self.source.unread(unread)
        while True:
            window = self.source.take(WINDOW_BYTES)
            at = find_header(window)
            if at is not None:
                self.source.unread(window[at:])
            elif len(window) == WINDOW_BYTES:
                self.source.unread(window[1 - BLOCK :])
                continue
            return self._damage(start, message, name)

    def _damage(self, start: int, message: str, name: str = "") -> Damage:
        fault, self.source.fault = self.source.fault, ""
        return Damage(start, self.source.position - start, f"{message}; {fault}" if fault else message, name)

    def _complaint(self, start: int, block: bytes) -> str:
        if len(block) < BLOCK:
            return "the file ends inside a header"
        if start > 0:
            return "a header's checksum does not match"
        compression = next((name for magic, name in COMPRESSIONS.items() if block.startswith(magic)), "")
        what = (
            f"it is compressed with {compression}; make it .tar or .tar.gz"
            if compression
            else f"it begins with {block[:16]!r}"
        )
        return f"this is no tar: {what}"

    def _skip_sparse_map(self, block: bytes) -> None:
        """Old GNU sparse files: the map goes on in blocks without a checksum, each saying whether one more follows."""
        more = block[482]
        while more:
            block = self.source.take(BLOCK)
            more = len(block) == BLOCK and block[504]


def parse_header(block: bytes) -> Header | None:
    """A header whose checksum and numbers are right, or None."""
    if len(block) < BLOCK:
        return None
    claimed, size_bytes = parse_number(block[148:156]), parse_number(block[124:136])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if claimed is None or size_bytes is None or (claimed != unsigned and claimed != _signed(block, unsigned)):
        return None
    name, prefix = block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
    if prefix and block[MAGIC_AT : MAGIC_AT + 6] == b"ustar\0":
        name = prefix + b"/" + name
    return Header(name, size_bytes, block[156:157])


def _signed(block: bytes, unsigned: int) -> int:
    """The sum as some old writers made it, over signed bytes."""
    return unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def parse_number(field: bytes) -> int | None:
    """Octal text, or base-256 where the first bit is set; None for what is neither or negative."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def parse_records(body: bytes) -> dict[str, bytes]:
    """A pax header's `length key=value` records; with the key `broken` when one of them is not that."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(body) and body[at] != 0:
        length = re.match(rb"([0-9]{1,9}) ", body[at : at + 10])
        end = at + int(length[1]) if length else 0
        record = body[at + length.end() : end - 1] if length else b""
        key, equals, value = record.partition(b"=")
        if end > len(body) or not equals or body[end - 1 : end] != b"\n":
            return {**records, "broken": b""}
        records[to_valid_text(key)] = value
        at = end
    return records


def _used(records: Mapping[str, bytes]) -> dict[str, bytes]:
    """What is read of them: a shard may hold any number of others, and global ones are kept to its end."""
    sparse = {"GNU.sparse.": b""} if any(key.startswith("GNU.sparse.") for key in records) else {}
    return {**{key: value for key, value in records.items() if key in USED_RECORDS}, **sparse}


def find_header(data: bytes, aligned: bool = False) -> int | None:
    """Where the first valid ustar header in `data` begins; `aligned`: of those at whole blocks."""
    return next((at for at in _magic(data, aligned) if parse_header(data[at : at + BLOCK]) is not None), None)


def _magic(data: bytes, aligned: bool) -> Iterator[int]:
    """Where a header would have to begin, by the word in it. Every body is looked through, so of aligned ones one byte
    a block is read."""
    if not aligned:
        yield from (match.start() - MAGIC_AT for match in re.finditer(MAGIC, data) if match.start() >= MAGIC_AT)
        return
    marks = data[MAGIC_AT::BLOCK]
    block = marks.find(MAGIC[:1])
    while block >= 0:
        if data.startswith(MAGIC, block * BLOCK + MAGIC_AT):
            yield block * BLOCK
        block = marks.find(MAGIC[:1], block + 1)


def _kind(header: Header, records: Mapping[str, bytes], name: str) -> Literal["file", "link", "sparse", "other"]:
    if header.type == b"S" or any(key.startswith("GNU.sparse.") for key in records):
        return "sparse"
    if header.type in b"12":
        return "link"
    return "file" if header.type in (b"0", b"\0", b"7") and not name.endswith("/") else "other"


def _decimal(text: bytes) -> int | None:
    return int(text) if re.fullmatch(rb"[0-9]{1,18}", text) else None
