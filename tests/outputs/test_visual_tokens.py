"""Test which patches are masked, and the codes that the model finds for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BeitConfig, BeitForMaskedImageModeling

from img2parquet.errors import OutputUnavailable, PartFailed
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.inference.device import CpuLane, open_device
from img2parquet.inference.forward import ModelExecutor
from img2parquet.models import Card
from img2parquet.models.model import Model
from img2parquet.outputs import BatchRows
from img2parquet.outputs.embedding import Embedding
from img2parquet.outputs.masking import draw_mask
from img2parquet.outputs.visual_tokens import VisualTokens
from tests.models import oracle

N, V = 16, 11
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": V,
    "use_mask_token": True,
}


def card(**config: Any) -> Card:
    settings = PreprocessSettings("exact", 32, 32, "bilinear", None, None)
    return Card(
        "tiny", "beit", "fake:", "0", {"use_mask_token": True, **config}, settings, {"visual_tokens": (N, V)}, ""
    )


def rows(*keys: str, **passthrough: Any) -> BatchRows:
    return BatchRows(keys, [(40, 40)] * len(keys), passthrough)


def test_codes_of_masked_patches_equal_the_reference(tmp_path: Path) -> None:
    model = BeitForMaskedImageModeling(BeitConfig(**TINY))
    backbone, x_BCHW = oracle.ours(oracle.saved(model, tmp_path)), oracle.pixels(3, (32, 32))
    output, about = VisualTokens(top_k=2, mask_ratio=0.5), rows("a", "b", "c")
    inputs = output.inputs(card(), about)
    (column,) = output.columns(card(), oracle.run(backbone, x_BCHW, "visual_tokens", **inputs), about)
    logits_BNV = oracle.reference(model, x_BCHW, bool_masked_pos=inputs["mask_BN"]).logits
    for patches, logits_NV, mask_N in zip(column.to_pylist(), logits_BNV, inputs["mask_BN"], strict=True):
        assert [patch["patch"] for patch in patches] == mask_N.nonzero().flatten().tolist()
        best = logits_NV[mask_N].softmax(1).topk(2)
        assert [patch["codes"] for patch in patches] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([patch["scores"] for patch in patches]), best.values)


def test_a_mask_follows_from_the_key_and_the_seed() -> None:
    one = VisualTokens(seed=1).inputs(card(), rows("a", "b"))["mask_BN"]
    assert one.sum(1).tolist() == [6, 6]  # 0.4 of 16
    assert not torch.equal(one[0], one[1])
    assert torch.equal(VisualTokens(seed=1).inputs(card(), rows("z", "a"))["mask_BN"][1], one[0])
    assert not torch.equal(VisualTokens(seed=2).inputs(card(), rows("a"))["mask_BN"][0], one[0])
    # part of the results: drawing differently needs a new RESULT_VERSION
    assert np.flatnonzero(draw_mask("a", 1, N, 6)).tolist() == [0, 9, 11, 12, 13, 14]


def test_without_a_mask_every_patch_is_written() -> None:
    output, scores_BNV = VisualTokens(mask_ratio=0), torch.randn(2, N, V)
    assert output.inputs(card(), rows("a", "b")) == {}
    assert output.wants(card(use_mask_token=False)) == {"visual_tokens"}
    (column,) = output.columns(card(), {"visual_tokens": scores_BNV}, rows("a", "b"))
    assert [[p["codes"][0] for p in row] for row in column.to_pylist()] == scores_BNV.argmax(2).tolist()


def test_a_column_of_masks() -> None:
    masks = [[i < 3 for i in range(N)], [0] * N]
    output, about = VisualTokens(mask_column="m"), rows("a", "b", m=masks)
    assert output.inputs(card(), about)["mask_BN"].tolist() == [masks[0], [False] * N]
    (column,) = output.columns(card(), {"visual_tokens": torch.randn(2, N, V)}, about)
    assert [[p["patch"] for p in row] for row in column.to_pylist()] == [[0, 1, 2], []]


@pytest.mark.parametrize("bad", [None, [True] * (N - 1), [2] * N, "x" * N], ids=str)
def test_a_bad_mask_fails_the_part_and_names_the_row(bad: Any) -> None:
    with pytest.raises(PartFailed, match="`m` of `b` is not a mask: 16 booleans"):
        VisualTokens(mask_column="m").inputs(card(), rows("a", "b", m=[[True] * N, bad]))


def test_a_mask_column_that_is_not_kept_is_named() -> None:
    with pytest.raises(PartFailed, match="no passthrough column `m`") as caught:
        VisualTokens(mask_column="m").inputs(card(), rows("a", label=["x"]))
    assert caught.value.known == ("label",)


def test_a_mask_needs_a_mask_token() -> None:
    for output in (VisualTokens(), VisualTokens(mask_column="m", mask_ratio=0)):
        with pytest.raises(OutputUnavailable, match="no mask token") as caught:
            output.wants(card(use_mask_token=False))
        assert "mask_ratio: 0" in caught.value.hint


def test_equal_scores_go_to_the_lower_code() -> None:
    (column,) = VisualTokens(top_k=3).columns(card(), {"visual_tokens": torch.zeros(1, N, V)}, rows("a"))
    assert all(patch["codes"] == [0, 1, 2] for patch in column.to_pylist()[0])


def test_other_outputs_of_the_model_see_the_whole_image(tmp_path: Path) -> None:
    folder = oracle.saved(BeitForMaskedImageModeling(BeitConfig(**TINY)), tmp_path)
    found = oracle.opened(folder)
    model = Model(
        found.card(), found.filled(torch.float32, torch.device("cpu"), True), torch.float32, torch.device("cpu")
    )
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    about, mean = rows("a", "b"), Embedding(pool="mean", name="mean", normalize="none", dtype="float32")
    forwards = [ModelExecutor(model, outputs, 2, open_device("cpu")) for outputs in ((mean,), (VisualTokens(), mean))]
    alone, both = (forward.columns(CpuLane(), pixels_BHWC, about) for forward in forwards)
    assert alone and both and both.arrays[1].equals(alone.arrays[0])
    masked = model.forward_pixels(pixels_BHWC, mean.wants(model.card), **VisualTokens().inputs(model.card, about))
    assert not mean.columns(model.card, masked, about)[0].equals(alone.arrays[0])
