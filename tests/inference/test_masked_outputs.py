"""Patches may be hidden from a model (`bool_masked_pos`) in a job and from Python, wherever there is a mask token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from img2parquet.errors import InputError, OutputUnavailable
from img2parquet.inference.device import CpuLane, open_device
from img2parquet.inference.forward import ModelExecutor
from img2parquet.models import load_model
from img2parquet.models.model import Model
from img2parquet.outputs import BatchRows
from img2parquet.outputs.attentions import Attentions
from img2parquet.outputs.embedding import Embedding
from img2parquet.outputs.masking import draw_mask
from img2parquet.outputs.tokens import Tokens
from img2parquet.outputs.visual_tokens import VisualTokens
from tests.inference.test_image_losses import pictures, pixels, saved
from tests.models import oracle
from tests.models.test_beit import TINY as BEIT

VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 32,
    "patch_size": 8, "attn_implementation": "eager",
}  # fmt: skip
N, KEYS = 16, ["a", "b", "c"]
REFERENCES: dict[str, Any] = {
    "beit": lambda: transformers.BeitModel(
        transformers.BeitConfig(**BEIT, use_mask_token=True, attn_implementation="eager")
    ),
    "vit_msn": lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**VIT), use_mask_token=True),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT), use_mask_token=True),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**VIT)
    ),
}
OUTPUTS = (Embedding(pool="mean"), Tokens(hidden_states=(1,)), Attentions(layers=(0,)))


def rows(**passthrough: Any) -> BatchRows:
    return BatchRows(KEYS, [(32, 32)] * 3, passthrough)


def columns(model: Model, outputs: tuple[Any, ...], about: BatchRows) -> list[pa.Array]:
    """Run outputs as a worker does."""
    made = ModelExecutor(model, outputs, 3, open_device("cpu")).columns(CpuLane(), pictures(32), about)
    assert made is not None
    return made.arrays


def theirs(reference: Any, mask_BN: Any) -> dict[str, torch.Tensor]:
    asked = {"output_hidden_states": True, "output_attentions": True, "bool_masked_pos": torch.from_numpy(mask_BN)}
    out = oracle.reference(reference, pixels(pictures(32)), **asked)
    first = 1 + getattr(reference.config, "num_register_tokens", 0)
    return {
        "pooled:mean": out.last_hidden_state[:, first:].mean(1),
        "tokens": out.last_hidden_state,
        "tokens:1": out.hidden_states[1],
        "attentions:0": out.attentions[0],
    }


@pytest.mark.parametrize("family", REFERENCES)
def test_outputs_of_hidden_patches_equal_the_reference(family: str, tmp_path: Path) -> None:
    reference = REFERENCES[family]()
    model = load_model(saved(reference, tmp_path, 32))
    mask_BN = np.random.default_rng(3).random((3, N)) < 0.5
    expected = theirs(reference, mask_BN)
    by_column = tuple(output.model_copy(update={"mask_column": "m"}) for output in OUTPUTS)
    found = columns(model, by_column, rows(m=mask_BN.tolist()))
    for column, (name, tensor) in zip(found, expected.items(), strict=True):
        mine = torch.tensor(column.to_pylist()).reshape(tensor.shape)
        oracle.agree({name: mine}, {name: tensor})
    oracle.agree(model(list(pictures(32)), expected, mask=mask_BN), expected)
    oracle.agree(model(list(pictures(32)), expected, mask=mask_BN.astype(int).tolist()), expected)


@pytest.mark.parametrize("family", REFERENCES)
def test_a_share_of_the_patches_follows_from_key_and_seed(family: str, tmp_path: Path) -> None:
    reference = REFERENCES[family]()
    model = load_model(saved(reference, tmp_path, 32))
    [found] = columns(model, (Tokens(mask_ratio=0.25, seed=5),), rows())
    expected = theirs(reference, np.stack([draw_mask(key, 5, N, 4) for key in KEYS]))["tokens"]
    oracle.agree({"tokens": torch.tensor(found.to_pylist()).reshape(expected.shape)}, {"tokens": expected})


def test_outputs_with_the_same_mask_share_a_forward_pass(tmp_path: Path) -> None:
    config = transformers.BeitConfig(**BEIT, use_mask_token=True, attn_implementation="eager")
    model = load_model(saved(transformers.BeitForMaskedImageModeling(config), tmp_path, 32))
    masked = (VisualTokens(mask_ratio=0.5), Tokens(mask_ratio=0.5))
    executor = ModelExecutor(
        model, (*masked, Tokens(name="whole"), Tokens(name="other", mask_ratio=0.5, seed=1)), 3, open_device("cpu")
    )
    passes = executor._passes(rows())
    assert [one.output_indices for one in passes] == [(2,), (0, 1), (3,)]
    assert passes[1].wants == {"visual_tokens", "tokens"}
    together, alone = columns(model, masked, rows()), [columns(model, (one,), rows())[0] for one in masked]
    assert together[0].equals(alone[0]) and together[1].equals(alone[1])


@pytest.mark.parametrize("output", [Embedding, Tokens, Attentions])
def test_a_mask_needs_a_mask_token(output: Any, tmp_path: Path) -> None:
    model = load_model(saved(transformers.ViTMSNModel(transformers.ViTMSNConfig(**VIT)), tmp_path, 32))
    layers = {"layers": (0,)} if output is Attentions else {}
    kind = output.model_fields["kind"].default
    for mask in ({"mask_ratio": 0.5}, {"mask_column": "m"}):
        with pytest.raises(
            OutputUnavailable, match=f"`{kind}`: `{next(iter(mask))}`: model .* has no mask token"
        ) as no:
            output(**layers, **mask).wants(model.card)
        assert f"remove `{next(iter(mask))}`" in no.value.hint
    assert output(**layers).wants(model.card)
    with pytest.raises(InputError, match="has no mask token"):
        model(list(pictures(32)), mask=np.zeros((3, N), bool))


def test_masks_that_are_none_are_refused(tmp_path: Path) -> None:
    model = load_model(saved(REFERENCES["dinov2"](), tmp_path, 32))
    for mask in (np.zeros((3, N - 1)), np.zeros((1, N)), np.full((3, N), 2), np.zeros(N)):
        with pytest.raises(InputError, match=r"is not 0 or 1 for each patch, \(3, 16\)"):
            model(list(pictures(32)), mask=mask)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.kind)
def test_settings_of_a_mask_are_part_of_the_identity_where_there_is_one(output: Any) -> None:
    plain = output.model_dump(mode="json")
    assert not {"mask_ratio", "seed", "mask_column"} & plain.keys()
    masked = output.model_copy(update={"mask_ratio": 0.5, "seed": 3}).model_dump(mode="json")
    assert masked == {**plain, "mask_ratio": 0.5, "seed": 3, "mask_column": None}
    assert type(output).model_validate(masked) == output.model_copy(update={"mask_ratio": 0.5, "seed": 3})
