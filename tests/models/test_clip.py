"""CLIP equals transformers for every field, class and dialect, in both towers, plain and fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from img2parquet.errors import CheckpointError
from img2parquet.models import Published, clip, load_model
from img2parquet.models.checkpoint import read_json
from img2parquet.models.processor import read_processor
from tests.harness.golden.crop_sources import CONFIGS
from tests.models import oracle
from tests.models.test_vit_msn import SHARED_ACTIVATIONS
from tests.models.towers import TINY, TINY_TEXT, check_crops, check_images, check_texts, compare_fields, prompts

VARIED = {  # each field of both towers away from the tiny config, one at a time
    "hidden_size": {"hidden_size": 44},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "num_attention_heads": {"num_attention_heads": 2},
    "intermediate_size": {"intermediate_size": 50},
    "layer_norm_eps": {"layer_norm_eps": 0.1},
    "attention_dropout": {"attention_dropout": 0.5},
    **{f"hidden_act_{name}": {"hidden_act": name} for name in SHARED_ACTIVATIONS},
}
OF_VISION = {
    "image_size": {"image_size": 40},
    "image_size_with_a_rest": {"image_size": 37},
    "patch_size": {"patch_size": 4},
    "num_channels": {"num_channels": 1},
}
OF_TEXT = {
    "vocab_size": {"vocab_size": 77},
    "max_position_embeddings": {"max_position_embeddings": 9},
    "eos_token_id": {"eos_token_id": 5},
    "eos_token_id_that_pads": {"eos_token_id": 5, "pad_token_id": 5},
}
KINDS = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification")


def config(kind: str, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **changed: Any) -> Any:
    vision = {**TINY, "projection_dim": changed.get("projection_dim", 20), **(vision or {})}
    if kind.startswith("CLIPVision"):
        return transformers.CLIPVisionConfig(**vision, attn_implementation="eager")
    both = {
        "vision_config": vision,
        "text_config": {**TINY_TEXT, **(text or {})},
        "projection_dim": 20,
        "num_labels": 3,
    }
    return transformers.CLIPConfig(**both | changed, attn_implementation="eager")


def reference(kind: str = "CLIPModel", **changed: Any) -> Any:
    return getattr(transformers, kind)(config(kind, **changed))


@pytest.mark.parametrize("changed", (VARIED | OF_VISION).values(), ids=VARIED | OF_VISION)
def test_every_field_of_the_image_tower(changed: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("CLIPModel", "CLIPForImageClassification"):
        model = reference(kind, vision=changed)
        check_images(model, oracle.saved(model, tmp_path / kind))


@pytest.mark.parametrize("changed", (VARIED | OF_TEXT).values(), ids=VARIED | OF_TEXT)
def test_every_field_of_the_text_tower(changed: dict[str, Any], tmp_path: Path) -> None:
    text = changed | ({"hidden_size": 48} if "hidden_size" in changed else {})
    text |= {"num_attention_heads": 4} if "num_attention_heads" in changed else {}
    model = reference(text=text)
    check_texts(model, oracle.saved(model, tmp_path))


@pytest.mark.parametrize("changed", [{"projection_dim": 7}, {"num_labels": 9}, {"logit_scale_init_value": 1.5}])
def test_every_field_of_both(changed: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("CLIPModel", "CLIPForImageClassification"):
        model = reference(kind, **changed)
        folder = oracle.saved(model, tmp_path / kind)
        check_images(model, folder)
        if kind == "CLIPModel":
            check_texts(model, folder)


@pytest.mark.parametrize("save", [oracle.saved, oracle.saved_as_state_dict])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_in_both_dialects(kind: str, save: Any, tmp_path: Path) -> None:
    model = reference(kind)
    folder = save(model, tmp_path)
    check_images(model, folder)
    card = load_model(str(folder)).card
    assert card.has_text == (kind == "CLIPModel") and card.implementation == "native"
    assert ("logits" in card.gives) == (kind == "CLIPForImageClassification") == bool(card.labels)


def test_files_of_transformers_4(tmp_path: Path) -> None:
    """There a bare tower's names have the prefix, position numbers are tensors, and sections are given twice."""
    model = reference("CLIPVisionModel")
    folder = oracle.saved(model, tmp_path / "tower")
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}, folder / "model.safetensors")
    check_images(model, folder)
    model = reference(vision={"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"})
    folder = oracle.saved(model, tmp_path / "both")
    said = read_json(folder / "config.json")
    kept = {key: value for key, value in said["vision_config"].items() if value is not None}
    said |= {"vision_config_dict": kept, "vision_config": {**kept, "layer_norm_eps": 0.5}}
    (folder / "config.json").write_text(json.dumps(said))
    check_images(model, folder)


OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
OPEN_CLIP = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{f"vision_model.pre_layrnorm.{leaf}": f"visual.ln_pre.{leaf}" for leaf in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{leaf}": f"visual.ln_post.{leaf}" for leaf in ("weight", "bias")},
    **{f"text_model.final_layer_norm.{leaf}": f"ln_final.{leaf}" for leaf in ("weight", "bias")},
}


def as_open_clip(model: Any, folder: Path, file: str, text: str = "") -> Path:
    """Save a CLIPModel as OpenCLIP does: its names, q, k and v in one matrix, and projections the other way round."""
    theirs, tensors = dict(model.state_dict()), {}
    for name, ours in OPEN_CLIP.items():
        tensors[ours] = theirs.pop(name)
    tensors["visual.proj"] = theirs.pop("visual_projection.weight").T
    tensors["text_projection"] = theirs.pop("text_projection.weight").T
    for tower, there in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for k in range(2):
            old, new = f"{tower}.encoder.layers.{k}", f"{there}.resblocks.{k}"
            for leaf in ("weight", "bias"):
                parts = [theirs.pop(f"{old}.self_attn.{part}_proj.{leaf}") for part in "qkv"]
                tensors[f"{new}.attn.in_proj_{leaf}"] = torch.cat(parts)
                for name, ours in OPEN_CLIP_BLOCK.items():
                    tensors[f"{new}.{ours}.{leaf}"] = theirs.pop(f"{old}.{name}.{leaf}")
    assert not theirs
    tensors = {(name if name.startswith(("visual.", "logit")) else text + name): t for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if file.endswith(".bin"):
        torch.save(contiguous, folder / file)
    else:
        save_file(contiguous, folder / file)
    return folder


def open_clip_config(model: Any, **changed: Any) -> dict[str, Any]:
    vision, text = model.config.vision_config, model.config.text_config
    said = {
        "embed_dim": model.config.projection_dim, "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size, "layers": 2, "width": vision.hidden_size, "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": 2, "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }  # fmt: skip
    steps = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": {**said, **changed}, "preprocess_cfg": steps}


@pytest.mark.parametrize(
    ("file", "text"), [("open_clip_model.safetensors", ""), ("open_clip_pytorch_model.bin", "text.")]
)
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_open_clip_s_files(file: str, text: str, act: str, tmp_path: Path) -> None:
    """With config.json of transformers, and with OpenCLIP's own alone."""
    sizes = {"hidden_act": act, "intermediate_size": 40, "eos_token_id": 2}
    model = oracle.randomised(reference(vision={**sizes, "intermediate_size": 64}, text=sizes))
    folder = as_open_clip(model, tmp_path, file, text)
    model.config.save_pretrained(folder)
    check_images(model, folder)
    check_texts(model, folder)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mine = load_model(str(folder))
    (folder / "config.json").unlink()
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(model)))
    alone = load_model(str(folder))
    assert alone.card.has_text and alone.card.gives == mine.card.gives
    settings = alone.card.preprocess
    assert (settings.resize, settings.size_HW, settings.resample) == ("shortest_edge", (32, 32), "bicubic")
    assert settings.mean == (0.4, 0.5, 0.6)
    x_BHWC = (pixels / 255 - torch.tensor(settings.mean)) / torch.tensor(settings.std)
    with torch.no_grad():
        theirs = model.get_image_features(x_BHWC.permute(0, 3, 1, 2)).pooler_output
    oracle.agree(alone.forward_pixels(pixels, frozenset({"pooled"})), {"pooled": theirs})
    ids_BT = prompts(model.config.text_config)
    with torch.no_grad():
        theirs = model.get_text_features(ids_BT).pooler_output
    oracle.agree({"text": alone.text.tower(ids_BT)}, {"text": theirs})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_clip_224"}}, "vision_cfg.timm_model_name"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64}}, r"layers: `\[3, 4, 6, 3\]`"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name"),
        ({"text_cfg": {"no_causal_mask": True}}, "text_cfg.no_causal_mask: `True` is another architecture"),
        ({"vision_cfg": None}, "vision_cfg: `None` is not an object"),
    ],
)
def test_what_open_clip_has_besides_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = reference()
    folder = as_open_clip(model, tmp_path, "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(model, **changed)))
    with pytest.raises(CheckpointError, match=said):
        load_model(str(folder))


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "hidden_size": heads * draw(st.sampled_from([4, 8, 12])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(5, 60)),
        "hidden_act": draw(st.sampled_from(SHARED_ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    }


@st.composite
def visions(draw: st.DrawFn) -> dict[str, Any]:
    patch = draw(st.sampled_from([4, 8]))
    image = {"patch_size": patch, "image_size": patch * draw(st.integers(2, 5)) + draw(st.integers(0, 3))}
    return draw(sizes()) | image | {"num_channels": draw(st.sampled_from([1, 3]))}


@pytest.mark.slow
@settings(max_examples=oracle.EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    vision=visions(),
    text=sizes(),
    context=st.integers(2, 20),
    eos=st.sampled_from([2, 5]),
    size=st.integers(1, 30),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    grid=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_random_combinations(
    vision: dict[str, Any], text: dict[str, Any], context: int, eos: int, size: int, kind: str, seed: int,
    grid: tuple[int, int] | None, tmp_path_factory: Any,
) -> None:  # fmt: skip
    text |= {"max_position_embeddings": context, "eos_token_id": eos}
    model, patch = reference(kind, vision=vision, text=text, projection_dim=size), vision["patch_size"]
    folder = oracle.saved(model, tmp_path_factory.mktemp("clip"), seed)
    no_resize = grid is None or kind == "CLIPForImageClassification"  # whose reference takes no other size
    check_images(model, folder, None if no_resize else (grid[0] * patch, grid[1] * patch))
    if kind == "CLIPModel":
        check_texts(model, folder)


@pytest.mark.parametrize("size_HW", [(48, 48), (16, 64), (40, 24), (32, 32), (8, 8)])
def test_other_sizes_resize_the_positions(size_HW: tuple[int, int], tmp_path: Path) -> None:
    model = reference()
    folder = oracle.saved(model, tmp_path)
    check_images(model, folder, size_HW)
    assert bool(oracle.opened(folder, size_HW).card().notes) == (size_HW != (32, 32))


def shortened(entry: Published) -> dict[str, Any]:
    """Return its config with two layers in each tower and a small vocabulary."""
    said: dict[str, Any] = json.loads(json.dumps(entry.config))
    said["vision_config"]["num_hidden_layers"] = said["text_config"]["num_hidden_layers"] = 2
    return said


@pytest.mark.parametrize(
    "repo",
    [
        pytest.param(entry.repo, marks=() if entry.repo.endswith("patch32") else pytest.mark.slow)
        for entry in clip.PUBLISHED
    ],
)
def test_published_at_full_width(repo: str, tmp_path: Path) -> None:
    """Two layers in each tower; seeded weights saved by transformers."""
    entry = next(entry for entry in clip.PUBLISHED if entry.repo == repo)
    model = transformers.CLIPModel(transformers.CLIPConfig(**shortened(entry)))
    folder, size_HW = oracle.saved(model, tmp_path), (entry.image_size, entry.image_size)
    x_BCHW = oracle.pixels(1, size_HW)

    def pooled(model: Any, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"pooled": model.get_image_features(x_BCHW).pooler_output}

    theirs = pooled(model, x_BCHW)
    for fast in (False, True):
        mine = oracle.run(oracle.ours(folder, fast=fast, size_HW=size_HW), x_BCHW, "pooled")
        oracle.agree_to_rounding(mine, theirs, pooled, model, x_BCHW)
    check_texts(model, folder)


@pytest.mark.parametrize("entry", clip.PUBLISHED, ids=lambda entry: entry.repo)
def test_published_parameters(entry: Published) -> None:
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig(**entry.config))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == entry.parameters
    assert load_model(entry.repo, weights="random(0)", device="meta").card.parameters == entry.parameters


@pytest.mark.parametrize("changed", (VARIED | OF_VISION).values(), ids=VARIED | OF_VISION)
def test_config_is_read_field_by_field(changed: dict[str, Any], tmp_path: Path) -> None:
    text = {name: value for name, value in changed.items() if name in VARIED and name != "hidden_size"}
    theirs = config("CLIPModel", vision=changed, text=text)
    theirs.save_pretrained(tmp_path)
    compare_fields(clip, theirs, read_json(tmp_path / "config.json"))


def test_defaults_are_the_reference_s() -> None:
    compare_fields(clip, transformers.CLIPConfig(), {"model_type": "clip", "text_config": {}, "vision_config": {}})
    bare = clip.read_settings({"model_type": "clip_vision_model"}, (224, 224))
    assert bare == clip.read_settings({"model_type": "clip"}, (224, 224))


@pytest.mark.parametrize("entry", clip.PUBLISHED, ids=lambda entry: entry.repo)
def test_crops_are_those_of_its_processor(entry: Published) -> None:
    """Bit for bit: of the PIL backend here, of the torchvision one by steps that tests/golden has crops of."""
    check_crops(entry, transformers.CLIPImageProcessorPil)
    ours = read_processor(dict(entry.preprocessor), {}, "").settings
    size = entry.image_size
    golden = [read_processor(CONFIGS[name], {}, "", size).settings.geometry for name in ("bit_default",)]
    assert ours.geometry in golden


def test_bfloat16_drift(tmp_path: Path) -> None:
    """Measured on these weights: 1 % of the scale, as the reference's own bfloat16."""
    model = transformers.CLIPModel(transformers.CLIPConfig(**shortened(clip.PUBLISHED[0])))
    folder, x_BCHW = oracle.saved(model, tmp_path), oracle.pixels(2, (224, 224))
    with torch.no_grad():
        exact = model.get_image_features(x_BCHW).pooler_output
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, dtype=torch.bfloat16, size_HW=(224, 224))
        drifted = oracle.run(backbone, x_BCHW.bfloat16(), "pooled")["pooled"].float()
        assert 1e-5 < oracle.distance(drifted, exact) < 0.05
        assert torch.nn.functional.cosine_similarity(drifted, exact).min() > 0.999


@pytest.mark.parametrize(
    ("vision", "text", "changed", "said"),
    [
        ({"num_attention_heads": 5}, {}, {}, "not divisible by num_attention_heads 5"),
        ({}, {"num_attention_heads": 5}, {}, "text_config.hidden_size 24 is not divisible"),
        ({"hidden_act": "gelo"}, {}, {}, "hidden_act: unknown activation `gelo`(.|\n)*did you mean `gelu`"),
        ({}, {"hidden_act": "gelo"}, {}, "text_config.hidden_act: unknown activation `gelo`"),
        ({"num_hidden_layers": 0}, {}, {}, "num_hidden_layers"),
        ({}, {"vocab_size": 0}, {}, "text_config.vocab_size"),
        ({}, {"max_position_embeddings": "77"}, {}, "text_config.max_position_embeddings"),
        ({}, {"eos_token_id": [1, 2]}, {}, r"text_config.eos_token_id: `\[1, 2\]`"),
        ({}, {"layer_norm_eps": -1}, {}, "text_config.layer_norm_eps"),
        ({"layer_norm_eps": "small"}, {}, {}, "layer_norm_eps: `small`"),
        ({"image_size": 4}, {}, {}, "4x4 is smaller than a patch, 8x8"),
        ({}, {}, {"projection_dim": 0}, "projection_dim"),
        ({}, {}, {"vision_config": 3}, "vision_config: `3` is not an object"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(
    vision: dict[str, Any], text: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    config = {"model_type": "clip", "vision_config": TINY | vision, "text_config": TINY_TEXT | text, **changed}
    with pytest.raises(CheckpointError, match=said):
        clip.read_settings(config, (32, 32))
        clip.build_text(config, frozenset({"text_projection.weight"}))


@pytest.mark.parametrize("section", ["vision_config", "text_config"])
def test_a_section_is_read_before_anything_is_built(section: str, tmp_path: Path) -> None:
    folder = oracle.saved(reference(), tmp_path)
    said = read_json(folder / "config.json")
    said[section]["num_hidden_layers"] = 10**6
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="1000000 layers, more than"):
        load_model(str(folder))


def test_a_text_tower_that_is_not_whole_is_refused_before_the_first_prompt(tmp_path: Path) -> None:
    folder = oracle.saved(reference(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_model.encoder.layers.1.mlp.fc2.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"do not fit `clip's text tower`(.|\n)*text_model.encoder.layers.1.mlp.fc2"
    ):
        load_model(str(folder))
