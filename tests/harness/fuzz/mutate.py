"""Bytes -> broken bytes, the same for the same generator: blindly, and by the pieces that a format is made of.

What is changed by pieces keeps its lengths and checksums right half of the time: a parser that stops at a wrong
checksum is not tested behind it.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

EXTREMES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
LENGTHS = (1, 2, 4, 8, 16, 64, 100, 512, 700, 4096)
MOST_BYTES = 1 << 20  # what doubling may make


def mutated(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One to four changes. `others` are what a piece may be spliced in from."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        by_pieces = pieces_of(data)
        if by_pieces and rng.random() < 0.45:
            data = _change_pieces(*by_pieces, rng)
        else:
            data = rng.choice(BLIND)(data or b"\0", rng, others)
        data = data[:MOST_BYTES]
    return data


# --- blindly ---------------------------------------------------------------------------------------------------------


def _place(data: bytes, rng: random.Random) -> int:
    """Half of the time near the beginning, where headers are."""
    return rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data))


def _flip(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at, length = _place(data, rng), rng.choice(LENGTHS)
    patch = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return (data[:at] + patch + data[at + length :])[: len(data)]


def _extreme(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A number of 1 to 8 bytes, in either order, where a header may have one."""
    at, width = _place(data, rng), rng.choice((1, 2, 4, 4, 8))
    value = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
    return (data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :])[: len(data)]


def _cut(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def _drop(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice(LENGTHS) :]


def _insert(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice(LENGTHS)) + data[at:]


def _double(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at, length = _place(data, rng), rng.choice((*LENGTHS, 40_000))
    return data[:at] + data[at : at + length] * rng.choice((2, 2, 3, 50)) + data[at + length :]


def _splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The beginning of one file with the end of another, or a run of another inside."""
    other = rng.choice(others) or b"\0"
    at, from_ = _place(data, rng), rng.randrange(len(other))
    if rng.random() < 0.5:
        return data[:at] + other[from_:]
    length = rng.choice(LENGTHS)
    return data[:at] + other[from_ : from_ + length] + data[at + length :]


BLIND: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    _flip, _flip, _overwrite, _extreme, _extreme, _cut, _drop, _insert, _double, _splice
)  # fmt: skip


# --- by pieces -------------------------------------------------------------------------------------------------------

Join = Callable[[list[bytes], bool], bytes]  # pieces, and whether to put lengths and checksums right


def pieces_of(data: bytes) -> tuple[list[bytes], Join] | None:
    """The pieces of a format that has them, and how they become a file again."""
    for magic, split in _SPLITTERS:
        if data.startswith(magic):
            return split(data)
    return None


def _change_pieces(pieces: list[bytes], join: Join, rng: random.Random) -> bytes:
    """A piece taken out, doubled, moved, or changed inside."""
    pieces, at = list(pieces), rng.randrange(len(pieces))
    how = rng.choice(("drop", "double", "swap", "inside", "inside", "inside", "many"))
    if how == "drop":
        del pieces[at]
    elif how in ("double", "many"):
        pieces[at:at] = [pieces[at]] * (1 if how == "double" else rng.choice((10, 300)))
    elif how == "swap":
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    else:
        change = rng.choice((_flip, _overwrite, _extreme, _extreme, _drop, _insert))
        pieces[at] = change(pieces[at] or b"\0", rng, pieces)
    return join(pieces, rng.random() < 0.7)


def _png(data: bytes) -> tuple[list[bytes], Join]:
    """Chunks; those of pixels are unpacked, so that what changes is what the filters see."""
    chunks, at, packed = list[bytes](), 8, b""
    while at + 12 <= len(data):
        length, tag = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if tag == b"IDAT":
            packed += body
        elif packed and tag == b"IEND":
            chunks.append(b"IDAT" + _unpacked(packed))
        if tag != b"IDAT":
            chunks.append(tag + body)
        at += 12 + length
    return chunks or [data], _join_png


def _unpacked(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MOST_BYTES)
    except zlib.error:
        return packed


def _join_png(chunks: list[bytes], right: bool) -> bytes:
    sink = [b"\x89PNG\r\n\x1a\n"]
    for chunk in chunks:
        tag, body = chunk[:4].ljust(4, b"\0"), chunk[4:]
        body = zlib.compress(body, 1) if tag == b"IDAT" else body
        sink.append(struct.pack(">I", len(body)) + tag + body)
        sink.append(struct.pack(">I", zlib.crc32(tag + body) if right else 1))
    return b"".join(sink)


def _jpeg(data: bytes) -> tuple[list[bytes], Join]:
    """Segments before the first scan, each from its marker on without its length; then what is left."""
    segments, at = list[bytes](), 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xDA, 0xD9):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(data[at + 1 : at + 2] + data[at + 4 : at + 2 + length])
        at += 2 + max(length, 2)
    return [*segments, b"\0" + data[at:]], _join_jpeg


def _join_jpeg(segments: list[bytes], right: bool) -> bytes:
    sink = [b"\xff\xd8"]
    for segment in segments:
        if segment[:1] == b"\0":
            sink.append(segment[1:])
        else:
            length = len(segment) + (1 if right else -1)
            sink.append(b"\xff" + segment[:1] + (length & 0xFFFF).to_bytes(2, "big") + segment[1:])
    return b"".join(sink)


def _riff(data: bytes) -> tuple[list[bytes], Join]:
    chunks, at = list[bytes](), 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append(data[at : at + 4] + data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return chunks or [data], _join_riff


def _join_riff(chunks: list[bytes], right: bool) -> bytes:
    parts = []
    for chunk in chunks:
        body = chunk[4:]
        length = len(body) if right else len(body) + 7
        parts.append(chunk[:4] + struct.pack("<I", length) + body + bytes(len(body) % 2))
    inside = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _gif(data: bytes) -> tuple[list[bytes], Join]:
    """Header, then runs that begin at extensions and images."""
    return _cut_at(data, (b"\x21\xf9", b"\x21\xff", b"\x2c\x00"))


def _boxes(data: bytes) -> tuple[list[bytes], Join]:
    """ISO media: runs that begin at the boxes' names, on every level."""
    return _cut_at(data, (b"meta", b"iloc", b"iprp", b"ispe", b"pixi", b"av1C", b"ipma", b"mdat", b"iinf", b"pitm"))


def _tiff(data: bytes) -> tuple[list[bytes], Join]:
    """Header, the directory's entries, and what lies around them."""
    order = "<" if data[:1] == b"I" else ">"
    start = struct.unpack_from(f"{order}I", data.ljust(8, b"\0"), 4)[0]
    count = struct.unpack_from(f"{order}H", data, start)[0] if start + 2 <= len(data) else 0
    cuts = [0, 4, 8, start, *(start + 2 + 12 * i for i in range(min(count, 60) + 1)), len(data)]
    return _at(data, sorted({min(cut, len(data)) for cut in cuts}))


def _bmp(data: bytes) -> tuple[list[bytes], Join]:
    return _at(data, (0, 10, 14, 18, 22, 26, 28, 30, 34, 38, 42, 46, 50, 54, len(data)))


def _cut_at(data: bytes, marks: Sequence[bytes]) -> tuple[list[bytes], Join]:
    found = {0, len(data)}
    for mark in marks:
        at = data.find(mark)
        while at >= 0 and len(found) < 200:
            found.add(at)
            at = data.find(mark, at + 1)
    return _at(data, sorted(found))


def _at(data: bytes, cuts: Sequence[int]) -> tuple[list[bytes], Join]:
    pieces = [data[a:b] for a, b in pairwise(cuts)]
    return pieces or [data], lambda changed, right: b"".join(changed)


_SPLITTERS: tuple[tuple[bytes, Callable[[bytes], tuple[list[bytes], Join]]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\xff\xd8", _jpeg),
    (b"RIFF", _riff),
    (b"GIF8", _gif),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
    (b"BM", _bmp),
    (b"\0\0\0\x20ftyp", _boxes),
    (b"\0\0\0\x1cftyp", _boxes),
)
