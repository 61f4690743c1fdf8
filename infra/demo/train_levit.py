"""Train `checkpoints/levit-photos/`, a LeViT of under 3 MB, to tell the photos' train regions apart.

    python infra/demo/train_levit.py            # about five minutes on one core; needs the `dev` extra

Trained with transformers' own class, so that the demo's checkpoint has the layout of the published ones.
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
from make_shards import Recipe, all_samples, encode
from photos import NAMES, PHOTOS, train_boxes
from PIL import Image, ImageFilter
from torch import Tensor
from transformers import LevitConfig, LevitForImageClassificationWithTeacher, LevitImageProcessor

FOLDER = Path(__file__).parent / "checkpoints" / "levit-photos"
SIZE = 96
SHORTEST_EDGE = 96  # the processor resizes to 256/224 of it: 109, then crops 96
CONFIG: dict[str, Any] = {
    "image_size": SIZE,
    "hidden_sizes": [64, 96, 128],
    "num_attention_heads": [4, 4, 4],
    "depths": [1, 1, 2],
    "key_dim": [16, 16, 16],
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800)
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
    accuracy = held_out_accuracy(given.folder)
    print(f"{given.steps} steps of {BATCH} in {seconds:.0f} s; held-out accuracy {accuracy:.4f}")


def new_model() -> LevitForImageClassificationWithTeacher:
    names = dict(enumerate(NAMES))
    config = LevitConfig(**CONFIG, id2label=names, label2id={name: i for i, name in names.items()})
    return LevitForImageClassificationWithTeacher(config)


def train(model: LevitForImageClassificationWithTeacher, steps: int, seed: int) -> None:
    """Train both heads with AdamW on the same labels: there is no teacher to distil from."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    images, draw = [photo.pixels() for photo in PHOTOS], np.random.default_rng(seed)
    model.train()
    for step in range(steps):
        x_BCHW, ids_B = training_batch(images, draw)
        heads = model(x_BCHW)
        losses = [
            torch.nn.functional.cross_entropy(logits, ids_B, label_smoothing=0.05)
            for logits in (heads.cls_logits, heads.distillation_logits)
        ]
        loss = (losses[0] + losses[1]) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def learning_rate(step: int, steps: int) -> float:
    """Warm up briefly, then follow half a cosine."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def training_batch(images: list[npt.NDArray[np.uint8]], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a balanced batch: x_BCHW normalised, ids_B."""
    ids = (np.arange(BATCH) + int(draw.integers(len(PHOTOS)))) % len(PHOTOS)
    crops = [training_crop(images[i], i, draw) for i in ids.tolist()]
    return normalised(np.stack(crops)), torch.from_numpy(ids)


def normalised(pixels_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    x_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255
    return (x_BCHW - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def training_crop(image_HWC: npt.NDArray[np.uint8], class_id: int, draw: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Cut a square from a train region, vary scale, side, colour, sharpness and JPEG quality, and resize it."""
    regions = train_boxes(PHOTOS[class_id], image_HWC.shape[1], image_HWC.shape[0])
    areas = np.array([region.width * region.height for region in regions])
    region = regions[int(draw.choice(2, p=areas / areas.sum()))]
    side = int(draw.integers(72, min(200, region.width, region.height) + 1))
    left = region.left + int(draw.integers(0, region.width - side + 1))
    top = region.top + int(draw.integers(0, region.height - side + 1))
    crop = Image.fromarray(image_HWC[top : top + side, left : left + side])
    return augmented(crop, draw)


def augmented(crop: Image.Image, draw: np.random.Generator) -> npt.NDArray[np.uint8]:
    if draw.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < 0.2:
        crop = crop.filter(ImageFilter.GaussianBlur(float(draw.uniform(0.3, 1.2))))
    if draw.random() < 0.3:
        crop = Image.open(io.BytesIO(encode(crop, quality=int(draw.integers(50, 96)))))
    pixels_HWC = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
    contrast, light, tint_C = draw.uniform(0.8, 1.2), draw.uniform(-20, 20), draw.uniform(0.96, 1.04, 3)
    mean = pixels_HWC.mean()
    changed: npt.NDArray[np.float64] = ((pixels_HWC - mean) * contrast + mean + light) * tint_C
    return np.clip(changed, 0, 255).astype(np.uint8)


def save(model: LevitForImageClassificationWithTeacher, folder: Path) -> None:
    """Save config.json, preprocessor_config.json and model.safetensors in transformers' layout."""
    model.eval().save_pretrained(folder)
    processor = LevitImageProcessor(
        size={"shortest_edge": SHORTEST_EDGE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    )
    processor.save_pretrained(folder)


def held_out_accuracy(folder: Path) -> float:
    """Compute the accuracy on the demo's own crops, with the saved checkpoint and its saved processor."""
    model = LevitForImageClassificationWithTeacher.from_pretrained(folder).eval()
    processor = LevitImageProcessor.from_pretrained(folder)
    samples, right = list(all_samples(Recipe())), 0
    for start in range(0, len(samples), 128):
        batch = samples[start : start + 128]
        images: list[Image.Image] = [Image.open(io.BytesIO(sample.image)) for sample in batch]
        with torch.inference_mode():
            best_B = model(**processor(images, return_tensors="pt")).logits.argmax(1)
        right += int((best_B == torch.tensor([sample.class_id for sample in batch])).sum())
    return right / len(samples)


if __name__ == "__main__":
    main()
