"""Check a PNG's chunks, and separate pixels from metadata, so that no damaged or huge profile costs a sound picture.

Pillow refuses a PNG for a wrong checksum in a comment, for a profile or text above 1 MiB and for a bad animation;
libpng and browsers show the picture.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from img2parquet.images.headers import ImageRejected, check_length

PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_EXIF_TEXTS = (b"Raw profile type exif", b"Raw profile type APP1")  # ImageMagick's, as hexadecimal digits
_XMP_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type xmp")
_MAX_TEXT_BYTES = 1 << 20  # of each of these four; EXIF has at most 64 KiB, which are twice as many digits
_XMP_IN_APP1 = b"http://ns.adobe.com/xap/1.0/\0"


class PngParts(NamedTuple):
    """A PNG without its metadata, and what of that tells how it is turned and whether it moves."""

    file: bytes
    exif: bytes
    xmp: bytes
    is_animated: bool


def read_png(view: memoryview) -> PngParts:
    """Separate a PNG's pixels from its metadata.

    Raises ImageRejected when a chunk is cut off, or one that decides pixels is damaged, unknown or missing."""
    pieces = [view[:8]]
    exif, texts = b"", dict[bytes, bytes]()
    frames, has_pixels, has_palette, is_first_frame = 0, False, False, False
    for tag, chunk in _chunks(view):
        if tag in PIXEL_CHUNKS or not tag[0] & 0x20:
            _check_pixel_chunk(tag, chunk, view)
            pieces.append(chunk)
            has_palette |= tag == b"PLTE"
            has_pixels |= tag == b"IDAT"
        elif tag == b"eXIf" and not exif and _is_sound(chunk):
            exif = bytes(chunk[8:-4])
        elif tag in _TEXT_CHUNKS:
            keyword = bytes(chunk[8:88]).partition(b"\0")[0]
            if keyword in (*_EXIF_TEXTS, *_XMP_TEXTS) and keyword not in texts and _is_sound(chunk):
                texts[keyword] = _text(tag, bytes(chunk[9 + len(keyword) : -4]))
        elif tag == b"acTL" and not has_pixels and len(chunk) >= 20:
            frames = int.from_bytes(chunk[8:12], "big")
        elif tag == b"fcTL" and not has_pixels:
            is_first_frame = True
    if len(view) > 25 and view[25] == 3 and not has_palette:
        raise ImageRejected("corrupt_data", "PNG: its colours are indices, and it has no palette")
    for name in _EXIF_TEXTS:
        exif = exif or _profile(texts.get(name, b""))
    xmp = texts.get(_XMP_TEXTS[0]) or _profile(texts.get(_XMP_TEXTS[1], b""))
    if exif.startswith(_XMP_IN_APP1):
        exif, xmp = b"", xmp or exif.removeprefix(_XMP_IN_APP1)
    return PngParts(b"".join(pieces), exif, xmp, frames > (1 if is_first_frame else 0))


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the type of each chunk up to IEND, and the whole chunk with its length and checksum."""
    position, tag = 8, b""
    while tag != b"IEND":
        if position + 12 > len(view):
            raise ImageRejected("truncated", f"PNG: ends after {len(view)} bytes, before its IEND chunk")
        length, tag = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        check_length("PNG", view, end)
        yield tag, view[position:end]
        position = end


def _check_pixel_chunk(tag: bytes, chunk: memoryview, view: memoryview) -> None:
    if tag == b"CgBI":
        raise ImageRejected("unsupported", "PNG: Apple's variant for iPhone apps; convert it with `pngcrush -revert`")
    if not _is_sound(chunk):
        raise ImageRejected("corrupt_data", f"PNG: the checksum of its chunk {tag!r} does not hold")


def _is_sound(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _text(tag: bytes, body: bytes) -> bytes:
    """Return the text behind the keyword, at most `_MAX_TEXT_BYTES` of it; b"" when it is damaged."""
    compressed = tag == b"zTXt"
    if tag == b"iTXt":
        compressed, body = body[:1] == b"\1", body[2:].split(b"\0", 2)[-1]
    elif compressed:
        body = body[1:]
    if not compressed:
        return body[:_MAX_TEXT_BYTES]
    try:
        return zlib.decompressobj().decompress(body, _MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _profile(text: bytes) -> bytes:
    """Return the bytes of a profile that ImageMagick wrote as text: a name, a length, and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""
