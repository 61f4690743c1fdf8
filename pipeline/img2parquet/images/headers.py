"""Read an image's format, size and orientation from its headers, and check that the file is complete.

Nothing is decoded here and nothing large is allocated. An image that cannot be used raises `ImageRejected`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

from img2parquet.images.orientation import read_orientation
from img2parquet.schema import Reason

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
    b"IIRO": "Olympus raw",
    b"IIRS": "Olympus raw",
    b"IIU\0": "Panasonic raw",
    b"FUJIFILMCCD-RAW": "Fujifilm raw",
    b"II\x1a\0\0\0HEAPCCDR": "Canon raw",
    b"FOVb": "Sigma raw",
    b"\0MRM": "Minolta raw",
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
_RAW_BRANDS = {b"crx "}  # Canon's CR3
_BMP_HEADER_SIZES = {12, 16, 40, 52, 56, 64, 108, 124}


def sniff(view: memoryview) -> str:
    """Return the format that the first bytes announce.

    Raises ImageRejected for empty bytes, for bytes of no image, and for formats that are not decoded here."""
    head = bytes(view[:64])
    if not head:
        raise ImageRejected("empty", "zero bytes")
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
            raise ImageRejected("unsupported", f"a {name} file; convert it to JPEG, PNG, WebP or AVIF")
    raise ImageRejected("not_an_image", f"no image format starts with {head[:16]!r}")


def _sniff_boxes(head: bytes) -> str:
    """Tell AVIF from other ISO media files, which are not decoded here."""
    size = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _RAW_BRANDS:
        raise ImageRejected("unsupported", "a Canon raw photo; convert it to JPEG, PNG, WebP or AVIF")
    if brands & _HEIF_BRANDS:
        raise ImageRejected("unsupported", "a HEIC/HEIF file; convert it to JPEG, PNG, WebP or AVIF")
    raise ImageRejected("not_an_image", f"an ISO media file of brand {head[8:12]!r}")


# --- JPEG ------------------------------------------------------------------------------------------------------------
class JpegHeader(NamedTuple):
    """The facts in a JPEG's markers before the first scan."""

    width: int
    height: int
    precision: int
    components: int
    frame_marker: int
    orientation: int

    @property
    def lossless(self) -> bool:
        """Whether pixels are predicted instead of transformed, so that there are no coefficients to leave out."""
        return self.frame_marker in _LOSSLESS

    @property
    def sequential(self) -> bool:
        """Whether each scan has its components' coefficients whole, so that its spectral range means nothing."""
        return self.frame_marker in _SEQUENTIAL


_LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without Huffman tables, JPG, arithmetic tables
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_MAX_SEGMENTS = 10_000


def read_jpeg_header(view: memoryview) -> JpegHeader:
    """Read the markers up to the first scan. Raises ImageRejected when they are damaged or cut off."""
    frame: tuple[int, int, int, int, int] | None = None
    exif, xmp = b"", b""
    for marker, body in _segments(view):
        if marker in _START_OF_FRAME:
            frame = frame or (*_frame(body), marker)
        elif marker == 0xE1 and bytes(body[:6]) == b"Exif\0\0":
            exif = exif or bytes(body[6:])
        elif marker == 0xE1 and bytes(body[: len(_XMP)]) == _XMP:
            xmp = xmp or bytes(body[len(_XMP) :])
    if frame is None:
        raise ImageRejected("corrupt_data", "JPEG: no frame header before the first scan")
    return JpegHeader(*frame, read_orientation(exif, xmp))


def _frame(body: memoryview) -> tuple[int, int, int, int]:
    """Return a frame header's width, height, bits per sample and number of components."""
    if len(body) < 6:
        raise ImageRejected("corrupt_data", f"JPEG: a frame header of {len(body)} bytes")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if height == 0:
        raise ImageRejected("unsupported", "JPEG: its height comes after the first scan (DNL)")
    return width, height, precision, components


def _segments(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (marker, body) of each segment before the first scan, skipping stray bytes as libjpeg does."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        while position < len(view) and view[position] != 0xFF:
            position += 1
        while position < len(view) and view[position] == 0xFF:
            position += 1
        if position + 2 >= len(view):
            raise ImageRejected("truncated", f"JPEG: ends in its header, after {len(view)} bytes")
        marker = view[position]
        position += 1
        if marker == 0xDA:
            return
        if marker == 0xD9:
            raise ImageRejected("corrupt_data", "JPEG: ends before its first scan")
        if marker in _NO_LENGTH or marker == 0x00:
            continue
        length = int.from_bytes(view[position : position + 2], "big")
        if length < 2:
            raise ImageRejected("corrupt_data", f"JPEG: segment 0x{marker:02x} has length {length}")
        if position + length > len(view):
            raise ImageRejected("truncated", f"JPEG: ends in its header, after {len(view)} bytes")
        yield marker, view[position + 2 : position + length]
        position += length
    raise ImageRejected("corrupt_data", f"JPEG: more than {_MAX_SEGMENTS} segments before the first scan")


# --- other containers ------------------------------------------------------------------------------------------------
def check_size(width: int, height: int, max_pixels: int) -> None:
    """Check an image's size. Raises ImageRejected when a side is not positive, or it has more than `max_pixels`."""
    if width <= 0 or height <= 0:
        raise ImageRejected("corrupt_data", f"its header says {width} x {height} pixels")
    if width * height > max_pixels:
        message = f"{width} x {height} is {width * height} pixels, more than max_pixels = {max_pixels}"
        raise ImageRejected("too_many_pixels", message)


def check_container(kind: str, view: memoryview, max_pixels: int) -> None:
    """Check a container's length and size, for formats whose Pillow plugin does not check them.

    Raises ImageRejected when one of them is wrong."""
    if kind == "WEBP":
        check_length(kind, view, 8 + int.from_bytes(view[4:8], "little"))
        check_size(*_webp_size(view), max_pixels)  # the plugin allocates two canvases on opening
    elif kind == "AVIF":
        check_length(kind, view, _boxes_end(view))
    elif kind == "TIFF":
        check_length(kind, view, _directory_end(view))


def check_length(kind: str, view: memoryview, end: int) -> None:
    if end > len(view):
        raise ImageRejected("truncated", f"{kind}: says that it has {end} bytes, there are {len(view)}")


def _webp_size(view: memoryview) -> tuple[int, int]:
    """Return the canvas width and height; (1, 1) for files that only the plugin can reject."""
    chunk, head = bytes(view[12:16]), bytes(view[20:30])
    if len(head) < 10:
        raise ImageRejected("truncated", f"WEBP: ends after {len(view)} bytes")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", head, 6)
    return (width & 0x3FFF, height & 0x3FFF) if chunk == b"VP8 " else (1, 1)


def _boxes_end(view: memoryview) -> int:
    """Return the byte at which the last top-level box of an ISO media file ends, according to its header."""
    position = 0
    while position + 8 <= len(view):
        size = int.from_bytes(view[position : position + 4], "big")
        if size == 1 and position + 16 <= len(view):
            size = int.from_bytes(view[position + 8 : position + 16], "big")
        if size < 8:  # 0 means up to the end of the file; anything else is left to the plugin to reject
            return len(view)
        position += size
    return position


def _directory_end(view: memoryview) -> int:
    """Return the byte at which a TIFF's first directory ends; it often lies behind the pixels."""
    order: Literal["little", "big"] = "little" if view[0] == ord("I") else "big"
    is_big = 43 in view[2:4]
    start = int.from_bytes(view[8:16] if is_big else view[4:8], order)
    count_size, entry_size = (8, 20) if is_big else (2, 12)
    count = int.from_bytes(view[start : start + count_size], order)
    return start + count_size + entry_size * count


class ImageRejected(Exception):
    """Raised for an image that cannot be used; becomes a `Rejection`."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message
