"""Image bytes to upright RGB pixels, or the reason why there are none.

- Routed by the first bytes, never by a name. JPEG goes through libjpeg-turbo in strict mode, because Pillow turns most
  damaged JPEGs into confident garbage; everything else, and CMYK, goes to the one Pillow plugin of its format.
- The header is read first and `max_pixels` holds before any pixel is allocated; Pillow's process-wide limit and
  LOAD_TRUNCATED_IMAGES are neither used nor changed.
- No bytes make `decode` raise, except MemoryError. ICC profiles are ignored, as the reference processors do.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.schema import Bad, Pixels, Reason

Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DecodePolicy:
    """What is done to images that are not plain upright 8-bit RGB.

    exif "apply" turns the image upright, "ignore" keeps it as stored; an invalid tag is ignored. alpha "white"
    composites on white, "drop" shows the colours behind it. salvage accepts what strict JPEG decoding refuses, grey
    where data is missing, with the warning `salvaged`; other formats have no such mode."""

    exif: Literal["apply", "ignore"] = "apply"
    alpha: Literal["white", "drop"] = "white"
    max_pixels: int = 89_478_485
    salvage: bool = False


def describe(policy: DecodePolicy) -> dict[str, Any]:
    """What the run's identity records of decoding, as JSON values."""
    return {**asdict(policy), "jpeg": "libjpeg-turbo strict", "other": "pillow", "icc": "ignored", "frames": "first"}


def decode(image: bytes | memoryview, policy: DecodePolicy = DecodePolicy()) -> Pixels | Bad:
    """An image file's bytes -> uint8 RGB (height, width, 3) with remarks, or a reason and the decoder's own words."""
    view = memoryview(image).cast("B")
    kind = "image"
    try:
        kind = sniff(view)
        return _decode_jpeg(view, policy) if kind == "JPEG" else _decode_other(kind, view, policy)
    except _Refused as refusal:
        return Bad(refusal.reason, refusal.message)
    except MemoryError:
        raise
    except Exception as error:
        return Bad(_reason_of(error), f"{kind}: {type(error).__name__}: {error}"[:300])


class _Refused(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


# --- which decoder ---------------------------------------------------------------------------------------------------

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
        raise _Refused("empty", "zero bytes")
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
            raise _Refused("unsupported", f"a {name} file; convert it to JPEG, PNG, WebP or AVIF")
    raise _Refused("not_an_image", f"no image format starts with {head[:16]!r}")


def _sniff_boxes(head: bytes) -> str:
    """ISO media files: AVIF, or a relative that is not decoded here."""
    size = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _HEIF_BRANDS:
        raise _Refused("unsupported", "a HEIC/HEIF file; convert it to JPEG, PNG, WebP or AVIF")
    raise _Refused("not_an_image", f"an ISO media file of brand {head[8:12]!r}")


# --- JPEG ------------------------------------------------------------------------------------------------------------


class JpegHeader(NamedTuple):
    """What the markers before the first scan say."""

    width: int
    height: int
    precision: int
    components: int
    orientation: int


def _decode_jpeg(view: memoryview, policy: DecodePolicy) -> Pixels:
    header = read_jpeg_header(view)
    _check_size(header.width, header.height, policy)
    if header.precision != 8:
        raise _Refused("unsupported", f"JPEG: {header.precision} bits per sample; only 8 are decoded")
    rgb, warnings = _jpeg_pixels(view, header, policy)
    return Pixels(_upright(rgb, header.orientation) if policy.exif == "apply" else rgb, warnings)


def _jpeg_pixels(view: memoryview, header: JpegHeader, policy: DecodePolicy) -> tuple[Rgb, tuple[str, ...]]:
    if not _turbo_takes(view):
        return _pillow_jpeg(view, policy), ()
    if header.components == 4:
        # libjpeg-turbo's own CMYK -> RGB is up to a level off Pillow's, so it only vouches for the data
        warnings = _turbo(view, "CMYK", policy.salvage)[1]
        return _pillow_jpeg(view, policy), warnings
    return _turbo(view, "RGB", policy.salvage)


def _turbo_takes(view: memoryview) -> bool:
    try:
        simplejpeg.decode_jpeg_header(view)
    except ValueError:  # odd subsampling, an unknown Adobe transform, two components
        return False
    return True


def _turbo(view: memoryview, colorspace: str, salvage: bool) -> tuple[Rgb, tuple[str, ...]]:
    try:
        return simplejpeg.decode_jpeg(view, colorspace, strict=True), ()
    except ValueError as error:
        if salvage:
            return simplejpeg.decode_jpeg(view, colorspace, strict=False), ("salvaged",)
        whole = bytes(view).rfind(b"\xff\xd9") > 0
        raise _Refused("corrupt_data" if whole else "truncated", f"JPEG: {error}") from error


def _pillow_jpeg(view: memoryview, policy: DecodePolicy) -> Rgb:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(view))
    _check_size(image.width, image.height, policy)
    image.load()
    return _to_rgb(image, policy.alpha)


_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # less huffman tables, JPG, arithmetic tables
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_MAX_SEGMENTS = 10_000


def read_jpeg_header(view: memoryview) -> JpegHeader:
    """Walks the markers up to the first scan; nothing is decoded, nothing large allocated."""
    frame: tuple[int, int, int, int] | None = None
    orientation = 1
    for marker, body in _segments(view):
        if marker in _START_OF_FRAME:
            frame = frame or _frame(body)
        elif marker == 0xE1 and bytes(body[:6]) == b"Exif\0\0":
            orientation = exif_orientation(bytes(body[6:]))
    if frame is None:
        raise _Refused("corrupt_data", "JPEG: no frame header before the first scan")
    return JpegHeader(*frame, orientation)


def _frame(body: memoryview) -> tuple[int, int, int, int]:
    """The frame header's width, height, bits per sample and number of components."""
    if len(body) < 6:
        raise _Refused("corrupt_data", f"JPEG: a frame header of {len(body)} bytes")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if height == 0:
        raise _Refused("unsupported", "JPEG: its height comes after the first scan (DNL)")
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
            raise _Refused("truncated", f"JPEG: ends in its header, after {len(view)} bytes")
        marker = view[position]
        position += 1
        if marker == 0xDA:
            return
        if marker == 0xD9:
            raise _Refused("corrupt_data", "JPEG: ends before its first scan")
        if marker in _NO_LENGTH or marker == 0x00:
            continue
        length = int.from_bytes(view[position : position + 2], "big")
        if length < 2:
            raise _Refused("corrupt_data", f"JPEG: segment 0x{marker:02x} has length {length}")
        if position + length > len(view):
            raise _Refused("truncated", f"JPEG: ends in its header, after {len(view)} bytes")
        yield marker, view[position + 2 : position + length]
        position += length
    raise _Refused("corrupt_data", f"JPEG: more than {_MAX_SEGMENTS} segments before the first scan")


# --- everything else, by Pillow --------------------------------------------------------------------------------------

_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def _decode_other(kind: str, view: memoryview, policy: DecodePolicy) -> Pixels:
    _check_container(kind, view, policy)
    image = _PLUGINS[kind](io.BytesIO(view))
    _check_size(image.width, image.height, policy)
    warnings: tuple[str, ...] = ("animated",) if _has_more_frames(kind, image, view) else ()
    stored = image.getexif().get(_ORIENTATION, 1) if kind == "TIFF" else 1
    image.load()
    if kind == "PNG":
        _rescale_transparency(image, bit_depth=view[24])
    if image.mode.startswith("I;16"):
        warnings += ("16bit_scaled",)
    rgb = _to_rgb(image, policy.alpha)
    return Pixels(_orient(kind, rgb, image, stored, policy), warnings)


def _orient(kind: str, rgb: Rgb, image: ImageFile.ImageFile, stored: int, policy: DecodePolicy) -> Rgb:
    if kind == "TIFF":  # Pillow has already turned it
        return rgb if policy.exif == "apply" else _upright(rgb, {6: 8, 8: 6}.get(stored, stored))
    exif = image.info.get("exif", b"")
    return _upright(rgb, exif_orientation(exif.removeprefix(b"Exif\0\0"))) if policy.exif == "apply" else rgb


def _has_more_frames(kind: str, image: ImageFile.ImageFile, view: memoryview) -> bool:
    """Asked before loading. A second GIF reader looks ahead, since looking moves the one that is to be loaded."""
    if kind != "GIF":
        return bool(getattr(image, "is_animated", False))
    try:
        return bool(GifImagePlugin.GifImageFile(io.BytesIO(view)).is_animated)
    except Exception:  # damage after the first frame, which is all that is used
        return False


def _check_size(width: int, height: int, policy: DecodePolicy) -> None:
    if width <= 0 or height <= 0:
        raise _Refused("corrupt_data", f"its header says {width} x {height} pixels")
    if width * height > policy.max_pixels:
        message = f"{width} x {height} is {width * height} pixels, more than max_pixels = {policy.max_pixels}"
        raise _Refused("too_many_pixels", message)


def _check_container(kind: str, view: memoryview, policy: DecodePolicy) -> None:
    """What the container says of its own length, checksums and size, for formats whose plugin does not look."""
    if kind == "PNG":
        _check_png(view)
    elif kind == "WEBP":
        _check_length(kind, view, 8 + int.from_bytes(view[4:8], "little"))
        _check_size(*_webp_size(view), policy)  # its plugin allocates two canvases when it opens
    elif kind == "AVIF":
        _check_length(kind, view, _boxes_end(view))


def _check_length(kind: str, view: memoryview, end: int) -> None:
    if end > len(view):
        raise _Refused("truncated", f"{kind}: says that it has {end} bytes, there are {len(view)}")


def _check_png(view: memoryview) -> None:
    """Every chunk is there up to IEND, and the checksums of critical ones hold: Pillow does not look at IDAT's."""
    position, tag = 8, b""
    while tag != b"IEND":
        if position + 12 > len(view):
            raise _Refused("truncated", f"PNG: ends after {len(view)} bytes, before its IEND chunk")
        length, tag = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        _check_length("PNG", view, end)
        critical = not tag[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise _Refused("corrupt_data", f"PNG: checksum of chunk {tag!r} at byte {position} does not hold")
        position = end


def _webp_size(view: memoryview) -> tuple[int, int]:
    """Canvas width and height; (1, 1) for what only the plugin can refuse."""
    chunk, head = bytes(view[12:16]), bytes(view[20:30])
    if len(head) < 10:
        raise _Refused("truncated", f"WEBP: ends after {len(view)} bytes")
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


# --- pixels to upright RGB -------------------------------------------------------------------------------------------

_STRIP_PIXELS = 1 << 20
_UNPREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _to_rgb(image: Image.Image, alpha: str) -> Rgb:
    """Any mode -> RGB in strips, so that a large image is not held three times over."""
    if image.mode in ("I", "F"):
        raise _Refused("unsupported", f"pixels of mode {image.mode}: their range is not known")
    rgb_HWC = np.empty((image.height, image.width, 3), np.uint8)
    convert = _strip_from_16_bit if image.mode.startswith("I;16") else _strip_to_rgb
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb_HWC[top : top + rows] = convert(strip, alpha)
    return rgb_HWC


def _strip_to_rgb(strip: Image.Image, alpha: str) -> Rgb:
    if strip.mode in _UNPREMULTIPLIED:
        strip = strip.convert(_UNPREMULTIPLIED[strip.mode])
    if strip.has_transparency_data and alpha == "white":
        white = Image.new("RGBA", strip.size, "white")
        strip = Image.alpha_composite(white, strip.convert("RGBA"))
    strip.info.pop("transparency", None)
    return np.asarray(strip.convert("RGB"))


def _strip_from_16_bit(strip: Image.Image, alpha: str) -> Rgb:
    """Pillow's own conversion would clip at 255 and give a white image."""
    grey_HW = np.asarray(strip)
    scaled_HW = (grey_HW >> 8).astype(np.uint8)
    if alpha == "white" and "transparency" in strip.info:
        scaled_HW[grey_HW == strip.info["transparency"]] = 255
    return np.repeat(scaled_HW[:, :, None], 3, axis=2)


def _rescale_transparency(image: Image.Image, bit_depth: int) -> None:
    """A PNG's transparent colour in the 8 bits that Pillow scales the pixels to; it leaves it in the file's depth."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int) and bit_depth in (2, 4):
        image.info["transparency"] = colour * 255 // ((1 << bit_depth) - 1)
    elif image.mode == "RGB" and isinstance(colour, tuple) and bit_depth == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


_ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4


def exif_orientation(tiff: bytes) -> int:
    """EXIF's TIFF block -> how the stored image is turned, 1 to 8; 1 (upright) where absent, invalid or damaged."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    first = int.from_bytes(tiff[4:8], order)
    for index in range(int.from_bytes(tiff[first : first + 2], order)):
        entry = tiff[first + 2 + 12 * index :][:12]
        if len(entry) < 12:
            break
        tag, kind = int.from_bytes(entry[:2], order), int.from_bytes(entry[2:4], order)
        if tag == _ORIENTATION and kind in (_SHORT, _LONG):
            value = int.from_bytes(entry[8:10] if kind == _SHORT else entry[8:12], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _upright(rgb_HWC: Rgb, orientation: int) -> Rgb:
    """Undoes an EXIF orientation: 2 to 4 mirror, 5 to 8 exchange rows and columns first."""
    turned = rgb_HWC.transpose(1, 0, 2) if orientation >= 5 else rgb_HWC
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


_UNSUPPORTED_WORDS = ("unsupported", "not supported", "cannot handle", "unknown", "no loader", "codec not available")


def _reason_of(error: Exception) -> Reason:
    text = str(error).lower()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too_many_pixels"
    if isinstance(error, NotImplementedError) or any(word in text for word in _UNSUPPORTED_WORDS):
        return "unsupported"
    if isinstance(error, EOFError | struct.error) or "truncated" in text:
        return "truncated"
    return "corrupt_data"
