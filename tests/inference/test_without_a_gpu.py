"""Code for CUDA is traced on any machine: every family, output, mask and dtype, with a GPU's rules for devices.

What is not covered: CUDA's kernels, streams and speed, for which `test_gpu.py` needs a GPU.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from img2parquet.errors import OutputUnavailable
from img2parquet.inference.device import Cpu, CpuLane
from img2parquet.inference.forward import ModelExecutor
from img2parquet.models import FAMILIES, Card, load_model, published
from img2parquet.models.model import Model
from img2parquet.models.tensors import as_tensor
from img2parquet.outputs import BatchRows, Output
from img2parquet.outputs.attentions import Attentions
from img2parquet.outputs.embedding import Embedding
from img2parquet.outputs.feature_maps import FeatureMaps
from img2parquet.outputs.logits import Logits
from img2parquet.outputs.segmentation import Segmentation
from img2parquet.outputs.tokens import Tokens
from tests.inference.test_image_losses import pictures
from tests.models.test_processor import ALL, model_of
from tests.outputs import test_outputs as kinds
from tests.support.pretend_cuda import PretendCuda, fake_cuda

CHECKPOINTS = (  # of each family and head, the smallest
    "facebook/levit-128S",
    "facebook/vit-msn-small",
    "google/bit-50",
    "google/vit-base-patch16-224",
    "microsoft/beit-base-patch16-224",
    "microsoft/beit-base-patch16-224-pt22k",
    "microsoft/beit-base-finetuned-ade-640-640",
    "facebook/dinov2-with-registers-small",
    "openai/clip-vit-base-patch32",
    "google/siglip-base-patch16-224",
)


@pytest.mark.parametrize(("kind", "fields"), kinds.CASES)
def test_an_output_reduces_on_the_device(kind: str, fields: dict[str, Any]) -> None:
    output, card = kinds.make(kind, **fields), kinds.card()
    features, rows = kinds.features(output.wants(card), 3), kinds.batch(3)
    expected = output.columns(card, features, rows)
    with PretendCuda():
        there = {name: feature.to("cuda") for name, feature in features.items()}
        found = output.columns(card, there, rows)
    assert found == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_model_gives_every_feature(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention weights a model takes its other way; a mask is one more input.

    Rows of an attention's bias are whole times 16 bytes, or CUDA would copy it in each call."""
    attend, biases = F.scaled_dot_product_attention, list[torch.Tensor]()

    def watched(q: Any, k: Any, v: Any, attn_mask: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
        biases.extend([] if attn_mask is None else [attn_mask])
        return attend(q, k, v, attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with fake_cuda(monkeypatch):
        model = load_model(name, weights="random(0)", device="cuda", dtype=dtype)
        gives, patches = model.card.gives, model.card.maskable_patches
        pixels = torch.zeros((2, *model.card.preprocess.shape_HWC), dtype=torch.uint8, device="cuda")
        asked = [frozenset(gives), frozenset(name for name in gives if not name.startswith("attentions"))]
        masks = [{}, {"mask_BN": torch.ones((2, patches), dtype=torch.bool)}] if patches else [{}]
        for wants, mask in itertools.product(asked, masks):
            features = model.forward_pixels(pixels, wants, **mask)
            shapes = {
                feature: (*tensor.shape, str(tensor.dtype), tensor.device.type) for feature, tensor in features.items()
            }
            assert shapes == {feature: (2, *gives[feature], "torch.float32", "cuda") for feature in wants}
        assert all(bias.stride(-2) * bias.element_size() % 16 == 0 for bias in biases)
        assert biases or not any(family in name for family in ("levit", "beit"))


def test_every_family_is_among_them() -> None:
    families = {entry.repo: family for family, entry in published()}
    assert {families[name].__name__ for name in CHECKPOINTS} == set(FAMILIES.values())


class CudaLane(CpuLane):
    """A lane of a device that is pretended: without streams, padded as on a GPU."""

    def rows(self, count: int, batch_size: int) -> int:
        return batch_size

    def upload(self, array: Any, rows: int) -> torch.Tensor:
        host = as_tensor(array)
        padding = torch.zeros((rows - len(host), *host.shape[1:]), dtype=host.dtype)
        return torch.cat([host, padding]).to("cuda")


def columns(model: Model, outputs: tuple[Output, ...], lane: CpuLane) -> list[pa.Array]:
    side, patches = model.card.preprocess.size_HW[0], model.card.maskable_patches
    mask = [[k % 3 == row for k in range(patches)] for row in range(3)]
    rows = BatchRows(["a", "b", "c"], [(side, side)] * 3, {"m": mask})
    made = ModelExecutor(model, outputs, 4, Cpu()).columns(lane, pictures(side), rows)
    assert made is not None and not made.not_finite
    return made.arrays


def outputs_of(card: Card) -> tuple[Output, ...]:
    """One output of each kind that the model can give, and masked ones where it has a mask token."""
    tried = [
        Embedding(normalize="l2"),
        Embedding(name="mean", pool="mean"),
        Logits(),
        Tokens(),
        Tokens(name="first", hidden_states=(1,), last=False),
        Attentions(layers=(0,)),
        FeatureMaps(stages=("stage1",)),
        Segmentation(size="model"),
        Tokens(name="by_column", mask_column="m"),
        Attentions(name="hidden", layers=(0,), mask_ratio=0.5),
    ]
    able = []
    for output in tried:
        with suppress(OutputUnavailable):
            output.wants(card)
            able.append(output)
    return tuple(able)


@pytest.mark.parametrize("name", ALL)
def test_a_small_model_has_the_columns_of_a_cpu(name: str, tmp_path: Path) -> None:
    path = model_of(name, tmp_path)
    size = 64 if "segformer" in name else None  # its default of 512 takes long
    here = load_model(path, image_size=size)
    outputs = outputs_of(here.card)
    expected = columns(here, outputs, CpuLane())
    with PretendCuda():
        found = columns(load_model(path, device="cuda", image_size=size), outputs, CudaLane())
    for mine, theirs in zip(found, expected, strict=True):
        if pa.types.is_binary(mine.type):
            assert mine == theirs
        else:
            there, here_ = (np.array(column.to_pylist()) for column in (mine, theirs))
            assert np.abs(there - here_).max() <= 1e-5 * np.abs(here_).max()


def test_a_tensor_on_the_wrong_device_is_seen() -> None:
    with PretendCuda():
        there = torch.ones(3, device="cuda")
        assert (there + 1).tolist() == [2, 2, 2] and (there[there > 0] + torch.tensor(1)).device.type == "cuda"
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(2, 3) @ there
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
