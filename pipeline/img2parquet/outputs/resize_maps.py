"""Upsample class maps to another size, a few classes at a time.

Shapes: K classes, k some of them, h w the head's map, H W the wanted size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from img2parquet.errors import OutputUnavailable
from img2parquet.models import Card

if TYPE_CHECKING:
    from torch import Tensor

SCORE_BYTES = 64 << 20  # of upsampled scores on the device at one time


def upsample_in_chunks(scores_Khw: Tensor, size_HW: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Upsample class maps bilinearly, in chunks: (K, h, w) -> the first class and the maps (k, H, W) of each chunk.

    A large image then does not need K maps of its size in memory. Each map is the same as if all were made at once."""
    import torch.nn.functional as F

    step = max(1, SCORE_BYTES // (4 * size_HW[0] * size_HW[1]))
    for first in range(0, len(scores_Khw), step):
        some_1khw = scores_Khw[None, first : first + step]
        yield first, F.interpolate(some_1khw, size=size_HW, mode="bilinear", align_corners=False)[0]


def require_whole_image(card: Card, wanted_by: str, instead: str) -> None:
    """Check that the model sees the whole source image. Raises OutputUnavailable when it sees a crop.

    The maps of a crop do not cover the source image. instead: the start of the hint, before `whose processor ...`."""
    if not card.preprocess.keeps_whole_image:
        raise OutputUnavailable(
            f"{wanted_by}: model `{card.name}` sees a crop, which has no mask for the whole source image",
            hint=f"{instead} whose processor resizes to its size without a crop",
        )
