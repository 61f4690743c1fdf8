"""Pixels to the uint8 crop of a model's size; rescale and normalise happen on the device.

Contract (being implemented): geometry and arithmetic equal the checkpoint's own image processor (torchvision
backend) to the last uint8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


@dataclass(frozen=True)
class PreprocessSettings:
    """What a checkpoint's processor does to an RGB image; the values as they are used, not as they are spelled.

    resize: "shortest_edge" scales so that the short side is `resize_height`; "exact" squashes to height x width;
    "none" leaves it. crop is None or a centre crop (zero-padded where the image is smaller)."""

    resize: Literal["shortest_edge", "exact", "none"]
    resize_height: int
    resize_width: int
    resample: Resample
    crop_height: int | None
    crop_width: int | None
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def size_HW(self) -> tuple[int, int]:
        """Height and width of what reaches the model."""
        if self.crop_height is not None and self.crop_width is not None:
            return self.crop_height, self.crop_width
        return self.resize_height, self.resize_width
