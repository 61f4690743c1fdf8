"""Writes timm_crops.json: what timm's own transforms make of small pictures, for every filter, crop mode and margin.

Needs timm and torchvision, which are no part of this project's environment; make_crops.py says how to get one of its
own (add `timm` to the packages). It stores the SHA-256 of the uint8 crop (H, W, 3) and of the float32 result (3, H, W),
both in C order.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from crop_sources import picture
from PIL import Image
from PIL import __version__ as pillow_version
from timm.data import create_transform, resolve_data_config

TARGET = Path(__file__).parents[2] / "golden" / "timm_crops.json"
PICTURES = ("odd_margin", "small", "tall_strip", "one_pixel", "wide_strip")
SETTINGS: list[dict[str, Any]] = [
    {"architecture": "resnet10t"},  # nothing is said
    *({"input_size": [3, 48, 48], "interpolation": name} for name in ("nearest", "bilinear", "bicubic", "lanczos")),
    *({"input_size": [3, 48, 48], "interpolation": name, "crop_pct": 0.9} for name in ("box", "hamming")),
    *({"input_size": [3, size, size], "crop_pct": share} for size in (45, 46, 47) for share in (0.8, 0.95, 1.0)),
    {"input_size": [3, 64, 64], "crop_pct": 1.1, "mean": [0.5], "std": [0.25]},  # padded
    {"input_size": [3, 40, 56], "crop_mode": "squash", "crop_pct": 0.93, "mean": [0.1, 0.2, 0.3]},
]  # fmt: skip


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def main() -> None:
    cases = []
    for cfg in SETTINGS:
        resolved = resolve_data_config(pretrained_cfg=cfg)
        for name in PICTURES:
            image = Image.fromarray(picture(name))
            crop = create_transform(**resolved, normalize=False)(image).numpy().transpose(1, 2, 0)
            x_CHW = create_transform(**resolved)(image).numpy()
            cases.append({"pretrained_cfg": cfg, "picture": name, "uint8": sha256(crop), "float32": sha256(x_CHW)})
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__, "torch": torch.__version__}
    TARGET.write_text(json.dumps({"versions": {**versions, "pillow": pillow_version}, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
