"""Plain vision transformers: ViT (Dosovitskiy et al. 2020; DINO's too), DINOv2, and DINOv2 with registers.

* One module for three `model_type`s: they differ in names on disk, layer scale, SwiGLU, registers and what the
  classifier reads. `infra/BACKBONES.md` walks through this file as the example of a family of one's own.
* `pooled` is what the reference calls `pooler_output`: ViT's class token through its pooling layer where the checkpoint
  has one, else (DINO, every classifier, DINOv2) the class token after the last layer norm.
* `tokens:<k>` are the reference's `hidden_states[k]`: the last of them is not normed, `tokens` is. Registers stand
  between the class token and the patches, and no pooling reads them.
* Another input size than the trained one resizes the positions, with antialiasing where there are registers: the
  reference's choice. DINOv2's own code had shifted them by a tenth of a patch.
* A trained size that is not square is taken as it is; the reference's DINOv2 would scramble such positions.

Shapes: B batch, C channels, H W image, N = h w patches, R registers, T = 1 + R + N tokens, D width, A heads, M hidden
width of an MLP, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.models import Published
from pipeline.models.checkpoint import num_labels
from pipeline.models.layers import activation, fused_linear
from pipeline.models.sizes import check_patches, pair
from pipeline.models.transformer import MLP, Attention, FastAttention, hide, patch_weight, patches, positions_for

MODEL_TYPE = "vit"
PREFIX = ("vit.", "dinov2.", "dinov2_with_registers.")
PROCESSOR = "ViTImageProcessor"
EMBEDDING = (
    "the class token after the last layer norm, through the pooling layer (tanh) where a ViT checkpoint has one; "
    "DINOv2 has none"
)

KEYS = {
    "embeddings.cls_token": "embed.class_11D",
    "embeddings.mask_token": "embed.mask_D",
    "embeddings.register_tokens": "embed.registers_1RD",
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
    "pooler.dense": "pooler",
    "classifier": "head",
    # DINOv2
    "encoder.layer.{}.norm1": "blocks.{}.norm1",
    "encoder.layer.{}.norm2": "blocks.{}.norm2",
    "encoder.layer.{}.layer_scale1.lambda1": "blocks.{}.scale1_D",
    "encoder.layer.{}.layer_scale2.lambda1": "blocks.{}.scale2_D",
    "encoder.layer.{}.mlp.fc1": "blocks.{}.mlp.up",
    "encoder.layer.{}.mlp.fc2": "blocks.{}.mlp.down",
    "encoder.layer.{}.mlp.weights_in": "blocks.{}.mlp.gate_and_up",
    "encoder.layer.{}.mlp.weights_out": "blocks.{}.mlp.down",
    # the names that transformers 5 has in memory: ViT, then DINOv2
    "layers.{}.layernorm_before": "blocks.{}.norm1",
    "layers.{}.attention.q_proj": "blocks.{}.attention.q",
    "layers.{}.attention.k_proj": "blocks.{}.attention.k",
    "layers.{}.attention.v_proj": "blocks.{}.attention.v",
    "layers.{}.attention.o_proj": "blocks.{}.attention.out",
    "layers.{}.layernorm_after": "blocks.{}.norm2",
    "layers.{}.mlp.fc1": "blocks.{}.mlp.up",
    "layers.{}.mlp.fc2": "blocks.{}.mlp.down",
    "encoder.layer.{}.attention.q_proj": "blocks.{}.attention.q",
    "encoder.layer.{}.attention.k_proj": "blocks.{}.attention.k",
    "encoder.layer.{}.attention.v_proj": "blocks.{}.attention.v",
    "encoder.layer.{}.attention.o_proj": "blocks.{}.attention.out",
    "encoder.layer.{}.mlp.gate_proj": "blocks.{}.mlp.gate",
    "encoder.layer.{}.mlp.up_proj": "blocks.{}.mlp.up",
    "encoder.layer.{}.mlp.down_proj": "blocks.{}.mlp.down",
}
UNUSED = ("decoder.0.*",)  # paints masked pixels (ViTForMaskedImageModeling), which no output asks for
_MASK = ("embeddings.mask_token",)
_POOLER, _HEAD = ("pooler.dense.weight", "pooler.dense.bias"), ("classifier.weight", "classifier.bias")
HEADS: Mapping[str, tuple[str, ...]] = {
    "ViTModel": _POOLER,
    "ViTForMaskedImageModeling": _MASK,
    "ViTForImageClassification": _HEAD,
    **{f"{name}{kind}": _MASK for name in ("Dinov2", "Dinov2WithRegisters") for kind in ("Model", "Backbone")},
    **{f"{name}ForImageClassification": (*_MASK, *_HEAD) for name in ("Dinov2", "Dinov2WithRegisters")},
}
SPLIT_SWIGLU = "encoder.layer.0.mlp.gate_proj.weight"  # newer files have its two halves apart


@dataclass(frozen=True)
class Settings:
    """config.json by the reference's names and ViT's defaults, then what this run adds."""

    model_type: str = "vit"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0  # training only
    attention_probs_dropout_prob: float = 0.0  # training only
    initializer_range: float = 0.02  # training only
    layer_norm_eps: float = 1e-12
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"
    # DINOv2
    mlp_ratio: float = 4
    layerscale_value: float = 1.0  # training only: the weights are on disk
    drop_path_rate: float = 0.0  # training only
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    apply_layernorm: bool = True  # to feature maps
    reshape_hidden_states: bool = True  # of feature maps

    num_labels: int = 2
    input_size: tuple[int, int] = (224, 224)

    @property
    def is_dinov2(self) -> bool:
        return self.model_type != "vit"

    @property
    def mlp_width(self) -> int:
        width = int(self.hidden_size * self.mlp_ratio) if self.is_dinov2 else self.intermediate_size
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def pooled_size(self) -> int:
        return self.pooler_output_size or self.hidden_size

    @property
    def trained_grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def input_grid(self) -> tuple[int, int]:
        return self.input_size[0] // self.patch_size[0], self.input_size[1] // self.patch_size[1]

    @property
    def first_patch(self) -> int:
        """Where the patches begin among the tokens."""
        return 1 + self.num_register_tokens


DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # where a model_type's differ from those above
    "vit": {},
    "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14},
    "dinov2_with_registers": {"layer_norm_eps": 1e-6, "num_register_tokens": 4},
}


class ViT(nn.Module):
    """The plain form, top-down as the papers draw it."""

    def __init__(self, settings: Settings, names: frozenset[str]) -> None:
        super().__init__()
        self.settings = s = settings
        self.embed = Embed(s, with_mask="embeddings.mask_token" in names)
        self.blocks = nn.ModuleList(Block(s, SPLIT_SWIGLU in names) for _ in range(s.num_hidden_layers))
        self.norm = _layer_norm(s)
        self.pooler = nn.Linear(s.hidden_size, s.pooled_size) if "pooler.dense.weight" in names else None
        width = 2 * s.hidden_size if s.is_dinov2 else s.hidden_size
        self.head = nn.Linear(width, s.num_labels) if "classifier.weight" in names else None
        self.paints = "decoder.0.weight" in names

    @property
    def notes(self) -> tuple[str, ...]:
        (h, w), (to_h, to_w) = self.settings.trained_grid, self.settings.input_grid
        resized = self.settings.image_size != self.settings.input_size
        said = (f"positions resized from {h}x{w} to {to_h}x{to_w} patches",) if resized else ()
        return said + (("its decoder of masked pixels is not loaded",) if self.paints else ())

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.pooler is not None, self.head is not None)

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW, mask_BN (true where a patch is hidden) -> the wanted features."""
        features: dict[str, Tensor] = {}
        x_BTD = self.embed(x_BCHW, mask_BN)
        for k, block in enumerate(self.blocks):
            features[f"tokens:{k}"] = x_BTD
            x_BTD, features[f"attentions:{k}"] = block(x_BTD)
        features[f"tokens:{len(self.blocks)}"] = x_BTD
        return finish(self, features, wants)


class Embed(nn.Module):
    """Patches, the class token and the registers before them, and positions, which registers do not have."""

    def __init__(self, s: Settings, with_mask: bool) -> None:
        super().__init__()
        self.settings, D, R = s, s.hidden_size, s.num_register_tokens
        self.class_11D = nn.Parameter(torch.empty(1, 1, D))
        mask_shape = (1, D) if s.is_dinov2 else (1, 1, D)
        self.mask_D = nn.Parameter(torch.empty(mask_shape)) if with_mask else None
        self.registers_1RD = nn.Parameter(torch.empty(1, R, D)) if R else None
        self.positions_1TD = nn.Parameter(torch.empty(1, 1 + s.trained_grid[0] * s.trained_grid[1], D))
        self.patch = nn.Conv2d(s.num_channels, D, s.patch_size, s.patch_size)

    def forward(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """x_BCHW -> x_BTD."""
        x_BND = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        if mask_BN is not None:
            x_BND = hide(x_BND, mask_BN, self.mask_D)
        first_1D, positions_1ND = self.starts((x_BCHW.shape[2], x_BCHW.shape[3]))
        return torch.cat([first_1D.expand(len(x_BND), -1, -1), x_BND + positions_1ND], dim=1)

    def starts(self, size_HW: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What stands before the patches, (1, 1 + R, D), and the patches' positions, (1, N, D)."""
        positions_1TD = self.positions_for(size_HW)
        first = [self.class_11D + positions_1TD[:, :1]]
        return torch.cat(first + ([] if self.registers_1RD is None else [self.registers_1RD]), 1), positions_1TD[:, 1:]

    def positions_for(self, size_HW: tuple[int, int]) -> Tensor:
        s = self.settings
        smooth = s.num_register_tokens > 0
        return positions_for(self.positions_1TD, size_HW, s.image_size, s.patch_size, antialias=smooth)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); in DINOv2 each sum's second part has a scale."""

    def __init__(self, s: Settings, split_swiglu: bool) -> None:
        super().__init__()
        self.norm1 = _layer_norm(s)
        self.attention = Attention(s.hidden_size, s.num_attention_heads, s.qkv_bias)
        self.norm2 = _layer_norm(s)
        self.mlp: MLP | SwiGLU = (
            SwiGLU(s, split_swiglu) if s.use_swiglu_ffn else MLP(s.hidden_size, s.mlp_width, s.hidden_act)
        )
        self.scale1_D = nn.Parameter(torch.empty(s.hidden_size)) if s.is_dinov2 else None
        self.scale2_D = nn.Parameter(torch.empty(s.hidden_size)) if s.is_dinov2 else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT."""
        mixed_BTD, weights_BATT = self.attention(self.norm1(x_BTD))
        x_BTD = x_BTD + (mixed_BTD if self.scale1_D is None else mixed_BTD * self.scale1_D)
        mixed_BTD = self.mlp(self.norm2(x_BTD))
        return x_BTD + (mixed_BTD if self.scale2_D is None else mixed_BTD * self.scale2_D), weights_BATT


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); files of both kinds are read: gate and up as one matrix, or apart."""

    def __init__(self, s: Settings, split: bool) -> None:
        super().__init__()
        self.split, D, M = split, s.hidden_size, s.mlp_width
        if split:
            self.gate, self.up = nn.Linear(D, M), nn.Linear(D, M)
        else:
            self.gate_and_up = nn.Linear(D, 2 * M)
        self.down = nn.Linear(M, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = (self.gate(x_BTD), self.up(x_BTD)) if self.split else self.gate_and_up(x_BTD).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of gate and up as one linear."""
        if not self.split:
            return self.gate_and_up.weight, self.gate_and_up.bias
        return torch.cat([self.gate.weight, self.up.weight]), torch.cat([self.gate.bias, self.up.bias])


def build(settings: Settings, names: frozenset[str]) -> ViT:
    return ViT(settings, names)


def fold(module: ViT, dtype: torch.dtype) -> FastViT:
    """Merged q/k/v, layer scale in the weights before it, positions of the input's size, fused linears, SDPA."""
    return FastViT(module, dtype)


class FastViT:
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_vit.py)."""

    def __init__(self, plain: ViT, dtype: torch.dtype) -> None:
        self.settings, embed = plain.settings, plain.embed
        first_1D, positions_1ND = embed.starts(plain.settings.input_size)
        self.first_1D, self.positions_1ND = first_1D.to(dtype), positions_1ND.to(dtype)
        self.mask_D = None if embed.mask_D is None else embed.mask_D.to(dtype)
        bias = embed.patch.get_parameter("bias")
        self.patch = fused_linear(patch_weight(embed.patch).to(dtype), bias.to(dtype))
        self.blocks = [FastBlock(block, plain.settings, dtype) for block in plain.blocks]  # type: ignore[arg-type]
        self.norm = deepcopy(plain.norm).to(dtype)
        self.pooler = None if plain.pooler is None else deepcopy(plain.pooler).to(dtype)
        self.head = None if plain.head is None else deepcopy(plain.head).to(dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.pooler is not None, self.head is not None)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        x_BTD = self._embed(x_BCHW, mask_BN)
        for k, block in enumerate(self.blocks):
            features[f"tokens:{k}"] = x_BTD
            x_BTD, features[f"attentions:{k}"] = block(x_BTD, f"attentions:{k}" in wants)
        features[f"tokens:{len(self.blocks)}"] = x_BTD
        return finish(self, features, wants)

    def _embed(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        x_BNp = patches(x_BCHW, self.settings.patch_size)
        if mask_BN is None:
            x_BND = self.patch(x_BNp, self.positions_1ND.expand(len(x_BNp), -1, -1))
        else:
            x_BND = hide(self.patch(x_BNp), mask_BN, self.mask_D) + self.positions_1ND
        return torch.cat([self.first_1D.expand(len(x_BND), -1, -1), x_BND], dim=1)


class FastBlock:
    def __init__(self, plain: Block, s: Settings, dtype: torch.dtype) -> None:
        mlp, self.attention = plain.mlp, FastAttention(plain.attention, dtype)
        self.out = fused_linear(*_scaled(plain.attention.out, plain.scale1_D, dtype))
        self.is_swiglu = isinstance(mlp, SwiGLU)
        weight, bias = mlp.merged() if isinstance(mlp, SwiGLU) else (mlp.up.weight, mlp.up.bias)
        self.up = fused_linear(weight.to(dtype), bias.to(dtype), "linear" if self.is_swiglu else s.hidden_act)
        self.down = fused_linear(*_scaled(mlp.down, plain.scale2_D, dtype))
        self.norm1, self.norm2 = deepcopy(plain.norm1).to(dtype), deepcopy(plain.norm2).to(dtype)

    def __call__(self, x_BTD: Tensor, with_weights: bool) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT (an empty tensor where they are not asked for)."""
        mixed_BTD, weights_BATT = self.attention(self.norm1(x_BTD), with_weights)
        x_BTD = self.out(mixed_BTD, x_BTD)
        up_BTM = self.up(self.norm2(x_BTD))
        if self.is_swiglu:
            gate_BTM, up_BTM = up_BTM.chunk(2, dim=-1)
            up_BTM = F.silu(gate_BTM) * up_BTM
        return self.down(up_BTM, x_BTD), weights_BATT


def gives(s: Settings, has_pooler: bool, has_head: bool) -> dict[str, tuple[int, ...]]:
    """Every feature with its shape, without the batch, at the settings' input size."""
    (h, w), D, layers = s.input_grid, s.hidden_size, s.num_hidden_layers
    T = s.first_patch + h * w
    shapes: dict[str, tuple[int, ...]] = {"pooled": (s.pooled_size if has_pooler else D,)}
    shapes |= {"pooled:cls": (D,), "pooled:mean": (D,)}
    if has_head:
        shapes["logits"] = (s.num_labels,)
    shapes |= {"tokens": (T, D)} | {f"tokens:{k}": (T, D) for k in range(layers + 1)}
    if s.is_dinov2:
        shape = (D, h, w) if s.reshape_hidden_states else (T, D)
        shapes |= {f"feature_maps:{_stage(k)}": shape for k in range(layers + 1)}
    return shapes | {f"attentions:{k}": (s.num_attention_heads, T, T) for k in range(layers)}


def finish(model: ViT | FastViT, features: dict[str, Tensor], wants: frozenset[str]) -> dict[str, Tensor]:
    """The hidden states of a pass, `tokens:<k>`, and its attentions -> the wanted features."""
    s, behind = model.settings, slice(model.settings.first_patch, None)
    x_BTD = features["tokens"] = model.norm(features[f"tokens:{s.num_hidden_layers}"])
    class_BD = features["pooled:cls"] = x_BTD[:, 0]
    if "pooled" in wants:
        pooled = class_BD if model.pooler is None else activation(s.pooler_act)(model.pooler(class_BD))
        features["pooled"] = pooled
    if wants & {"pooled:mean", "logits"}:
        features["pooled:mean"] = x_BTD[:, behind].mean(dim=1)
    if model.head is not None and "logits" in wants:
        read = torch.cat([class_BD, features["pooled:mean"]], dim=1) if s.is_dinov2 else class_BD
        features["logits"] = model.head(read)
    for name in wants:
        if name.startswith("feature_maps:"):
            features[name] = _feature_map(model, features[f"tokens:{_layer(name)}"])
    return {name: features[name] for name in wants}


def _feature_map(model: ViT | FastViT, x_BTD: Tensor) -> Tensor:
    s = model.settings
    x_BTD = model.norm(x_BTD) if s.apply_layernorm else x_BTD
    if not s.reshape_hidden_states:
        return x_BTD
    return x_BTD[:, s.first_patch :].transpose(1, 2).reshape(len(x_BTD), -1, *s.input_grid)


def _stage(k: int) -> str:
    return f"stage{k}" if k else "stem"


def _layer(name: str) -> int:
    """`feature_maps:stage<k>` -> k."""
    return int(name.removeprefix("feature_maps:").removeprefix("stage").replace("stem", "0"))


def _scaled(linear: nn.Linear, scale_D: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A linear and the layer scale after it, as one."""
    if scale_D is None:
        return linear.weight.to(dtype), linear.bias.to(dtype)
    scale = scale_D.double()
    return (linear.weight.double() * scale[:, None]).to(dtype), (linear.bias.double() * scale).to(dtype)


def _layer_norm(s: Settings) -> nn.LayerNorm:
    return nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)


# --- config.json ---


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """config.json and the input's size -> Settings; what cannot work raises CheckpointError."""
    defaults = DEFAULTS[config.get("model_type", MODEL_TYPE)]
    known = {field.name for field in fields(Settings)}
    said: dict[str, Any] = {**defaults, **{name: value for name, value in config.items() if name in known}}
    for name in ("image_size", "patch_size"):
        said[name] = pair(name, said.get(name, getattr(Settings, name)))
    settings = Settings(**said | {"num_labels": num_labels(config), "input_size": size_HW})
    _check(settings)
    return settings


COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels", "pooled_size")
FLAGS = ("qkv_bias", "use_swiglu_ffn", "apply_layernorm", "reshape_hidden_states")


def _check(s: Settings) -> None:
    for name in COUNTS:
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {name}: `{value}` is not a positive number")
    for name in FLAGS:
        if not isinstance(getattr(s, name), bool):
            raise CheckpointError(f"config.json: {name}: `{getattr(s, name)}` is neither true nor false")
    for name, least in (("layer_norm_eps", 0), ("mlp_ratio", 0), ("num_register_tokens", 0)):
        value = getattr(s, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise CheckpointError(f"config.json: {name}: `{value}` is not a number of at least {least}")
    if s.mlp_width < 1:
        raise CheckpointError(f"config.json: mlp_ratio: `{s.mlp_ratio}` of hidden_size {s.hidden_size} is no width")
    if s.hidden_size % s.num_attention_heads:
        raise CheckpointError(
            f"config.json: hidden_size {s.hidden_size} is not divisible by num_attention_heads {s.num_attention_heads}"
        )
    activation(s.hidden_act)
    activation(s.pooler_act, "config.json: pooler_act")
    check_patches(s)


# --- what its authors published ---

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_LEVELS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_README = "linear probe on ImageNet-1k (the authors' README)"


def _google(
    name: str, config: dict[str, Any], parameters: int, gmacs: float, size: int = 224, classes: bool = True
) -> Published:
    squash = {"image_processor_type": PROCESSOR, "size": {"height": size, "width": size}, "resample": 2}
    processor = {**_LEVELS, **squash, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = {"model_type": "vit", "image_size": size, **config} | ({"num_labels": 1000} if classes else {})
    architecture = "ViTForImageClassification" if classes else "ViTModel"
    return Published(f"google/vit-{name}", architecture, config, processor, parameters, gmacs, size)


def _dinov2(name: str, config: dict[str, Any], parameters: int, gmacs: float, accuracy: float) -> Published:
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
    processor = {**_LEVELS, **_IMAGENET, **crop, "image_processor_type": "BitImageProcessor", "resample": 3}
    with_registers = name.startswith("with-registers")
    model_type = "dinov2_with_registers" if with_registers else "dinov2"
    architecture = "Dinov2WithRegistersModel" if with_registers else "Dinov2Model"
    config = {"model_type": model_type, "image_size": 518, "patch_size": 14, **config}
    said = f"{accuracy} % {_README}"
    return Published(f"facebook/dinov2-{name}", architecture, config, processor, parameters, gmacs, 224, said)


_SMALL = {"hidden_size": 384, "num_attention_heads": 6}
_GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
_LARGE_MLP = {**_LARGE, "intermediate_size": 4096}

PUBLISHED = (
    _google("base-patch16-224", {}, 86_567_656, 17.56),
    _google("base-patch16-384", {}, 86_859_496, 55.48, 384),
    _google("base-patch32-384", {"patch_size": 32}, 88_297_192, 13.04, 384),
    _google("large-patch16-224", _LARGE_MLP, 304_326_632, 61.55),
    _google("large-patch16-384", _LARGE_MLP, 304_715_752, 191.1, 384),
    _google("large-patch32-384", {**_LARGE_MLP, "patch_size": 32}, 306_632_680, 45.28, 384),
    _google("base-patch16-224-in21k", {}, 86_389_248, 17.56, classes=False),
    _google("large-patch16-224-in21k", _LARGE_MLP, 304_351_232, 61.55, classes=False),
    _dinov2("small", _SMALL, 22_056_576, 6.12, 81.1),
    _dinov2("base", {}, 86_580_480, 23.16, 84.5),
    _dinov2("large", _LARGE, 304_368_640, 81.01, 86.3),
    _dinov2("giant", _GIANT, 1_136_480_768, 299.39, 86.5),
    _dinov2("with-registers-small", _SMALL, 22_058_112, 6.23, 80.9),
    _dinov2("with-registers-base", {}, 86_583_552, 23.54, 84.6),
    _dinov2("with-registers-large", _LARGE, 304_372_736, 82.32, 86.7),
    _dinov2("with-registers-giant", _GIANT, 1_136_486_912, 304.17, 87.1),
)
