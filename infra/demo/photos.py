"""Divide the photographs in scikit-image's and scikit-learn's wheels into train and held-out regions.

* Nothing is downloaded: only files in the installed packages are used.
* One quarter of each photo, at a corner, is held out; the rest, less a gap, is for training. The demo's shards are
  cut from held-out regions only, so it prints the accuracy on pixels that no training step has seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

GAP = 16  # pixels: two blocks of those sources that are JPEGs


class Box(NamedTuple):
    """A box in pixels; right and bottom are exclusive, as in PIL."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def overlaps(self, other: Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


@dataclass(frozen=True, slots=True)
class Photo:
    name: str
    package: str
    file: str
    held_out: Literal["top_left", "top_right", "bottom_left", "bottom_right"]
    shrink: int = 1  # where a crop of the original would show too little

    @property
    def path(self) -> Path:
        found = importlib.util.find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(
                f"error: the demo's photos are part of `{self.package}`\nhint: pip install 'img2parquet[demo]'"
            )
        return Path(found.submodule_search_locations[0]) / self.file

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Load RGB pixels, (height, width, 3)."""
        image = Image.open(self.path).convert("RGB")
        return np.asarray(image.reduce(self.shrink) if self.shrink > 1 else image)

    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png", "top_left"),
    Photo("brick", "skimage", "data/brick.png", "top_right"),
    Photo("cameraman", "skimage", "data/camera.png", "top_left"),
    Photo("cat", "skimage", "data/chelsea.png", "bottom_right"),
    Photo("coffee", "skimage", "data/coffee.png", "bottom_left"),
    Photo("coins", "skimage", "data/coins.png", "bottom_right"),
    Photo("grass", "skimage", "data/grass.png", "top_left"),
    Photo("gravel", "skimage", "data/gravel.png", "bottom_left"),
    Photo("galaxies", "skimage", "data/hubble_deep_field.jpg", "bottom_right"),
    Photo("tissue", "skimage", "data/ihc.png", "bottom_right"),
    Photo("moon", "skimage", "data/moon.png", "top_right"),
    Photo("motorcycle", "skimage", "data/motorcycle_left.png", "bottom_right"),
    Photo("retina", "skimage", "data/retina.jpg", "top_right", shrink=2),
    Photo("rocket", "skimage", "data/rocket.jpg", "bottom_right"),
    Photo("pagoda", "sklearn", "datasets/images/china.jpg", "top_left"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg", "bottom_right"),
)
NAMES = tuple(photo.name for photo in PHOTOS)


def held_out_box(photo: Photo, width: int, height: int) -> Box:
    """Return the quarter at the photo's held-out corner."""
    left = 0 if photo.held_out.endswith("left") else width - width // 2
    top = 0 if photo.held_out.startswith("top") else height - height // 2
    return Box(left, top, left + width // 2, top + height // 2)


def train_boxes(photo: Photo, width: int, height: int) -> tuple[Box, Box]:
    """Return the two halves outside the held-out corner, `GAP` away from it; they share the opposite corner."""
    held = held_out_box(photo, width, height)
    beside = Box(held.right + GAP, 0, width, height) if held.left == 0 else Box(0, 0, held.left - GAP, height)
    above_or_below = Box(0, held.bottom + GAP, width, height) if held.top == 0 else Box(0, 0, width, held.top - GAP)
    return beside, above_or_below
