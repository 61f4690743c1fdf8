"""BEiT equals transformers in float32, plain and fast, for every class, config field, dialect and input size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BeitBackbone,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)

from img2parquet.errors import CheckpointError, OutputUnavailable
from img2parquet.models import beit
from img2parquet.models.beit import Settings
from tests.models import oracle

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": 11,
    "num_labels": 5,
    "out_indices": [1, 2, 3, 4],
    "use_relative_position_bias": True,
    "layer_norm_eps": 1e-5,
    "auxiliary_channels": 6,
}
CLASSES = {
    cls.__name__: cls
    for cls in (
        BeitModel,
        BeitForMaskedImageModeling,
        BeitForImageClassification,
        BeitForSemanticSegmentation,
        BeitBackbone,
    )
}
ONE_AT_A_TIME: list[dict[str, Any]] = [
    {},
    {"vocab_size": 40},
    {"hidden_size": 48},
    {"num_hidden_layers": 6},
    {"num_attention_heads": 1},
    {"num_attention_heads": 8},
    {"intermediate_size": 64},
    {"hidden_act": "relu"},
    {"hidden_act": "gelu_new"},
    {"hidden_act": "quick_gelu"},
    {"hidden_dropout_prob": 0.5},
    {"attention_probs_dropout_prob": 0.5},
    {"initializer_range": 1.0},
    {"layer_norm_eps": 1e-2},
    {"image_size": 64},
    {"image_size": 37},
    {"image_size": [18, 55]},
    {"image_size": [16, 48]},
    {"image_size": [48, 16], "use_shared_relative_position_bias": True},
    {"image_size": [16, 64], "use_absolute_position_embeddings": True},
    {"patch_size": 4},
    {"num_channels": 1},
    {"use_mask_token": True},
    {"use_absolute_position_embeddings": True},
    {"use_relative_position_bias": False},
    {"use_shared_relative_position_bias": True},
    {"use_shared_relative_position_bias": True, "use_relative_position_bias": False},
    {"layer_scale_init_value": 0.0},
    {"layer_scale_init_value": 1e-5},
    {"drop_path_rate": 0.9},
    {"use_mean_pooling": False},
    {"pool_scales": [1, 4]},
    {"use_auxiliary_head": False},
    {"auxiliary_loss_weight": 2.0},
    {"auxiliary_channels": 8},
    {"auxiliary_num_convs": 2},
    {"auxiliary_concat_input": True},
    {"semantic_loss_ignore_index": 0},
    {"out_indices": [0, 1, 2, 4]},
    {"out_indices": [-4, -3, -2, -1]},
    {"out_indices": None, "out_features": ["stem", "stage1", "stage3", "stage4"]},
    {"out_indices": None, "segmentation_indices": [1, 2, 3, 4]},
    {"add_fpn": True},
    {"reshape_hidden_states": False},
    {"num_labels": 1},
]


# --- every class, one field at a time, and in seeded combinations ---


@pytest.mark.parametrize("delta", ONE_AT_A_TIME, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_each_field_alone(name: str, delta: dict[str, Any], tmp_path: Path) -> None:
    check_agrees(name, {**TINY, **delta}, tmp_path)


@pytest.mark.parametrize("delta", [{}, {"use_mean_pooling": False}], ids=str)
def test_a_classifier_of_no_classes_gives_what_its_head_would_read(delta: dict[str, Any], tmp_path: Path) -> None:
    check_agrees("BeitForImageClassification", {**TINY, **delta, "num_labels": 0}, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("delta", [{}, {"use_mean_pooling": False}, {"add_fpn": True}], ids=str)
def test_names_that_transformers_has_in_memory(name: str, delta: dict[str, Any], tmp_path: Path) -> None:
    check_agrees(name, {**TINY, "use_shared_relative_position_bias": True, **delta}, tmp_path, in_memory_names=True)


@pytest.mark.parametrize("size_HW", [(16, 16), (64, 64), (24, 48), (56, 40), (53, 53), (45, 51)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_any_input_size(name: str, size_HW: tuple[int, int], tmp_path: Path) -> None:
    every = {
        "use_absolute_position_embeddings": True,
        "use_shared_relative_position_bias": True,
        "image_size": [48, 48],
    }
    check_agrees(name, {**TINY, **every}, tmp_path, size_HW=size_HW)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any], tuple[int, int], bool]:
    patch, heads = draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 2, 4]))
    side = st.integers(2, 6).map(lambda n: n * patch)
    absolute, flag = draw(st.booleans()), st.booleans()
    trained = draw(side)
    config = {
        **TINY,
        "patch_size": patch,
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from([8, 12])),
        "intermediate_size": draw(st.integers(8, 70)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu", "gelu_pytorch_tanh"])),
        "image_size": trained if absolute else [trained, draw(side)],
        "use_absolute_position_embeddings": absolute,
        "use_relative_position_bias": draw(flag),
        "use_shared_relative_position_bias": draw(flag),
        "use_mask_token": draw(flag),
        "use_mean_pooling": draw(flag),
        "layer_scale_init_value": draw(st.sampled_from([0.0, 0.1])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-3])),
        "pool_scales": draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)),
        "out_indices": sorted(draw(st.sets(st.integers(0, 4), min_size=4, max_size=4))),
    }
    config |= draw(st.sampled_from([{}, {"add_fpn": True}, {"reshape_hidden_states": False}]))
    return draw(st.sampled_from(sorted(CLASSES))), config, (draw(side), draw(side)), draw(flag)


@pytest.mark.slow
@settings(
    max_examples=oracle.EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(cases())
def test_fields_together(case: tuple[str, dict[str, Any], tuple[int, int], bool]) -> None:
    name, config, size_HW, in_memory_names = case
    with TemporaryDirectory() as folder:
        check_agrees(name, config, Path(folder), size_HW=size_HW, in_memory_names=in_memory_names)


# --- published configurations at full width ---


@pytest.mark.parametrize("entry", beit.PUBLISHED, ids=lambda entry: entry.repo)
def test_published_parameters(entry: Any) -> None:
    settings_ = beit.read_settings(entry.config, (entry.image_size, entry.image_size))
    with torch.device("meta"):
        module = beit.build(settings_, frozenset(beit.HEADS[entry.architecture]))
        theirs = CLASSES[entry.architecture](BeitConfig(**entry.config))
    assert sum(p.numel() for p in theirs.parameters()) == entry.parameters
    assert sum(p.numel() for p in module.parameters()) == entry.parameters
    assert len(beit.PUBLISHED) == 11


WIDE = ("512", "ade")


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, id=e.repo, marks=[pytest.mark.slow] if any(w in e.repo for w in WIDE) else [])
        for e in beit.PUBLISHED
    ],
)
def test_published_at_full_width(entry: Any, tmp_path: Path) -> None:
    segments = entry.architecture == "BeitForSemanticSegmentation"
    config = {**entry.config, "num_hidden_layers": 4 if segments else 2}
    config |= {"out_indices": [1, 2, 3, 4]} if segments else {}
    size = 64 if segments else entry.image_size  # the head at 640 is 700 GMAC; its tables stay those of 640
    check_agrees(entry.architecture, config, tmp_path, size_HW=(size, size), batch=1)


def test_settings_equal_the_reference_field_by_field(tmp_path: Path) -> None:
    for delta in ONE_AT_A_TIME:
        reference: Any = BeitConfig(**{**TINY, **delta})
        ours = beit.read_settings(reference.to_dict(), (32, 32))
        for field in set(ours.__dataclass_fields__) - {"input_size", "has_identity_head"}:
            assert getattr(ours, field) == plain(field, getattr(reference, field), reference), field


def test_defaults_equal_the_reference() -> None:
    default: Any = BeitConfig()
    assert beit.read_settings({}, (224, 224)) == beit.read_settings(default.to_dict(), (224, 224))


# --- what is given, and what is not ---


def test_shapes_are_those_promised(tmp_path: Path) -> None:
    for name, config in (
        ("BeitForSemanticSegmentation", {**TINY, "add_fpn": True}),
        ("BeitForMaskedImageModeling", {**TINY, "reshape_hidden_states": False}),
        ("BeitForImageClassification", TINY),
    ):
        folder = oracle.saved(make(name, config), tmp_path / name)
        for fast in (False, True):
            model = oracle.ours(folder, fast=fast, size_HW=(40, 56))
            given_ = model.gives()
            made = oracle.run(model, oracle.pixels(size_HW=(40, 56)), *given_)
            assert {key: tuple(value.shape[1:]) for key, value in made.items()} == given_


def test_pooled_needs_a_pooling_norm_that_was_trained(tmp_path: Path) -> None:
    masked = oracle.ours(oracle.saved(make("BeitForMaskedImageModeling", TINY), tmp_path / "masked"))
    assert "pooled" not in masked.gives() and {"pooled:cls", "pooled:mean"} <= masked.gives().keys()
    with pytest.raises(OutputUnavailable, match="does not give `pooled`"):
        oracle.run(masked, oracle.pixels(size_HW=(32, 32)), "pooled")
    assert "never trained" in masked.notes[0]  # type: ignore[attr-defined]
    classifier = oracle.ours(oracle.saved(make("BeitForImageClassification", TINY), tmp_path / "classes"))
    assert "pooled" in classifier.gives() and "segmentation" not in classifier.gives()


def test_a_mask_needs_a_mask_token(tmp_path: Path) -> None:
    folder = oracle.saved(make("BeitForMaskedImageModeling", TINY), tmp_path)
    mask_BN = torch.ones(2, 16, dtype=torch.bool)
    for fast in (False, True):
        with pytest.raises(OutputUnavailable, match="mask token"):
            oracle.run(
                oracle.ours(folder, fast=fast), oracle.pixels(size_HW=(32, 32)), "visual_tokens", mask_BN=mask_BN
            )


def test_layers_above_the_wanted_one_are_not_run(tmp_path: Path) -> None:
    model = oracle.ours(oracle.saved(make("BeitForSemanticSegmentation", TINY), tmp_path))
    ran: list[int] = []
    for k, block in enumerate(model.blocks):  # type: ignore[attr-defined]
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    oracle.run(model, oracle.pixels(size_HW=(32, 32)), "segmentation")
    assert ran == [0, 1, 2]  # out_indices end at 4: hidden state 3


# --- the fast form ---


def test_biases_beyond_the_memory_bound_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TINY, "use_shared_relative_position_bias": True}
    folder, x_BCHW = oracle.saved(make("BeitModel", config), tmp_path), oracle.pixels(size_HW=(48, 32))
    kept = oracle.run(oracle.ours(folder), x_BCHW, "tokens")["tokens"]
    monkeypatch.setattr(beit, "BIAS_BYTES", 0)
    assert torch.equal(oracle.run(oracle.ours(folder), x_BCHW, "tokens")["tokens"], kept)


def test_a_change_of_size_is_seen(tmp_path: Path) -> None:
    config = {**TINY, "use_absolute_position_embeddings": True}
    folder = oracle.saved(make("BeitModel", config), tmp_path)
    fast = oracle.ours(folder)
    for size_HW in ((32, 32), (32, 64), (64, 32), (32, 32)):
        x_BCHW = oracle.pixels(size_HW=size_HW)
        expected = oracle.run(oracle.ours(folder, fast=False), x_BCHW, "tokens")
        oracle.agree(oracle.run(fast, x_BCHW, "tokens"), expected)


def test_the_fast_form_leaves_the_plain_one_and_its_inputs_alone(tmp_path: Path) -> None:
    folder, x_BCHW = oracle.saved(make("BeitForSemanticSegmentation", TINY), tmp_path), oracle.pixels(size_HW=(32, 32))
    module = oracle.ours(folder, fast=False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}  # type: ignore[attr-defined]
    fast = beit.fold(module, torch.bfloat16)  # type: ignore[arg-type]
    everything = oracle.run(fast, x_BCHW, *fast.gives())
    assert torch.equal(x_BCHW, oracle.pixels(size_HW=(32, 32)))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())  # type: ignore[attr-defined]
    alone = oracle.run(fast, x_BCHW, "tokens:1")["tokens:1"]
    assert torch.equal(everything["tokens:1"], alone) or oracle.distance(everything["tokens:1"], alone) < 2e-2


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_drift_is_bounded(fast: bool, tmp_path: Path) -> None:
    entry = next(e for e in beit.PUBLISHED if e.repo == "microsoft/beit-base-patch16-224")
    folder = oracle.saved(make(entry.architecture, {**entry.config, "num_hidden_layers": 2}), tmp_path)
    x_BCHW, wants = oracle.pixels(size_HW=(224, 224)), ("logits", "pooled", "tokens")
    exact = oracle.run(oracle.ours(folder), x_BCHW, *wants)
    drifted = oracle.run(oracle.ours(folder, fast=fast, dtype=torch.bfloat16), x_BCHW.bfloat16(), *wants)
    for name in wants:
        cosine = F.cosine_similarity(drifted[name].float().flatten(1), exact[name].flatten(1))
        assert cosine.min() > 0.9995, f"{name}: {cosine}"


# --- bad input ---

BAD: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 7}, "image_size 7x7 is smaller than a patch, 8x8"),
    ({"patch_size": 0}, "`patch_size` is `0`"),
    ({"patch_size": [8, 8, 8]}, "`patch_size`"),
    ({"num_attention_heads": 5}, "`num_attention_heads` is `5`"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers` is `0`"),
    ({"hidden_size": "32"}, "`hidden_size` is `32`"),
    ({"hidden_size": True}, "`hidden_size` is `True`"),
    ({"use_mean_pooling": 1}, "`use_mean_pooling` is `1`"),
    ({"layer_norm_eps": -1.0}, "`layer_norm_eps`"),
    ({"hidden_act": "gellu"}, "unknown activation `gellu`"),
    ({"pool_scales": [0, 2]}, "`pool_scales`"),
    ({"pool_scales": 3}, "`pool_scales`"),
    ({"out_indices": [1, 2, 9]}, "`out_indices`"),
    ({"out_indices": [2, 1]}, "`out_indices`"),
    ({"out_indices": [1, 1]}, "`out_indices`"),
    ({"out_indices": "stage1"}, "`out_indices`"),
    ({"out_indices": None, "out_features": ["stage9"]}, "`out_features`"),
    ({"out_features": ["stage1"], "out_indices": [2]}, "`out_features`"),
    ({"add_fpn": True, "out_indices": [1]}, "four `out_indices`"),
    ({"add_fpn": True, "reshape_hidden_states": False}, "`reshape_hidden_states`"),
    ({"image_size": [16, 24], "use_absolute_position_embeddings": True}, "not a square"),
    ({"num_labels": -1}, "num_labels"),
]


@pytest.mark.parametrize(("delta", "message"), BAD, ids=str)
def test_a_config_that_cannot_work_is_refused(delta: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        beit.read_settings({**TINY, **delta}, (32, 32))
    assert message in str(error.value)


def test_segmentation_needs_four_stages_and_a_grid_to_halve() -> None:
    names = frozenset(beit.HEADS["BeitForSemanticSegmentation"])
    with pytest.raises(CheckpointError, match="four `out_indices`"):
        beit.build(beit.read_settings({**TINY, "out_indices": [1, 2]}, (32, 32)), names)
    with pytest.raises(CheckpointError, match="too small"):
        beit.build(beit.read_settings(TINY, (8, 32)), names)
    with pytest.raises(CheckpointError, match="input's size 7x32"):
        beit.read_settings(TINY, (7, 32))


def test_the_old_default_of_segmentation_indices_does_not_refuse_a_small_classifier() -> None:
    config = {**TINY, "out_indices": None, "segmentation_indices": [3, 5, 7, 11]}
    assert beit.read_settings(config, (32, 32)).out_indices == (4,)


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(),
    st.sampled_from(["", "gelu", "stage1"]),
    st.lists(st.one_of(st.integers(-9, 9), st.sampled_from(["stem", "stage2"]), st.none()), max_size=5),
    st.just({"a": 1}),
)


@pytest.mark.slow
@settings(max_examples=oracle.EXAMPLES * 3, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(st.sampled_from([*sorted(Settings.__dataclass_fields__), "segmentation_indices"]), JSON, max_size=2)
)
def test_no_value_of_any_field_ends_in_a_traceback(delta: dict[str, Any]) -> None:
    try:
        read = beit.read_settings({**TINY, **delta}, (32, 32))
        with torch.device("meta"):
            beit.build(read, frozenset(beit.HEADS["BeitForSemanticSegmentation"])).gives()
    except CheckpointError as error:
        assert error.message


INDEX = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"


@pytest.mark.parametrize(
    ("gone", "added", "message"),
    [
        ("", INDEX, ""),
        ("", "auxiliary_head.conv_cat.convolution.weight", ""),
        ("beit.pooler.layernorm.weight", "", "1 missing: pooler.layernorm.weight"),
        ("beit.encoder.layer.2.lambda_2", "", "1 missing: encoder.layer.2.lambda_2"),
        ("", "beit.encoder.layer.0.attention.attention.key.bias", "attention.key.bias"),
        ("", "lm_head.bias", "1 unexpected: lm_head.bias"),
        ("", "decode_head.bottleneck.bn.weight", "1 unexpected"),
    ],
)
def test_files_that_do_not_fit_are_refused(gone: str, added: str, message: str, tmp_path: Path) -> None:
    file = oracle.saved(make("BeitForImageClassification", TINY), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor for name, tensor in tensors.items() if name != gone}
    assert len(tensors) == len(load_file(file)) - bool(gone)
    save_file(tensors | ({added: torch.zeros(32)} if added else {}), file)
    if not message:
        assert "logits" in oracle.ours(tmp_path).gives()
        return
    with pytest.raises(CheckpointError) as error:
        oracle.ours(tmp_path)
    assert message in str(error.value)


# --- the oracle's side ---


def make(name: str, config: Mapping[str, Any]) -> Any:
    return CLASSES[name](BeitConfig(**{**config, "attn_implementation": "eager"}))


def check_agrees(
    name: str,
    config: dict[str, Any],
    folder: Path,
    *,
    size_HW: tuple[int, int] | None = None,
    in_memory_names: bool = False,
    batch: int = 2,
) -> None:
    """Save a seeded model of the reference, load it as ours, and compare every common output."""
    model = make(name, config)
    (oracle.saved_as_state_dict if in_memory_names else oracle.saved)(model, folder)
    side = config["image_size"]
    size_HW = size_HW or ((side, side) if isinstance(side, int) else (side[0], side[1]))
    x_BCHW = oracle.pixels(batch, size_HW, config.get("num_channels", 3))
    for mask_BN in masks(config, name, size_HW, batch):
        theirs = features_of(model, x_BCHW, mask_BN)
        inputs = {} if mask_BN is None else {"mask_BN": mask_BN}
        for fast in (False, True):
            mine = oracle.ours(folder, fast=fast, size_HW=size_HW)
            assert theirs.keys() <= mine.gives().keys()
            compare(oracle.run(mine, x_BCHW, *theirs, **inputs), theirs)
            last = list(theirs)[-1]  # alone: no layer more than it needs, and attention without its weights
            compare(oracle.run(mine, x_BCHW, last, **inputs), {last: theirs[last]})


def compare(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    oracle.agree(mine, theirs)


def masks(config: Mapping[str, Any], name: str, size_HW: tuple[int, int], batch: int) -> list[Tensor | None]:
    if not config.get("use_mask_token") or name not in ("BeitModel", "BeitForMaskedImageModeling"):
        return [None]
    N = (size_HW[0] // config.get("patch_size", 16)) * (size_HW[1] // config.get("patch_size", 16))
    return [None, torch.rand(batch, N, generator=torch.Generator().manual_seed(3)) < 0.4]


def features_of(model: Any, x_BCHW: Tensor, mask_BN: Tensor | None) -> dict[str, Tensor]:
    """Map the reference's outputs to our names; its class's own output comes last."""
    inputs: dict[str, Any] = {} if mask_BN is None else {"bool_masked_pos": mask_BN}
    inputs |= {} if isinstance(model, BeitBackbone) else {"interpolate_pos_encoding": True}
    made = oracle.reference(model, x_BCHW, output_hidden_states=True, output_attentions=True, **inputs)
    features = {f"tokens:{k}": state for k, state in enumerate(made.hidden_states)}
    features |= {f"attentions:{k}": weights for k, weights in enumerate(made.attentions)}
    match model:
        case BeitModel():
            features |= {"tokens": made.last_hidden_state, "pooled:cls": made.last_hidden_state[:, 0]}
            features |= {"pooled:mean": made.last_hidden_state[:, 1:].mean(1), "pooled": made.pooler_output}
        case BeitForMaskedImageModeling():
            features["visual_tokens"] = made.logits
        case BeitForImageClassification():
            features["logits"] = made.logits
        case BeitForSemanticSegmentation():
            features["segmentation"] = made.logits
        case BeitBackbone():
            stages = model.out_features
            features |= {f"feature_maps:{s}": m for s, m in zip(stages, made.feature_maps, strict=True)}
    return features


def plain(field: str, value: Any, config: Any) -> Any:
    """Convert a field of the reference's config to the form in Settings."""
    if field in ("image_size", "patch_size"):
        return (value, value) if isinstance(value, int) else tuple(value)
    if field == "out_indices":
        return tuple(i % len(config.stage_names) for i in value)
    return tuple(value) if isinstance(value, list) else value
