"""`img2parquet.compute_loss` gives the reference's loss of each image, for every family, head and problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BeitConfig, BeitForMaskedImageModeling, LevitConfig, LevitForImageClassificationWithTeacher

from img2parquet import compute_loss
from img2parquet.errors import InputError, OutputUnavailable
from img2parquet.models import load_model
from tests.models import oracle
from tests.models.test_beit import TINY as BEIT
from tests.models.test_levit import TINY as LEVIT
from tests.models.test_processor import NATIVE
from tests.outputs.test_loss import MASKED, PROBLEMS, alone, png, segmenter

LEVELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def saved(model: Any, folder: Path, side: int) -> str:
    oracle.saved(model, folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, **LEVELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def pictures(side: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def pixels(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("family", NATIVE)
def test_a_classifier_of_every_family(family: str, problem: str, tmp_path: Path) -> None:
    config, cls, settings = NATIVE[family]
    problem_type, num_labels, truths = PROBLEMS[problem]
    head = {"num_labels": num_labels, "problem_type": problem_type}
    if "Vision" in config:  # a tower, whose classifier keeps the settings under `vision_config`
        config = getattr(transformers, config.replace("Vision", ""))(vision_config=settings, **head)
    else:
        config = getattr(transformers, config)(**settings, **head)
    model = getattr(transformers, cls.replace("Vision", "").replace("Model", "ForImageClassification"))(config)
    side = settings.get("image_size", 64)
    path, images = saved(model, tmp_path, side), pictures(side)
    labels = [torch.tensor([truth]) for truth in truths]
    expected = alone(model, pixels(images), labels)
    for given in (truths, [torch.tensor(truth) for truth in truths]):
        losses = compute_loss(list(images), given, path, dtype="float32", batch_size=2)
        assert losses.dtype == np.float32
        assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_names_heads_and_labels_that_are_not_there(tmp_path: Path) -> None:
    classes = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    config = LevitConfig(**{key: value for key, value in LEVIT.items() if key != "num_labels"}, **classes)
    model = LevitForImageClassificationWithTeacher(config)
    loaded, images = load_model(saved(model, tmp_path, 64)), pictures(64)
    logits = oracle.reference(model, pixels(images)).cls_logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 1]), reduction="none").tolist()
    losses = compute_loss(iter(images), ["dog", None, -100], loaded, head="cls")
    assert losses[0] == pytest.approx(expected[0], rel=1e-5) and np.isnan(losses[1:]).all()
    assert compute_loss([], [], loaded).shape == (0,)
    with pytest.raises(InputError, match=r"`labels` of `images\[1\]`: `rat` is not a class(.|\n)*known: cat, dog"):
        compute_loss(images, ["dog", "rat", "cat"], loaded)
    for labels in (["dog"] * 2, ["dog"] * 4):
        with pytest.raises(InputError, match=f"labels: {len(labels)} for (.|\n)*give one for every image"):
            compute_loss(images, labels, loaded)
    with pytest.raises(OutputUnavailable, match="`reduce_labels` is a setting of a segmentation loss"):
        compute_loss(images, [0, 0, 0], loaded, reduce_labels=True)
    with pytest.raises(OutputUnavailable, match="needs `segmentation`"):
        compute_loss(images, [0, 0, 0], loaded, of="segmentation")


def test_segmentation_takes_arrays_and_pngs_of_any_size(tmp_path: Path) -> None:
    model = segmenter(use_auxiliary_head=False)
    path, images = saved(model, tmp_path, 32), pictures(32)
    maps = [np.random.default_rng(i).integers(0, 7, size) for i, size in enumerate([(40, 33), (5, 9), (32, 32)])]
    expected = alone(model, pixels(images), [torch.from_numpy(ids)[None] for ids in maps])
    for given in (maps, [torch.from_numpy(ids) for ids in maps], [png(ids) for ids in maps]):
        assert compute_loss(images, given, path, dtype="float32") == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match=r"`labels` of `images\[2\]`: the map has class 9"):
        compute_loss(images, [*maps[:2], np.full((4, 4), 9)], path)


def test_masked_image_modelling(tmp_path: Path) -> None:
    model = BeitForMaskedImageModeling(BeitConfig(**BEIT | MASKED))
    path, images, draw = saved(model, tmp_path, 32), pictures(32), np.random.default_rng(0)
    mask_BN, codes_BN = draw.random((3, 16)) < 0.4, draw.integers(0, 11, (3, 16))
    codes = [torch.from_numpy(codes_N[mask_N]) for codes_N, mask_N in zip(codes_BN, mask_BN, strict=True)]
    expected = alone(model, pixels(images), codes, bool_masked_pos=torch.from_numpy(mask_BN))
    assert compute_loss(images, codes_BN, path, mask=mask_BN, dtype="float32") == pytest.approx(expected, rel=1e-5)
    # without a mask the model sees every patch, and every patch counts
    logits_BNV = oracle.reference(model, pixels(images)).logits
    whole = [
        float(torch.nn.functional.cross_entropy(one, torch.from_numpy(c)))
        for one, c in zip(logits_BNV, codes_BN, strict=True)
    ]
    assert compute_loss(images, codes_BN, path, dtype="float32") == pytest.approx(whole, rel=1e-5)
    with pytest.raises(InputError, match=r"`mask` of `images\[0\]` is not a mask: 16 booleans"):
        compute_loss(images, codes_BN, path, mask=mask_BN[:, :9])


def test_an_image_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = saved(segmenter(use_auxiliary_head=False), tmp_path, 32)
    with pytest.raises(InputError, match=r"images\[1\]: mode F"):
        compute_loss([Image.new("RGB", (9, 9)), Image.new("F", (9, 9))], [np.zeros((2, 2), int)] * 2, path)
