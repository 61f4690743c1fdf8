"""Encode pixels into hidden states with a plain vision transformer, which ViT, DINOv2, ViTMSN, CLIP and SigLIP share.

A family's file adds its settings, names on disk and heads. `Encoder` is the plain form, `FastEncoder` the fast one.
What DINOv2 has on top (registers, layer scale, SwiGLU) and what CLIP and SigLIP do otherwise (a layer norm before the
first block, no class token) is off unless the family's settings say so. `text_tower.py` builds on the same blocks.

Shapes: B batch, C channels, H W image, N = h w patches, p values of a patch, R registers, T = 1 + R + N tokens (class
token, registers, patches), D width, A heads, M hidden width of an MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.errors import CheckpointError, OutputUnavailable
from img2parquet.models.checkpoint import has_identity_head, num_labels
from img2parquet.models.kernels.activations import activation
from img2parquet.models.layers import attend, fold_layer_scale, fused_linear, resize_positions
from img2parquet.models.patch_sizes import PatchSizes, pair, unread_note


@dataclass(frozen=True)
class BlockSettings:
    """The fields of config.json that shape the blocks of an encoder, by the reference's names, with ViT's defaults.

    A family whose blocks differ from ViT's overrides the properties."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def has_qkv_bias(self) -> bool:
        return True

    @property
    def has_layer_scale(self) -> bool:
        return False

    @property
    def has_swiglu(self) -> bool:
        return False

    @property
    def is_causal(self) -> bool:
        """Whether a token attends only to itself and those before it."""
        return False


@dataclass(frozen=True)
class EncoderSettings(BlockSettings, PatchSizes):
    """The fields that shape the encoder of an image, whose blocks lie between an embedding and a layer norm."""

    num_channels: int = 3
    num_labels: int = 2
    has_identity_head: bool = False

    @property
    def registers(self) -> int:
        """The number of tokens between the class token and the patches."""
        return 0

    @property
    def has_class_token(self) -> bool:
        return True

    @property
    def has_batch_axis(self) -> bool:
        """Whether class token and positions are (1, 1, D) and (1, T, D) on disk, else (D) and (T, D)."""
        return True

    @property
    def has_patch_bias(self) -> bool:
        return True

    @property
    def has_pre_norm(self) -> bool:
        """Whether there is a layer norm before the first block."""
        return False

    @property
    def norms_tokens(self) -> bool:
        """Whether the reference's `last_hidden_state` has passed the last layer norm."""
        return True

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (1, 1, self.hidden_size)

    @property
    def first_patch(self) -> int:
        """The index of the first patch among the tokens."""
        return self.has_class_token + self.registers

    @property
    def tokens(self) -> int:
        """The number of tokens of an input."""
        return self.first_patch + self.input_grid[0] * self.input_grid[1]


@dataclass(frozen=True)
class TransformerSettings(EncoderSettings):
    """The fields that ViT, DINOv2 and ViTMSN have in common."""

    hidden_dropout_prob: float = 0.0  # training only
    attention_probs_dropout_prob: float = 0.0  # training only
    initializer_range: float = 0.02  # training only
    qkv_bias: bool = True

    @property
    def has_qkv_bias(self) -> bool:
        return self.qkv_bias


class Encoder(nn.Module):
    """The plain form, top-down as the papers draw it. A family's subclass adds heads."""

    def __init__(
        self, settings: EncoderSettings, with_mask: bool, split_swiglu: bool = False, merged_qkv: bool = False
    ) -> None:
        """split_swiglu: the file has gate and up as two matrices. merged_qkv: it has q, k and v as one."""
        super().__init__()
        self.settings = s = settings
        self.embed = Embed(s, with_mask)
        self.pre_norm = layer_norm(s) if s.has_pre_norm else None
        self.blocks = nn.ModuleList(Block(s, split_swiglu, merged_qkv) for _ in range(s.num_hidden_layers))
        self.norm = layer_norm(s)

    @property
    def notes(self) -> tuple[str, ...]:
        (h, w), (to_h, to_w) = self.settings.trained_grid, self.settings.input_grid
        unread = unread_note(self.settings)
        if (h, w) == (to_h, to_w):
            return unread
        return (f"positions resized from {h}x{w} to {to_h}x{to_w} patches", *unread)

    @property
    def maskable_patches(self) -> int:
        h, w = self.settings.input_grid
        return 0 if self.embed.mask_D is None else h * w

    def encode(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> dict[str, Tensor]:
        """x_BCHW, mask_BN (true where a patch is hidden) -> `tokens:<k>`, `attentions:<k>`, and `tokens` after the last
        layer norm, or without it where the settings say so."""
        features: dict[str, Tensor] = {}
        x_BTD = self.embed(x_BCHW, mask_BN)
        x_BTD = x_BTD if self.pre_norm is None else self.pre_norm(x_BTD)
        for k, block in enumerate(self.blocks):
            features[f"tokens:{k}"] = x_BTD
            x_BTD, features[f"attentions:{k}"] = block(x_BTD)
        features[f"tokens:{len(self.blocks)}"] = x_BTD
        return features | {"tokens": self.norm(x_BTD) if self.settings.norms_tokens else x_BTD}


class Embed(nn.Module):
    """Patches, the class token and the registers before them, and positions, which registers do not have."""

    def __init__(self, s: EncoderSettings, with_mask: bool) -> None:
        super().__init__()
        self.settings, D, R = s, s.hidden_size, s.registers
        num_positions = s.has_class_token + s.trained_grid[0] * s.trained_grid[1]
        class_shape, positions_shape = (
            ((1, 1, D), (1, num_positions, D)) if s.has_batch_axis else ((D,), (num_positions, D))
        )
        self.class_11D = nn.Parameter(torch.empty(class_shape)) if s.has_class_token else None
        self.mask_D = nn.Parameter(torch.empty(s.mask_shape)) if with_mask else None
        self.registers_1RD = nn.Parameter(torch.empty(1, R, D)) if R else None
        self.positions_1TD = nn.Parameter(torch.empty(positions_shape))
        self.patch = nn.Conv2d(s.num_channels, D, s.patch_size, s.patch_size, bias=s.has_patch_bias)

    def forward(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """x_BCHW -> x_BTD."""
        x_BND = self.patch(x_BCHW).flatten(2).transpose(1, 2)
        if mask_BN is not None:
            x_BND = hide(x_BND, mask_BN, self.mask_D)
        first_1D, positions_1ND = self.starts((x_BCHW.shape[2], x_BCHW.shape[3]))
        return torch.cat([first_1D.expand(len(x_BND), -1, -1), x_BND + positions_1ND], dim=1)

    def starts(self, size_HW: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the tokens before the patches, (1, 1 + R, D), and the patches' positions, (1, N, D)."""
        positions_1TD = self.positions_for(size_HW)
        if self.class_11D is None:
            return positions_1TD[:, :0], positions_1TD
        first = [self.class_11D.view(1, 1, -1) + positions_1TD[:, :1]]
        return torch.cat(first + ([] if self.registers_1RD is None else [self.registers_1RD]), 1), positions_1TD[:, 1:]

    def positions_for(self, size_HW: tuple[int, int]) -> Tensor:
        """Return the learned positions for an image of this size, resized as the references do it -> (1, T - R, D).

        With registers the reference antialiases."""
        s, positions_1TD = self.settings, self.positions_1TD.view(1, -1, self.settings.hidden_size)
        if size_HW == s.image_size:
            return positions_1TD
        grid = (size_HW[0] // s.patch_size[0], size_HW[1] // s.patch_size[1])
        # as many patches on a square image: the references take them as they are
        if size_HW[0] == size_HW[1] and s.has_class_token + grid[0] * grid[1] == positions_1TD.shape[1]:
            return positions_1TD
        return resize_positions(positions_1TD, grid, antialias=s.registers > 0, first=int(s.has_class_token))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with layer scale, each sum's second part has a factor."""

    def __init__(self, s: BlockSettings, split_swiglu: bool = False, merged_qkv: bool = False) -> None:
        super().__init__()
        D, M = s.hidden_size, s.mlp_width
        self.norm1 = layer_norm(s)
        self.attention = Attention(s, merged_qkv)
        self.norm2 = layer_norm(s)
        self.mlp: MLP | SwiGLU = SwiGLU(D, M, split_swiglu) if s.has_swiglu else MLP(D, M, s.hidden_act)
        self.scale1_D = nn.Parameter(torch.empty(D)) if s.has_layer_scale else None
        self.scale2_D = nn.Parameter(torch.empty(D)) if s.has_layer_scale else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT."""
        mixed_BTD, weights_BATT = self.attention(self.norm1(x_BTD))
        x_BTD = x_BTD + (mixed_BTD if self.scale1_D is None else mixed_BTD * self.scale1_D)
        mixed_BTD = self.mlp(self.norm2(x_BTD))
        return x_BTD + (mixed_BTD if self.scale2_D is None else mixed_BTD * self.scale2_D), weights_BATT


class Attention(nn.Module):
    """Mix tokens by attention; reads files that have q, k and v as three matrices, or as one."""

    def __init__(self, s: BlockSettings, merged: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal, self.merged, D = s.num_attention_heads, s.is_causal, merged, s.hidden_size
        if merged:
            self.qkv = nn.Linear(D, 3 * D, bias=s.has_qkv_bias)
        else:
            self.q, self.k, self.v = (nn.Linear(D, D, bias=s.has_qkv_bias) for _ in range(3))
        self.out = nn.Linear(D, D)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT."""
        parts = self.qkv(x_BTD).chunk(3, dim=-1) if self.merged else (self.q(x_BTD), self.k(x_BTD), self.v(x_BTD))
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        mixed, weights_BATT = attend(q, k, v, causal_bias(x_BTD) if self.is_causal else None)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights_BATT

    def merged_qkv(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of q, k and v as one linear."""
        if self.merged:
            return self.qkv.weight, self.qkv.bias
        parts = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([part.bias for part in parts])
        return torch.cat([part.weight for part in parts]), bias


class MLP(nn.Module):
    def __init__(self, width: int, inner_width: int, hidden_act: str) -> None:
        super().__init__()
        self.act = activation(hidden_act)
        self.up, self.down = nn.Linear(width, inner_width), nn.Linear(inner_width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x_BTD)))
        return y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); reads files that have gate and up as one matrix, or as two."""

    def __init__(self, width: int, inner_width: int, split: bool) -> None:
        super().__init__()
        self.split, D, M = split, width, inner_width
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
        """Return weight and bias of gate and up as one linear."""
        if not self.split:
            return self.gate_and_up.weight, self.gate_and_up.bias
        return torch.cat([self.gate.weight, self.up.weight]), torch.cat([self.gate.bias, self.up.bias])


def hide(x_BND: Tensor, mask_BN: Tensor, token_D: Tensor | None) -> Tensor:
    """Replace the hidden patches by the mask token. Raises OutputUnavailable when there is none, or the mask's shape
    differs."""
    if token_D is None:
        raise OutputUnavailable("this checkpoint has no mask token", hint="leave the mask out, or take one that has it")
    if mask_BN.shape != x_BND.shape[:2]:
        raise OutputUnavailable(f"mask {tuple(mask_BN.shape)} for {tuple(x_BND.shape[:2])} patches")
    return torch.where(mask_BN.bool()[..., None], token_D.to(x_BND.dtype), x_BND)


def token_shapes(s: EncoderSettings) -> dict[str, tuple[int, ...]]:
    """List the hidden states that `encode` gives, with their shapes without the batch."""
    names = ("tokens", *(f"tokens:{k}" for k in range(s.num_hidden_layers + 1)))
    return dict.fromkeys(names, (s.tokens, s.hidden_size))


def attention_shapes(s: EncoderSettings) -> dict[str, tuple[int, ...]]:
    """List the attention weights that `encode` gives, with their shapes without the batch."""
    return {f"attentions:{k}": (s.num_attention_heads, s.tokens, s.tokens) for k in range(s.num_hidden_layers)}


def layer_norm(s: BlockSettings) -> nn.LayerNorm:
    return nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)


def causal_bias(x_BTD: Tensor) -> Tensor:
    """Return what is added to scores so that no token attends to a later one, (T, T)."""
    T = x_BTD.shape[1]
    return torch.full((T, T), -torch.inf, dtype=x_BTD.dtype, device=x_BTD.device).triu(1)


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """x_BTD -> (B, A, T, D / A)."""
    return x_BTD.reshape(*x_BTD.shape[:2], num_heads, -1).transpose(1, 2)


# --- the fast form ---


class FastEncoder:
    """The fast form: merged q, k and v, layer scale in the weights before it, positions of the input's size, fused
    linears with their activation and residual, SDPA."""

    def __init__(self, plain: Encoder, dtype: torch.dtype) -> None:
        self.settings, embed = plain.settings, plain.embed
        first_1D, positions_1ND = embed.starts(plain.settings.input_size)
        self.first_1D, self.positions_1ND = first_1D.to(dtype), positions_1ND.to(dtype)
        self.mask_D = None if embed.mask_D is None else embed.mask_D.to(dtype)
        bias = embed.patch.bias
        self.patch = fused_linear(_patch_weight(embed.patch).to(dtype), None if bias is None else bias.to(dtype))
        self.pre_norm = cast_copy(plain.pre_norm, dtype)
        self.blocks = [FastBlock(block, plain.settings, dtype) for block in plain.blocks]  # type: ignore[arg-type]
        self.norm = deepcopy(plain.norm).to(dtype)

    def encode(self, x_BCHW: Tensor, mask_BN: Tensor | None, wants: frozenset[str]) -> dict[str, Tensor]:
        """As `Encoder.encode`; attentions that are not wanted are empty."""
        features: dict[str, Tensor] = {}
        x_BTD = self._embed(x_BCHW, mask_BN)
        x_BTD = x_BTD if self.pre_norm is None else self.pre_norm(x_BTD)
        for k, block in enumerate(self.blocks):
            features[f"tokens:{k}"] = x_BTD
            x_BTD, features[f"attentions:{k}"] = block(x_BTD, f"attentions:{k}" in wants)
        features[f"tokens:{len(self.blocks)}"] = x_BTD
        return features | {"tokens": self.norm(x_BTD) if self.settings.norms_tokens else x_BTD}

    def _embed(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        x_BNp = _patches(x_BCHW, self.settings.patch_size)
        if mask_BN is None:
            x_BND = self.patch(x_BNp, self.positions_1ND.expand(len(x_BNp), -1, -1))
        else:
            x_BND = hide(self.patch(x_BNp), mask_BN, self.mask_D) + self.positions_1ND
        if not self.settings.first_patch:
            return x_BND
        return torch.cat([self.first_1D.expand(len(x_BND), -1, -1), x_BND], dim=1)


class FastBlock:
    def __init__(self, plain: Block, s: BlockSettings, dtype: torch.dtype) -> None:
        mlp, self.attention = plain.mlp, FastAttention(plain.attention, dtype)
        self.out = fused_linear(*fold_layer_scale(plain.attention.out, plain.scale1_D, dtype))
        self.is_swiglu = isinstance(mlp, SwiGLU)
        weight, bias = mlp.merged() if isinstance(mlp, SwiGLU) else (mlp.up.weight, mlp.up.bias)
        self.up = fused_linear(weight.to(dtype), bias.to(dtype), "linear" if self.is_swiglu else s.hidden_act)
        self.down = fused_linear(*fold_layer_scale(mlp.down, plain.scale2_D, dtype))
        self.norm1, self.norm2 = deepcopy(plain.norm1).to(dtype), deepcopy(plain.norm2).to(dtype)

    def __call__(self, x_BTD: Tensor, with_weights: bool) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT (an empty tensor without `with_weights`)."""
        mixed_BTD, weights_BATT = self.attention(self.norm1(x_BTD), with_weights)
        x_BTD = self.out(mixed_BTD, x_BTD)
        up_BTM = self.up(self.norm2(x_BTD))
        if self.is_swiglu:
            gate_BTM, up_BTM = up_BTM.chunk(2, dim=-1)
            up_BTM = F.silu(gate_BTM) * up_BTM
        return self.down(up_BTM, x_BTD), weights_BATT


class FastAttention:
    """q, k and v as one linear; SDPA unless the weights are wanted."""

    def __init__(self, plain: Attention, dtype: torch.dtype) -> None:
        self.num_heads, self.is_causal = plain.num_heads, plain.is_causal
        weight, bias = plain.merged_qkv()
        self.qkv = fused_linear(weight.to(dtype), None if bias is None else bias.to(dtype))

    def __call__(self, x_BTD: Tensor, with_weights: bool) -> tuple[Tensor, Tensor]:
        """x_BTD -> mixed_BTD, before the last linear; attention weights BATT (empty without `with_weights`)."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        if with_weights:
            mixed, weights_BATT = attend(q, k, v, causal_bias(x_BTD) if self.is_causal else None)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
            weights_BATT = x_BTD.new_empty(0)
        return mixed.transpose(1, 2).flatten(2), weights_BATT


Part = TypeVar("Part", bound=nn.Module)


def cast_copy(part: Part | None, dtype: torch.dtype) -> Part | None:
    """Copy a head in `dtype`, if there is one."""
    return None if part is None else deepcopy(part).to(dtype)


def _patches(x_BCHW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """x_BCHW -> (B, N, patch height * patch width * C), without the rows and columns that fill no patch."""
    (ph, pw), (b, c, height, width) = patch_size, x_BCHW.shape
    h, w = height // ph, width // pw
    x_BCHW = x_BCHW[:, :, : h * ph, : w * pw]  # SigLIP's 384 pixels have a rest that 14 does not fill
    return x_BCHW.permute(0, 2, 3, 1).reshape(b, h, ph, w, pw, c).transpose(2, 3).reshape(b, h * w, ph * pw * c)


def _patch_weight(patch: nn.Conv2d) -> Tensor:
    """Return a convolution over patches as the weight of a linear over what `_patches` gives, (D, p)."""
    return patch.weight.permute(0, 2, 3, 1).flatten(1)


# --- config.json ---

SomeSettings = TypeVar("SomeSettings", bound=EncoderSettings)


def read_fields(
    kind: type[SomeSettings], config: Mapping[str, Any], size_HW: tuple[int, int], defaults: Mapping[str, Any] = {}
) -> SomeSettings:
    """Fill a family's settings from config.json; `defaults` precede those of `kind`. Unknown keys are ignored."""
    known = {field.name for field in fields(kind)}
    values: dict[str, Any] = {**defaults, **{name: value for name, value in config.items() if name in known}}
    for name in ("image_size", "patch_size"):
        values[name] = pair(name, values.get(name, getattr(kind, name)))
    derived = {"num_labels": num_labels(config), "has_identity_head": has_identity_head(config), "input_size": size_HW}
    return kind(**values | derived)


def classifier(s: TransformerSettings, width: int, on_disk: bool) -> nn.Linear | nn.Identity | None:
    """Build the head that reads vectors of `width`, if the checkpoint has one."""
    if on_disk:
        return nn.Linear(width, s.num_labels)
    return nn.Identity() if s.has_identity_head else None


COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")


def check_counts(s: object, names: Iterable[str] = COUNTS) -> None:
    """Raise CheckpointError unless each of these settings is a positive number."""
    for name in names:
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {name}: `{value}` is not a positive number")


def check_flags(s: object, names: Iterable[str] = ("qkv_bias",)) -> None:
    """Raise CheckpointError unless each of these settings is true or false."""
    for name in names:
        if not isinstance(getattr(s, name), bool):
            raise CheckpointError(f"config.json: {name}: `{getattr(s, name)}` is neither true nor false")


def check_heads(s: BlockSettings) -> None:
    """Raise CheckpointError unless the attention heads divide the width."""
    if s.hidden_size % s.num_attention_heads:
        raise CheckpointError(
            f"config.json: hidden_size {s.hidden_size} is not divisible by num_attention_heads {s.num_attention_heads}",
            hint=f"numbers of heads that fit: {_few_divisors(s.hidden_size)}",
        )


def _few_divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)
