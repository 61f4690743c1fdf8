"""Per-class maps brought to another size, a few classes at a time.

Shapes: K classes, k some of them, h w the head's map, H W the wanted size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.errors import OutputUnavailable
from pipeline.models import Card

if TYPE_CHECKING:
    from torch import Tensor

SCORE_BYTES = 64 << 20  # of upsampled scores on the device at one time


def upsampled(scores_Khw: Tensor, size_HW: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """The first class of each chunk and the chunk's maps (k, H, W), bilinear: a large image does not need K maps of its
    size at once, and each class's map is the same as if it had them."""
    import torch.nn.functional as F

    step = max(1, SCORE_BYTES // (4 * size_HW[0] * size_HW[1]))
    for first in range(0, len(scores_Khw), step):
        some_1khw = scores_Khw[None, first : first + step]
        yield first, F.interpolate(some_1khw, size=size_HW, mode="bilinear", align_corners=False)[0]


def require_whole_image(card: Card, wanted_by: str, instead: str) -> None:
    """Raises OutputUnavailable for a model that sees a crop: its maps do not lie on the whole source image."""
    resized = card.preprocess.resize_height, card.preprocess.resize_width
    if card.preprocess.resize != "exact" or card.preprocess.size_HW != resized:
        raise OutputUnavailable(
            f"{wanted_by}: model `{card.name}` sees a crop, which has no mask for the whole source image",
            hint=f"{instead} whose processor resizes to its size without a crop",
        )
