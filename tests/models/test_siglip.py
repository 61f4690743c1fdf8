"""SigLIP and SigLIP 2 equal transformers for every field, class and dialect, in both towers, plain and fast."""

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
from img2parquet.models import Published, load_model, siglip
from img2parquet.models.checkpoint import read_json
from img2parquet.models.processor import read_processor
from tests.harness.golden.crop_sources import CONFIGS
from tests.models import oracle
from tests.models.test_clip import OF_VISION, VARIED, sizes, visions
from tests.models.towers import TINY, TINY_TEXT, check_crops, check_images, check_texts, compare_fields

OF_SIGLIP = OF_VISION | {"vision_use_head": {"vision_use_head": False}}
OF_TEXT = {
    "vocab_size": {"vocab_size": 77},
    "max_position_embeddings": {"max_position_embeddings": 9},
    "projection_size": {"projection_size": 9},
}
KINDS = ("SiglipModel", "SiglipVisionModel", "SiglipForImageClassification")


def config(kind: str, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **changed: Any) -> Any:
    vision = {**TINY, **(vision or {})}
    if kind == "SiglipVisionModel":
        return transformers.SiglipVisionConfig(**vision, attn_implementation="eager")
    both = {"vision_config": vision, "text_config": {**TINY_TEXT, **(text or {})}, "num_labels": 3}
    return transformers.SiglipConfig(**both | changed, attn_implementation="eager")


def reference(kind: str = "SiglipModel", **changed: Any) -> Any:
    return getattr(transformers, kind)(config(kind, **changed))


@pytest.mark.parametrize("changed", (VARIED | OF_SIGLIP).values(), ids=VARIED | OF_SIGLIP)
def test_every_field_of_the_image_tower(changed: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("SiglipVisionModel", "SiglipForImageClassification"):
        model = reference(kind, vision=changed)
        check_images(model, oracle.saved(model, tmp_path / kind))


@pytest.mark.parametrize("changed", (VARIED | OF_TEXT).values(), ids=VARIED | OF_TEXT)
def test_every_field_of_the_text_tower(changed: dict[str, Any], tmp_path: Path) -> None:
    text = changed | ({"hidden_size": 48} if "hidden_size" in changed else {})
    text |= {"num_attention_heads": 4} if "num_attention_heads" in changed else {}
    model = reference(text=text)
    check_texts(model, oracle.saved(model, tmp_path))


@pytest.mark.parametrize("save", [oracle.saved, oracle.saved_as_state_dict])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_in_both_dialects(kind: str, save: Any, tmp_path: Path) -> None:
    model = reference(kind)
    folder = save(model, tmp_path)
    check_images(model, folder)
    card = load_model(str(folder)).card
    assert card.has_text == (kind == "SiglipModel") and card.implementation == "native"
    assert ("logits" in card.gives) == (kind == "SiglipForImageClassification") == bool(card.labels)
    assert "pooled:cls" not in card.gives


def test_more_classes(tmp_path: Path) -> None:
    model = reference("SiglipForImageClassification", num_labels=9)
    check_images(model, oracle.saved(model, tmp_path))


def test_files_of_transformers_4(tmp_path: Path) -> None:
    """There a bare tower's names have the prefix, and position numbers are tensors."""
    model = reference("SiglipVisionModel")
    folder = oracle.saved(model, tmp_path / "tower")
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(16)[None]}, folder / "model.safetensors")
    check_images(model, folder)


TIMM = {
    "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
POOL = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def as_open_clip(model: Any, folder: Path) -> Path:
    """Save a SiglipModel as OpenCLIP does: an image tower with timm's names, and q, k and v in one matrix."""
    theirs, tensors = dict(model.state_dict()), dict[str, torch.Tensor]()
    positions = theirs.pop("vision_model.embeddings.position_embedding.weight")
    tensors["visual.trunk.pos_embed"] = positions[None]
    tensors["visual.trunk.attn_pool.latent"] = theirs.pop("vision_model.head.probe")
    tensors["text.token_embedding.weight"] = theirs.pop("text_model.embeddings.token_embedding.weight")
    tensors["text.positional_embedding"] = theirs.pop("text_model.embeddings.position_embedding.weight")
    tensors |= {name: theirs.pop(name)[0] for name in ("logit_scale", "logit_bias")}
    for leaf in ("weight", "bias"):
        tensors[f"visual.trunk.patch_embed.proj.{leaf}"] = theirs.pop(f"vision_model.embeddings.patch_embedding.{leaf}")
        tensors[f"visual.trunk.norm.{leaf}"] = theirs.pop(f"vision_model.post_layernorm.{leaf}")
        tensors[f"text.ln_final.{leaf}"] = theirs.pop(f"text_model.final_layer_norm.{leaf}")
        tensors[f"text.text_projection.{leaf}"] = theirs.pop(f"text_model.head.{leaf}")
        qkv = theirs.pop(f"vision_model.head.attention.in_proj_{leaf}")
        tensors[f"visual.trunk.attn_pool.q.{leaf}"], tensors[f"visual.trunk.attn_pool.kv.{leaf}"] = qkv[:32], qkv[32:]
        for name, timm in POOL.items():
            tensors[f"visual.trunk.attn_pool.{timm}.{leaf}"] = theirs.pop(f"vision_model.head.{name}.{leaf}")
        for k in range(2):
            for tower, new, names, merged in (
                ("vision_model", f"visual.trunk.blocks.{k}", TIMM, f"attn.qkv.{leaf}"),
                ("text_model", f"text.transformer.resblocks.{k}", OPEN_CLIP, f"attn.in_proj_{leaf}"),
            ):
                old = f"{tower}.encoder.layers.{k}"
                parts = [theirs.pop(f"{old}.self_attn.{part}_proj.{leaf}") for part in "qkv"]
                tensors[f"{new}.{merged}"] = torch.cat(parts)
                for name, ours in names.items():
                    tensors[f"{new}.{ours}.{leaf}"] = theirs.pop(f"{old}.{name}.{leaf}")
    assert not theirs
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "open_clip_model.safetensors")
    return folder


def test_open_clip_s_file(tmp_path: Path) -> None:
    model = oracle.randomised(reference(text={"projection_size": 32}))
    folder = as_open_clip(model, tmp_path)
    model.config.save_pretrained(folder)
    check_images(model, folder)
    check_images(model, folder, (40, 24))
    check_texts(model, folder)


@pytest.mark.slow
@settings(max_examples=oracle.EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    vision=visions(),
    text=sizes(),
    context=st.integers(2, 20),
    projection=st.none() | st.integers(1, 30),
    use_head=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    grid=st.none() | st.tuples(st.integers(1, 6), st.integers(2, 6)),  # attention of one token is constant
)
def test_random_combinations(
    vision: dict[str, Any], text: dict[str, Any], context: int, projection: int | None, use_head: bool, kind: str,
    seed: int, grid: tuple[int, int] | None, tmp_path_factory: Any,
) -> None:  # fmt: skip
    text |= {"max_position_embeddings": context, "projection_size": projection}
    vision |= {"vision_use_head": use_head or kind == "SiglipModel"}
    model, patch = reference(kind, vision=vision, text=text), vision["patch_size"]
    folder = oracle.saved(model, tmp_path_factory.mktemp("siglip"), seed)
    check_images(model, folder, None if grid is None else (grid[0] * patch, grid[1] * patch))
    if kind == "SiglipModel":
        check_texts(model, folder)


@pytest.mark.parametrize("size_HW", [(48, 48), (16, 64), (40, 24), (32, 32), (8, 16)])
def test_other_sizes_resize_the_positions(size_HW: tuple[int, int], tmp_path: Path) -> None:
    model = reference()
    folder = oracle.saved(model, tmp_path)
    check_images(model, folder, size_HW)
    assert bool(oracle.opened(folder, size_HW).card().notes) == (size_HW != (32, 32))


def smallest_of_each_shape() -> list[str]:
    """One published model for each shape of its layers: the others differ in the image's size, or in words alone."""
    found: dict[str, str] = {}
    for entry in sorted(siglip.PUBLISHED, key=lambda entry: entry.image_size):
        found.setdefault(
            entry.repo.rpartition("-patch")[0] + str(entry.config["vision_config"]["patch_size"]), entry.repo
        )
    return list(found.values())


@pytest.mark.parametrize(
    "repo",
    [
        pytest.param(repo, marks=() if repo.endswith("base-patch16-224") else pytest.mark.slow)
        for repo in smallest_of_each_shape()
    ],
)
def test_published_at_full_width(repo: str, tmp_path: Path) -> None:
    """Two layers in each tower and 999 words; seeded weights saved by transformers."""
    entry = next(entry for entry in siglip.PUBLISHED if entry.repo == repo)
    said = shortened(entry)
    said["text_config"]["vocab_size"] = 999
    model = transformers.SiglipModel(transformers.SiglipConfig(**said))
    model.config.text_config.eos_token_id = 1
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


def shortened(entry: Published) -> dict[str, Any]:
    """Return its config with two layers in each tower."""
    said: dict[str, Any] = json.loads(json.dumps(entry.config))
    said["vision_config"]["num_hidden_layers"] = said["text_config"]["num_hidden_layers"] = 2
    return said


@pytest.mark.parametrize("entry", siglip.PUBLISHED, ids=lambda entry: entry.repo)
def test_published_parameters(entry: Published) -> None:
    with torch.device("meta"):
        theirs = transformers.SiglipModel(transformers.SiglipConfig(**entry.config))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == entry.parameters
    assert load_model(entry.repo, weights="random(0)", device="meta").card.parameters == entry.parameters


@pytest.mark.parametrize("changed", (VARIED | OF_SIGLIP).values(), ids=VARIED | OF_SIGLIP)
def test_config_is_read_field_by_field(changed: dict[str, Any], tmp_path: Path) -> None:
    text = {name: value for name, value in changed.items() if name in VARIED and name != "hidden_size"}
    theirs = config("SiglipModel", vision=changed, text=text)
    theirs.save_pretrained(tmp_path)
    compare_fields(siglip, theirs, read_json(tmp_path / "config.json"))


def test_defaults_are_the_reference_s() -> None:
    compare_fields(
        siglip, transformers.SiglipConfig(), {"model_type": "siglip", "text_config": {}, "vision_config": {}}
    )


@pytest.mark.parametrize("entry", siglip.PUBLISHED, ids=lambda entry: entry.repo)
def test_crops_are_those_of_its_processor(entry: Published) -> None:
    """Bit for bit: of the PIL backend here, of the torchvision one by steps that tests/golden has crops of."""
    check_crops(entry, transformers.SiglipImageProcessorPil)
    ours = read_processor(dict(entry.preprocessor), {}, "").settings
    size = entry.image_size
    golden = [read_processor(CONFIGS[name], {}, "", size).settings.geometry for name in ("beit_default", "vit_default")]
    assert ours.geometry in golden


def test_bfloat16_drift(tmp_path: Path) -> None:
    """Measured on these weights: 1 % of the scale, as the reference's own bfloat16."""
    said = shortened(siglip.PUBLISHED[0])
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**said["vision_config"]))
    folder, x_BCHW = oracle.saved(model, tmp_path), oracle.pixels(2, (224, 224))
    exact = oracle.reference(model, x_BCHW).pooler_output
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, dtype=torch.bfloat16, size_HW=(224, 224))
        drifted = oracle.run(backbone, x_BCHW.bfloat16(), "pooled")["pooled"].float()
        assert 1e-5 < oracle.distance(drifted, exact) < 0.05
        assert torch.nn.functional.cosine_similarity(drifted, exact).min() > 0.999


@pytest.mark.parametrize(
    ("vision", "text", "said"),
    [
        ({"num_attention_heads": 5}, {}, "not divisible by num_attention_heads 5"),
        ({}, {"num_attention_heads": 5}, "text_config.hidden_size 24 is not divisible"),
        ({"vision_use_head": "yes"}, {}, "vision_use_head: `yes` is neither"),
        ({"hidden_act": "gelo"}, {}, "hidden_act: unknown activation `gelo`"),
        ({}, {"projection_size": -4}, "text_config.embedding_size: `-4`"),
        ({}, {"vocab_size": 0}, "text_config.vocab_size"),
        ({"image_size": 4}, {}, "4x4 is smaller than a patch, 8x8"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(
    vision: dict[str, Any], text: dict[str, Any], said: str
) -> None:
    config = {"model_type": "siglip", "vision_config": TINY | vision, "text_config": TINY_TEXT | text}
    with pytest.raises(CheckpointError, match=said):
        siglip.read_settings(config, (32, 32))
        siglip.build_text(config, frozenset({"text_model.head.weight"}))


def test_a_rest_that_fills_no_patch_is_not_read(tmp_path: Path) -> None:
    """As of the published 384 pixels with patches of 14; of another size a note says so."""
    folder = oracle.saved(reference(vision={"image_size": 37}), tmp_path)
    assert load_model(str(folder), image_size=37).card.gives["tokens"] == (16, 32)
    other = load_model(str(folder), image_size=45).card
    assert other.gives["tokens"] == (25, 32) and any("fill no 8x8 patch" in note for note in other.notes)
