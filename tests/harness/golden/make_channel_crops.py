"""Writes channel_crops.json: what transformers' torchvision backend makes of grey and RGBA images, and of RGB images
that it neither crops nor resizes to one size.

Run it like make_crops.py, which says how. For each case it stores the size and the SHA-256 of the uint8 result
(H, W, C), and of the float32 result (C, H, W), both in C order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crop_sources import picture_in
from make_crops import processor_of, run, sha256, versions
from PIL import Image

TARGET = Path(__file__).parents[2] / "golden" / "channel_crops.json"
PICTURES = ("odd_margin", "small", "tall_strip", "one_pixel")
_SQUASH: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 56}}
_CROP: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 50}, "do_center_crop": True,
    "crop_size": {"height": 45, "width": 52},
}  # fmt: skip
_LEVELS: dict[int, dict[str, Any]] = {
    1: {"image_mean": [0.45], "image_std": [0.23]},
    4: {"image_mean": [0.485, 0.456, 0.406, 0.1], "image_std": [0.229, 0.224, 0.225, 0.9]},
}
CHANNELS = [
    (channels, {**geometry, **levels, "resample": resample, "do_convert_rgb": False, **more})
    for channels, levels in _LEVELS.items()
    for geometry in (_SQUASH, _CROP)
    for resample, more in ((2, {}), (3, {}), (2, {"do_normalize": False}), (3, {"do_rescale": False}))
]
FREE = [
    (3, {"image_processor_type": kind, "do_center_crop": False, **size})
    for kind in ("ViTImageProcessor", "BeitImageProcessor", "BitImageProcessor", "LevitImageProcessor")
    for size in (
        {"size": {"shortest_edge": 60}},
        {"size": {"shortest_edge": 60, "longest_edge": 70}},
        {"size": {"shortest_edge": 33, "longest_edge": 400}},
        {"do_resize": False},
    )
]


def main() -> None:
    cases = []
    for channels, config in CHANNELS + FREE:
        for name in PICTURES:
            crop_HWC, pixels_CHW = run(processor_of(config), Image.fromarray(picture_in(name, channels)))
            about = {"config": config, "channels": channels, "picture": name, "size_HW": crop_HWC.shape[:2]}
            cases.append({**about, "uint8": sha256(crop_HWC), "float32": sha256(pixels_CHW)})
    TARGET.write_text(json.dumps({"versions": versions(), "cases": cases}, indent=1) + "\n")
    print(TARGET, len(cases), "cases")


if __name__ == "__main__":
    main()
