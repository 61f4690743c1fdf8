"""ViT and DINOv2, with and without registers, equal transformers for every field, class and dialect, plain and fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from img2parquet.errors import CheckpointError, OutputUnavailable
from img2parquet.models import Published, load_model, vit
from img2parquet.models.checkpoint import read_json
from tests.models import oracle
from tests.models.test_vit_msn import SHARED_ACTIVATIONS

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
OF_VIT = {"intermediate_size": 37, "encoder_stride": 8}
CONFIGS = {
    "vit": transformers.ViTConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
}
NAMES = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
KINDS = ("Model", "ForImageClassification")
CUT = [(37, 37), (39, 33), (45, 51), (15, 9)]  # sizes whose last pixels fill no patch; the first two have 4x4 of them
VARIED = {  # each field away from the tiny config, one at a time
    "hidden_size": {"hidden_size": 44},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "num_attention_heads": {"num_attention_heads": 2},
    "hidden_dropout_prob": {"hidden_dropout_prob": 0.5},
    "attention_probs_dropout_prob": {"attention_probs_dropout_prob": 0.5},
    "initializer_range": {"initializer_range": 1.0},
    "layer_norm_eps": {"layer_norm_eps": 0.1},
    "image_size": {"image_size": 40},
    "image_size_cut": {"image_size": 37},
    "patch_size": {"patch_size": 4},
    "patch_not_square": {"patch_size": [8, 4]},
    "num_channels": {"num_channels": 1},
    "qkv_bias": {"qkv_bias": False},
    "num_labels": {"num_labels": 9},
    "num_labels_0": {"num_labels": 0},
    **{f"hidden_act_{name}": {"hidden_act": name} for name in SHARED_ACTIVATIONS},
}
VARIED_VIT = {
    "not_square": {"image_size": [16, 48]},
    "not_square_cut": {"image_size": [18, 55]},
    "intermediate_size": {"intermediate_size": 50},
    "pooler_output_size": {"pooler_output_size": 20},
    "pooler_act": {"pooler_act": "gelu"},
}
VARIED_DINO = {
    "mlp_ratio": {"mlp_ratio": 3},
    "layerscale_value": {"layerscale_value": 0.5},
    "drop_path_rate": {"drop_path_rate": 0.5},
    "use_swiglu_ffn": {"use_swiglu_ffn": True},
    "apply_layernorm": {"apply_layernorm": False},
    "reshape_hidden_states": {"reshape_hidden_states": False},
}
FIELDS = [
    *(("vit", name, changed) for name, changed in (VARIED | VARIED_VIT).items()),
    *(("dinov2", name, changed) for name, changed in (VARIED | VARIED_DINO).items()),
    ("dinov2_with_registers", "num_register_tokens", {"num_register_tokens": 2}),
]


def config(model_type: str, **changed: Any) -> Any:
    tiny = TINY | (OF_VIT if model_type == "vit" else {})
    return CONFIGS[model_type](**tiny | changed, attn_implementation="eager")  # the default gives no attentions


def reference(model_type: str, kind: str, **changed: Any) -> Any:
    return getattr(transformers, NAMES[model_type] + kind)(config(model_type, **changed))


def expected(model: Any, outputs: Any) -> dict[str, torch.Tensor]:
    """Map the reference's outputs to our names."""
    found = {f"tokens:{k}": tensor for k, tensor in enumerate(outputs.hidden_states)}
    found |= {f"attentions:{k}": tensor for k, tensor in enumerate(outputs.attentions)}
    if hasattr(outputs, "logits"):
        return found | {"logits": outputs.logits}
    last, first = outputs.last_hidden_state, 1 + getattr(model.config, "num_register_tokens", 0)
    pooled = last[:, 0] if outputs.pooler_output is None else outputs.pooler_output
    pools = {"pooled": pooled, "pooled:cls": last[:, 0], "pooled:mean": last[:, first:].mean(1)}
    return found | {"tokens": last} | pools


def check_parity(model: Any, folder: Path, size_HW: tuple[int, int] | None = None, **inputs: torch.Tensor) -> None:
    """Compare every feature, plain and fast, from one saved checkpoint, with the shapes that `gives` promises."""
    side = model.config.image_size
    trained = tuple(side) if isinstance(side, list | tuple) else (side, side)
    x_BCHW = oracle.pixels(2, size_HW or trained, model.config.num_channels)
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    if model.config.model_type == "vit" and size_HW is not None:
        asked |= {"interpolate_pos_encoding": True}
    asked |= {"bool_masked_pos": inputs["mask_BN"]} if inputs else {}

    def outputs(model: Any, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        return expected(model, oracle.reference(model, x_BCHW, **asked))

    theirs = outputs(model, x_BCHW)
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, size_HW=size_HW)
        mine = oracle.run(backbone, x_BCHW, *backbone.gives(), **inputs)
        oracle.agree_to_rounding(mine, theirs, outputs, model, x_BCHW)
        assert {name: tuple(tensor.shape[1:]) for name, tensor in mine.items()} == backbone.gives()
        # without attentions the fast form takes its other path
        names = [name for name in theirs if not name.startswith("attentions")]
        alone = oracle.run(backbone, x_BCHW, *names, **inputs)
        oracle.agree_to_rounding(alone, {name: theirs[name] for name in names}, outputs, model, x_BCHW)


@pytest.mark.parametrize(("model_type", "name", "changed"), FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_field(model_type: str, name: str, changed: dict[str, Any], tmp_path: Path) -> None:
    for kind in KINDS:
        model = reference(model_type, kind, **changed)
        check_parity(model, oracle.saved(model, tmp_path / kind))


@pytest.mark.parametrize("save", [oracle.saved, oracle.saved_as_state_dict])
@pytest.mark.parametrize(
    ("model_type", "swiglu"), [*((one, False) for one in CONFIGS), ("dinov2", True), ("dinov2_with_registers", True)]
)
def test_every_class_in_both_dialects(model_type: str, swiglu: bool, save: Any, tmp_path: Path) -> None:
    for kind in KINDS:
        model = reference(model_type, kind, **({"use_swiglu_ffn": True} if swiglu else {}))
        check_parity(model, save(model, tmp_path / kind))


def test_vit_without_a_pooling_layer(tmp_path: Path) -> None:
    model = transformers.ViTModel(config("vit"), add_pooling_layer=False)
    check_parity(model, oracle.saved(model, tmp_path))


def test_vit_of_masked_image_modelling(tmp_path: Path) -> None:
    model = reference("vit", "ForMaskedImageModeling")
    folder, mask_BN = oracle.saved(model, tmp_path), torch.rand(2, 16) < 0.5
    check_parity(model.vit, folder, mask_BN=mask_BN)
    assert oracle.opened(folder).card().notes == ("its decoder of masked pixels is not loaded",)


@pytest.mark.parametrize("changed", [{}, *VARIED_DINO.values()], ids=["plain", *VARIED_DINO])
@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
def test_backbones(model_type: str, changed: dict[str, Any], tmp_path: Path) -> None:
    stages = ["stem", "stage1", "stage2"]
    model = reference(model_type, "Backbone", out_features=stages, **changed)
    size_HW = (27, 46)
    folder, x_BCHW = oracle.saved(model, tmp_path), oracle.pixels(2, size_HW)
    maps = oracle.reference(model, x_BCHW).feature_maps
    theirs = {f"feature_maps:{stage}": map_ for stage, map_ in zip(stages, maps, strict=True)}
    for fast in (False, True):
        oracle.agree(oracle.run(oracle.ours(folder, fast=fast, size_HW=size_HW), x_BCHW, *theirs), theirs)


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    model_type, heads, patch = (
        draw(st.sampled_from(list(CONFIGS))),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([4, 8])),
    )
    changed = {
        "hidden_size": heads * draw(st.sampled_from([4, 8, 12])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_act": draw(st.sampled_from(SHARED_ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        "patch_size": patch,
        "image_size": patch * draw(st.integers(2, 5)),
        "num_channels": draw(st.sampled_from([1, 3])),
        "qkv_bias": draw(st.booleans()),
        "num_labels": draw(st.integers(1, 7)),
    }
    if model_type == "vit":
        return model_type, changed | {"intermediate_size": draw(st.integers(5, 60))}
    changed |= {"mlp_ratio": draw(st.integers(1, 5)), "use_swiglu_ffn": draw(st.booleans())}
    if model_type == "dinov2_with_registers":
        changed["num_register_tokens"] = draw(st.integers(1, 5))
    return model_type, changed


@pytest.mark.slow
@settings(max_examples=oracle.EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    chosen=configs(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    grid=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_random_combinations(
    chosen: tuple[str, dict[str, Any]], kind: str, seed: int, grid: tuple[int, int] | None, tmp_path_factory: Any
) -> None:
    model_type, changed = chosen
    model, patch = reference(model_type, kind, **changed), changed["patch_size"]
    size_HW = (grid[0] * patch, grid[1] * patch) if grid else None
    check_parity(model, oracle.saved(model, tmp_path_factory.mktemp("vit"), seed), size_HW)


@pytest.mark.parametrize("size_HW", [(48, 48), (16, 64), (40, 24), (32, 32), (8, 8), *CUT])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_other_sizes_resize_the_positions(model_type: str, size_HW: tuple[int, int], tmp_path: Path) -> None:
    """(16, 64) has as many patches as the trained (32, 32), and the reference still resizes."""
    model = reference(model_type, "Model")
    folder = oracle.saved(model, tmp_path)
    check_parity(model, folder, size_HW)
    assert bool(oracle.opened(folder, size_HW).card().notes) == (size_HW != (32, 32))


@pytest.mark.parametrize("size_HW", [None, (40, 24), (47, 25)])
@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
def test_masked_patches(model_type: str, size_HW: tuple[int, int] | None, tmp_path: Path) -> None:
    model, (h, w) = reference(model_type, "Model"), size_HW or (32, 32)
    mask_BN = torch.rand(2, (h // 8) * (w // 8), generator=torch.Generator().manual_seed(0)) < 0.5
    check_parity(model, oracle.saved(model, tmp_path), size_HW, mask_BN=mask_BN)


@pytest.mark.parametrize("fast", [False, True])
def test_a_mask_needs_a_mask_token(fast: bool, tmp_path: Path) -> None:
    model = reference("dinov2", "Model", use_mask_token=False)
    backbone = oracle.ours(oracle.saved(model, tmp_path), fast=fast)
    with pytest.raises(OutputUnavailable, match="no mask token"):
        oracle.run(backbone, oracle.pixels(2, (32, 32)), "pooled", mask_BN=torch.ones(2, 16, dtype=torch.bool))


def test_the_family_is_what_the_config_says(tmp_path: Path) -> None:
    card = load_model(str(oracle.saved(reference("dinov2", "ForImageClassification"), tmp_path))).card
    assert card.family == "dinov2" and "logits" in card.gives and len(card.labels) == 3


@pytest.mark.parametrize(
    "repo",
    [
        pytest.param(entry.repo, marks=() if entry.repo.endswith("small") else pytest.mark.slow)
        for entry in vit.PUBLISHED
    ],
)
def test_published_at_full_width(repo: str, tmp_path: Path) -> None:
    """Two layers; seeded weights saved by transformers."""
    entry = next(entry for entry in vit.PUBLISHED if entry.repo == repo)
    said = dict(entry.config) | {"num_hidden_layers": 2}
    model = getattr(transformers, entry.architecture)(CONFIGS[said.pop("model_type")](**said))
    oracle.saved(model, tmp_path)
    size_HW = (entry.image_size, entry.image_size)
    x_BCHW = oracle.pixels(1, size_HW)
    outputs = oracle.reference(model, x_BCHW)
    theirs = {"logits": outputs.logits} if "logits" in outputs else {"tokens": outputs.last_hidden_state}
    for fast in (False, True):
        oracle.agree(oracle.run(oracle.ours(tmp_path, fast=fast, size_HW=size_HW), x_BCHW, *theirs), theirs)


@pytest.mark.parametrize("entry", vit.PUBLISHED, ids=lambda entry: entry.repo)
def test_published_parameters(entry: Published) -> None:
    said = dict(entry.config)
    with torch.device("meta"):
        theirs = getattr(transformers, entry.architecture)(CONFIGS[said.pop("model_type")](**said))
        names = frozenset(vit.HEADS[entry.architecture])
        mine = vit.build(vit.read_settings(entry.config, (entry.image_size, entry.image_size)), names)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (theirs, mine)]
    assert counts == [entry.parameters, entry.parameters]


def test_random_weights_for_a_crop_smaller_than_the_trained_image() -> None:
    """DINOv2's last training was at 518; it is used at 224."""
    model = load_model("facebook/dinov2-small", weights="random(0)")
    assert model.card.preprocess.size_HW == (224, 224) and model.card.gives["tokens"] == (257, 384)
    assert model.card.notes[0] == "positions resized from 37x37 to 16x16 patches"


@pytest.mark.parametrize(("model_type", "name", "changed"), FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_config_is_read_field_by_field(model_type: str, name: str, changed: dict[str, Any], tmp_path: Path) -> None:
    theirs = config(model_type, **changed)
    theirs.save_pretrained(tmp_path)
    side = theirs.image_size
    size_HW = (side, side) if isinstance(side, int) else (side[0], side[1])
    compare_fields(theirs, vit.read_settings(read_json(tmp_path / "config.json"), size_HW))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_defaults_are_the_reference_s(model_type: str) -> None:
    compare_fields(CONFIGS[model_type](), vit.read_settings({"model_type": model_type}, (224, 224)))


def compare_fields(theirs: Any, mine: vit.Settings) -> None:
    compared = 0
    for field in vit.Settings.__dataclass_fields__:
        if not hasattr(theirs, field):
            continue  # a field of the other architecture
        value, compared = getattr(theirs, field), compared + 1
        if field in ("image_size", "patch_size"):
            value = tuple(value) if isinstance(value, list | tuple) else (value, value)
        ours = mine.pooled_size if field == "pooler_output_size" else getattr(mine, field)
        assert ours == value, field
    assert compared > 15


def test_bfloat16_drift(tmp_path: Path) -> None:
    """Measured on these weights: about 1 % of the scale, as the reference's own bfloat16."""
    said = dict(next(entry for entry in vit.PUBLISHED if entry.repo == "facebook/dinov2-small").config)
    del said["model_type"]
    model = transformers.Dinov2Model(transformers.Dinov2Config(**said | {"num_hidden_layers": 2}))
    folder, x_BCHW = oracle.saved(model, tmp_path), oracle.pixels(2, (224, 224))
    exact = oracle.reference(model, x_BCHW).last_hidden_state[:, 0]
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, dtype=torch.bfloat16, size_HW=(224, 224))
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
        ({"pooler_act": "tanj"}, (32, 32), "pooler_act: unknown activation `tanj`"),
        ({"num_hidden_layers": 0}, (32, 32), "num_hidden_layers"),
        ({"num_register_tokens": -1}, (32, 32), "num_register_tokens"),
        ({"model_type": "dinov2", "mlp_ratio": 0.01}, (32, 32), "mlp_ratio"),
        ({"use_swiglu_ffn": "yes"}, (32, 32), "use_swiglu_ffn"),
        ({"patch_size": [8, 8, 8]}, (32, 32), "patch_size"),
        ({"layer_norm_eps": -1}, (32, 32), "layer_norm_eps"),
        ({"image_size": [16, 64]}, (32, 32), "cannot be resized, since it is not square"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(
    changed: dict[str, Any], size_HW: tuple[int, int], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        vit.read_settings(TINY | changed, size_HW)
