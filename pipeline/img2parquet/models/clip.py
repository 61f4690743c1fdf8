"""CLIP (Radford et al. 2021; OpenAI's, LAION's, MetaCLIP, DFN): an image and a text tower with one space.

* `pooled` is the vector of the shared space, the reference's `get_image_features`: projected, not normalised. A bare
  tower or a classifier has no projection, and its own vector takes that place. `pooled:tower` is the tower's own
  `pooler_output`: the class token after the last layer norm.
* `tokens` are the reference's `last_hidden_state`, which that layer norm has not passed; nor have `pooled:cls` and
  `pooled:mean`, the class token and the mean over the patches. The classifier reads that mean.
* Prompts attend to earlier tokens only. Their vector is read at the first end-of-text token; where config.json says
  `eos_token_id: 2`, as older ones do, at the highest token number.

Shapes: B batch, C channels, H W image, N patches, T = 1 + N tokens, D width, E width of the shared space, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from img2parquet.models.family import Published, TextFamily
from img2parquet.models.kernels.activations import activation
from img2parquet.models.patch_sizes import check_patches
from img2parquet.models.transformer import (
    COUNTS,
    Encoder,
    EncoderSettings,
    FastEncoder,
    attention_shapes,
    cast_copy,
    check_counts,
    check_heads,
    token_shapes,
)
from img2parquet.models.two_towers import (
    OPEN_CLIP_QKV,
    FastTextTower,
    Projection,
    TextSettings,
    TextTower,
    block_keys,
    check_epsilon,
    open_clip_block_keys,
    read_text,
    read_vision,
)

MODEL_TYPE = "clip"
PREFIX = "vision_model."
PROCESSOR = "CLIPImageProcessor"
EMBEDDING = (
    "the image's vector in the space shared with text (`get_image_features`), projected and not normalised; of a bare "
    "tower, and with `pool: tower`, the class token after the last layer norm"
)

KEYS = {
    "embeddings.class_embedding": "embed.class_11D",
    "embeddings.position_embedding.weight": "embed.positions_1TD",
    "embeddings.patch_embedding": "embed.patch",
    "pre_layrnorm": "pre_norm",
    **block_keys("encoder.layers", "blocks"),
    "post_layernorm": "norm",
    "visual_projection.weight": "projection.weight_ED",
    "classifier": "head",
    # OpenCLIP
    "visual.class_embedding": "embed.class_11D",
    "visual.positional_embedding": "embed.positions_1TD",
    "visual.conv1": "embed.patch",
    "visual.ln_pre": "pre_norm",
    **open_clip_block_keys("visual.transformer.resblocks", "blocks"),
    "visual.ln_post": "norm",
    "visual.proj": "projection.weight_DE",
}
_TEXT = ("text_model.*", "text_projection*", "transformer.*", "token_embedding.*", "positional_embedding", "ln_final.*")
UNUSED = (*_TEXT, "text.*", "logit_scale", "*position_ids", "attn_mask")
_PROJECTION = "visual_projection.weight"
HEADS = {
    "CLIPModel": (_PROJECTION, "text_projection.weight"),
    "CLIPVisionModel": (),
    "CLIPVisionModelWithProjection": (_PROJECTION,),
    "CLIPForImageClassification": ("classifier.weight",),
}


@dataclass(frozen=True)
class Settings(EncoderSettings):
    """config.json's `vision_config` by the reference's names and defaults, then what this run adds."""

    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    patch_size: tuple[int, int] = (32, 32)
    attention_dropout: float = 0.0  # training only
    projection_dim: int = 512

    @property
    def has_batch_axis(self) -> bool:
        return False

    @property
    def has_patch_bias(self) -> bool:
        return False

    @property
    def has_pre_norm(self) -> bool:
        return True

    @property
    def norms_tokens(self) -> bool:
        return False


class CLIP(Encoder):
    """The plain form: the shared encoder, the projection, and in a fine-tuned checkpoint a classifier."""

    settings: Settings

    def __init__(self, s: Settings, names: frozenset[str]) -> None:
        super().__init__(s, with_mask=False, merged_qkv=_has_merged_qkv(names))
        transposed = "visual.proj" in names
        has_projection = transposed or _PROJECTION in names
        self.projection = Projection(s.hidden_size, s.projection_dim, transposed) if has_projection else None
        self.head = nn.Linear(s.hidden_size, s.num_labels) if "classifier.weight" in names else None

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.projection is not None, self.head is not None)

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW -> the wanted features."""
        return finish(self, self.encode(x_BCHW, mask_BN), wants)


def build(settings: Settings, names: frozenset[str]) -> CLIP:
    return CLIP(settings, names)


def fold(module: CLIP, dtype: torch.dtype) -> FastCLIP:
    return FastCLIP(module, dtype)


class FastCLIP(FastEncoder):
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_clip.py)."""

    settings: Settings

    def __init__(self, plain: CLIP, dtype: torch.dtype) -> None:
        super().__init__(plain, dtype)
        self.projection, self.head = cast_copy(plain.projection, dtype), cast_copy(plain.head, dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.projection is not None, self.head is not None)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        return finish(self, self.encode(x_BCHW, mask_BN, wants), wants)


def gives(s: Settings, has_projection: bool, has_head: bool) -> dict[str, tuple[int, ...]]:
    """List every feature with its shape, without the batch, at the settings' input size."""
    D = s.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"pooled": (s.projection_dim if has_projection else D,)}
    shapes |= dict.fromkeys(("pooled:tower", "pooled:cls", "pooled:mean"), (D,))
    if has_head:
        shapes["logits"] = (s.num_labels,)
    return shapes | token_shapes(s) | attention_shapes(s)


def finish(model: CLIP | FastCLIP, features: dict[str, Tensor], wants: frozenset[str]) -> dict[str, Tensor]:
    """Turn what `encode` gave into the wanted features."""
    x_BTD = features["tokens"]
    features["pooled:cls"] = x_BTD[:, 0]
    if wants & {"pooled", "pooled:tower"}:
        tower_BD = features["pooled"] = features["pooled:tower"] = model.norm(x_BTD[:, 0])
        if model.projection is not None and "pooled" in wants:
            features["pooled"] = model.projection(tower_BD)
    if wants & {"pooled:mean", "logits"}:
        features["pooled:mean"] = x_BTD[:, 1:].mean(dim=1)
    if model.head is not None and "logits" in wants:
        features["logits"] = model.head(features["pooled:mean"])
    return {name: features[name] for name in wants}


def _has_merged_qkv(names: frozenset[str], tower: str = "visual.") -> bool:
    return any(name.startswith(tower) and name.endswith(OPEN_CLIP_QKV) for name in names)


# --- the text tower ---


@dataclass(frozen=True)
class ClipTextSettings(TextSettings):
    """config.json's `text_config` by the reference's names and defaults."""

    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def pads_with_eos(self) -> bool:
        return True

    def read_at(self, ids_BT: Tensor) -> Tensor:
        return (ids_BT if self.eos_token_id == 2 else (ids_BT == self.eos_token_id).int()).argmax(dim=1)


def build_text(config: Mapping[str, Any], names: frozenset[str]) -> TextTower | None:
    """Build the plain text tower, if the checkpoint has one. Raises CheckpointError for a config that cannot work."""
    transposed = bool(names & {"text_projection", "text.text_projection"})
    if not transposed and "text_projection.weight" not in names:
        return None
    s = read_text(ClipTextSettings, config, embedding_size=config.get("projection_dim", 512))
    merged = any(_has_merged_qkv(names, tower) for tower in ("transformer.", "text."))
    return TextTower(s, Projection(s.hidden_size, s.embedding_size, transposed), (), False, merged)


_OPEN_CLIP_TEXT = {
    "token_embedding.weight": "tokens_VD",
    "positional_embedding": "positions_TD",
    **open_clip_block_keys("transformer.resblocks", "blocks"),
    "ln_final": "norm",
    "text_projection": "projection.weight_DE",
}
TEXT = TextFamily(
    MODEL_TYPE="clip's text tower",
    KEYS={
        "text_model.embeddings.token_embedding.weight": "tokens_VD",
        "text_model.embeddings.position_embedding.weight": "positions_TD",
        **block_keys("text_model.encoder.layers", "blocks"),
        "text_model.final_layer_norm": "norm",
        "text_projection.weight": "projection.weight_ED",
        **_OPEN_CLIP_TEXT,
        **{f"text.{name}": ours for name, ours in _OPEN_CLIP_TEXT.items()},  # OpenCLIP's `custom_text`
    },
    UNUSED=("vision_model.*", "visual*", "classifier.*", "*position_ids", "attn_mask", "text.attn_mask"),
    build=build_text,
    fold=FastTextTower,
)


# --- config.json ---


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """Read config.json, for an input of `size_HW`. Raises CheckpointError when a value cannot work."""
    both = {"projection_dim": config.get("projection_dim", 512)} if config.get("model_type") == MODEL_TYPE else {}
    s = read_vision(Settings, config, size_HW, **both)
    check_counts(s, (*COUNTS, "projection_dim"))
    check_epsilon(s)
    check_heads(s)
    activation(s.hidden_act)
    check_patches(s)
    return s


# --- checkpoints that the authors published ---

_MEAN_STD = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_HUGE = {**_LARGE, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_GIANT = {**_HUGE, "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 40}
_BIG_GIANT = {**_HUGE, "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48}
_TEXT_768 = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_TEXT_1280 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def _published(
    repo: str,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    size: int,
    parameters: int,
    gmacs: float,
    accuracy: str,
    mean_std: Mapping[str, Any] = _MEAN_STD,
) -> Published:
    act = {} if repo.startswith("openai/") else {"hidden_act": "gelu"}
    patch = int(repo.rpartition("patch")[2][:2]) if "patch" in repo else int(repo.split("-")[3])
    width = text.get("hidden_size", 512)
    config = {
        "projection_dim": width,
        "vision_config": {**vision, **act, "image_size": size, "patch_size": patch, "projection_dim": width},
        "text_config": {**text, **act, "projection_dim": width},
    }
    processor = {
        "image_processor_type": PROCESSOR, "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size}, "resample": 3, **mean_std,
    }  # fmt: skip
    claim = f"{accuracy} % zero-shot on ImageNet-1k ({'paper' if repo.startswith('openai/') else 'model card'})"
    return Published(repo, "CLIPModel", config, processor, parameters, gmacs, size, claim)


PUBLISHED: tuple[Published, ...] = (
    _published("openai/clip-vit-base-patch32", {}, {}, 224, 151_277_313, 4.41, "63.2"),
    _published("openai/clip-vit-base-patch16", {}, {}, 224, 149_620_737, 17.56, "68.6"),
    _published("openai/clip-vit-large-patch14", _LARGE, _TEXT_768, 224, 427_616_513, 81.01, "75.3"),
    _published("openai/clip-vit-large-patch14-336", _LARGE, _TEXT_768, 336, 427_944_193, 191.0, "76.2"),
    _published("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", {}, {}, 224, 151_277_313, 4.41, "66.6"),
    _published("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", {}, {}, 224, 149_620_737, 17.56, "70.2"),
    _published("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _LARGE, _TEXT_768, 224, 427_616_513, 81.01, "75.3", _HALF),
    _published("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _HUGE, _LARGE, 224, 986_109_441, 167.3, "78.0"),
    _published("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", _GIANT, _LARGE, 224, 1_366_678_273, 267.0, "76.6"),
    _published("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", _GIANT, _LARGE, 224, 1_366_678_273, 267.0, "78.4"),
    _published("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", _BIG_GIANT, _TEXT_1280, 224, 2_539_567_105, 483.7, "80.1"),
)
