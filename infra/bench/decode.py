"""JPEG bytes to the uint8 crop that LeViT takes (short side 256, centre 224) beside Pillow and transformers; images per
second of one core.

* The images are generated: crops of the photographs that the demo uses, in random sizes and encodings, with the grain
  of a sensor. The same seed gives the same files.
* transformers' processor gives normalised float32, which is what its users feed; the others stop at uint8.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from infra.bench import machine
from infra.bench.contest import HOW, Array, Call, Record, Rules, compete, progress
from infra.bench.report import Bar, Report


@dataclass(frozen=True)
class ImageSet:
    """Images to generate, and the least that ours must be ahead, by contestant."""

    name: str
    count: int
    size: tuple[int, int]  # width and height, the mean where they are spread
    spread: float  # of each side, as a share of it
    grain: float  # standard deviation of the noise
    quality: tuple[int, int]
    floors: Mapping[str, float] = field(default_factory=dict)


PILLOW, TRANSFORMERS, OURS = "Pillow", "transformers, PIL processor", "ours"
SETS = (
    ImageSet("imagenet-like", 96, (420, 375), 0.2, 10.0, (85, 96), {PILLOW: 1.6, TRANSFORMERS: 2.4}),
    ImageSet("1600x1200", 12, (1600, 1200), 0.0, 7.0, (85, 96), {PILLOW: 2.0}),
)
SUBSAMPLING = ("4:2:0", "4:4:4", "4:2:2")
TOLERANCE = 2  # of 255, from Pillow: torch's resize rounds in another order
EDGE, SIDE = 256, 224
COLUMNS = (
    "image set",
    "images/s",
    "CPU ms/image",
    "x Pillow",
    "x transformers",
    "floor",
    "largest difference",
    "turns",
)


def report(rules: Rules, threads: int, only: Sequence[str], sets: Sequence[ImageSet] = SETS) -> Report:
    """`threads` is not read: decoding is measured per core."""
    load_at_start, rows, bars, agrees, seen = machine.load(), list[Sequence[str]](), list[Bar](), True, list[str]()
    for images in sets:
        if only and images.name not in only:
            continue
        count = 2 if rules.quick else images.count
        files = generate(images, count)
        measured = compete({name: partial(prepare, name, files) for name in CONTESTANTS}, rules)
        rows += table(images, measured, count)
        bars += bars_of(images, measured)
        progress(images.name, measured)
        agrees = agrees and all(differs(measured, name) <= TOLERANCE for name in CONTESTANTS)
        seen.append(f"{images.name}: {describe(files)}")
    about = [
        f"{machine.cpu()}; load average {load_at_start} at the start, {machine.load()} at the end",
        machine.versions(("pillow", "simplejpeg", "torch", "transformers", "numpy")),
        *seen,
        f"one thread, medians of {rules.rounds} turns of at least {rules.round_s:g} s",
        HOW,
        "`our allocator settings` are those that our workers set for themselves; the floors are for `ours` without",
        "`largest difference` from Pillow of this run, in levels of 255",
    ]
    title = "JPEG bytes to the model's crop, one core"
    return Report("decode", title, about, COLUMNS, rows, bars, agrees)


def prepare(name: str, files: Sequence[bytes]) -> Call:
    """Runs in the contestant's own process."""
    name, _, allocator = name.partition(", our")
    if allocator:
        from pipeline.embed import keep_freed_memory

        keep_freed_memory()
    return _MAKERS[name](files)


def _pillow(files: Sequence[bytes]) -> Call:
    def crop(file: bytes) -> Array:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        short = min(image.size)
        width, height = (int(EDGE * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))

    return lambda: np.stack([crop(file) for file in files])


def _transformers(files: Sequence[bytes]) -> Call:
    from transformers import LevitImageProcessorPil

    processor = LevitImageProcessorPil()

    def call() -> Array:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        normalised: Array = processor(images, return_tensors="np")["pixel_values"]
        return normalised

    return call


def _ours(files: Sequence[bytes]) -> Call:
    import torch

    from pipeline.decode import decode
    from pipeline.preprocess import Preprocessor, read_settings
    from pipeline.schema import Bad

    torch.set_num_threads(1)
    cropper = Preprocessor(read_settings(None, "LevitImageProcessor"))

    def crop(file: bytes, out: Array) -> None:
        pixels = decode(file)
        assert not isinstance(pixels, Bad), pixels
        cropper(pixels, out)

    def call() -> Array:
        crops_BHWC = np.empty((len(files), SIDE, SIDE, 3), np.uint8)
        for file, out in zip(files, crops_BHWC, strict=True):
            crop(file, out)
        return crops_BHWC

    return call


_MAKERS: dict[str, Callable[[Sequence[bytes]], Call]] = {PILLOW: _pillow, TRANSFORMERS: _transformers, OURS: _ours}
CONTESTANTS = (PILLOW, f"{PILLOW}, our allocator settings", TRANSFORMERS, OURS, f"{OURS}, our allocator settings")


def generate(images: ImageSet, count: int, seed: int = 0) -> list[bytes]:
    """JPEG files: a tenth grey or progressive, most with halved colour, as photographs on the web are."""
    from infra.demo.photos import PHOTOS

    random, photos = np.random.default_rng(seed), [photo.pixels() for photo in PHOTOS]
    return [_one(images, photos[index % len(photos)], random) for index in range(count)]


def _one(images: ImageSet, photo: Array, random: np.random.Generator) -> bytes:
    width, height = (round(side * random.uniform(1 - images.spread, 1 + images.spread)) for side in images.size)
    source = _crop(Image.fromarray(photo), width / height, random).resize((width, height), Image.Resampling.LANCZOS)
    grain_HWC = random.normal(0, images.grain, (height, width, 3))
    image = Image.fromarray((np.asarray(source) * random.uniform(0.8, 1.1) + grain_HWC).clip(0, 255).astype(np.uint8))
    if random.random() < 0.02:
        image = image.convert("L")
    options: dict[str, Any] = {"quality": int(random.integers(*images.quality, endpoint=True))}
    options |= {"subsampling": str(random.choice(SUBSAMPLING, p=[0.6, 0.35, 0.05]))} if image.mode == "RGB" else {}
    file = io.BytesIO()
    image.save(file, "JPEG", progressive=bool(random.random() < 0.06), **options)
    return file.getvalue()


def _crop(photo: Image.Image, aspect: float, random: np.random.Generator) -> Image.Image:
    """A random part of that shape, half to all of what fits."""
    width = min(photo.width, photo.height * aspect) * random.uniform(0.5, 1)
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - width / aspect)
    return photo.crop((round(left), round(top), round(left + width), round(top + width / aspect)))


def describe(files: Sequence[bytes]) -> str:
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    width, height = (round(float(np.mean(sides))) for sides in zip(*sizes, strict=True))
    kilobytes = np.mean([len(file) for file in files]) / 1000
    return f"{len(files)} generated JPEGs of {width}x{height} and {kilobytes:.0f} kB in the mean"


def table(images: ImageSet, measured: Mapping[str, Record], count: int) -> list[Sequence[str]]:
    pillow_s, transformers_s = measured[PILLOW].wall_s, measured[TRANSFORMERS].wall_s
    rows = [[f"**{images.name}**", *[""] * (len(COLUMNS) - 1)]]
    for name in CONTESTANTS:
        record = measured[name]
        floors = ", ".join(f"{floor:g} x {rival.partition(',')[0]}" for rival, floor in images.floors.items())
        rows.append(
            [
                name,
                f"{count / record.wall_s:.0f}",
                f"{record.cpu_s / count * 1e3:.2f}",
                f"{pillow_s / record.wall_s:.2f}",
                f"{transformers_s / record.wall_s:.2f}",
                floors if name == OURS else "",
                f"{differs(measured, name):.0f}",
                f"{record.clean} of {len(record.turns)}",
            ]
        )
    return list(rows)


def bars_of(images: ImageSet, measured: Mapping[str, Record]) -> list[Bar]:
    ours_s = measured[OURS].wall_s
    return [
        Bar(f"{images.name}, x {rival.partition(',')[0]}", measured[rival].wall_s / ours_s, floor)
        for rival, floor in images.floors.items()
    ]


def differs(measured: Mapping[str, Record], name: str) -> float:
    """Largest difference from Pillow, in levels."""
    reference_BHWC, crops_BHWC = measured[PILLOW].output.astype(np.float32), measured[name].output
    if name == TRANSFORMERS:
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        crops_BHWC = np.rint((crops_BHWC.transpose(0, 2, 3, 1) * std + mean) * 255)
    return float(np.abs(crops_BHWC - reference_BHWC).max())
