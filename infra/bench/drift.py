"""Measure how far `preprocess: fast` and `pil` move pixels and the results of two small trained models from those of
`exact`, compared with alternatives that are not offered and with the effect of bfloat16 on the same pixels.

* The demo's photographs, from regions held out of training, as sensors of 440 to 1740 rows would see them: short sides
  spread evenly on a logarithmic scale, so that JPEGs are decoded at 1/2 and 1/4 with little and with much to spare.
* The cosine is centred: computed after subtracting the exact embeddings' mean, since the plain cosine flatters.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from img2parquet.images.decode import decode
from img2parquet.images.jpeg_scaling import SPARE, shrink_for
from img2parquet.images.preprocess import Preprocessor, PreprocessSettings
from img2parquet.models import load_model
from img2parquet.models.model import Model
from img2parquet.schema import Pixels, Rejection
from infra.bench.contest import Array
from infra.bench.jpegs import photographed
from infra.demo.photos import PHOTOS, Photo, held_out_box

CROPS = 256
MOST_LEVELS = 12  # of 255: the most `fast` may move any one value
CHECKPOINTS = Path(__file__).parents[1] / "demo" / "checkpoints"
SHORT_SIDES, ASPECTS = (440, 1740), (1.0, 1.5)


@dataclass(frozen=True)
class Drift:
    """The distance of one way from the exact one, for one model."""

    model: str
    way: str
    most_levels: float
    mean_levels: float
    most_shift: float  # of the mean of a channel of an image, in levels
    mean_cosine: float
    least_cosine: float
    agreement: float  # of the best class, of images or of a map's pixels
    accuracy: float | None  # of the labels, where the model was trained for them


@dataclass(frozen=True)
class Seen:
    """A model's results for one way's crops."""

    crops_BHWC: Array
    embeddings_BD: Array
    classes_B: Array  # or (B, h, w)


def measure(count: int = CROPS) -> list[Drift]:
    """Measure every way with both models."""
    files, labels_B = photographs(count)
    return [drift for model in MODELS for drift in _of_model(model, files, labels_B)]


def photographs(count: int, seed: int = 5) -> tuple[list[bytes], Array]:
    """Make JPEG files, with the number of the photo that each shows."""
    random = np.random.default_rng(seed)
    chosen = [int(index) for index in random.integers(len(PHOTOS), size=count)]
    return [_photograph(PHOTOS[index], random) for index in chosen], np.array(chosen)


def _photograph(photo: Photo, random: np.random.Generator) -> bytes:
    pixels = photo.pixels()
    held = held_out_box(photo, pixels.shape[1], pixels.shape[0])
    side = int(random.integers(96, min(200, held.width, held.height), endpoint=True))
    left = int(random.integers(held.left, held.right - side, endpoint=True))
    top = int(random.integers(held.top, held.bottom - side, endpoint=True))
    short, aspect = np.exp(random.uniform(*np.log(SHORT_SIDES))), random.uniform(*ASPECTS)
    size = (round(short * aspect), round(short)) if random.random() < 0.5 else (round(short), round(short * aspect))
    scene = Image.fromarray(pixels[top : top + side, left : left + side])
    file = io.BytesIO()
    image = photographed(scene, size, grain=6.0, random=random)
    image.save(file, "JPEG", quality=int(random.integers(85, 96)), subsampling=str(random.choice(["4:2:0", "4:4:4"])))
    return file.getvalue()


# --- ways ------------------------------------------------------------------------------------------------------------

Way = Callable[[bytes, PreprocessSettings], "Pixels | Rejection"]
EXACT, FAST, PIL, BFLOAT16 = "exact", "fast", "pil", "exact, bfloat16"


def _exact(file: bytes, settings: PreprocessSettings) -> Pixels | Rejection:
    return decode(file)


def _fast(file: bytes, settings: PreprocessSettings) -> Pixels | Rejection:
    return decode(file, shrink=partial(shrink_for, [settings]))


def _twice_as_small(file: bytes, settings: PreprocessSettings) -> Pixels | Rejection:
    return decode(file, shrink=lambda source_HW: 2 * shrink_for([settings], source_HW))


def _eighths(file: bytes, settings: PreprocessSettings) -> Pixels | Rejection:
    """Find libjpeg's smallest size that leaves as much as `fast` does; a partial last row counts as whole."""
    width, height = Image.open(io.BytesIO(file)).size
    least = SPARE * max(settings.resize_height, settings.resize_width)
    smaller = simplejpeg.decode_jpeg(file, "RGB", min_height=least, min_width=least)
    return Pixels(smaller, (), 1, (height, width))


def _fastdct(file: bytes, settings: PreprocessSettings) -> Pixels | Rejection:
    return Pixels(simplejpeg.decode_jpeg(file, "RGB", fastdct=True, fastupsample=True))


WAYS: Mapping[str, Way] = {
    FAST: _fast,
    PIL: _exact,
    "not offered: twice as small": _twice_as_small,
    "not offered: N/8 as simplejpeg gives it": _eighths,
    "not offered: fastdct": _fastdct,
    BFLOAT16: _exact,
}
EMBEDDING = "pooled:mean"
MODELS = {"levit-photos": "logits", "beit-textures": "segmentation"}  # and where its classes are


def _of_model(name: str, files: Sequence[bytes], labels_B: Array) -> list[Drift]:
    model = load_model(str(CHECKPOINTS / name))
    others = {
        BFLOAT16: load_model(str(CHECKPOINTS / name), dtype="bfloat16"),
        PIL: load_model(str(CHECKPOINTS / name), preprocess="pil"),
    }
    reference = _see(model, files, _exact)
    drifts = [_drift(name, EXACT, reference, reference, labels_B)]
    for way, pixels_of in WAYS.items():
        seen = _see(others.get(way, model), files, pixels_of)
        drifts.append(_drift(name, way, seen, reference, labels_B))
    return drifts


def _see(model: Model, files: Sequence[bytes], way: Way) -> Seen:
    settings, feature = model.card.preprocess, MODELS[model.card.name]
    cropper, crops = Preprocessor(settings), []
    for file in files:
        pixels = way(file, settings)
        crop = pixels if isinstance(pixels, Rejection) else cropper(pixels)
        assert not isinstance(crop, Rejection), crop
        crops.append(crop)
    crops_BHWC = np.stack(crops)
    features = model.forward_pixels(crops_BHWC, frozenset({EMBEDDING, feature}))
    return Seen(crops_BHWC, features[EMBEDDING].numpy(), features[feature].argmax(1).numpy())


def _drift(model: str, way: str, seen: Seen, reference: Seen, labels_B: Array) -> Drift:
    difference_BHWC = seen.crops_BHWC.astype(np.float32) - reference.crops_BHWC
    mean_D = reference.embeddings_BD.mean(axis=0)
    cosines_B = _cosines(seen.embeddings_BD - mean_D, reference.embeddings_BD - mean_D)
    known = MODELS[model] == "logits"
    return Drift(
        model=model,
        way=way,
        most_levels=float(np.abs(difference_BHWC).max()),
        mean_levels=float(np.abs(difference_BHWC).mean()),
        most_shift=float(np.abs(difference_BHWC.mean(axis=(1, 2))).max()),
        mean_cosine=float(cosines_B.mean()),
        least_cosine=float(cosines_B.min()),
        agreement=float((seen.classes_B == reference.classes_B).mean()),
        accuracy=float((seen.classes_B == labels_B).mean()) if known else None,
    )


def _cosines(a_BD: Array, b_BD: Array) -> Array:
    cosines_B: Array = (a_BD * b_BD).sum(1) / (np.linalg.norm(a_BD, axis=1) * np.linalg.norm(b_BD, axis=1))
    return cosines_B


# --- the page --------------------------------------------------------------------------------------------------------

COLUMNS = ("model, way", "largest", "mean", "colour shift", "centred cosine", "least", "same class", "accuracy")


def markdown(drifts: Sequence[Drift]) -> str:
    head = [
        "## What `preprocess: fast` and `pil` change",
        "Differences from `exact` in levels of 255, of embeddings, and of the best class (levit-photos: of the image, "
        "with its accuracy on these held-out regions; beit-textures: of each pixel of its map).",
        "| " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * (len(COLUMNS) - 1),
    ]
    return "\n\n".join(head) + "\n" + "\n".join(map(_row, drifts))


def _row(drift: Drift) -> str:
    cells = [
        f"{drift.model}, {drift.way}",
        f"{drift.most_levels:.0f}",
        f"{drift.mean_levels:.2f}",
        f"{drift.most_shift:.2f}",
        f"{drift.mean_cosine:.5f}",
        f"{drift.least_cosine:.4f}",
        f"{drift.agreement:.4f}",
        "" if drift.accuracy is None else f"{drift.accuracy:.4f}",
    ]
    return "| " + " | ".join(cells) + " |"
