"""Build layers that several families share: fused linear and convolution, folding, attention, positions.

Shapes: B batch, T tokens (class token first), D width, O outputs, I inputs, C channels, H W image or map.

* `fused_linear` and `fused_conv` do bias, activation and residual in one pass over memory where oneDNN can (CPU). Those
  operators are private to torch, so a self-test decides once per process and dtype; if it fails, plain torch is used.
* Weights are packed into oneDNN's own layout once, when the fused form is built.
* Folding is done in float64 and rounded once at the end.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.models.kernels.activations import ACTIVATIONS, gelu_tanh


def fused_linear(weight_OI: Tensor, bias_O: Tensor | None = None, activation: str = "linear") -> FusedLinear:
    """y = activation(x W^T + b) [+ residual], packed for the device and dtype that the weight has."""
    fused = weight_OI.device.type == "cpu" and activation in _ONEDNN and onednn_works(weight_OI.dtype)
    return FusedLinear(weight_OI, bias_O, activation, fused)


def fused_conv(
    weight_OIHW: Tensor,
    bias_O: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    activation: str = "linear",
) -> FusedConv:
    """y = activation(conv(x) + b [+ residual]), channels last, packed for the device and dtype that the weight has."""
    fused = weight_OIHW.device.type == "cpu" and activation in _ONEDNN and onednn_works(weight_OIHW.dtype)
    return FusedConv(weight_OIHW, bias_O, _Geometry(stride, padding, dilation), activation, fused)


class FusedLinear:
    """Built by `fused_linear`. With a residual, the activation must be "linear"."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, activation: str, fused: bool) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self.bias_O = None if bias_O is None else bias_O.detach().contiguous()
        self.activation, self.fused = activation, fused
        weight_OI = weight_OI.detach().contiguous()
        self.weight_OI = _packed_linear(weight_OI) if fused else weight_OI

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., I), residual (..., O) -> (..., O). Does not change its inputs."""
        assert residual is None or self.activation == "linear"
        if not self.fused:
            y = ACTIVATIONS[self.activation](F.linear(x, self.weight_OI, self.bias_O))
            return y if residual is None else y + residual
        ops = torch.ops.mkldnn
        if residual is None:
            attr, scalars, algorithm = _ONEDNN[self.activation]
            return ops._linear_pointwise(x, self.weight_OI, self.bias_O, attr, scalars, algorithm)  # type: ignore[no-any-return]
        return ops._linear_pointwise.binary(x, residual, self.weight_OI, self.bias_O, "add")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Geometry:
    stride: int
    padding: int
    dilation: int


class FusedConv:
    """Built by `fused_conv`. With a residual, the activation comes after the sum."""

    def __init__(self, weight_OIHW: Tensor, bias_O: Tensor | None, at: _Geometry, activation: str, fused: bool) -> None:
        self.bias_O = None if bias_O is None else bias_O.detach().contiguous()
        self.at, self.activation, self.fused = at, activation, fused
        weight_OIHW = weight_OIHW.detach().contiguous(memory_format=torch.channels_last)
        self.weight_OIHW = _packed_conv(weight_OIHW, at) if fused else weight_OIHW

    def __call__(self, x_BCHW: Tensor, residual_BOHW: Tensor | None = None) -> Tensor:
        """x_BCHW -> (B, O, H', W'), channels last. Does not change its inputs."""
        at = self.at
        if not self.fused:
            y = F.conv2d(x_BCHW, self.weight_OIHW, self.bias_O, at.stride, at.padding, at.dilation)
            return ACTIVATIONS[self.activation](y if residual_BOHW is None else y + residual_BOHW)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        where = ([at.padding] * 2, [at.stride] * 2, [at.dilation] * 2, 1)
        ops, unary = torch.ops.mkldnn, _ONEDNN[self.activation]
        if residual_BOHW is None:
            return ops._convolution_pointwise(x_BCHW, self.weight_OIHW, self.bias_O, *where, *unary)  # type: ignore[no-any-return]
        then = unary if self.activation == "relu" else (None, [], None)  # oneDNN fuses no other activation with a sum
        operands = (x_BCHW, residual_BOHW, self.weight_OIHW, self.bias_O)
        y = ops._convolution_pointwise.binary(*operands, *where, "add", 1.0, *then)
        return y if then is unary else ACTIVATIONS[self.activation](y)


def fold_batch_norm(weight: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the bias-free linear or convolution before it (outputs first): weight, bias in float64."""
    scale_O, shift_O = batch_norm_affine(norm)
    return weight.double() * scale_O.view(-1, *[1] * (weight.dim() - 1)), shift_O


def fold_layer_scale(linear: nn.Linear, scale_O: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge a linear and the layer scale after it: weight_OI, bias_O in `dtype`."""
    if scale_O is None:
        return linear.weight.to(dtype), linear.bias.to(dtype)
    scale = scale_O.double()
    return (linear.weight.double() * scale[:, None]).to(dtype), (linear.bias.double() * scale).to(dtype)


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift, in float64, of a batch norm at inference: y = x * scale + shift."""
    if norm.running_mean is None or norm.running_var is None:
        raise AssertionError("a batch norm without running statistics cannot be folded")
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute scaled dot product attention and its weights, softmax in float32 -> out_BHTD, weights_BHTT."""
    scores_BHTT = q_BHTD @ k_BHTD.transpose(-2, -1) * q_BHTD.shape[-1] ** -0.5
    if bias is not None:
        scores_BHTT = scores_BHTT + bias
    weights_BHTT = scores_BHTT.float().softmax(dim=-1).to(q_BHTD.dtype)
    return weights_BHTT @ v_BHTD, weights_BHTT


def resize_positions(
    positions_1TD: Tensor, grid_HW: tuple[int, int], antialias: bool = False, first: int = 1
) -> Tensor:
    """Resize learned positions of a square grid, bicubic as the reference, but the `first` ones -> (1, T, D)."""
    width, side = positions_1TD.shape[-1], math.isqrt(positions_1TD.shape[1] - first)
    grid_1DHW = positions_1TD[:, first:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid_1DHW = F.interpolate(grid_1DHW, size=grid_HW, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions_1TD[:, :first], grid_1DHW.flatten(2).transpose(1, 2)], dim=1)


# oneDNN's post-operation for an activation: (name, scalars, algorithm); the others run after an unfused linear
_ONEDNN: dict[str, tuple[str, list[float], str | None]] = {
    "linear": ("none", [], None),
    "relu": ("relu", [], None),
    "hardswish": ("hardswish", [], None),
    "sigmoid": ("sigmoid", [], None),
    "tanh": ("tanh", [], None),
    **{name: ("gelu", [], "none") for name in ("gelu", "gelu_python")},
    **{name: ("gelu", [], "tanh") for name, function in ACTIVATIONS.items() if function is gelu_tanh},
}


@functools.cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether this torch and CPU run the fused operators correctly, found once by comparing them with plain torch."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return False
    try:
        with torch.inference_mode():
            return all(_agrees(name, dtype) for name in _ONEDNN)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


def _agrees(name: str, dtype: torch.dtype) -> bool:
    random = torch.Generator().manual_seed(0)
    x, w, b, r = (torch.randn(shape, generator=random).to(dtype) for shape in ((2, 5, 24), (16, 24), (16,), (2, 5, 16)))
    image, kernel = x.reshape(2, 24, 5, 1), w[..., None, None]
    close = functools.partial(torch.allclose, rtol=2e-2, atol=6e-2) if dtype == torch.bfloat16 else _close_float32
    plain, fused = FusedLinear(w, b, name, False), FusedLinear(w, b, name, True)
    at = _Geometry(1, 0, 1)
    plain_conv, fused_conv = FusedConv(kernel, b, at, name, False), FusedConv(kernel, b, at, name, True)
    pairs = [(plain(x), fused(x)), (plain_conv(image), fused_conv(image))]
    map_ = r.reshape(2, 16, 5, 1).contiguous(memory_format=torch.channels_last)
    pairs.append((plain_conv(image, map_), fused_conv(image, map_)))
    if name == "linear":
        pairs.append((plain(x, r), fused(x, r)))
    return all(bool(close(a.float(), b.float())) for a, b in pairs)


def _close_float32(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def _packed_linear(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return packed


def _packed_conv(weight_OIHW: Tensor, at: _Geometry) -> Tensor:
    where = ([at.padding] * 2, [at.stride] * 2, [at.dilation] * 2, 1)
    packed: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight_OIHW.to_mkldnn(), *where)
    return packed
