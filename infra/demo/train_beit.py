"""Train `checkpoints/beit-textures/`, a BEiT of under 4 MB, to segment mosaics of the photos' train regions.

    python infra/demo/train_beit.py             # about five minutes on one core; needs the `dev` extra

Trained with transformers' own class, so that the checkpoint has the layout of the published ones.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch and transformers leave `backward` and `eval` without annotations)

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from make_shards import encode
from mosaics import SIZE, TEXTURES, Confusion, Mosaics
from PIL import Image
from torch import Tensor
from transformers import BeitConfig, BeitForSemanticSegmentation, BeitImageProcessor

FOLDER = Path(__file__).parent / "checkpoints" / "beit-textures"
CONFIG: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "use_relative_position_bias": True,
    "out_indices": [2, 3, 4, 5],  # the segmentation model reads the outputs of the layers before: 1, 2, 3, 4
    "pool_scales": [1, 2, 3],
    "use_auxiliary_head": False,
    "drop_path_rate": 0.0,
}
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    torch.set_num_threads(1)  # a fixed order of sums: the same versions give the same weights
    started = time.monotonic()
    model = new_model()
    train(model, given.steps, given.seed)
    seconds = time.monotonic() - started
    save(model, given.folder)
    print(f"{given.steps} steps of {BATCH} in {seconds:.0f} s; held-out mIoU {held_out_iou(given.folder):.4f}")


def new_model() -> BeitForSemanticSegmentation:
    names = dict(enumerate(TEXTURES))
    return BeitForSemanticSegmentation(
        BeitConfig(**CONFIG, id2label=names, label2id={name: i for i, name in names.items()})
    )


def train(model: BeitForSemanticSegmentation, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    mosaics, draw = Mosaics("train"), np.random.default_rng(seed)
    model.train()
    for step in range(steps):
        x_BCHW, truth_BHW = training_batch(mosaics, draw)
        logits_BKhw = model(x_BCHW).logits
        logits_BKHW = torch.nn.functional.interpolate(logits_BKhw, size=truth_BHW.shape[1:], mode="bilinear")
        loss = torch.nn.functional.cross_entropy(logits_BKHW, truth_BHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def learning_rate(step: int, steps: int) -> float:
    """Warm up briefly, then follow half a cosine."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def training_batch(mosaics: Mosaics, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch: x_BCHW normalised, truth_BHW."""
    drawn = [mosaics(draw) for _ in range(BATCH)]
    pixels_BHWC = np.stack([augmented(mosaic_HWC, draw) for mosaic_HWC, _ in drawn])
    truth_BHW = np.stack([truth_HW for _, truth_HW in drawn]).astype(np.int64)
    x_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x_BCHW, torch.from_numpy(truth_BHW)


def augmented(mosaic_HWC: npt.NDArray[np.uint8], draw: np.random.Generator) -> npt.NDArray[np.uint8]:
    if draw.random() < 0.3:
        jpeg = encode(Image.fromarray(mosaic_HWC), quality=int(draw.integers(60, 96)))
        mosaic_HWC = np.asarray(Image.open(io.BytesIO(jpeg)))
    contrast, light, tint_C = draw.uniform(0.85, 1.15), draw.uniform(-15, 15), draw.uniform(0.95, 1.05, 3)
    changed: npt.NDArray[np.float64] = ((mosaic_HWC - 128.0) * contrast + 128.0 + light) * tint_C
    return np.clip(changed, 0, 255).astype(np.uint8)


def save(model: BeitForSemanticSegmentation, folder: Path) -> None:
    """Save config.json, preprocessor_config.json and model.safetensors in transformers' layout."""
    model.eval().save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    BeitImageProcessor(
        size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_reduce_labels=False
    ).save_pretrained(folder)


def held_out_iou(folder: Path, count: int = 256, seed: int = 2024) -> float:
    """Compute the mean IoU on the demo's own mosaics, with the saved checkpoint and its saved processor."""
    model = BeitForSemanticSegmentation.from_pretrained(folder).eval()
    processor = BeitImageProcessor.from_pretrained(folder)
    mosaics, confusion = Mosaics("held_out"), Confusion()
    for index in range(count):
        mosaic_HWC, truth_HW = mosaics(np.random.default_rng([seed, index]))
        with torch.inference_mode():
            answer = model(**processor(Image.fromarray(mosaic_HWC), return_tensors="pt"))
        (map_HW,) = processor.post_process_semantic_segmentation(answer, target_sizes=[truth_HW.shape])
        confusion.add(truth_HW, map_HW.numpy())
    return confusion.mean_iou()


if __name__ == "__main__":
    main()
