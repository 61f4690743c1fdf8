"""SigLIP and SigLIP 2 at fixed sizes (Zhai et al. 2023, Tschannen et al. 2025): image and text towers with one space.

* `pooled` is the vector of the shared space, the reference's `get_image_features`, not normalised: a trained probe
  attends to the patches. There is no projection after it, so `pooled:tower` is the same. A tower without that head
  (`vision_use_head: false`) has neither.
* There is no class token. `tokens` have passed the last layer norm; `pooled:mean` is their mean, which the classifier
  reads.
* Prompts attend to all tokens, padding too: every prompt is padded to the full length, and read at its last place.
* 14 pixels do not fill the published 384: the convolution leaves the rest out, as in the reference.

Shapes: B batch, C channels, H W image, T tokens (patches), D width, A heads, K classes.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.models.family import Published, TextFamily
from img2parquet.models.kernels.activations import activation
from img2parquet.models.layers import attend, fused_linear
from img2parquet.models.patch_sizes import check_patches
from img2parquet.models.transformer import (
    COUNTS,
    MLP,
    Encoder,
    EncoderSettings,
    FastEncoder,
    attention_shapes,
    cast_copy,
    check_counts,
    check_flags,
    check_heads,
    layer_norm,
    split_heads,
    token_shapes,
)
from img2parquet.models.two_towers import (
    OPEN_CLIP_QKV,
    FastTextTower,
    TextSettings,
    TextTower,
    block_keys,
    check_epsilon,
    open_clip_block_keys,
    read_text,
    read_vision,
    tower_config,
)

MODEL_TYPE = "siglip"
PREFIX = "vision_model."
PROCESSOR = "SiglipImageProcessor"
EMBEDDING = (
    "the image's vector in the space shared with text (`get_image_features`), not normalised: attention pooling over "
    "the patches, with no projection after it, so that `pool: tower` is the same"
)

KEYS = {
    "embeddings.position_embedding.weight": "embed.positions_1TD",
    "embeddings.patch_embedding": "embed.patch",
    **block_keys("encoder.layers", "blocks"),
    "post_layernorm": "norm",
    "head.probe": "pooler.probe_11D",
    "head.attention.in_proj_weight": "pooler.qkv.weight",
    "head.attention.in_proj_bias": "pooler.qkv.bias",
    "head.attention.out_proj": "pooler.out",
    "head.layernorm": "pooler.norm",
    "head.mlp.fc1": "pooler.mlp.up",
    "head.mlp.fc2": "pooler.mlp.down",
    "classifier": "head",
    # OpenCLIP, whose image tower is timm's
    "visual.trunk.pos_embed": "embed.positions_1TD",
    "visual.trunk.patch_embed.proj": "embed.patch",
    "visual.trunk.blocks.{}.norm1": "blocks.{}.norm1",
    "visual.trunk.blocks.{}.attn.qkv": "blocks.{}.attention.qkv",
    "visual.trunk.blocks.{}.attn.proj": "blocks.{}.attention.out",
    "visual.trunk.blocks.{}.norm2": "blocks.{}.norm2",
    "visual.trunk.blocks.{}.mlp.fc1": "blocks.{}.mlp.up",
    "visual.trunk.blocks.{}.mlp.fc2": "blocks.{}.mlp.down",
    "visual.trunk.norm": "norm",
    "visual.trunk.attn_pool.latent": "pooler.probe_11D",
    "visual.trunk.attn_pool.q": "pooler.q",
    "visual.trunk.attn_pool.kv": "pooler.kv",
    "visual.trunk.attn_pool.proj": "pooler.out",
    "visual.trunk.attn_pool.norm": "pooler.norm",
    "visual.trunk.attn_pool.mlp.fc1": "pooler.mlp.up",
    "visual.trunk.attn_pool.mlp.fc2": "pooler.mlp.down",
}
UNUSED = ("text_model.*", "text.*", "logit_scale", "logit_bias", "*position_ids")
_PROBE, _OPEN_CLIP_PROBE = "head.probe", "visual.trunk.attn_pool.latent"
HEADS = {
    "SiglipModel": (_PROBE, "text_model.head.weight"),
    "SiglipVisionModel": (_PROBE,),
    "SiglipForImageClassification": (_PROBE, "classifier.weight"),
}


@dataclass(frozen=True)
class Settings(EncoderSettings):
    """config.json's `vision_config` by the reference's names and defaults, then what this run adds."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0  # training only
    vision_use_head: bool = True
    from_timm: bool = False  # the names on disk are OpenCLIP's

    @property
    def has_class_token(self) -> bool:
        return False

    @property
    def has_batch_axis(self) -> bool:
        return self.from_timm


class SigLIP(Encoder):
    """The plain form: the shared encoder, attention pooling, and in a fine-tuned checkpoint a classifier."""

    settings: Settings

    def __init__(self, s: Settings, names: frozenset[str]) -> None:
        super().__init__(s, with_mask=False, merged_qkv=s.from_timm)
        self.pooler = AttentionPooling(s) if s.vision_use_head else None
        self.head = nn.Linear(s.hidden_size, s.num_labels) if "classifier.weight" in names else None

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head is not None)

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW -> the wanted features."""
        return finish(self, self.encode(x_BCHW, mask_BN), wants)


class AttentionPooling(nn.Module):
    """Pool the tokens by a trained probe that attends to them; y + mlp(norm(y)) follows."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.num_heads, self.merged, D = s.num_attention_heads, not s.from_timm, s.hidden_size
        self.probe_11D = nn.Parameter(torch.empty(1, 1, D))
        if self.merged:
            self.qkv = nn.Linear(D, 3 * D)
        else:
            self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)
        self.norm = layer_norm(s)
        self.mlp = MLP(D, s.intermediate_size, s.hidden_act)

    def query(self) -> Tensor:
        """Return the probe's query, which no image changes, (1, 1, D)."""
        if not self.merged:
            q_11D: Tensor = self.q(self.probe_11D)
            return q_11D
        D = self.probe_11D.shape[-1]
        return F.linear(self.probe_11D, self.qkv.weight[:D], self.qkv.bias[:D])

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of keys and values as one linear."""
        if not self.merged:
            return self.kv.weight, self.kv.bias
        D = self.probe_11D.shape[-1]
        return self.qkv.weight[D:], self.qkv.bias[D:]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> (B, D)."""
        q_11D, (k_BTD, v_BTD) = self.query(), F.linear(x_BTD, *self.keys_and_values()).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in (q_11D, k_BTD, v_BTD))
        y_BD = self.out(attend(q, k, v)[0].transpose(1, 2).flatten(1))
        pooled_BD: Tensor = y_BD + self.mlp(self.norm(y_BD))
        return pooled_BD


def build(settings: Settings, names: frozenset[str]) -> SigLIP:
    has_probe = bool(names & {_PROBE, _OPEN_CLIP_PROBE})
    from_timm = any(name.startswith("visual.trunk.") for name in names)
    use_head = settings.vision_use_head and (has_probe or not from_timm)
    return SigLIP(replace(settings, from_timm=from_timm, vision_use_head=use_head), names)


def fold(module: SigLIP, dtype: torch.dtype) -> FastSigLIP:
    return FastSigLIP(module, dtype)


class FastSigLIP(FastEncoder):
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_siglip.py)."""

    settings: Settings

    def __init__(self, plain: SigLIP, dtype: torch.dtype) -> None:
        super().__init__(plain, dtype)
        self.pooler = None if plain.pooler is None else FastAttentionPooling(plain.pooler, dtype)
        self.head = cast_copy(plain.head, dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head is not None)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        return finish(self, self.encode(x_BCHW, mask_BN, wants), wants)


class FastAttentionPooling:
    """The fast form: the probe's query computed once, keys and values as one linear, SDPA."""

    def __init__(self, plain: AttentionPooling, dtype: torch.dtype) -> None:
        self.num_heads = plain.num_heads
        self.q = split_heads(plain.query(), plain.num_heads).to(dtype)
        weight, bias = plain.keys_and_values()
        self.kv = fused_linear(weight.to(dtype), bias.to(dtype))
        self.out, self.norm = deepcopy(plain.out).to(dtype), deepcopy(plain.norm).to(dtype)
        self.mlp = deepcopy(plain.mlp).to(dtype)

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> (B, D)."""
        k, v = (split_heads(part, self.num_heads) for part in self.kv(x_BTD).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(self.q.expand(len(x_BTD), -1, -1, -1), k, v)
        y_BD = self.out(mixed.transpose(1, 2).flatten(1))
        pooled_BD: Tensor = y_BD + self.mlp(self.norm(y_BD))
        return pooled_BD


def gives(s: Settings, has_head: bool) -> dict[str, tuple[int, ...]]:
    """List every feature with its shape, without the batch, at the settings' input size."""
    names = (*(("pooled", "pooled:tower") if s.vision_use_head else ()), "pooled:mean")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (s.hidden_size,))
    if has_head:
        shapes["logits"] = (s.num_labels,)
    return shapes | token_shapes(s) | attention_shapes(s)


def finish(model: SigLIP | FastSigLIP, features: dict[str, Tensor], wants: frozenset[str]) -> dict[str, Tensor]:
    """Turn what `encode` gave into the wanted features."""
    x_BTD = features["tokens"]
    if model.pooler is not None and wants & {"pooled", "pooled:tower"}:
        features["pooled"] = features["pooled:tower"] = model.pooler(x_BTD)
    if wants & {"pooled:mean", "logits"}:
        features["pooled:mean"] = x_BTD.mean(dim=1)
    if model.head is not None and "logits" in wants:
        features["logits"] = model.head(features["pooled:mean"])
    return {name: features[name] for name in wants}


# --- the text tower ---


@dataclass(frozen=True)
class SiglipTextSettings(TextSettings):
    """config.json's `text_config` by the reference's names and defaults."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vocab_size: int = 32000
    max_position_embeddings: int = 64

    def clean(self, text: str, tokenizer: Mapping[str, Any]) -> str:
        """Lower-case the prompt; for SigLIP's own tokenizer, remove ASCII punctuation and join its words by a space.

        SigLIP 2 was trained on lower case too, which Gemma's tokenizer.json does not do."""
        if tokenizer.get("do_lower_case", True):
            text = text.lower()
        if tokenizer.get("tokenizer_class") == "SiglipTokenizer":
            text = " ".join(text.translate(str.maketrans("", "", string.punctuation)).split())
        return text

    def read_at(self, ids_BT: Tensor) -> Tensor:
        return torch.full((len(ids_BT),), ids_BT.shape[1] - 1, device=ids_BT.device)


def build_text(config: Mapping[str, Any], names: frozenset[str]) -> TextTower | None:
    """Build the plain text tower, if the checkpoint has one. Raises CheckpointError for a config that cannot work."""
    from_open_clip = "text.text_projection.weight" in names
    if not from_open_clip and "text_model.head.weight" not in names:
        return None
    given = tower_config(config, "text_config")
    size = given.get("projection_size") or given.get("hidden_size", SiglipTextSettings.hidden_size)
    s = read_text(SiglipTextSettings, config, embedding_size=size)
    merged = any(name.startswith("text.") and name.endswith(OPEN_CLIP_QKV) for name in names)
    return TextTower(s, nn.Linear(s.hidden_size, size), () if from_open_clip else (1,), True, merged)


TEXT = TextFamily(
    MODEL_TYPE="siglip's text tower",
    problem="multi_label_classification",
    KEYS={
        "text_model.embeddings.token_embedding.weight": "tokens_VD",
        "text_model.embeddings.position_embedding.weight": "positions_TD",
        **block_keys("text_model.encoder.layers", "blocks"),
        "text_model.final_layer_norm": "norm",
        "text_model.head": "projection",
        # OpenCLIP
        "text.token_embedding.weight": "tokens_VD",
        "text.positional_embedding": "positions_TD",
        **open_clip_block_keys("text.transformer.resblocks", "blocks"),
        "text.ln_final": "norm",
        "text.text_projection": "projection",
    },
    UNUSED=("vision_model.*", "visual.*", "classifier.*", "*position_ids"),
    build=build_text,
    fold=FastTextTower,
)


# --- config.json ---


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """Read config.json, for an input of `size_HW`. Raises CheckpointError when a value cannot work."""
    s = read_vision(Settings, config, size_HW, from_timm=False)
    check_counts(s, COUNTS)
    check_flags(s, ("vision_use_head",))
    check_epsilon(s)
    check_heads(s)
    activation(s.hidden_act)
    check_patches(s)
    return s


# --- checkpoints that the authors published ---

_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_GIANT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}
_TOWERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {  # by the first word of the size
    "base": ({}, {}),
    "large": (_LARGE, _LARGE),
    "so400m": (_SO400M, _SO400M),
    "giant": (_GIANT, {**_SO400M, "projection_size": 1536}),
}
_MULTILINGUAL, _GEMMA = 250_000, 256_000  # tokens of their vocabularies


def _published(name: str, parameters: int, gmacs: float, accuracy: str = "") -> Published:
    family, first, *_ = name.split("-")
    vision, text = _TOWERS[first]
    patch, size = (int(word) for word in name.partition("patch")[2].split("-")[:2])
    words = {"siglip2": _GEMMA}.get(family, _MULTILINGUAL if name.endswith(("multilingual", "i18n")) else 32_000)
    config = {
        "vision_config": {**vision, "image_size": size, "patch_size": patch},
        "text_config": {**text, "vocab_size": words},
    }
    processor = {
        "image_processor_type": PROCESSOR, "size": {"height": size, "width": size},
        "resample": 2 if family == "siglip2" else 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    claim = f"{accuracy} % zero-shot on ImageNet-1k (paper)" if accuracy else ""
    return Published(f"google/{name}", "SiglipModel", config, processor, parameters, gmacs, size, claim)


PUBLISHED: tuple[Published, ...] = (
    _published("siglip-base-patch16-224", 203_155_970, 17.71),
    _published("siglip-base-patch16-256", 203_202_050, 23.41),
    _published("siglip-base-patch16-384", 203_447_810, 56.06),
    _published("siglip-base-patch16-512", 203_791_874, 108.1),
    _published("siglip-base-patch16-256-multilingual", 370_626_050, 23.41),
    _published("siglip-large-patch16-256", 652_150_786, 81.28),
    _published("siglip-large-patch16-384", 652_478_466, 191.9),
    _published("siglip-so400m-patch14-224", 877_415_602, 110.2),
    _published("siglip-so400m-patch14-384", 877_960_498, 335.2),
    _published("siglip-so400m-patch16-256-i18n", 1_128_758_962, 110.2),
    _published("siglip2-base-patch32-256", 376_856_066, 5.74, "74.0"),
    _published("siglip2-base-patch16-224", 375_187_970, 17.71, "78.2"),
    _published("siglip2-base-patch16-256", 375_234_050, 23.41, "79.1"),
    _published("siglip2-base-patch16-384", 375_479_810, 56.06, "80.6"),
    _published("siglip2-base-patch16-512", 375_823_874, 108.1, "81.2"),
    _published("siglip2-large-patch16-256", 881_526_786, 81.28, "82.5"),
    _published("siglip2-large-patch16-384", 881_854_466, 191.9, "83.1"),
    _published("siglip2-large-patch16-512", 882_313_218, 363.7, "83.5"),
    _published("siglip2-so400m-patch14-224", 1_135_463_602, 110.2, "83.2"),
    _published("siglip2-so400m-patch14-384", 1_136_008_498, 335.2, "84.1"),
    _published("siglip2-so400m-patch16-256", 1_135_670_962, 110.2, "83.4"),
    _published("siglip2-so400m-patch16-384", 1_136_039_602, 259.5, "84.1"),
    _published("siglip2-so400m-patch16-512", 1_136_555_698, 489.8, "84.3"),
    _published("siglip2-giant-opt-patch16-256", 1_871_393_906, 299.5, "84.5"),
    _published("siglip2-giant-opt-patch16-384", 1_871_885_426, 696.5, "85.0"),
)
