"""An image's first bytes to what they say: format, size, orientation, and whether the file is whole.

Nothing is decoded here and nothing large allocated; what cannot be used raises `Refused` with its reason.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pipeline.schema import Reason

# --- formats ---------------------------------------------------------------------------------------------------------

_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_UNSUPPORTED_MAGIC = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"II\xbc\x01": "JPEG XR",
    b"8BPS\0": "Photoshop",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"\0\0\1\0": "icon",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"SIMPLE  =": "FITS",
    b"P4\n": "PNM",
    b"P5\n": "PNM",
    b"P6\n": "PNM",
}
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"}
_BMP_HEADER_SIZES = {12, 16, 40, 52, 56, 64, 108, 124}


def sniff(view: memoryview) -> str:
    """The format that the first bytes announce; refuses what is empty, no image, or a format not decoded here."""
    head = bytes(view[:64])
    if not head:
        raise Refused("empty", "zero bytes")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    if head[4:8] == b"ftyp":
        return _sniff_boxes(head)
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if head.startswith(magic):
            raise Refused("unsupported", f"a {name} file; convert it to JPEG, PNG, WebP or AVIF")
    raise Refused("not_an_image", f"no image format starts with {head[:16]!r}")


def _sniff_boxes(head: bytes) -> str:
    """ISO media files: AVIF, or a relative that is not decoded here."""
    size = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _HEIF_BRANDS:
        raise Refused("unsupported", "a HEIC/HEIF file; convert it to JPEG, PNG, WebP or AVIF")
    raise Refused("not_an_image", f"an ISO media file of brand {head[8:12]!r}")


# --- JPEG ------------------------------------------------------------------------------------------------------------
class JpegHeader(NamedTuple):
    """What the markers before the first scan say."""

    width: int
    height: int
    precision: int
    components: int
    frame_marker: int
    orientation: int

    @property
    def lossless(self) -> bool:
        """Predicted pixels instead of a transform: there are no coefficients to decode fewer of."""
        return self.frame_marker in _LOSSLESS


_LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # less huffman tables, JPG, arithmetic tables
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_MAX_SEGMENTS = 10_000


def read_jpeg_header(view: memoryview) -> JpegHeader:
    """Walks the markers up to the first scan; nothing is decoded, nothing large allocated."""
    frame: tuple[int, int, int, int, int] | None = None
    orientation = 1
    for marker, body in _segments(view):
        if marker in _START_OF_FRAME:
            frame = frame or (*_frame(body), marker)
        elif marker == 0xE1 and bytes(body[:6]) == b"Exif\0\0":
            orientation = exif_orientation(bytes(body[6:]))
    if frame is None:
        raise Refused("corrupt_data", "JPEG: no frame header before the first scan")
    return JpegHeader(*frame, orientation)


def _frame(body: memoryview) -> tuple[int, int, int, int]:
    """The frame header's width, height, bits per sample and number of components."""
    if len(body) < 6:
        raise Refused("corrupt_data", f"JPEG: a frame header of {len(body)} bytes")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if height == 0:
        raise Refused("unsupported", "JPEG: its height comes after the first scan (DNL)")
    return width, height, precision, components


def _segments(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(marker, body) of each segment before the first scan, skipping stray bytes as libjpeg does."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        while position < len(view) and view[position] != 0xFF:
            position += 1
        while position < len(view) and view[position] == 0xFF:
            position += 1
        if position + 2 >= len(view):
            raise Refused("truncated", f"JPEG: ends in its header, after {len(view)} bytes")
        marker = view[position]
        position += 1
        if marker == 0xDA:
            return
        if marker == 0xD9:
            raise Refused("corrupt_data", "JPEG: ends before its first scan")
        if marker in _NO_LENGTH or marker == 0x00:
            continue
        length = int.from_bytes(view[position : position + 2], "big")
        if length < 2:
            raise Refused("corrupt_data", f"JPEG: segment 0x{marker:02x} has length {length}")
        if position + length > len(view):
            raise Refused("truncated", f"JPEG: ends in its header, after {len(view)} bytes")
        yield marker, view[position + 2 : position + length]
        position += length
    raise Refused("corrupt_data", f"JPEG: more than {_MAX_SEGMENTS} segments before the first scan")


# --- other containers ------------------------------------------------------------------------------------------------
def check_size(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise Refused("corrupt_data", f"its header says {width} x {height} pixels")
    if width * height > max_pixels:
        message = f"{width} x {height} is {width * height} pixels, more than max_pixels = {max_pixels}"
        raise Refused("too_many_pixels", message)


def check_container(kind: str, view: memoryview, max_pixels: int) -> None:
    """What the container says of its own length, checksums and size, for formats whose plugin does not look."""
    if kind == "PNG":
        _check_png(view)
    elif kind == "WEBP":
        _check_length(kind, view, 8 + int.from_bytes(view[4:8], "little"))
        check_size(*_webp_size(view), max_pixels)  # its plugin allocates two canvases when it opens
    elif kind == "AVIF":
        _check_length(kind, view, _boxes_end(view))
    elif kind == "TIFF":
        _check_length(kind, view, _directory_end(view))


def _check_length(kind: str, view: memoryview, end: int) -> None:
    if end > len(view):
        raise Refused("truncated", f"{kind}: says that it has {end} bytes, there are {len(view)}")


def _check_png(view: memoryview) -> None:
    """Every chunk is there up to IEND, and the checksums of critical ones hold: Pillow does not look at IDAT's."""
    position, tag = 8, b""
    while tag != b"IEND":
        if position + 12 > len(view):
            raise Refused("truncated", f"PNG: ends after {len(view)} bytes, before its IEND chunk")
        length, tag = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        _check_length("PNG", view, end)
        critical = not tag[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise Refused("corrupt_data", f"PNG: checksum of chunk {tag!r} at byte {position} does not hold")
        position = end


def _webp_size(view: memoryview) -> tuple[int, int]:
    """Canvas width and height; (1, 1) for what only the plugin can refuse."""
    chunk, head = bytes(view[12:16]), bytes(view[20:30])
    if len(head) < 10:
        raise Refused("truncated", f"WEBP: ends after {len(view)} bytes")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", head, 6)
    return (width & 0x3FFF, height & 0x3FFF) if chunk == b"VP8 " else (1, 1)


def _boxes_end(view: memoryview) -> int:
    """Where the last top-level box of an ISO media file says that it ends."""
    position = 0
    while position + 8 <= len(view):
        size = int.from_bytes(view[position : position + 4], "big")
        if size == 1 and position + 16 <= len(view):
            size = int.from_bytes(view[position + 8 : position + 16], "big")
        if size < 8:  # 0 runs to the end of the file; anything else is for the plugin to refuse
            return len(view)
        position += size
    return position


def _directory_end(view: memoryview) -> int:
    """Where a TIFF's first directory ends; it often lies behind the pixels."""
    order: Literal["little", "big"] = "little" if view[0] == ord("I") else "big"
    is_big = 43 in view[2:4]
    start = int.from_bytes(view[8:16] if is_big else view[4:8], order)
    count_size, entry_size = (8, 20) if is_big else (2, 12)
    count = int.from_bytes(view[start : start + count_size], order)
    return start + count_size + entry_size * count


# --- EXIF ------------------------------------------------------------------------------------------------------------

ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4


def exif_orientation(tiff: bytes) -> int:
    """EXIF's TIFF block -> how the stored image is turned, 1 to 8; 1 (upright) where absent, invalid or damaged."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    first = int.from_bytes(tiff[4:8], order)
    for index in range(int.from_bytes(tiff[first : first + 2], order)):
        start = first + 2 + 12 * index
        entry = tiff[start : start + 12]
        if len(entry) < 12:
            break
        tag, kind = int.from_bytes(entry[:2], order), int.from_bytes(entry[2:4], order)
        if tag == ORIENTATION and kind in (_SHORT, _LONG):
            value = int.from_bytes(entry[8:10] if kind == _SHORT else entry[8:12], order)
            return value if 1 <= value <= 8 else 1
    return 1


class Refused(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message
