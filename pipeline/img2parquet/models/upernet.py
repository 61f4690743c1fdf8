"""Turn four feature maps of a plain transformer into per-class maps: BEiT's pyramid neck and UperNet head.

Shapes: B batch, D width, h w the patch grid, K classes.

- A transformer's maps all have the patch grid's size; `Neck` turns them into a pyramid: x4, x2, x1, /2.
- `UperHead` (Xiao et al. 2018) pools the coarsest map at several scales (PSP), adds each level to the next finer one
  (FPN), and classifies at the finest: (B, K, 4h, 4w).
- `FcnHead` (Long et al. 2015) is the auxiliary head, which only enters the loss. It sees the map of the patch grid.
- `fold_neck` and `fold_head` fold every batch norm into the convolution before it, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Neck(nn.Module):
    """Four (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h//2, w//2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(_double(width), nn.BatchNorm2d(width), nn.GELU(), _double(width))
        self.up2 = nn.Sequential(_double(width))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        finest, fine, same, coarse = maps
        return [self.up4(finest), self.up2(fine), same, F.max_pool2d(coarse, kernel_size=2, stride=2)]


class UperHead(nn.Module):
    """The neck's four maps -> (B, K, 4h, 4w) scores."""

    def __init__(self, width: int, pool_scales: Sequence[int], num_labels: int) -> None:
        super().__init__()
        self.psp = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), ConvNormRelu(width, width, 1)) for s in pool_scales
        )
        self.psp_bottleneck = ConvNormRelu((1 + len(pool_scales)) * width, width, 3)
        self.laterals = nn.ModuleList(ConvNormRelu(width, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNormRelu(width, width, 3) for _ in range(3))
        self.bottleneck = ConvNormRelu(4 * width, width, 3)
        self.classifier = nn.Conv2d(width, num_labels, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps[:3], strict=True)]
        levels.append(self.pool_pyramid(maps[3]))
        for i in (2, 1, 0):
            levels[i] = levels[i] + _resize_like(levels[i + 1], levels[i])
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:3], strict=True)] + levels[3:]
        gathered = torch.cat([smoothed[0], *(_resize_like(x, smoothed[0]) for x in smoothed[1:])], dim=1)
        scores: Tensor = self.classifier(self.bottleneck(gathered))
        return scores

    def pool_pyramid(self, x_BDhw: Tensor) -> Tensor:
        pooled = [_resize_like(pool(x_BDhw), x_BDhw) for pool in self.psp]
        context: Tensor = self.psp_bottleneck(torch.cat([x_BDhw, *pooled], dim=1))
        return context


class FcnHead(nn.Module):
    """(B, D, h, w) -> (B, K, h, w) scores, through 3x3 convolutions.

    concatenates: one more convolution sees the input beside the others' output."""

    def __init__(self, width: int, channels: int, num_convs: int, concatenates: bool, num_labels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNormRelu(channels if k else width, channels, 3) for k in range(num_convs))
        self.concat = ConvNormRelu(width + channels, channels, 3) if concatenates else None
        self.classifier = nn.Conv2d(channels, num_labels, kernel_size=1)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        y = x_BDhw
        for conv in self.convs:
            y = conv(y)
        y = y if self.concat is None else self.concat(torch.cat([x_BDhw, y], dim=1))
        scores: Tensor = self.classifier(y)
        return scores


class ConvNormRelu(nn.Module):
    """Same-size convolution, batch norm (until it is folded away), ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def _double(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _resize_like(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


# --- the fast form ---

Part = TypeVar("Part", bound=nn.Module)


def fold_neck(neck: Neck, dtype: torch.dtype) -> Neck:
    """Copy the neck without its batch norm, in `dtype`."""
    folded = copy.deepcopy(neck)
    folded.up4[0], folded.up4[1] = _fold(neck.up4[0], neck.up4[1]), nn.Identity()
    return _laid_out(folded, dtype)


def fold_head(head: Part, dtype: torch.dtype) -> Part:
    """Copy a head without batch norms, in `dtype`."""
    folded = copy.deepcopy(head)
    for part in folded.modules():
        if isinstance(part, ConvNormRelu):
            part.conv, part.norm = _fold(part.conv, part.norm), nn.Identity()
    return _laid_out(folded, dtype)


def _laid_out(part: Part, dtype: torch.dtype) -> Part:
    """Put bfloat16 channels-last, three times as fast on CPUs with matrix units; float32 was faster channels-first."""
    part = part.to(dtype)
    return part if dtype == torch.float32 else part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fold(conv: nn.Module, norm: nn.Module) -> nn.Conv2d | nn.ConvTranspose2d:
    """Fold norm(conv(x)) into one convolution: scale weights per output channel, which is axis 1 when transposed."""
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    scale_O = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias_O = conv.bias.double() if conv.bias is not None else torch.zeros_like(scale_O)
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    folded = copy.deepcopy(conv)
    folded.weight = _frozen(conv.weight.double() * scale_O.reshape(shape))
    folded.bias = _frozen((bias_O - norm.running_mean.double()) * scale_O + norm.bias.double())
    return folded


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.float(), requires_grad=False)
