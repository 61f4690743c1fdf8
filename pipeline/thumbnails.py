"""Image bytes -> a small WebP, decoded by the same decoder and within limits like the run's."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.decode import DecodePolicy, decode
from pipeline.schema import Bad, Pixels

LARGE_PX, SMALL_PX = 176, 72  # the longer side: in galleries; under the pointer on the map
QUALITY = 68
MOST_PIXELS = 89_478_485


@dataclass(frozen=True)
class Thumb:
    """A WebP and its size in pixels."""

    data: bytes
    width: int
    height: int


def thumb(image: bytes, longer_px: int, salvage: bool = False) -> Thumb | None:
    """None where the bytes do not decode enough. `salvage` accepts JPEGs that end early, grey where data is missing."""
    policy = DecodePolicy(max_pixels=MOST_PIXELS, salvage=salvage)
    pixels = decode(image, policy, lambda size_HW: _shrink(size_HW, longer_px))
    return None if isinstance(pixels, Bad) else shrunk(pixels, longer_px)


def shrunk(pixels: Pixels, longer_px: int) -> Thumb:
    return encode(Image.fromarray(np.ascontiguousarray(pixels.rgb_HWC)), longer_px)


def encode(image: Image.Image, longer_px: int) -> Thumb:
    scale = min(1.0, longer_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) if size != image.size else image
    sink = io.BytesIO()
    small.save(sink, "WEBP", quality=QUALITY, method=4)
    return Thumb(sink.getvalue(), *small.size)


def _shrink(size_HW: tuple[int, int], longer_px: int) -> int:
    return next((by for by in (4, 2) if max(size_HW) >= 2 * by * longer_px), 1)
