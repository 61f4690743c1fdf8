"""Image bytes to upright RGB pixels, or the reason why there are none.

- Routed by the first bytes, never by a name. JPEG goes through libjpeg-turbo in strict mode, because Pillow turns most
  damaged JPEGs into confident garbage; everything else, and CMYK, goes to the one Pillow plugin of its format.
- A JPEG may be decoded 2 or 4 times smaller, where its caller says so; its size is then still the source's.
- The header is read first and `max_pixels` holds before any pixel is allocated; Pillow's process-wide limit and
  LOAD_TRUNCATED_IMAGES are neither used nor changed.
- No bytes make `decode` raise, except MemoryError. ICC profiles are ignored, as the reference processors do.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

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

from pipeline.headers import (
    ORIENTATION,
    JpegHeader,
    Refused,
    check_container,
    check_size,
    exif_orientation,
    read_jpeg_header,
    sniff,
)
from pipeline.schema import Bad, Pixels, Reason

Rgb = npt.NDArray[np.uint8]
Shrink = Callable[[tuple[int, int]], int]  # upright height and width of a source -> 1, 2 or 4


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


def decode(
    image: bytes | memoryview, policy: DecodePolicy = DecodePolicy(), shrink: Shrink | None = None
) -> Pixels | Bad:
    """An image file's bytes -> uint8 RGB (height, width, 3) with remarks, or a reason and the decoder's own words.

    shrink says how many times smaller an image of that upright size may be decoded; only JPEGs that hold
    coefficients of three colours or grey are. What is refused, and why, does not depend on it."""
    view = memoryview(image).cast("B")
    kind = "image"
    try:
        kind = sniff(view)
        return _decode_jpeg(view, policy, shrink) if kind == "JPEG" else _decode_other(kind, view, policy)
    except Refused as refusal:
        return Bad(refusal.reason, refusal.message)
    except MemoryError:
        raise
    except Exception as error:
        return Bad(_reason_of(error), f"{kind}: {type(error).__name__}: {error}"[:300])


def _decode_jpeg(view: memoryview, policy: DecodePolicy, shrink: Shrink | None) -> Pixels:
    header = read_jpeg_header(view)
    check_size(header.width, header.height, policy.max_pixels)
    if header.precision != 8:
        raise Refused("unsupported", f"JPEG: {header.precision} bits per sample; only 8 are decoded")
    orientation = header.orientation if policy.exif == "apply" else 1
    source_HW = (header.width, header.height) if orientation >= 5 else (header.height, header.width)
    by = _smaller(view, header, orientation, shrink(source_HW)) if shrink else 1
    if by == 1:
        rgb, warnings = _jpeg_pixels(view, header, policy)
        return Pixels(_upright(rgb, orientation), warnings)
    rgb, warnings = _turbo(view, "RGB", policy.salvage, _scaled(header, by))
    return Pixels(_upright(rgb, orientation), warnings, by, source_HW)


def _smaller(view: memoryview, header: JpegHeader, orientation: int, allowed: int) -> int:
    """How many times smaller the JPEG is decoded: at most `allowed`, and 1 for those that take another way."""
    # a lossless one is never scaled by libjpeg, and simplejpeg gives it a scaled buffer all the same
    if allowed == 1 or header.components not in (1, 3) or header.lossless or not _turbo_takes(view):
        return 1
    # the last row and column, where the source fills them in part, have to stay the last: a mirrored image needs none
    while orientation > 1 and (header.height % allowed or header.width % allowed):
        allowed //= 2
    return allowed


def _scaled(header: JpegHeader, by: int) -> dict[str, int]:
    """What makes simplejpeg decode 1 / by and nothing between: with less than this whole size it takes N/8."""
    return {"min_height": -(-header.height // by), "min_width": -(-header.width // by), "min_factor": by}


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


def _turbo(
    view: memoryview, colorspace: str, salvage: bool, scaled: Mapping[str, int] | None = None
) -> tuple[Rgb, tuple[str, ...]]:
    try:
        return simplejpeg.decode_jpeg(view, colorspace, strict=True, **scaled or {}), ()
    except ValueError as error:
        if salvage:
            return simplejpeg.decode_jpeg(view, colorspace, strict=False, **scaled or {}), ("salvaged",)
        cut = "Premature end of JPEG file" in str(error) or b"\xff\xd9" not in bytes(view)
        raise Refused("truncated" if cut else "corrupt_data", f"JPEG: {error}") from error


def _pillow_jpeg(view: memoryview, policy: DecodePolicy) -> Rgb:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(view))
    check_size(image.width, image.height, policy.max_pixels)
    image.load()
    return _to_rgb(image, policy.alpha)


_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def _decode_other(kind: str, view: memoryview, policy: DecodePolicy) -> Pixels:
    check_container(kind, view, policy.max_pixels)
    image = _PLUGINS[kind](io.BytesIO(view))
    check_size(image.width, image.height, policy.max_pixels)
    warnings: tuple[str, ...] = ("animated",) if _has_more_frames(kind, image, view) else ()
    stored = image.getexif().get(ORIENTATION, 1) if kind == "TIFF" else 1
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


_STRIP_PIXELS = 1 << 20
_UNPREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _to_rgb(image: Image.Image, alpha: str) -> Rgb:
    """Any mode -> RGB in strips, so that a large image is not held three times over."""
    if image.mode in ("I", "F"):
        raise Refused("unsupported", f"pixels of mode {image.mode}: their range is not known")
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


def _upright(rgb_HWC: Rgb, orientation: int) -> Rgb:
    """Undoes an EXIF orientation: 2 to 4 mirror, 5 to 8 exchange rows and columns first."""
    turned = rgb_HWC.transpose(1, 0, 2) if orientation >= 5 else rgb_HWC
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


_UNSUPPORTED_WORDS = ("unsupported", "not supported", "cannot handle", "unknown", "no loader", "codec not available")
_TRUNCATED_WORDS = ("truncated", "but only got", "no more images")


def _reason_of(error: Exception) -> Reason:
    text = str(error).lower()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too_many_pixels"
    if isinstance(error, NotImplementedError) or any(word in text for word in _UNSUPPORTED_WORDS):
        return "unsupported"
    if isinstance(error, EOFError | struct.error) or any(word in text for word in _TRUNCATED_WORDS):
        return "truncated"
    return "corrupt_data"
