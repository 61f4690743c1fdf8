"""Shards that are large in one way, made cheaply: many images, many bytes, many pixels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.bad_images import picture

BLOCK = 512


def many_images(path: Path, count: int) -> None:
    """One tar of tiny JPEGs."""
    data = _encoded(picture(48, 64), "JPEG")
    body = data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")
    with path.open("wb") as file:
        for number in range(count):
            file.write(_header(f"{number:06d}.jpg", len(data)) + body)
        file.write(bytes(2 * BLOCK))


def many_bytes(path: Path, count: int, each_bytes: int) -> None:
    """One tar of JPEGs of `each_bytes`, a multiple of 512: a small picture, and zeros behind its end, which are holes
    in the file."""
    data = _encoded(picture(48, 64), "JPEG")
    with path.open("wb") as file:
        for number in range(count):
            at = number * (BLOCK + each_bytes)
            file.seek(at)
            file.write(_header(f"{number:06d}.jpg", each_bytes) + data)
        file.truncate(count * (BLOCK + each_bytes) + 2 * BLOCK)


def many_pixels(path: Path, height: int, width: int, count: int) -> None:
    """One tar of `count` JPEGs, progressive every second, and as many PNGs, all of that size."""
    tile = picture(250, 250)
    image = Image.fromarray(np.tile(tile, (-(-height // 250), -(-width // 250), 1))[:height, :width])
    plain, progressive = _encoded(image, "JPEG"), _encoded(image, "JPEG", progressive=True)
    png = _encoded(image, "PNG", compress_level=1)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for name, data in (("jpg", progressive if number % 2 else plain), ("png", png)):
                info = tarfile.TarInfo(f"{number:03d}-{name}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    return info.tobuf(tarfile.USTAR_FORMAT)


def _encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:  # type: ignore[type-arg]
    sink = io.BytesIO()
    picture_ = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture_.save(sink, kind, **options)
    return sink.getvalue()
