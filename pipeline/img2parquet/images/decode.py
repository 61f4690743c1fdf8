"""Decode image bytes to upright RGB pixels, or reject them with a reason.

- The first bytes decide the format, never a name. JPEGs are decoded by libjpeg-turbo in strict mode, because Pillow
  turns most damaged JPEGs into plausible garbage; other formats, and CMYK, by the one Pillow plugin of the format.
- A JPEG may be decoded 2 or 4 times smaller if the caller permits it; its reported size is still the source's.
- The header is read first, and `max_pixels` is enforced before any pixel is allocated. Pillow's process-wide limit and
  LOAD_TRUNCATED_IMAGES are neither used nor changed.
- `decode` never raises, whatever the bytes, except MemoryError. ICC profiles are ignored, as in the reference.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    AvifImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from img2parquet.images.bmp import BmpPicture, hidden_pixels
from img2parquet.images.headers import (
    ImageRejected,
    JpegHeader,
    check_container,
    check_size,
    read_jpeg_header,
    sniff,
)
from img2parquet.images.jpeg_repair import without_harmless_defects
from img2parquet.images.orientation import read_orientation
from img2parquet.images.png_chunks import PngParts, read_png
from img2parquet.images.tiff import TiffPage, check_first_page
from img2parquet.schema import Pixels, Reason, Rejection

Rgb = npt.NDArray[np.uint8]
Shrink = Callable[[tuple[int, int]], int]  # from the source's upright height and width to a factor: 1, 2 or 4


@dataclass(frozen=True)
class DecodePolicy:
    """Settings for images that are not plain upright 8-bit RGB.

    exif: "apply" turns the image upright, "ignore" keeps it as stored; an invalid tag is ignored.
    alpha: "white" composites on white, "drop" drops the alpha channel.
    max_pixels: images whose header has more are rejected.
    salvage: accept JPEGs that strict decoding rejects, grey where data is missing, with the warning `salvaged`. Other
        formats have no such mode."""

    exif: Literal["apply", "ignore"] = "apply"
    alpha: Literal["white", "drop"] = "white"
    max_pixels: int = 89_478_485
    salvage: bool = False


def describe(policy: DecodePolicy) -> dict[str, Any]:
    """Return what the run's identity records about decoding, as JSON values."""
    return {**asdict(policy), "jpeg": "libjpeg-turbo strict", "other": "pillow", "icc": "ignored", "frames": "first"}


def decode(
    image: bytes | memoryview,
    policy: DecodePolicy = DecodePolicy(),
    shrink: Shrink | None = None,
    with_alpha: bool = False,
) -> Pixels | Rejection:
    """Decode an image file's bytes to uint8 RGB (height, width, 3) with warnings, or return the reason for a reject.

    shrink: returns by which factor an image of a given upright size may be decoded smaller. Only JPEGs with DCT
    coefficients in RGB or grey are. Which images are rejected, and why, does not depend on it.
    with_alpha: keep the transparency of images that have any beside their RGB, as `rgba_HWC`."""
    view = memoryview(image).cast("B")
    kind = "image"
    try:
        kind = sniff(view)
        return _decode_jpeg(view, policy, shrink) if kind == "JPEG" else _decode_other(kind, view, policy, with_alpha)
    except ImageRejected as refusal:
        return Rejection(refusal.reason, refusal.message)
    except MemoryError:
        raise
    except Exception as error:
        return Rejection(_reason_of(error), f"{kind}: {type(error).__name__}: {error}"[:300])


def _decode_jpeg(view: memoryview, policy: DecodePolicy, shrink: Shrink | None) -> Pixels:
    header = read_jpeg_header(view)
    check_size(header.width, header.height, policy.max_pixels)
    if header.precision != 8:
        raise ImageRejected("unsupported", f"JPEG: {header.precision} bits per sample; only 8 are decoded")
    view = _readable_header(view, header)
    orientation = header.orientation if policy.exif == "apply" else 1
    source_HW = (header.width, header.height) if orientation >= 5 else (header.height, header.width)
    factor = _shrink_factor(view, header, orientation, shrink(source_HW)) if shrink else 1
    if factor == 1:
        rgb, warnings = _jpeg_pixels(view, header, policy)
        return Pixels(_upright(rgb, orientation), warnings)
    rgb, warnings = _turbo(view, "RGB", header, policy.salvage, _scaled(header, factor))
    return Pixels(_upright(rgb, orientation), warnings, factor, source_HW)


def _shrink_factor(view: memoryview, header: JpegHeader, orientation: int, allowed: int) -> int:
    """Return the factor by which the JPEG is decoded smaller: at most `allowed`, and 1 where this is impossible."""
    # libjpeg never scales a lossless JPEG, but simplejpeg would still give it a scaled buffer
    if allowed == 1 or header.components not in (1, 3) or header.lossless or not _turbo_takes(view):
        return 1
    # a last row or column that the source fills only in part must stay the last one, so a mirrored image may have none
    while orientation > 1 and (header.height % allowed or header.width % allowed):
        allowed //= 2
    return allowed


def _scaled(header: JpegHeader, factor: int) -> dict[str, int]:
    """Return the arguments that make simplejpeg decode at 1/factor: with any smaller size it would choose an N/8."""
    smallest = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
    return {**smallest, "min_factor": factor}


def _jpeg_pixels(view: memoryview, header: JpegHeader, policy: DecodePolicy) -> tuple[Rgb, tuple[str, ...]]:
    if not _turbo_takes(view):
        return _pillow_jpeg(view, policy), ()
    if header.components == 4:
        # libjpeg-turbo's conversion of CMYK differs from Pillow's by up to one level, so it only validates the data
        warnings = _turbo(view, "CMYK", header, policy.salvage)[1]
        return _pillow_jpeg(view, policy), warnings
    return _turbo(view, "RGB", header, policy.salvage)


# warnings after which the same pixels may come out of a cleaner file
_HARMLESS = re.compile("extraneous bytes before marker|Invalid SOS parameters|unknown JFIF revision")


def _readable_header(view: memoryview, header: JpegHeader) -> memoryview:
    """Mend a header over which libjpeg warns; otherwise Pillow would decode the JPEG, and find no damage."""
    if _turbo_takes(view):
        return view
    mended = memoryview(without_harmless_defects(bytes(view), header.sequential, zeros_kept=len(view)))
    return mended if _turbo_takes(mended) else view


def _turbo_takes(view: memoryview) -> bool:
    try:
        simplejpeg.decode_jpeg_header(view)
    except ValueError:  # odd subsampling, an unknown Adobe transform, two components
        return False
    return True


def _turbo(
    view: memoryview, colorspace: str, header: JpegHeader, salvage: bool, scaled: Mapping[str, int] | None = None
) -> tuple[Rgb, tuple[str, ...]]:
    how = scaled or {}
    try:
        return simplejpeg.decode_jpeg(view, colorspace, strict=True, **how), ()
    except ValueError as error:
        for zeros_kept in (0, 1) if _HARMLESS.search(str(error)) else ():
            with suppress(ValueError):
                mended = without_harmless_defects(bytes(view), header.sequential, zeros_kept)
                return simplejpeg.decode_jpeg(mended, colorspace, strict=True, **how), ()
        if salvage:
            return simplejpeg.decode_jpeg(view, colorspace, strict=False, **how), ("salvaged",)
        cut = "Premature end of JPEG file" in str(error) or b"\xff\xd9" not in bytes(view)
        raise ImageRejected("truncated" if cut else "corrupt_data", f"JPEG: {error}") from error


def _pillow_jpeg(view: memoryview, policy: DecodePolicy) -> Rgb:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(view))
    check_size(image.width, image.height, policy.max_pixels)
    image.load()
    return _to_rgb(image, policy.alpha)


_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpPicture,
    "TIFF": TiffPage,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def _decode_other(kind: str, view: memoryview, policy: DecodePolicy, with_alpha: bool) -> Pixels:
    check_container(kind, view, policy.max_pixels)
    if kind == "TIFF":
        check_first_page(view)
    png = read_png(view) if kind == "PNG" else None
    image = _PLUGINS[kind](io.BytesIO(png.file if png else view))
    check_size(image.width, image.height, policy.max_pixels)
    is_animated = png.is_animated if png else _has_more_frames(kind, image, view)
    warnings: tuple[str, ...] = ("animated",) if is_animated else ()
    image.load()
    if png:
        _rescale_transparency(image, bit_depth=view[24])
    if image.mode.startswith("I;16"):
        warnings += ("16bit_scaled",)
    is_unset, inverts = _alpha_is_unset(image), isinstance(image, TiffPage) and image.inverts
    hidden_HW = hidden_pixels(view) if kind == "BMP" else None
    orientation = _orientation(image, png) if policy.exif == "apply" else 1
    rgb = _to_rgb(image, "drop" if is_unset else policy.alpha)
    if hidden_HW is not None and policy.alpha == "white":
        rgb[hidden_HW] = 255
    if inverts:
        np.subtract(255, rgb, out=rgb)
    upright = _upright(rgb, orientation)
    has_alpha = hidden_HW is not None or (image.has_transparency_data and not is_unset)
    if not with_alpha or not has_alpha:
        return Pixels(upright, warnings)
    rgba = _to_rgb(image, "keep")
    if hidden_HW is not None:
        rgba[hidden_HW, 3] = 0
    return Pixels(upright, warnings, rgba_HWC=_upright(rgba, orientation))


def _orientation(image: ImageFile.ImageFile, png: PngParts | None) -> int:
    if png:
        return read_orientation(png.exif, png.xmp)
    if isinstance(image, TiffPage):
        return image.orientation
    # AVIF is turned by its own boxes alone, which the plugin reports as EXIF
    is_avif = isinstance(image, AvifImagePlugin.AvifImageFile)
    return read_orientation(image.info.get("exif", b""), b"" if is_avif else image.info.get("xmp", b""))


def _alpha_is_unset(image: ImageFile.ImageFile) -> bool:
    """Whether a fourth channel is 0 everywhere, and its file or the habits of its writers leave open what it means."""
    may_be_padding = isinstance(image, BmpPicture) or (isinstance(image, TiffPage) and not image.alpha_is_said)
    return may_be_padding and image.mode == "RGBA" and image.getbbox(alpha_only=True) is None


def _has_more_frames(kind: str, image: ImageFile.ImageFile, view: memoryview) -> bool:
    """Whether the file has more than one frame. Call this before loading.

    For GIF a second reader looks ahead, since looking would move the reader that is loaded later."""
    if kind != "GIF":
        return bool(getattr(image, "is_animated", False))
    try:
        return bool(GifImagePlugin.GifImageFile(io.BytesIO(view)).is_animated)
    except Exception:  # damage after the first frame, which is all that is used
        return False


_STRIP_PIXELS = 1 << 20
_UNPREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _to_rgb(image: Image.Image, alpha: str) -> Rgb:
    """Convert any mode to RGB, in strips so that memory does not hold a large image three times.

    alpha: as in the policy, or `keep` for RGBA."""
    if image.mode in ("I", "F"):
        raise ImageRejected("unsupported", f"pixels of mode {image.mode}: their range is not known")
    rgb_HWC = np.empty((image.height, image.width, 4 if alpha == "keep" else 3), np.uint8)
    convert = _strip_to_rgb
    if image.mode.startswith("I;16"):
        convert = partial(_strip_from_16_bit, depth=image.depth if isinstance(image, TiffPage) else 16)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb_HWC[top : top + rows] = convert(strip, alpha)
    return rgb_HWC


def _strip_to_rgb(strip: Image.Image, alpha: str) -> Rgb:
    if strip.mode in _UNPREMULTIPLIED:
        strip = strip.convert(_UNPREMULTIPLIED[strip.mode])
    if alpha == "keep":
        return np.asarray(strip.convert("RGBA"))
    if strip.has_transparency_data and alpha == "white":
        white = Image.new("RGBA", strip.size, "white")
        strip = Image.alpha_composite(white, strip.convert("RGBA"))
    strip.info.pop("transparency", None)
    return np.asarray(strip.convert("RGB"))


def _strip_from_16_bit(strip: Image.Image, alpha: str, depth: int) -> Rgb:
    """Keep the upper 8 bits. Pillow's own conversion would clip at 255 and give a white image."""
    grey_HW = np.asarray(strip)
    scaled_HW = (grey_HW >> (depth - 8)).astype(np.uint8)
    if alpha == "keep":
        alpha_HW = np.where(grey_HW == strip.info["transparency"], 0, 255).astype(np.uint8)
        return np.stack([scaled_HW] * 3 + [alpha_HW], axis=2)
    if alpha == "white" and "transparency" in strip.info:
        scaled_HW[grey_HW == strip.info["transparency"]] = 255
    return np.repeat(scaled_HW[:, :, None], 3, axis=2)


def _rescale_transparency(image: Image.Image, bit_depth: int) -> None:
    """Convert a PNG's transparent colour from the file's depth, in which Pillow leaves it, to the pixels' 8 bits."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int) and bit_depth in (2, 4):
        image.info["transparency"] = colour * 255 // ((1 << bit_depth) - 1)
    elif image.mode == "RGB" and isinstance(colour, tuple) and bit_depth == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def _upright(rgb_HWC: Rgb, orientation: int) -> Rgb:
    """Undo an EXIF orientation: 2 to 4 mirror, 5 to 8 exchange rows and columns first."""
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
