"""Every family takes grey and RGBA images, images of one stated size, and float16, from image files to features.

transformers' PIL backend and model, on the same image, are the reference.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from img2parquet.errors import CheckpointError, InputError
from img2parquet.inference.embed_images import embed
from img2parquet.models import ModelSpec, load_model, read_card
from tests.harness.golden.crop_sources import picture_in
from tests.models import oracle
from tests.models.test_processor import NATIVE

SIDE = 64
LEVELS: dict[int, dict[str, Any]] = {
    1: {"image_mean": 0.45, "image_std": 0.23},
    3: {},
    4: {"image_mean": [0.485, 0.456, 0.406, 0.1], "image_std": [0.229, 0.224, 0.225, 0.9]},
}
SQUASH = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
FAMILIES = [*NATIVE, "dinov2_with_registers", "transformers:vit"]


def made(name: str, folder: Path, processor: dict[str, Any], **changed: Any) -> tuple[str, Any]:
    """Save a small model of a family, and return its name for a job and the reference's module."""
    library, _, kind = name.rpartition(":")
    config, cls, settings = NATIVE[kind.removesuffix("_with_registers")]
    if kind.endswith("_with_registers"):
        config, cls = "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"
    sizes = {} if kind == "bit" else {"image_size": SIDE}
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings | sizes | changed))
    oracle.saved(model, folder)
    written = {"image_processor_type": "ViTImageProcessor", **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    return (f"{library}:" if library else "") + str(folder), model


def theirs(model: Any, processor: dict[str, Any], image: Image.Image) -> torch.Tensor:
    """The reference's last hidden state, as ours has it."""
    processor = transformers.ViTImageProcessorPil.from_dict(processor)
    return oracle.reference(model, processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state


def tokens(model: str, image: Any, **settings: Any) -> torch.Tensor:
    loaded = load_model(model, preprocess="pil", **settings)
    wanted = "tokens" if "tokens" in loaded.card.gives else "feature_maps:last"
    return loaded([image], [wanted])[wanted]


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_grey_and_rgba_images(name: str, channels: int, tmp_path: Path) -> None:
    processor = {**SQUASH, **LEVELS[channels]}
    path, model = made(name, tmp_path, processor, num_channels=channels)
    array = picture_in("odd_margin", channels)
    image = Image.fromarray(array)
    expected = theirs(model, processor, image)
    for given in (array, image):
        oracle.agree({"tokens": tokens(path, given)}, {"tokens": expected})
    # a job decodes files; a vector equals that of the pixels
    assert np.array_equal(embed([png(image)], path), embed([image], path))
    assert any("channels" in note for note in read_card(path).notes)


@pytest.mark.parametrize("name", FAMILIES)
def test_colours_for_a_grey_model_and_grey_for_a_model_of_colours(name: str, tmp_path: Path) -> None:
    colours = Image.fromarray(picture_in("small", 3))
    grey, _ = made(name, tmp_path / "grey", {**SQUASH, **LEVELS[1]}, num_channels=1)
    assert torch.equal(tokens(grey, colours), tokens(grey, colours.convert("L")))
    rgba, _ = made(name, tmp_path / "rgba", {**SQUASH, **LEVELS[4]}, num_channels=4)
    assert torch.equal(tokens(rgba, colours), tokens(rgba, colours.convert("RGBA")))
    with pytest.raises(InputError, match=r"uint8 \(height, width\) array"):
        tokens(grey, picture_in("small", 4))


@pytest.mark.parametrize(
    ("processor", "source_HW"),
    [
        ({"do_resize": False}, (72, 96)),
        ({"size": {"shortest_edge": 72}, "do_center_crop": False}, (150, 200)),
        ({"size": {"shortest_edge": 80, "longest_edge": 96}, "do_center_crop": False}, (90, 120)),
    ],
    ids=["not resized", "short side", "bounded"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_one_stated_size(
    name: str, processor: dict[str, Any], source_HW: tuple[int, int], tmp_path: Path
) -> None:
    path, model = made(name, tmp_path, processor)
    size = (72, 96)
    if name == "levit":  # whose grid is fixed, to 4x4 here
        with pytest.raises(CheckpointError, match=r"image_size 72x96: LeViT's bias tables"):
            read_card(ModelSpec(path, image_size=size))
        return
    height, width = source_HW
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    needs_saying = name.endswith(("vit", "vit_msn", "beit", "clip", "siglip"))
    interpolates = {"interpolate_pos_encoding": True} if needs_saying else {}
    pixels = transformers.ViTImageProcessorPil.from_dict(processor)(image, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape[2:]) == size
    expected = oracle.reference(model, pixels, **interpolates).last_hidden_state
    oracle.agree({"tokens": tokens(path, image, image_size=size)}, {"tokens": expected})
    with pytest.raises(InputError, match=r"images\[0\]: wrong_size: .* the model takes 96 x 72: write .* there"):
        tokens(path, image.rotate(90, expand=True), image_size=size)
    if "size" in processor:
        with pytest.raises(CheckpointError, match=r"different sizes(.|\n)*set `image_size: \[height, width\]`"):
            read_card(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_float16_stays_near_float32(name: str, tmp_path: Path) -> None:
    path, _ = made(name, tmp_path, SQUASH)
    image = picture_in("small", 3)
    exact = tokens(path, image)
    for fast in (False, True):
        near = tokens(path, image, dtype="float16", fast=fast)
        assert near.dtype == torch.float32 and 1e-6 < oracle.distance(near, exact) < 0.02
