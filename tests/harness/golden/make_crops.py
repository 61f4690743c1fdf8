"""Writes crops.npz: what transformers' torchvision backend makes of every picture under every configuration.

Needs torchvision, which is several GB and no part of this project's environment, so it runs in one of its own:

    python3 -m venv golden-venv
    golden-venv/bin/pip install torch==2.15.0 torchvision==0.29.2 transformers==5.23.0 pillow==13.0.0 numpy
    golden-venv/bin/python tests/harness/golden/make_crops.py
    rm -r golden-venv

For each configuration and picture it stores the SHA-256 of the uint8 crop (H, W, 3) and of the float32 result
(3, H, W), both in C order, and every sixteenth pixel of the crop to look at when they differ; a few crops are stored
whole. One JPEG file is stored with the hashes of its crops, from bytes to the last pixel.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import transformers
from crop_sources import CONFIGS, SIZES_HW, picture
from PIL import Image
from PIL import __version__ as pillow_version

WHOLE = [("levit_default", "landscape"), ("beit_hub", "portrait"), ("bit_padded", "tall_strip")]
TARGET = Path(__file__).parents[2] / "golden" / "crops.npz"


def main() -> None:
    stored: dict[str, Any] = {}
    hashes: dict[str, dict[str, dict[str, Any]]] = {}
    jpeg = io.BytesIO()
    Image.fromarray(picture("landscape")).save(jpeg, "JPEG", quality=80)
    images = {name: Image.fromarray(picture(name)) for name in SIZES_HW}
    images["jpeg"] = Image.open(io.BytesIO(jpeg.getvalue())).convert("RGB")
    for config_name, config in CONFIGS.items():
        processor = processor_of(config)
        for name, image in images.items():
            crop_HWC, pixels_CHW = run(processor, image)
            hashes.setdefault(config_name, {})[name] = {"uint8": sha256(crop_HWC), "float32": sha256(pixels_CHW)}
            stored[f"sample/{config_name}/{name}"] = crop_HWC[::16, ::16]
            if (config_name, name) in WHOLE:
                stored[f"whole/{config_name}/{name}"] = crop_HWC
    about = {"versions": versions(), "hashes": hashes, "sources": {name: sha256(picture(name)) for name in SIZES_HW}}
    stored["jpeg"] = np.frombuffer(jpeg.getvalue(), np.uint8)
    np.savez_compressed(TARGET, about=json.dumps(about), **stored)
    print(TARGET, TARGET.stat().st_size, "bytes", about["versions"])


def processor_of(config: dict[str, Any]) -> Any:
    spelled = config.get("image_processor_type") or config["feature_extractor_type"]
    kind = getattr(transformers, spelled.replace("FeatureExtractor", "ImageProcessor"))
    processor = kind.from_dict(config)
    assert processor.backend == "torchvision", processor
    return processor


def run(processor: Any, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    plain = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    full = processor(image, return_tensors="pt")["pixel_values"][0]
    assert plain.dtype == torch.uint8, plain.dtype
    return plain.permute(1, 2, 0).contiguous().numpy(), full.to(torch.float32).contiguous().numpy()


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def versions() -> dict[str, str]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": pillow_version,
        "numpy": np.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


if __name__ == "__main__":
    main()
