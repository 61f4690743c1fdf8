"""Parse a tar into its members and the ranges that could not be read.

Python's `tarfile` silently drops what follows a damaged header. This reader is strict and forgiving at once:

* Each header's checksum is verified, members must end inside the file, and nothing may follow the end marker.
* A range that breaks a rule is one `Damage` with its position and size; reading continues at the next valid header.
* A body that contains an aligned header of another member means that its own header has a wrong size.
* ustar, old GNU, pax (`x`, `g`) and base-256 sizes are supported. Nothing is ever written to disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from img2parquet.read.byte_source import ByteSource
from img2parquet.read.passthrough import to_valid_text
from img2parquet.storage.stand_ins import stand_in

BLOCK = 512
WINDOW_BYTES = 1 << 20
START_BYTES = 32
MAX_EXTENDED_BYTES = 1 << 20  # a name longer than this is an attack or damage
MAGIC, MAGIC_AT = b"ustar", 257
BODILESS = b"123456"  # links, devices, folders, pipes: their size field does not announce a body
USED_RECORDS = {"path", "size", "GNU.sparse.name", "broken"}
COMPRESSIONS = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. `body` is None if it is not wanted, too large or absent; `offset` is that of the first header."""

    name: str
    kind: Literal["file", "link", "sparse", "other"]
    size_bytes: int
    offset: int
    body: bytes | None = None
    start: bytes = b""  # of the body, where the name has no extension to tell what it is


@dataclass(frozen=True, slots=True)
class Damage:
    """A range that could not be parsed into members; `name` if a header still gave it."""

    offset: int
    size_bytes: int
    message: str
    name: str = ""


class Header(NamedTuple):
    name: bytes
    size_bytes: int
    type: bytes


class Archive:
    """Iterate over the members and damages of one tar, or of a slice that starts at a header.

    `wanted` decides by name, size and start which bodies to keep; with `bodies=False` all are skipped, for a walk over
    headers only. The start of a body is read where the name has no extension, and is empty elsewhere.
    `has_end_marker` is known at the end; a missing marker alone is not damage."""

    def __init__(
        self, source: ByteSource, wanted: Callable[[str, int, bytes], bool], max_body_bytes: int, bodies: bool = True
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
        """Return a member, with the extended headers before it applied, a damage, or None at the end."""
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
        """Add the records of an extended header about the next member to `records`; return what is wrong with it."""
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
        body, start_of_body = None, b""
        if kind == "file" and has_no_extension(name):
            start_of_body = self.source.take(min(size_bytes, START_BYTES))
            self.source.unread(start_of_body)
        may_keep = self.bodies and kind == "file" and size_bytes <= self.max_body_bytes
        if may_keep and self.wanted(name, size_bytes, start_of_body):
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
        return Member(name, kind, size_bytes, start, body, start_of_body)

    def _zeros(self, start: int, block: bytes) -> Damage | None:
        """Read the end marker, which only zeros may follow. Anything else is damage."""
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
        """Skip to the next valid header; the bytes in `unread` are searched again."""
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
            known = stand_in(block) if start == 0 else None
            return f"this is no tar, but {known[0]}: {known[1]}" if known else "the file ends inside a header"
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
        """Skip the map of an old GNU sparse file: blocks without checksum that each say whether another one follows."""
        more = block[482]
        while more:
            block = self.source.take(BLOCK)
            more = len(block) == BLOCK and block[504]


def has_no_extension(name: str) -> bool:
    """Whether a member is neither hidden nor has an extension: `a/4f1c2d`, but not `a/.x` or `a/x.jpg`."""
    stem, _, suffix = name.rpartition("/")[2].partition(".")
    return bool(stem) and not suffix


def parse_header(block: bytes) -> Header | None:
    """Parse a header; None if its checksum or numbers are wrong."""
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
    """Return the checksum over signed bytes, as some old writers computed it."""
    return unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def parse_number(field: bytes) -> int | None:
    """Parse octal text, or base-256 if the first bit is set; None for anything else and for negative numbers."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def parse_records(body: bytes) -> dict[str, bytes]:
    """Parse the `length key=value` records of a pax header; the key `broken` is added if one is malformed."""
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
    """Keep only the records that are used: a shard may hold any number, and global ones are kept to its end."""
    sparse = {"GNU.sparse.": b""} if any(key.startswith("GNU.sparse.") for key in records) else {}
    return {**{key: value for key, value in records.items() if key in USED_RECORDS}, **sparse}


def find_header(data: bytes, aligned: bool = False) -> int | None:
    """Return where the first valid ustar header in `data` starts; if `aligned`, only at multiples of a block."""
    return next((at for at in _magic(data, aligned) if parse_header(data[at : at + BLOCK]) is not None), None)


def _magic(data: bytes, aligned: bool) -> Iterator[int]:
    """Yield where a header may start, found by its magic word.

    Every body is searched for aligned headers, so only one byte a block is read for them."""
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
