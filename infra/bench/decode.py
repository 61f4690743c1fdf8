"""Compare decoding JPEGs to LeViT's uint8 crop (short side 256, centre 224), `exact` and `fast`, with Pillow,
transformers and, where installed, OpenCV and torchvision, in images per second of one core.

* transformers' processor returns normalised float32, which its users feed to a model; the others stop at uint8.
* Images per second and ratios use CPU seconds: each contestant has one thread, and cores are what users pay for.
* How far `fast` moves embeddings of trained models is measured too (infra/bench/drift.py).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import numpy as np
from PIL import Image

from infra.bench import drift, machine
from infra.bench.contest import HOW, Array, Call, Record, Rules, compete, progress
from infra.bench.jpegs import ImageSet, describe, generate
from infra.bench.report import Bar, Report

PILLOW, TRANSFORMERS, OURS, FAST = "Pillow", "transformers, PIL processor", "ours", "ours, fast"
SETS = (
    ImageSet(
        "imagenet-like", 96, (420, 375), 0.2, 10.0, (85, 96),
        {(OURS, PILLOW): 1.6, (OURS, TRANSFORMERS): 2.4, (FAST, OURS): 0.97},
    ),
    ImageSet("1600x1200", 12, (1600, 1200), 0.0, 7.0, (85, 96), {(OURS, PILLOW): 2.0, (FAST, PILLOW): 2.7}),
    ImageSet("12-megapixel", 3, (4032, 3024), 0.0, 5.0, (80, 92)),
)  # fmt: skip
EDGE, SIDE = 256, 224
COLUMNS = (
    "image set",
    "images/s/core",
    "CPU ms/image",
    "x Pillow",
    "x transformers",
    "floor",
    "largest difference",
    "mean",
    "turns",
)


def report(rules: Rules, threads: int, only: Sequence[str], sets: Sequence[ImageSet] = SETS) -> Report:
    """Write the report. `threads` is ignored: decoding is measured per core."""
    load_at_start, rows, bars, agrees, seen = machine.load(), list[Sequence[str]](), list[Bar](), True, list[str]()
    for images in sets:
        if only and images.name not in only:
            continue
        count = min(2, images.count) if rules.quick else images.count
        files = generate(images, count)
        measured = compete({one.name: partial(prepare, one.name, files) for one in contestants()}, rules)
        rows += table(images, measured, count)
        bars += bars_of(images, measured)
        progress(images.name, measured)
        agrees = agrees and all(differs(measured, one).max() <= one.tolerance for one in contestants())
        seen.append(f"{images.name}: {describe(files)}")
    drifts = drift.measure(8 if rules.quick else drift.CROPS)
    about = [
        f"{machine.cpu()}; load average {load_at_start} at the start, {machine.load()} at the end",
        machine.versions(("pillow", "simplejpeg", "torch", "transformers", "numpy")),
        *seen,
        *(f"{one.name}: not measured, no {one.needs} here" for one in CONTESTANTS if not one.is_installed),
        f"one thread, CPU seconds, medians of {rules.rounds} turns of at least {rules.round_s:g} s",
        HOW,
        "`our allocator settings` are those that our workers set for themselves; the floors are for those without",
        "differences are from Pillow of this run, in levels of 255; OpenCV's filters are others, or do not average",
    ]
    title = "JPEG bytes to the model's crop, one core"
    return Report("decode", title, about, COLUMNS, rows, bars, agrees, notes=[drift.markdown(drifts)])


def prepare(name: str, files: Sequence[bytes]) -> Call:
    """Prepare a contestant, in its own process."""
    one = next(one for one in CONTESTANTS if one.name == name)
    if one.allocator:
        from img2parquet.inference.allocator import keep_freed_memory

        keep_freed_memory()
    return one.make(files)


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


def _torchvision(files: Sequence[bytes]) -> Call:
    """Return transformers' default processor when torchvision is installed."""
    import torch
    from transformers import LevitImageProcessor

    torch.set_num_threads(1)
    processor = LevitImageProcessor()

    def call() -> Array:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        normalised: Array = processor(images, return_tensors="pt")["pixel_values"].numpy()
        return normalised

    return call


def _opencv(files: Sequence[bytes], filter_name: str) -> Call:
    import cv2

    cv2.setNumThreads(1)
    interpolation = getattr(cv2, filter_name)

    def crop(file: bytes) -> Array:
        image = cv2.cvtColor(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        short = min(image.shape[:2])
        height, width = (int(EDGE * side / short) for side in image.shape[:2])
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        resized: Array = cv2.resize(image, (width, height), interpolation=interpolation)
        return resized[top : top + SIDE, left : left + SIDE]

    return lambda: np.stack([crop(file) for file in files])


def _ours(files: Sequence[bytes], mode: Literal["exact", "fast"]) -> Call:
    import torch

    from img2parquet.images.decode import decode
    from img2parquet.images.jpeg_scaling import shrink_for
    from img2parquet.images.preprocess import Preprocessor, read_settings
    from img2parquet.schema import Rejection

    torch.set_num_threads(1)
    cropper = Preprocessor(read_settings(None, "LevitImageProcessor"))
    shrink = partial(shrink_for, [cropper.settings]) if mode == "fast" else None

    def crop(file: bytes, out: Array) -> None:
        pixels = decode(file, shrink=shrink)
        assert not isinstance(pixels, Rejection), pixels
        cropper(pixels, out)

    def call() -> Array:
        crops_BHWC = np.empty((len(files), SIDE, SIDE, 3), np.uint8)
        for file, out in zip(files, crops_BHWC, strict=True):
            crop(file, out)
        return crops_BHWC

    return call


@dataclass(frozen=True)
class Contestant:
    """One way from files to crops; `tolerance` is its largest allowed difference from Pillow, in levels."""

    name: str
    make: Callable[[Sequence[bytes]], Call]
    tolerance: float
    allocator: bool = False
    normalises: bool = False
    needs: str = "numpy"

    @property
    def is_installed(self) -> bool:
        return find_spec(self.needs) is not None


ROUNDING = 2  # torch's resize rounds in a different order from Pillow's
ANY = float("inf")
MEMORY = "our allocator settings"
_EXACT, _FAST = partial(_ours, mode="exact"), partial(_ours, mode="fast")
CONTESTANTS = (
    Contestant(PILLOW, _pillow, 0),
    Contestant(f"{PILLOW}, {MEMORY}", _pillow, 0, allocator=True),
    Contestant(TRANSFORMERS, _transformers, ROUNDING, normalises=True),
    Contestant("transformers, torchvision processor", _torchvision, ROUNDING, normalises=True, needs="torchvision"),
    Contestant("OpenCV, INTER_AREA", partial(_opencv, filter_name="INTER_AREA"), ANY, needs="cv2"),
    Contestant("OpenCV, INTER_LINEAR", partial(_opencv, filter_name="INTER_LINEAR"), ANY, needs="cv2"),
    Contestant(OURS, _EXACT, ROUNDING),
    Contestant(f"{OURS}, {MEMORY}", _EXACT, ROUNDING, allocator=True),
    Contestant(FAST, _FAST, drift.MOST_LEVELS),
    Contestant(f"{FAST}, {MEMORY}", _FAST, drift.MOST_LEVELS, allocator=True),
)


def contestants() -> list[Contestant]:
    return [one for one in CONTESTANTS if one.is_installed]


def table(images: ImageSet, measured: Mapping[str, Record], count: int) -> list[Sequence[str]]:
    pillow_s, transformers_s = measured[PILLOW].cpu_s, measured[TRANSFORMERS].cpu_s
    rows = [[f"**{images.name}**", *[""] * (len(COLUMNS) - 1)]]
    for one in contestants():
        record, difference = measured[one.name], differs(measured, one)
        floors = [f"{floor:g} x {_short(rival)}" for (name, rival), floor in images.floors.items() if name == one.name]
        rows.append(
            [
                one.name,
                f"{count / record.cpu_s:.0f}",
                f"{record.cpu_s / count * 1e3:.2f}",
                f"{pillow_s / record.cpu_s:.2f}",
                f"{transformers_s / record.cpu_s:.2f}",
                ", ".join(floors),
                f"{difference.max():.0f}",
                f"{difference.mean():.3f}",
                f"{record.clean} of {len(record.turns)}",
            ]
        )
    return list(rows)


def _short(name: str) -> str:
    return "exact" if name == OURS else name.partition(",")[0]


def bars_of(images: ImageSet, measured: Mapping[str, Record]) -> list[Bar]:
    return [
        Bar(f"{images.name}, {_mode(name)}, x {_short(rival)}", measured[rival].cpu_s / measured[name].cpu_s, floor)
        for (name, rival), floor in images.floors.items()
    ]


def _mode(name: str) -> str:
    return "fast" if name == FAST else "exact"


def differs(measured: Mapping[str, Record], one: Contestant) -> Array:
    """Compute differences from Pillow, in levels."""
    reference_BHWC, crops_BHWC = measured[PILLOW].output.astype(np.float32), measured[one.name].output
    if one.normalises:
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        crops_BHWC = np.rint((crops_BHWC.transpose(0, 2, 3, 1) * std + mean) * 255)
    difference: Array = np.abs(crops_BHWC - reference_BHWC)
    return difference
