"""Make sets of JPEG files: crops of the demo's photographs in random sizes and encodings, with a sensor's grain.

The same seed gives the same files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from infra.bench.contest import Array


@dataclass(frozen=True)
class ImageSet:
    """Images to generate, and the least factor by which one contestant must beat another on them."""

    name: str
    count: int
    size: tuple[int, int]  # width and height, the mean where they are spread
    spread: float  # of each side, as a share of it
    grain: float  # standard deviation of the noise
    quality: tuple[int, int]
    floors: Mapping[tuple[str, str], float] = field(default_factory=dict)  # (contestant, rival) -> times as fast


SUBSAMPLING = ("4:2:0", "4:4:4", "4:2:2")


def generate(images: ImageSet, count: int, seed: int = 0) -> list[bytes]:
    """Make JPEG files: a few grey or progressive, most with halved colour, like photographs on the web."""
    from infra.demo.photos import PHOTOS

    random, photos = np.random.default_rng(seed), [photo.pixels() for photo in PHOTOS]
    return [_one(images, photos[index % len(photos)], random) for index in range(count)]


def _one(images: ImageSet, photo: Array, random: np.random.Generator) -> bytes:
    width, height = (round(side * random.uniform(1 - images.spread, 1 + images.spread)) for side in images.size)
    image = photographed(_crop(Image.fromarray(photo), width / height, random), (width, height), images.grain, random)
    if random.random() < 0.02:
        image = image.convert("L")
    options: dict[str, Any] = {"quality": int(random.integers(*images.quality, endpoint=True))}
    options |= {"subsampling": str(random.choice(SUBSAMPLING, p=[0.6, 0.35, 0.05]))} if image.mode == "RGB" else {}
    file = io.BytesIO()
    image.save(file, "JPEG", progressive=bool(random.random() < 0.06), **options)
    return file.getvalue()


def photographed(scene: Image.Image, size: tuple[int, int], grain: float, random: np.random.Generator) -> Image.Image:
    """Render a scene as a sensor of that width and height sees it: in different light, with the sensor's noise."""
    source = scene.resize(size, Image.Resampling.LANCZOS)
    grain_HWC = random.normal(0, grain, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(source) * random.uniform(0.8, 1.1) + grain_HWC).clip(0, 255).astype(np.uint8))


def _crop(photo: Image.Image, aspect: float, random: np.random.Generator) -> Image.Image:
    """Cut a random part of that shape, half to all of what fits."""
    width = min(photo.width, photo.height * aspect) * random.uniform(0.5, 1)
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - width / aspect)
    return photo.crop((round(left), round(top), round(left + width), round(top + width / aspect)))


def describe(files: Sequence[bytes]) -> str:
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    width, height = (round(float(np.mean(sides))) for sides in zip(*sizes, strict=True))
    kilobytes = np.mean([len(file) for file in files]) / 1000
    return f"{len(files)} generated JPEGs of {width}x{height} and {kilobytes:.0f} kB in the mean"
