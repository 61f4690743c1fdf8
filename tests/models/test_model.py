"""The loaded model: images in, features out, and the card that describes it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from img2parquet.errors import CheckpointError, InputError, OutputUnavailable, UnknownModel
from img2parquet.models import FAMILIES, Card, ModelSpec, load_model, published, read_card
from img2parquet.models.model import Model
from tests.models import oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LevitConfig, LevitForImageClassificationWithTeacher

    config = LevitConfig(
        hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], image_size=64,
        id2label={1: "dog", 0: "cat", 2: "cow"},
    )  # fmt: skip
    return oracle.saved(LevitForImageClassificationWithTeacher(config), tmp_path_factory.mktemp("levit"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder), name="pets")


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_images_to_features(model: Model) -> None:
    array = noise(90, 70)
    features = model([array, Image.fromarray(array), Image.fromarray(array).resize((300, 40))])
    assert features.keys() == {"pooled", "logits"}
    assert features.pooled.shape == (3, 32) and features.logits.shape == (3, 3)
    assert torch.equal(features.logits[0], features.logits[1])
    assert not torch.allclose(features.logits[0], features.logits[2])
    with pytest.raises(AttributeError, match="feature `tokens` was not requested"):
        _ = features.tokens


def test_features_equal_the_reference_s(model: Model, folder: Path) -> None:
    """Start from an image of the model's own size; rescaling and normalization happen on the device."""
    from transformers import LevitForImageClassificationWithTeacher

    reference = LevitForImageClassificationWithTeacher.from_pretrained(folder)
    x_BHWC = noise(64, 64)[None]
    settings = model.card.preprocess
    x = (torch.tensor(x_BHWC) / 255 - torch.tensor(settings.mean)) / torch.tensor(settings.std)
    theirs = oracle.reference(reference, x.permute(0, 3, 1, 2))
    mine = model.forward_pixels(x_BHWC, frozenset({"logits", "logits:cls"}))
    oracle.agree(mine, {"logits": theirs.logits, "logits:cls": theirs.cls_logits})


def test_transparency_and_grey_as_the_job_does_it(model: Model) -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    features = model([clear, Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64), 255)])
    assert torch.equal(features.pooled[0], features.pooled[1]) and torch.equal(features.pooled[0], features.pooled[2])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no images"),
        ([np.zeros((4, 4), np.uint8)], r"images\[0\]: uint8 \(4, 4\)"),
        ([np.zeros((4, 4, 3), np.float32)], r"images\[0\]: float32"),
        ([Image.new("F", (9, 9))], r"images\[0\]: mode F"),
    ],
)
def test_what_is_no_image(images: list[Any], said: str, model: Model) -> None:
    with pytest.raises(InputError, match=said):
        model(images)


@pytest.mark.parametrize("shape", [(1, 32, 64, 3), (64, 64, 3)])
def test_crops_of_another_size(shape: tuple[int, ...], model: Model) -> None:
    with pytest.raises(InputError, match=r"takes uint8 crops \(batch, 64, 64, 3\)"):
        model.forward_pixels(np.zeros(shape, np.uint8), frozenset({"pooled"}))


def test_what_the_checkpoint_cannot_give(model: Model) -> None:
    with pytest.raises(OutputUnavailable, match=r"`pets` .* cannot give `logit`(.|\n)*did you mean `logits`") as caught:
        model([noise(64, 64)], wants=["logit"])
    assert "tokens ... tokens:3" in str(caught.value)
    with pytest.raises(OutputUnavailable, match="segmentation"):
        model.forward_pixels(noise(64, 64)[None], frozenset({"segmentation"}))


def test_card(model: Model, folder: Path) -> None:
    card = model.card
    assert (card.name, card.family, card.source) == ("pets", "levit", str(folder))
    assert card.labels == ("cat", "dog", "cow")
    assert card.gives["logits"] == (3,) and card.gives["tokens:0"] == (16, 16)
    assert card.preprocess.size_HW == (64, 64)
    assert card == read_card(ModelSpec(str(folder), name="pets"))
    assert isinstance(pickle.loads(pickle.dumps(card)), Card)


def test_the_preprocessor_s_file_decides_the_size(folder: Path) -> None:
    written = folder / "preprocessor_config.json"
    try:
        written.write_text('{"size": {"shortest_edge": 64}, "crop_size": 64, "image_mean": [0.5, 0.5, 0.5]}')
        assert read_card(ModelSpec(str(folder))).preprocess.mean == (0.5, 0.5, 0.5)
        assert read_card(ModelSpec(str(folder), image_size=60)).preprocess.size_HW == (60, 60)
        written.write_text('{"size": {"shortest_edge": 96}, "crop_size": 96}')
        with pytest.raises(CheckpointError, match="4x4 grid"):
            read_card(ModelSpec(str(folder)))
    finally:
        written.unlink()


def test_dtypes(folder: Path) -> None:
    pixels = noise(64, 64)[None]
    exact = load_model(str(folder)).forward_pixels(pixels, frozenset({"logits"}))["logits"]
    for dtype in ("bfloat16", "auto"):
        features = load_model(str(folder), dtype=dtype).forward_pixels(pixels, frozenset({"logits"}))
        assert features["logits"].dtype == torch.float32
        assert oracle.distance(features["logits"], exact) < 0.05
    with pytest.raises(InputError, match=r"unknown dtype `float23`(.|\n)*did you mean `float32`"):
        load_model(str(folder), dtype="float23")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_here(device: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"device `{device}` cannot be used"):
        load_model(str(folder), device=device)


@pytest.mark.filterwarnings("error")
def test_pixels_may_be_read_only_and_stay_as_they_are(model: Model) -> None:
    pixels = noise(64, 64)[None]
    pixels.flags.writeable = False
    before = pixels.copy()
    model.forward_pixels(pixels, frozenset({"pooled"}))
    assert np.array_equal(pixels, before)


def test_plain_and_fast_agree(folder: Path, model: Model) -> None:
    wants, pixels = frozenset(model.card.gives), noise(64, 64)[None]
    plain = load_model(str(folder), fast=False).forward_pixels(pixels, wants)
    fast = model.forward_pixels(pixels, wants)
    assert all(oracle.distance(fast[name], plain[name]) < oracle.TOLERANCE for name in wants)


@pytest.mark.parametrize("repo", ["facebook/levit-128S", "facebook/vit-msn-small"])
def test_random_weights_need_no_files(repo: str) -> None:
    model = load_model(repo, weights="random(3)")
    features = model([noise(224, 224), noise(100, 300)])
    for tensor in features.values():
        assert torch.isfinite(tensor).all() and tensor.std() > 0.01
        assert (tensor[0] - tensor[1]).abs().max() > 0.01
    again, other = (read_card(ModelSpec(repo, weights=f"random({seed})")).weights_hash for seed in (3, 4))
    assert model.card.weights_hash == again != other
    assert model.card.parameters == next(entry.parameters for _, entry in published() if entry.repo == repo)


def test_random_weights_that_cannot_be() -> None:
    with pytest.raises(UnknownModel, match=r"did you mean `facebook/levit-256`"):
        load_model("facebook/levit-255", weights="random(0)")
    with pytest.raises(CheckpointError, match=r"write `random\(0\)`"):
        load_model("facebook/levit-256", weights="random")


def test_a_spec_says_everything_but_how_to_run() -> None:
    with pytest.raises(InputError, match="must be given in the ModelSpec"):
        load_model(ModelSpec("facebook/levit-128S"), weights="random(0)")


def test_channels_that_no_image_has_are_refused(tmp_path: Path) -> None:
    from transformers import LevitConfig, LevitModel

    config = LevitConfig(hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], image_size=32, num_channels=2)
    with pytest.raises(CheckpointError, match=r"num_channels: `2`(.|\n)*known: 1 \(grey\), 3 \(RGB\), 4 \(RGBA\)"):
        load_model(str(oracle.saved(LevitModel(config), tmp_path)))


def test_published_names_are_unique_and_complete() -> None:
    entries = published()
    assert len({entry.repo for _, entry in entries}) == len(entries)
    named = {entry.config.get("model_type", family.MODEL_TYPE) for family, entry in entries}
    assert FAMILIES.keys() - named == {"clip_vision_model", "siglip_vision_model"}  # towers cut out of a checkpoint
    assert named <= FAMILIES.keys()
    for family, entry in entries:
        assert entry.architecture in family.HEADS and entry.parameters > 1e6 and entry.gmacs > 0


def test_the_contract_imports_no_torch() -> None:
    code = "import sys, img2parquet.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
