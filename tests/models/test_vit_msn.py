"""ViTMSN equals transformers for every config field, class and dialect, plain and fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel
from transformers.activations import ACT2FN

from img2parquet.errors import CheckpointError, OutputUnavailable
from img2parquet.models import Published, vit_msn
from img2parquet.models.checkpoint import read_json
from img2parquet.models.kernels.activations import ACTIVATIONS
from tests.models import oracle

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
CLASSES = (ViTMSNModel, ViTMSNForImageClassification)
SHARED_ACTIVATIONS = sorted(ACT2FN.keys() & ACTIVATIONS.keys())
VARIED = {  # each field away from the tiny config, one at a time
    "hidden_size": {"hidden_size": 44},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "num_attention_heads": {"num_attention_heads": 2},
    "intermediate_size": {"intermediate_size": 50},
    "hidden_dropout_prob": {"hidden_dropout_prob": 0.5},
    "attention_probs_dropout_prob": {"attention_probs_dropout_prob": 0.5},
    "initializer_range": {"initializer_range": 1.0},
    "layer_norm_eps": {"layer_norm_eps": 0.1},
    "image_size": {"image_size": 40},
    "image_size_cut": {"image_size": 37},
    "not_square": {"image_size": [16, 48]},
    "patch_size": {"patch_size": 4},
    "patch_not_square": {"patch_size": [8, 4]},
    "num_channels": {"num_channels": 1},
    "qkv_bias": {"qkv_bias": False},
    "num_labels": {"num_labels": 9},
    "num_labels_0": {"num_labels": 0},
    **{f"hidden_act_{name}": {"hidden_act": name} for name in SHARED_ACTIVATIONS},
}


def config(**changed: Any) -> ViTMSNConfig:
    return ViTMSNConfig(**TINY | changed, attn_implementation="eager")  # the default gives no attentions


def expected(model: Any, outputs: Any) -> dict[str, torch.Tensor]:
    """Map the reference's outputs to our names."""
    found = {f"tokens:{k}": tensor for k, tensor in enumerate(outputs.hidden_states)}
    found |= {f"attentions:{k}": tensor for k, tensor in enumerate(outputs.attentions)}
    if isinstance(model, ViTMSNForImageClassification):
        return found | {"logits": outputs.logits}
    last = outputs.last_hidden_state
    return found | {"tokens": last, "pooled": last[:, 0], "pooled:cls": last[:, 0], "pooled:mean": last[:, 1:].mean(1)}


def check_parity(model: Any, folder: Path, size_HW: tuple[int, int] | None = None, **inputs: torch.Tensor) -> None:
    """Compare every feature, plain and fast, from one saved checkpoint, with the shapes that `gives` promises."""
    side = model.config.image_size
    trained = tuple(side) if isinstance(side, list | tuple) else (side, side)
    x_BCHW = oracle.pixels(2, size_HW or trained, model.config.num_channels)
    asked = {"output_hidden_states": True, "output_attentions": True, "interpolate_pos_encoding": size_HW is not None}
    masked = {"bool_masked_pos": inputs["mask_BN"]} if inputs else {}
    theirs = expected(model, oracle.reference(model, x_BCHW, **asked, **masked))
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, size_HW=size_HW)
        mine = oracle.run(backbone, x_BCHW, *backbone.gives(), **inputs)
        oracle.agree(mine, theirs)
        assert {name: tuple(tensor.shape[1:]) for name, tensor in mine.items()} == backbone.gives()
        # without attentions the fast form takes its other path
        names = [name for name in theirs if not name.startswith("attentions")]
        oracle.agree(oracle.run(backbone, x_BCHW, *names, **inputs), {name: theirs[name] for name in names})


@pytest.mark.parametrize("varied", VARIED)
def test_every_field(varied: str, tmp_path: Path) -> None:
    model = ViTMSNForImageClassification(config(**VARIED[varied]))
    check_parity(model, oracle.saved(model, tmp_path))


@pytest.mark.parametrize("save", [oracle.saved, oracle.saved_as_state_dict])
@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_in_both_dialects(kind: Any, save: Any, tmp_path: Path) -> None:
    model = kind(config())
    check_parity(model, save(model, tmp_path))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    heads, patch = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8]))
    return {
        "hidden_size": heads * draw(st.sampled_from([4, 8, 12])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(5, 60)),
        "hidden_act": draw(st.sampled_from(SHARED_ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "patch_size": patch,
        "image_size": patch * draw(st.integers(2, 5)),
        "num_channels": draw(st.sampled_from([1, 3])),
        "qkv_bias": draw(st.booleans()),
        "num_labels": draw(st.integers(1, 7)),
    }


@pytest.mark.slow
@settings(max_examples=oracle.EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    changed=configs(),
    kind=st.sampled_from(CLASSES),
    seed=st.integers(0, 1000),
    grid=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_random_combinations(
    changed: dict[str, Any], kind: Any, seed: int, grid: tuple[int, int] | None, tmp_path_factory: Any
) -> None:
    model, patch = kind(config(**changed)), changed["patch_size"]
    size_HW = (grid[0] * patch, grid[1] * patch) if grid else None
    check_parity(model, oracle.saved(model, tmp_path_factory.mktemp("msn"), seed), size_HW)


@pytest.mark.parametrize(
    "size_HW", [(48, 48), (16, 16), (16, 64), (40, 24), (32, 32), (8, 8), (37, 37), (39, 33), (45, 51)]
)
def test_other_sizes_resize_the_positions(size_HW: tuple[int, int], tmp_path: Path) -> None:
    """(16, 64) has as many patches as the trained (32, 32), and the reference still resizes."""
    model = ViTMSNModel(config())
    folder = oracle.saved(model, tmp_path)
    check_parity(model, folder, size_HW)
    notes = oracle.opened(folder, size_HW).card().notes
    assert bool(notes) == (size_HW != (32, 32))


@pytest.mark.parametrize("size_HW", [None, (40, 24), (47, 25)])
def test_masked_patches(size_HW: tuple[int, int] | None, tmp_path: Path) -> None:
    model = ViTMSNModel(config(), use_mask_token=True)
    h, w = size_HW or (32, 32)
    mask_BN = torch.rand(2, (h // 8) * (w // 8), generator=torch.Generator().manual_seed(0)) < 0.5
    check_parity(model, oracle.saved(model, tmp_path), size_HW, mask_BN=mask_BN)


@pytest.mark.parametrize("fast", [False, True])
def test_a_mask_needs_a_mask_token(fast: bool, tmp_path: Path) -> None:
    backbone = oracle.ours(oracle.saved(ViTMSNModel(config()), tmp_path), fast=fast)
    with pytest.raises(OutputUnavailable, match="no mask token"):
        oracle.run(backbone, oracle.pixels(2, (32, 32)), "pooled", mask_BN=torch.ones(2, 16, dtype=torch.bool))


def test_a_backbone_has_no_logits(tmp_path: Path) -> None:
    assert "logits" not in oracle.ours(oracle.saved(ViTMSNModel(config()), tmp_path)).gives()


@pytest.mark.parametrize(
    "repo",
    [
        pytest.param(entry.repo, marks=() if entry.repo.endswith("small") else pytest.mark.slow)
        for entry in vit_msn.PUBLISHED
    ],
)
def test_published_at_full_width(repo: str, tmp_path: Path) -> None:
    """Two layers; seeded weights saved by transformers."""
    check_published(repo, tmp_path, {"num_hidden_layers": 2})


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base"])
def test_published_at_full_depth(size: str, tmp_path: Path) -> None:
    check_published(f"facebook/vit-msn-{size}", tmp_path, {})


def check_published(repo: str, folder: Path, changed: dict[str, Any]) -> None:
    entry = next(entry for entry in vit_msn.PUBLISHED if entry.repo == repo)
    model = ViTMSNModel(ViTMSNConfig(**dict(entry.config) | changed))
    oracle.saved(model, folder)
    x_BCHW = oracle.pixels(1, (224, 224))
    theirs = {"tokens": oracle.reference(model, x_BCHW).last_hidden_state}
    for fast in (False, True):
        oracle.agree(oracle.run(oracle.ours(folder, fast=fast), x_BCHW, "tokens"), theirs)


@pytest.mark.parametrize("entry", vit_msn.PUBLISHED, ids=lambda entry: entry.repo)
def test_published_parameters(entry: Published) -> None:
    with torch.device("meta"):
        theirs = ViTMSNModel(ViTMSNConfig(**entry.config))
        mine = vit_msn.build(vit_msn.read_settings(entry.config, (224, 224)), frozenset())
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (theirs, mine)]
    assert counts == [entry.parameters, entry.parameters]


@pytest.mark.parametrize("varied", [{}, *VARIED.values()], ids=["tiny", *VARIED])
def test_config_is_read_field_by_field(varied: dict[str, Any], tmp_path: Path) -> None:
    theirs = ViTMSNConfig(**TINY | varied)
    theirs.save_pretrained(tmp_path)
    side = theirs.image_size
    size_HW = (side, side) if isinstance(side, int) else (side[0], side[1])
    compare_fields(theirs, vit_msn.read_settings(read_json(tmp_path / "config.json"), size_HW))


def test_defaults_are_the_reference_s() -> None:
    compare_fields(ViTMSNConfig(), vit_msn.read_settings({}, (224, 224)))


def compare_fields(theirs: ViTMSNConfig, mine: vit_msn.Settings) -> None:
    for field in vit_msn.Settings.__dataclass_fields__.keys() - {"input_size", "has_identity_head"}:
        value = getattr(theirs, field)
        if field in ("image_size", "patch_size"):
            value = tuple(value) if isinstance(value, list | tuple) else (value, value)
        assert getattr(mine, field) == value, field


def test_bfloat16_drift(tmp_path: Path) -> None:
    """Measured on these weights: about 1 % of the scale, as the reference's own bfloat16."""
    model = ViTMSNModel(ViTMSNConfig(**dict(vit_msn.PUBLISHED[0].config) | {"num_hidden_layers": 2}))
    folder, x_BCHW = oracle.saved(model, tmp_path), oracle.pixels(2, (224, 224))
    exact = oracle.reference(model, x_BCHW).last_hidden_state[:, 0]
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, dtype=torch.bfloat16)
        drifted = oracle.run(backbone, x_BCHW.bfloat16(), "pooled")["pooled"].float()
        assert 1e-5 < oracle.distance(drifted, exact) < 0.05
        assert torch.nn.functional.cosine_similarity(drifted, exact).min() > 0.999


@pytest.mark.parametrize(
    ("changed", "size_HW", "said"),
    [
        ({"image_size": 7}, (32, 32), "config.json: image_size: 7x7 is smaller than a patch, 8x8"),
        ({}, (33, 7), "image_size: 33x7 is smaller than a patch, 8x8(.|\n)*multiple of the patch size"),
        ({"num_attention_heads": 5}, (32, 32), "not divisible by num_attention_heads 5"),
        ({"hidden_act": "gelo"}, (32, 32), "unknown activation `gelo`(.|\n)*did you mean `gelu`"),
        ({"hidden_act": "xielu"}, (32, 32), "trained parameters of its own"),
        ({"num_hidden_layers": 0}, (32, 32), "num_hidden_layers"),
        ({"hidden_size": "32"}, (32, 32), "hidden_size"),
        ({"patch_size": [8, 8, 8]}, (32, 32), "patch_size"),
        ({"layer_norm_eps": -1}, (32, 32), "layer_norm_eps"),
        ({"qkv_bias": "yes"}, (32, 32), "qkv_bias"),
        ({"image_size": [16, 64]}, (32, 32), "cannot be resized, since it is not square"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(
    changed: dict[str, Any], size_HW: tuple[int, int], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        vit_msn.read_settings(TINY | changed, size_HW)
