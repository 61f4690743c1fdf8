"""ViTMSN (masked siamese networks): a plain pre-norm vision transformer; pixels in, features out.

* The published checkpoints are backbones. The image vector is the class token after the last layer norm, which is what
  the reference's own classifier reads; the reference has no pooler.
* `tokens:<k>` are the reference's `hidden_states[k]`, so the last of them is not normed and `tokens` is.
* Another input size than the trained one, also not square, resizes the positions (the reference's
  `interpolate_pos_encoding`). Where a patch would be cut the reference drops it; here that size is refused.
* `mask_BN` (the reference's `bool_masked_pos`) needs a checkpoint with a mask token.

Shapes: B batch, C channels, H W image, h w grid, N = h w patches, T = 1 + N tokens, D width, A heads, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.models import Published
from pipeline.models.checkpoint import num_labels
from pipeline.models.layers import activation, fused_linear
from pipeline.models.sizes import check_patches, pair
from pipeline.models.transformer import MLP, Attention, FastAttention, hide, patch_weight, patches, positions_for

MODEL_TYPE = "vit_msn"
PREFIX = "vit."
PROCESSOR = "ViTImageProcessor"
EMBEDDING = (
    "the class token after the last layer norm, `last_hidden_state[:, 0]` of the reference, which has no pooler; "
    "`pooled:mean` is the mean over the patches instead"
)

KEYS = {
    "embeddings.cls_token": "embed.class_11D",
    "embeddings.mask_token": "embed.mask_11D",
    "embeddings.position_embeddings": "embed.positions_1TD",
    "embeddings.patch_embeddings.projection": "embed.patch",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.attention.attention.query": "blocks.{}.attention.q",
    "encoder.layer.{}.attention.attention.key": "blocks.{}.attention.k",
    "encoder.layer.{}.attention.attention.value": "blocks.{}.attention.v",
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attention.out",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.up",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.down",
    "layernorm": "norm",
    "classifier": "head",
    # the names that transformers 5 has in memory
    "layers.{}.layernorm_before": "blocks.{}.norm1",
    "layers.{}.attention.q_proj": "blocks.{}.attention.q",
    "layers.{}.attention.k_proj": "blocks.{}.attention.k",
    "layers.{}.attention.v_proj": "blocks.{}.attention.v",
    "layers.{}.attention.o_proj": "blocks.{}.attention.out",
    "layers.{}.layernorm_after": "blocks.{}.norm2",
    "layers.{}.mlp.fc1": "blocks.{}.mlp.up",
    "layers.{}.mlp.fc2": "blocks.{}.mlp.down",
}
UNUSED: tuple[str, ...] = ()
HEADS = {"ViTMSNModel": (), "ViTMSNForImageClassification": ("classifier.weight", "classifier.bias")}


@dataclass(frozen=True)
class Settings:
    """config.json by the reference's names and defaults, then what this run adds."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0  # training only
    attention_probs_dropout_prob: float = 0.0  # training only
    initializer_range: float = 0.02  # training only
    layer_norm_eps: float = 1e-6
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    num_labels: int = 2
    input_size: tuple[int, int] = (224, 224)

    @property
    def trained_grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def input_grid(self) -> tuple[int, int]:
        return self.input_size[0] // self.patch_size[0], self.input_size[1] // self.patch_size[1]


class ViTMSN(nn.Module):
    """The plain form, top-down as the paper draws it."""

    def __init__(self, settings: Settings, names: frozenset[str]) -> None:
        super().__init__()
        self.settings = settings
        self.embed = Embed(settings, with_mask="embeddings.mask_token" in names)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_hidden_layers))
        self.norm = _layer_norm(settings)
        has_head = "classifier.weight" in names
        self.head = nn.Linear(settings.hidden_size, settings.num_labels) if has_head else None

    @property
    def notes(self) -> tuple[str, ...]:
        trained, asked = self.settings.trained_grid, self.settings.input_grid
        if self.settings.image_size == self.settings.input_size:
            return ()
        return (f"positions resized from {trained[0]}x{trained[1]} to {asked[0]}x{asked[1]} patches",)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head is not None)

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW, mask_BN (true where a patch is hidden) -> the wanted features."""
        features: dict[str, Tensor] = {}
        x_BTD = self.embed(x_BCHW, mask_BN)
        for k, block in enumerate(self.blocks):
            features[f"tokens:{k}"] = x_BTD
            x_BTD, features[f"attentions:{k}"] = block(x_BTD)
        features[f"tokens:{len(self.blocks)}"] = x_BTD
        return _finish(features, self.norm(x_BTD), self.head, wants)


class Embed(nn.Module):
    """Patches, the class token before them, and positions."""

    def __init__(self, s: Settings, with_mask: bool) -> None:
        super().__init__()
        num_patches = s.trained_grid[0] * s.trained_grid[1]
        self.class_11D = nn.Parameter(torch.empty(1, 1, s.hidden_size))
        self.mask_11D = nn.Parameter(torch.empty(1, 1, s.hidden_size)) if with_mask else None
        self.positions_1TD = nn.Parameter(torch.empty(1, 1 + num_patches, s.hidden_size))
        self.patch = nn.Conv2d(s.num_channels, s.hidden_size, s.patch_size, s.patch_size)
        self.trained_size, self.patch_size = s.image_size, s.patch_size

    def forward(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """x_BCHW -> x_BTD."""
        x_BND = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        if mask_BN is not None:
            x_BND = hide(x_BND, mask_BN, self.mask_11D)
        x_BTD = torch.cat([self.class_11D.expand(len(x_BND), -1, -1), x_BND], dim=1)
        return x_BTD + self.positions_for((x_BCHW.shape[2], x_BCHW.shape[3]))

    def positions_for(self, size_HW: tuple[int, int]) -> Tensor:
        return positions_for(self.positions_1TD, size_HW, self.trained_size, self.patch_size)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.norm1 = _layer_norm(s)
        self.attention = Attention(s.hidden_size, s.num_attention_heads, s.qkv_bias)
        self.norm2 = _layer_norm(s)
        self.mlp = MLP(s.hidden_size, s.intermediate_size, s.hidden_act)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT."""
        mixed_BTD, weights_BATT = self.attention(self.norm1(x_BTD))
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.norm2(x_BTD)), weights_BATT


def build(settings: Settings, names: frozenset[str]) -> ViTMSN:
    return ViTMSN(settings, names)


def fold(module: ViTMSN, dtype: torch.dtype) -> FastViTMSN:
    """Merged q/k/v, positions of the input's size, fused linears with their activation and residual, SDPA."""
    return FastViTMSN(module, dtype)


class FastViTMSN:
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_vit_msn.py)."""

    def __init__(self, plain: ViTMSN, dtype: torch.dtype) -> None:
        self.settings = s = plain.settings
        embed = plain.embed
        positions_1TD = embed.positions_for(s.input_size)
        self.positions_1ND = positions_1TD[:, 1:].to(dtype)
        self.class_11D = (embed.class_11D + positions_1TD[:, :1]).to(dtype)
        self.mask_11D = None if embed.mask_11D is None else embed.mask_11D.to(dtype)
        bias = embed.patch.get_parameter("bias")
        self.patch = fused_linear(patch_weight(embed.patch).to(dtype), bias.to(dtype))
        self.blocks = [FastBlock(block, s, dtype) for block in plain.blocks]  # type: ignore[arg-type]
        self.norm = deepcopy(plain.norm).to(dtype)
        self.head = None if plain.head is None else deepcopy(plain.head).to(dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head is not None)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        x_BTD = self._embed(x_BCHW, mask_BN)
        for k, block in enumerate(self.blocks):
            features[f"tokens:{k}"] = x_BTD
            x_BTD, features[f"attentions:{k}"] = block(x_BTD, f"attentions:{k}" in wants)
        features[f"tokens:{len(self.blocks)}"] = x_BTD
        return _finish(features, self.norm(x_BTD), self.head, wants)

    def _embed(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        x_BNp = patches(x_BCHW, self.settings.patch_size)
        if mask_BN is None:
            x_BND = self.patch(x_BNp, self.positions_1ND.expand(len(x_BNp), -1, -1))
        else:
            x_BND = hide(self.patch(x_BNp), mask_BN, self.mask_11D) + self.positions_1ND
        return torch.cat([self.class_11D.expand(len(x_BND), -1, -1), x_BND], dim=1)


class FastBlock:
    def __init__(self, plain: Block, s: Settings, dtype: torch.dtype) -> None:
        self.attention, out = FastAttention(plain.attention, dtype), plain.attention.out
        self.out = fused_linear(out.weight.to(dtype), out.bias.to(dtype))
        self.up = fused_linear(plain.mlp.up.weight.to(dtype), plain.mlp.up.bias.to(dtype), s.hidden_act)
        self.down = fused_linear(plain.mlp.down.weight.to(dtype), plain.mlp.down.bias.to(dtype))
        self.norm1, self.norm2 = deepcopy(plain.norm1).to(dtype), deepcopy(plain.norm2).to(dtype)

    def __call__(self, x_BTD: Tensor, with_weights: bool) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT (an empty tensor where they are not asked for)."""
        mixed_BTD, weights_BATT = self.attention(self.norm1(x_BTD), with_weights)
        x_BTD = self.out(mixed_BTD, x_BTD)
        return self.down(self.up(self.norm2(x_BTD)), x_BTD), weights_BATT


def gives(s: Settings, has_head: bool) -> dict[str, tuple[int, ...]]:
    tokens = 1 + s.input_grid[0] * s.input_grid[1]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("pooled", "pooled:cls", "pooled:mean"), (s.hidden_size,))
    if has_head:
        shapes["logits"] = (s.num_labels,)
    shapes["tokens"] = (tokens, s.hidden_size)
    shapes |= {f"tokens:{k}": (tokens, s.hidden_size) for k in range(s.num_hidden_layers + 1)}
    return shapes | {f"attentions:{k}": (s.num_attention_heads, tokens, tokens) for k in range(s.num_hidden_layers)}


def _finish(
    features: dict[str, Tensor], x_BTD: Tensor, head: nn.Module | None, wants: frozenset[str]
) -> dict[str, Tensor]:
    features |= {"tokens": x_BTD, "pooled": x_BTD[:, 0], "pooled:cls": x_BTD[:, 0]}
    if "pooled:mean" in wants:
        features["pooled:mean"] = x_BTD[:, 1:].mean(dim=1)
    if head is not None and "logits" in wants:
        features["logits"] = head(x_BTD[:, 0])
    return {name: features[name] for name in wants}


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    known = {field.name for field in fields(Settings)}
    said: dict[str, Any] = {name: value for name, value in config.items() if name in known}
    for name in ("image_size", "patch_size"):
        said[name] = pair(name, said.get(name, getattr(Settings, name)))
    settings = Settings(**said | {"num_labels": num_labels(config), "input_size": size_HW})
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {name}: `{value}` is not a positive number")
    if not isinstance(s.layer_norm_eps, int | float) or s.layer_norm_eps < 0:
        raise CheckpointError(f"config.json: layer_norm_eps: `{s.layer_norm_eps}` is not a small positive number")
    if not isinstance(s.qkv_bias, bool):
        raise CheckpointError(f"config.json: qkv_bias: `{s.qkv_bias}` is neither true nor false")
    if s.hidden_size % s.num_attention_heads:
        raise CheckpointError(
            f"config.json: hidden_size {s.hidden_size} is not divisible by num_attention_heads {s.num_attention_heads}",
            hint=f"heads that fit: {_few_divisors(s.hidden_size)}",
        )
    activation(s.hidden_act)
    check_patches(s)


def _few_divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)


def _layer_norm(s: Settings) -> nn.LayerNorm:
    return nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)


_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def _published(size: str, config: Mapping[str, Any], parameters: int, gmacs: float, accuracy: str = "") -> Published:
    return Published(f"facebook/vit-msn-{size}", "ViTMSNModel", config, _PREPROCESSOR, parameters, gmacs, 224, accuracy)


PUBLISHED = (
    _published("small", {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}, 21_665_664, 4.60),
    _published("base", {}, 85_798_656, 17.56),
    _published("large", _LARGE, 303_301_632, 61.55),
    _published("base-4", {"patch_size": 4}, 87_503_616, 447.9, "75.7 % ImageNet-1k with 1 % of the labels (paper)"),
    _published("large-7", {**_LARGE, "patch_size": 7}, 303_513_600, 361.3, "80.7 % ImageNet-1k linear probe (paper)"),
)
