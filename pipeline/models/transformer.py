"""What plain vision transformers share: patches and their positions, hidden patches, attention and MLP, plain and fast.

Shapes: B batch, C channels, H W image, N patches, p values of a patch, T tokens (class token first), D width, A heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import OutputUnavailable
from pipeline.models.layers import activation, attend, fused_linear, resize_positions


def patches(x_BCHW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """x_BCHW -> (B, N, patch height * patch width * C)."""
    (ph, pw), (b, c, height, width) = patch_size, x_BCHW.shape
    h, w = height // ph, width // pw
    return x_BCHW.permute(0, 2, 3, 1).reshape(b, h, ph, w, pw, c).transpose(2, 3).reshape(b, h * w, ph * pw * c)


def patch_weight(patch: nn.Conv2d) -> Tensor:
    """A convolution over patches -> the weight of a linear over what `patches` gives, (D, p)."""
    return patch.weight.permute(0, 2, 3, 1).flatten(1)


def positions_for(
    positions_1TD: Tensor,
    size_HW: tuple[int, int],
    trained_HW: tuple[int, int],
    patch_size: tuple[int, int],
    antialias: bool = False,
) -> Tensor:
    """Learned positions for an image of this size, as the references resize them -> (1, T, D)."""
    if size_HW == trained_HW:
        return positions_1TD
    grid = (size_HW[0] // patch_size[0], size_HW[1] // patch_size[1])
    # as many patches on a square image: the references take them as they are
    if size_HW[0] == size_HW[1] and 1 + grid[0] * grid[1] == positions_1TD.shape[1]:
        return positions_1TD
    return resize_positions(positions_1TD, grid, antialias)


def hide(x_BND: Tensor, mask_BN: Tensor, token_D: Tensor | None) -> Tensor:
    """The mask token in place of the hidden patches. Raises OutputUnavailable."""
    if token_D is None:
        raise OutputUnavailable("this checkpoint has no mask token", hint="leave the mask out, or take one that has it")
    if mask_BN.shape != x_BND.shape[:2]:
        raise OutputUnavailable(f"mask {tuple(mask_BN.shape)} for {tuple(x_BND.shape[:2])} patches")
    return torch.where(mask_BN.bool()[..., None], token_D.to(x_BND.dtype), x_BND)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=qkv_bias) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x_BTD -> x_BTD, attention weights BATT."""
        q, k, v = (_split_heads(part(x_BTD), self.num_heads) for part in (self.q, self.k, self.v))
        mixed, weights_BATT = attend(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights_BATT


class FastAttention:
    """q, k and v as one linear, SDPA where nobody asks for the weights."""

    def __init__(self, plain: Attention, dtype: torch.dtype) -> None:
        self.num_heads, parts = plain.num_heads, (plain.q, plain.k, plain.v)
        bias = None if plain.q.bias is None else torch.cat([part.bias for part in parts]).to(dtype)
        self.qkv = fused_linear(torch.cat([part.weight for part in parts]).to(dtype), bias)

    def __call__(self, x_BTD: Tensor, with_weights: bool) -> tuple[Tensor, Tensor]:
        """x_BTD -> mixed_BTD, before the last linear; attention weights BATT (empty where they are not asked for)."""
        q, k, v = (_split_heads(part, self.num_heads) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        if with_weights:
            mixed, weights_BATT = attend(q, k, v)
        else:
            mixed, weights_BATT = F.scaled_dot_product_attention(q, k, v), x_BTD.new_empty(0)
        return mixed.transpose(1, 2).flatten(2), weights_BATT


class MLP(nn.Module):
    def __init__(self, width: int, inner_width: int, hidden_act: str) -> None:
        super().__init__()
        self.act = activation(hidden_act)
        self.up, self.down = nn.Linear(width, inner_width), nn.Linear(inner_width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x_BTD)))
        return y


def _split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """x_BTD -> (B, A, T, D / A)."""
    return x_BTD.reshape(*x_BTD.shape[:2], num_heads, -1).transpose(1, 2)
