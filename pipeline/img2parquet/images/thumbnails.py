"""Make small WebP images from image bytes, with the decoder and the limits of a job."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.schema import Pixels, Rejection

LARGE_PX, SMALL_PX = 176, 72  # the longer side: in galleries, and under the pointer on the map
QUALITY = 68
MAX_PIXELS = 89_478_485


@dataclass(frozen=True)
class Thumb:
    """A WebP and its size in pixels."""

    data: bytes
    width: int
    height: int


def thumb(image: bytes, longer_px: int, salvage: bool = False) -> Thumb | None:
    """Make a thumbnail whose longer side is at most `longer_px`; return None when the bytes cannot be decoded.

    salvage: accept JPEGs that end early, grey where data is missing."""
    policy = DecodePolicy(max_pixels=MAX_PIXELS, salvage=salvage)
    pixels = decode(image, policy, lambda size_HW: _shrink_factor(size_HW, longer_px))
    return None if isinstance(pixels, Rejection) else _encode(pixels, longer_px)


def _encode(pixels: Pixels, longer_px: int) -> Thumb:
    image = Image.fromarray(np.ascontiguousarray(pixels.rgb_HWC))
    scale = min(1.0, longer_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) if size != image.size else image
    sink = io.BytesIO()
    small.save(sink, "WEBP", quality=QUALITY, method=4)
    return Thumb(sink.getvalue(), *small.size)


def _shrink_factor(size_HW: tuple[int, int], longer_px: int) -> int:
    return next((factor for factor in (4, 2) if max(size_HW) >= 2 * factor * longer_px), 1)
