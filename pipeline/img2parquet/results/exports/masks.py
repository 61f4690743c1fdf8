"""Decode a stored mask (PNG or COCO run lengths) to class ids at the source image's size, and split it into regions.

Shapes: H W the source image, h w the stored mask.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from img2parquet.outputs.segmentation import class_ids
from img2parquet.results.exports.rows import class_names

__all__ = ["Box", "Ids", "Region", "box", "class_map", "class_names", "regions", "runs"]
Ids = npt.NDArray[np.integer[Any]]
Region = npt.NDArray[np.bool_]
NOWHERE = -1  # a pixel without a class


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels, [left, right) x [top, bottom)."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def xywh(self) -> list[int]:
        return [self.left, self.top, self.right - self.left, self.bottom - self.top]


def class_map(stored: bytes | Sequence[dict[str, Any]], height: int, width: int) -> Ids:
    """Decode a mask to (H, W) class ids. A mask of another size is scaled to it by nearest pixel."""
    if isinstance(stored, bytes):
        ids_hw: Ids = _of_png(stored)
    elif stored:
        ids_hw = class_ids(stored, NOWHERE)
    else:
        return np.full((height, width), NOWHERE)
    if ids_hw.shape == (height, width):
        return ids_hw
    image = Image.fromarray(ids_hw.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image)


def regions(ids_HW: Ids) -> Iterator[tuple[int, Region, Box]]:
    """Yield each class in the mask with its region and bounding box."""
    for k in np.unique(ids_HW):
        if k != NOWHERE:
            region_HW = ids_HW == k
            yield int(k), region_HW, box(region_HW)


def box(region_HW: Region) -> Box:
    """Return the smallest box around the region's pixels."""
    rows, columns = np.flatnonzero(region_HW.any(1)), np.flatnonzero(region_HW.any(0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def runs(flat_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the run lengths of a flat mask of 0 and 1, starting with the run of 0s, which may be empty."""
    edges = np.flatnonzero(np.diff(flat_N.astype(np.int8))) + 1
    counts = np.diff(edges, prepend=0, append=len(flat_N))
    return np.concatenate([[0], counts]) if len(flat_N) and flat_N[0] else counts


def _of_png(data: bytes) -> Ids:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(np.int32)
