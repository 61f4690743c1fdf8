"""The pictures and processor configurations behind crops.npz, the same bit for bit wherever they are made.

Only integer arithmetic: numpy's own random streams may change between versions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SIZES_HW = {
    "landscape": (333, 517),
    "portrait": (500, 375),
    "small": (150, 97),
    "exact_224": (224, 224),
    "exact_256": (256, 256),
    "odd_margin": (259, 263),
    "one_pixel": (1, 1),
    "wide_strip": (64, 300),
    "tall_strip": (700, 41),
    "one_column": (101, 1),
    "large": (900, 1201),
    "grey": (310, 211),
}

_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_OLD_LEVIT = {"feature_extractor_type": "LevitFeatureExtractor", "size": 288, "crop_size": 288, "do_center_crop": True}

CONFIGS: dict[str, dict[str, Any]] = {  # each as a preprocessor_config.json would say it
    "bit_default": {"image_processor_type": "BitImageProcessor"},
    "bit_hub": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 448},
        "crop_size": {"height": 448, "width": 448},
        "resample": 2,
        **_HALF,
    },
    "bit_padded": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 200}, "crop_size": 225},
    "beit_default": {"image_processor_type": "BeitImageProcessor"},
    "beit_hub": {"feature_extractor_type": "BeitFeatureExtractor", "size": 224, "do_center_crop": False, "resample": 2},
    "beit_ade": {"image_processor_type": "BeitImageProcessor", "size": {"height": 640, "width": 640}, "resample": 3},
    "beit_cropped": {"feature_extractor_type": "BeitFeatureExtractor", "size": 256, "do_center_crop": True},
    "levit_default": {"image_processor_type": "LevitImageProcessor"},
    "levit_288": {**_OLD_LEVIT, "resample": 3},
    "levit_squashed": {"image_processor_type": "LevitImageProcessor", "size": {"height": 240, "width": 250}},
    "vit_default": {"image_processor_type": "ViTImageProcessor"},
    "vit_msn": {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, **_IMAGENET},
    "vit_not_normalised": {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    "vit_not_rescaled": {"image_processor_type": "ViTImageProcessor", "do_rescale": False},
}


def picture(name: str) -> npt.NDArray[np.uint8]:
    """A named picture (H, W, 3): blocks of noise at four scales, with a ramp and hard edges."""
    height, width = SIZES_HW[name]
    seed = 1 + list(SIZES_HW).index(name)
    y_H11, x_1W1, c_11C = np.arange(height)[:, None, None], np.arange(width)[None, :, None], np.arange(3)[None, None, :]
    total_HWC = (5 * y_H11 + 3 * x_1W1 * (c_11C + 1)) % 200
    for scale in (1, 4, 17, 61):
        total_HWC = total_HWC + _noise(y_H11 // scale, x_1W1 // scale, c_11C, seed * 7 + scale) // (1 + 8 // scale)
    rgb_HWC = (total_HWC * 2 // 7).clip(0, 255).astype(np.uint8)
    rgb_HWC[height // 3 : height // 3 + 5, :, :] = 255
    rgb_HWC[:, width // 2 : width // 2 + 3, :] = 0
    return rgb_HWC if name != "grey" else np.repeat(rgb_HWC[:, :, :1], 3, axis=2)


def picture_in(name: str, channels: int) -> npt.NDArray[np.uint8]:
    """The picture in grey (H, W), RGB (H, W, 3), or RGBA (H, W, 4), whose alpha is its green upside down."""
    rgb_HWC = picture(name)
    if channels == 1:
        return rgb_HWC[..., 0]
    return np.concatenate([rgb_HWC, rgb_HWC[::-1, :, 1:2]], axis=2) if channels == 4 else rgb_HWC


def _noise(
    y: npt.NDArray[np.int64], x: npt.NDArray[np.int64], c: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """0 to 255 for each place, by an integer hash (modulo 2**32)."""
    h = (x * 374761393 + y * 668265263 + c * 2147483647 + seed * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    return (h ^ (h >> 16)) & 0xFF
