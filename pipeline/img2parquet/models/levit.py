"""LeViT: four strided convolutions, then stages of attention whose token grid shrinks.

What is unusual:
* every linear and convolution is followed by a batch norm, so `fold` leaves plain linears; there is no layer norm;
* attention adds a learned bias per head and offset (|dy|, |dx|) between query and key, numbered in the order in which
  the offsets first appear. Its table fixes the token grid: only input sizes that give this grid are possible;
* between two stages, attention whose queries are every second row and column shrinks the grid (no residual there);
* the published files have two heads. `logits` is the mean of both, as the authors evaluate, even if config.json
  names the reference's one-head class, which silently drops the second head.

`tokens:<k>` are the reference's `hidden_states[k]`: the input of stage k, the last one being the output.
`attentions:<k>`, which the reference does not offer, counts every attention, the shrinking ones too.

Shapes: B batch, C channels, H W image, N tokens (Q queries, K keys), D width, A heads, h head width, O offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.errors import CheckpointError
from img2parquet.models.checkpoint import has_identity_head, num_labels
from img2parquet.models.family import Published
from img2parquet.models.kernels.attention import FusedAttention, fused_attention, mixes_first
from img2parquet.models.kernels.conv_stem import FusedStem, Geometry, fused_stem
from img2parquet.models.kernels.feed_forward import fused_feed_forward
from img2parquet.models.layers import (
    FusedConv,
    FusedLinear,
    batch_norm_affine,
    fold_batch_norm,
    fused_conv,
    fused_linear,
)

MODEL_TYPE = "levit"
PREFIX = "levit."
PROCESSOR = "LevitImageProcessor"
EMBEDDING = "the mean over the last stage's tokens: the reference's `pooler_output`; `pooled:mean` is the same"

_RESIDUAL, _SHRINK = "encoder.stages.{}.layers.{}.module.", "encoder.stages.{}.layers.{}."
KEYS = {
    **{f"patch_embeddings.embedding_layer_{n + 1}.convolution": f"stem.{n}.conv" for n in range(4)},
    **{f"patch_embeddings.embedding_layer_{n + 1}.batch_norm": f"stem.{n}.norm" for n in range(4)},
    _RESIDUAL + "attention_biases": "stages.{}.{}.biases_AO",
    _SHRINK + "attention_biases": "stages.{}.{}.biases_AO",
    **{
        f"{where}{theirs}.{part}": f"stages.{{}}.{{}}.{ours}.{part.replace('batch_', '')}"
        for where, theirs, ours in (
            (_RESIDUAL, "queries_keys_values", "qkv"),
            (_RESIDUAL, "projection", "out"),
            (_RESIDUAL, "linear_up", "up"),
            (_RESIDUAL, "linear_down", "down"),
            (_SHRINK, "keys_values", "kv"),
            (_SHRINK, "queries", "q"),
            (_SHRINK, "projection", "out"),
        )
        for part in ("linear", "batch_norm")
    },
    "classifier.batch_norm": "heads.cls.norm",
    "classifier.linear": "heads.cls.linear",
    "classifier_distill.batch_norm": "heads.distillation.norm",
    "classifier_distill.linear": "heads.distillation.linear",
}
UNUSED = ("*.attention_bias_idxs",)  # computed from the grid; older files contain it
_CLS, _DISTILLATION = "classifier.linear.weight", "classifier_distill.linear.weight"
HEADS = {
    "LevitModel": (),
    "LevitForImageClassification": (_CLS,),
    "LevitForImageClassificationWithTeacher": (_CLS, _DISTILLATION),
}


@dataclass(frozen=True)
class Shrink:
    """One entry of the config's `down_ops`: how the grid shrinks after a stage."""

    key_dim: int
    num_heads: int
    attention_ratio: int
    mlp_ratio: int
    stride: int


@dataclass(frozen=True)
class Settings:
    """config.json by the reference's names and defaults, then what this run adds."""

    image_size: int = 224
    num_channels: int = 3
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    patch_size: int = 16
    hidden_sizes: tuple[int, ...] = (128, 256, 384)
    num_attention_heads: tuple[int, ...] = (4, 8, 12)
    depths: tuple[int, ...] = (4, 4, 4)
    key_dim: tuple[int, ...] = (16, 16, 16)
    drop_path_rate: float = 0  # training only
    mlp_ratio: tuple[int, ...] = (2, 2, 2)
    attention_ratio: tuple[int, ...] = (2, 2, 2)
    initializer_range: float = 0.02  # training only
    down_ops: tuple[Shrink | None, ...] = ()  # one between each stage and the next
    num_labels: int = 2
    input_size: tuple[int, int] = (224, 224)
    architecture: str = ""
    has_identity_head: bool = False

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the token grid at the start of each stage, then at the end."""
        sides = [self.image_size // self.patch_size]
        for shrink in self.down_ops:
            sides.append((sides[-1] - 1) // shrink.stride + 1 if shrink else sides[-1])
        return (*sides, sides[-1])

    @property
    def geometry(self) -> Geometry:
        """The channels of each of the four convolutions."""
        return Geometry(self.kernel_size, self.stride, self.padding)

    def grid_of(self, size: int) -> int:
        """Return the side of the token grid after the four convolutions, for an image's side."""
        for _ in range(4):
            size = self.geometry.shrink(size)
        return size


class Levit(nn.Module):
    """The plain form, top-down."""

    def __init__(self, settings: Settings, names: frozenset[str]) -> None:
        super().__init__()
        self.settings = s = settings
        first = s.hidden_sizes[0]
        channels = (s.num_channels, first // 8, first // 4, first // 2, first)
        self.stem = nn.ModuleList(ConvNorm(channels[n], channels[n + 1], s) for n in range(4))
        self.stages = nn.ModuleList(nn.ModuleList(_stage(s, index)) for index in range(len(s.depths)))
        heads = {"cls": _CLS in names, "distillation": _DISTILLATION in names}
        self.heads = nn.ModuleDict({name: Head(s) for name, there in heads.items() if there})

    @property
    def notes(self) -> tuple[str, ...]:
        if len(self.heads) == 2 and self.settings.architecture == "LevitForImageClassification":
            return ("logits are the mean of both heads; the reference's LevitForImageClassification reads `cls` alone",)
        return ()

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, tuple(self.heads))

    def forward(self, x_BCHW: Tensor, wants: frozenset[str]) -> dict[str, Tensor]:
        """x_BCHW -> the wanted features."""
        for n, layer in enumerate(self.stem):
            x_BCHW = layer(x_BCHW) if n == 3 else F.hardswish(layer(x_BCHW))
        x_BND = x_BCHW.flatten(2).transpose(1, 2)
        features: dict[str, Tensor] = {}
        attentions: list[Tensor] = []
        for k, stage in enumerate(self.stages):
            features[f"tokens:{k}"] = x_BND
            for layer in stage:  # type: ignore[attr-defined]
                x_BND = layer(x_BND, attentions)
        features |= {f"attentions:{k}": weights for k, weights in enumerate(attentions)}
        pooled_BD = x_BND.mean(dim=1)
        logits = {name: head(pooled_BD) for name, head in self.heads.items()}
        return _finish(features, x_BND, pooled_BD, logits, len(self.stages), wants)


class ConvNorm(nn.Module):
    def __init__(self, c_in: int, c_out: int, s: Settings) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, s.kernel_size, s.stride, s.padding, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x_BCHW))
        return y


class LinearNorm(nn.Module):
    """A linear, then a batch norm over the width."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)
        self.norm = nn.BatchNorm1d(d_out)

    def forward(self, x_BND: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x_BND).flatten(0, 1))
        return y.unflatten(0, x_BND.shape[:2])  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True)
class HeadShape:
    """An attention's number of heads, their widths, and the grids of its queries and keys."""

    num_heads: int
    key_dim: int
    value_dim: int
    side: int  # of the keys' grid
    stride: int = 1  # queries are every stride-th row and column of it

    @property
    def query_side(self) -> int:
        return (self.side - 1) // self.stride + 1


class Attention(nn.Module):
    """x + attention among all tokens."""

    def __init__(self, width: int, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = LinearNorm(width, shape.num_heads * (2 * shape.key_dim + shape.value_dim))
        self.out = LinearNorm(shape.num_heads * shape.value_dim, width)
        self.biases_AO, self.index_QK = _bias_table(self, shape)

    def forward(self, x_BND: Tensor, attentions: list[Tensor]) -> Tensor:
        widths = [self.shape.key_dim, self.shape.key_dim, self.shape.value_dim]
        q, k, v = torch.split(_heads(self.qkv(x_BND), self.shape.num_heads), widths, dim=-1)
        mixed: Tensor = self.out(_attend(q, k, v, self.biases_AO[:, self.index_QK], attentions))
        return x_BND + mixed


class ShrinkingAttention(nn.Module):
    """Attention from every stride-th row and column to all tokens: the next stage's grid and width."""

    def __init__(self, width_in: int, width_out: int, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.kv = LinearNorm(width_in, shape.num_heads * (shape.key_dim + shape.value_dim))
        self.q = LinearNorm(width_in, shape.num_heads * shape.key_dim)
        self.out = LinearNorm(shape.num_heads * shape.value_dim, width_out)
        self.biases_AO, self.index_QK = _bias_table(self, shape)

    def forward(self, x_BND: Tensor, attentions: list[Tensor]) -> Tensor:
        widths, heads = [self.shape.key_dim, self.shape.value_dim], self.shape.num_heads
        k, v = torch.split(_heads(self.kv(x_BND), heads), widths, dim=-1)
        q = _heads(self.q(every_nth(x_BND, self.shape)), heads)
        mixed: Tensor = self.out(_attend(q, k, v, self.biases_AO[:, self.index_QK], attentions))
        return mixed


class MLP(nn.Module):
    """x + mlp(x)."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.up, self.down = LinearNorm(width, width * ratio), LinearNorm(width * ratio, width)

    def forward(self, x_BND: Tensor, attentions: list[Tensor]) -> Tensor:
        y: Tensor = self.down(F.hardswish(self.up(x_BND)))
        return x_BND + y


class Head(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(s.hidden_sizes[-1])
        self.linear = nn.Linear(s.hidden_sizes[-1], s.num_labels)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(pooled_BD))
        return y


def build(settings: Settings, names: frozenset[str]) -> Levit:
    return Levit(settings, names)


def fold(module: Levit, dtype: torch.dtype) -> FastLevit:
    """Return the fast form: batch norms in the weights, scale in the queries, bias tables gathered, one linear for both
    heads."""
    return FastLevit(module, dtype)


class FastLevit:
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_levit.py)."""

    def __init__(self, plain: Levit, dtype: torch.dtype) -> None:
        self.settings, self.head_names = plain.settings, tuple(plain.heads)
        self.stem = _fast_stem(plain, dtype)
        self.stages = [_fast_stage(list(stage), dtype) for stage in plain.stages[:-1]]  # type: ignore[call-overload]
        self.stages.append(_fast_stage(list(plain.stages[-1]), dtype, last=True))  # type: ignore[call-overload]
        ends = self.stages[-1][-1] if self.stages[-1] else None
        self.last_mlp = ends if isinstance(ends, FastMLP) else None
        self.heads = _fast_heads(list(plain.heads.values()), dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head_names)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str]) -> dict[str, Tensor]:
        """x_BCHW -> the wanted features."""
        for conv in self.stem:
            x_BCHW = conv(x_BCHW)
        x_BND = x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
        features: dict[str, Tensor] = {}
        attentions: list[Tensor] | None = [] if any(name.startswith("attentions:") for name in wants) else None
        last = None if wants & {"tokens", f"tokens:{len(self.stages)}"} else self.last_mlp
        for k, stage in enumerate(self.stages):
            features[f"tokens:{k}"] = x_BND
            x_BND = x_BND if attentions is not None else self._whole_rows(x_BND, k)
            for layer in stage:
                x_BND = x_BND if layer is last else layer(x_BND, attentions)
            x_BND = x_BND[:, : self.settings.sides[k + 1] ** 2]
        features |= {f"attentions:{k}": weights for k, weights in enumerate(attentions or ())}
        pooled_BD = last.mean(x_BND) if last else x_BND.mean(dim=1)
        heads = self.heads if any(name.startswith("logits") for name in wants) else None
        parts = torch.split(heads(pooled_BD), self.settings.num_labels, dim=-1) if heads else ()
        logits = dict(zip(self.head_names, parts, strict=False))
        return _finish(features, x_BND, pooled_BD, logits, len(self.stages), wants)

    def _whole_rows(self, x_BND: Tensor, k: int) -> Tensor:
        """Append tokens of zeros, as many as the stage's attentions need; their results are never read."""
        first = next(iter(self.stages[k]), None)
        missing = first.bias_1AQK.shape[-1] - x_BND.shape[1] if isinstance(first, FastAttention) else 0
        return F.pad(x_BND, (0, 0, 0, missing)) if missing else x_BND


class FastAttention:
    """An attention and the MLP after it."""

    def __init__(self, plain: Attention, mlp: MLP | None, dtype: torch.dtype) -> None:
        self.shape = shape = plain.shape
        weight_OI, bias_O = fold_batch_norm(plain.qkv.linear.weight, plain.qkv.norm)
        widths = [shape.key_dim, shape.key_dim, shape.value_dim]
        scales = [shape.key_dim**-0.5, 1.0, 1.0]
        bias_AQK = plain.biases_AO[:, plain.index_QK]
        self.fused = _fused(bias_AQK, shape, dtype)
        # in bfloat16, rows of zeros that widen queries and keys to the values' width cost less than padding both later
        made = [shape.value_dim] * 3 if dtype == torch.bfloat16 and not self.fused and _takes_flash(shape) else widths
        self.qkv = fused_linear(
            _by_part(weight_OI, shape.num_heads, widths, scales, made).to(dtype),
            _by_part(bias_O, shape.num_heads, widths, scales, made).to(dtype),
        )
        self.widths = [shape.num_heads * width for width in made]
        self.after = FastFeedForward(plain.out, mlp, dtype)
        bias_1AQK = bias_AQK[None].to(dtype)
        self.bias_1AQK = bias_1AQK if self.fused else _with_whole_rows(bias_1AQK)

    def __call__(self, x_BND: Tensor, attentions: list[Tensor] | None) -> Tensor:
        tokens = x_BND.shape[1]  # may include padding: see `_whole_rows`
        parts = torch.split(self.qkv(x_BND), self.widths, dim=-1)
        if self.fused and attentions is None:
            return self.after(self.fused(*parts), x_BND)
        q, k, v = (_heads(part, self.shape.num_heads) for part in parts)
        return self.after(_fast_attend(q, k, v, self.bias_1AQK[..., :tokens, :tokens], attentions), x_BND)


class FastShrinkingAttention:
    """An attention and the MLP after it."""

    def __init__(self, plain: ShrinkingAttention, mlp: MLP | None, dtype: torch.dtype) -> None:
        self.shape = shape = plain.shape
        weight_OI, bias_O = fold_batch_norm(plain.kv.linear.weight, plain.kv.norm)
        widths = [shape.key_dim, shape.value_dim]
        weight_OI = _by_part(weight_OI, shape.num_heads, widths, [1.0, 1.0], widths).to(dtype)
        bias_O = _by_part(bias_O, shape.num_heads, widths, [1.0, 1.0], widths).to(dtype)
        self.kv = fused_linear(weight_OI, bias_O)
        self.widths = [shape.num_heads * width for width in widths]
        self.q = fused_linear(*_folded(plain.q, dtype, scale=shape.key_dim**-0.5))
        self.after = FastFeedForward(plain.out, mlp, dtype)
        bias_AQK = plain.biases_AO[:, plain.index_QK]
        self.bias_1AQK, keys = bias_AQK[None].to(dtype), self.widths[0]
        mixing = _mixing(bias_AQK, shape, weight_OI[keys:], bias_O[keys:])
        self.fused = mixing or _fused(bias_AQK, shape, dtype)
        self.k = (
            fused_linear(weight_OI[:keys], bias_O[:keys]) if mixing else None
        )  # keys alone: values are computed from the mean

    def __call__(self, x_BND: Tensor, attentions: list[Tensor] | None) -> Tensor:
        x_BND = x_BND[:, : self.shape.side**2]
        q_BQW = self.q(every_nth(x_BND, self.shape))
        if self.fused and self.k and attentions is None:
            return self.after(self.fused(q_BQW, self.k(x_BND), x_BND))
        parts = (q_BQW, *torch.split(self.kv(x_BND), self.widths, dim=-1))
        if self.fused and attentions is None:
            return self.after(self.fused(*parts))
        q, k, v = (_heads(part, self.shape.num_heads) for part in parts)
        return self.after(_fast_attend(q, k, v, self.bias_1AQK, attentions))


class FastFeedForward:
    """The output linear, the residual and the MLP, if there is one, after attention in each token's row."""

    def __init__(self, out: LinearNorm, mlp: MLP | None, dtype: torch.dtype) -> None:
        folded = [_folded(linear, dtype) for linear in ((out, mlp.up, mlp.down) if mlp else (out,))]
        self.fused = fused_feed_forward(*folded) if mlp else None
        self.out = None if self.fused else fused_linear(*folded[0])
        self.mlp = FastMLP(mlp, dtype) if mlp and not self.fused else None

    def __call__(self, mixed_BNW: Tensor, x_BND: Tensor | None = None) -> Tensor:
        if self.fused:
            return self.fused(mixed_BNW, x_BND)
        assert self.out
        y_BND = self.out(mixed_BNW, x_BND)
        return self.mlp(y_BND, None) if self.mlp else y_BND


class FastMLP:
    def __init__(self, plain: MLP, dtype: torch.dtype) -> None:
        self.up = fused_linear(*_folded(plain.up, dtype), "hardswish")
        self.down = fused_linear(*_folded(plain.down, dtype))

    def __call__(self, x_BND: Tensor, attentions: list[Tensor] | None) -> Tensor:
        return self.down(self.up(x_BND), x_BND)

    def mean(self, x_BND: Tensor) -> Tensor:
        """Return the mean over the tokens of a call's result, y_BD. It is taken before the second linear, which then
        has one row instead of N."""
        return self.down(self.up(x_BND).mean(dim=1), x_BND.mean(dim=1))


def gives(s: Settings, heads: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("pooled", "pooled:mean"), (s.hidden_sizes[-1],))
    if heads or s.has_identity_head:
        shapes["logits"] = (s.num_labels or s.hidden_sizes[-1],)
        shapes |= {f"logits:{name}": (s.num_labels,) for name in heads}
    widths = (*s.hidden_sizes, s.hidden_sizes[-1])
    states = [(side**2, width) for side, width in zip(s.sides, widths, strict=True)]
    shapes["tokens"] = states[-1]
    shapes |= {f"tokens:{k}": shape for k, shape in enumerate(states)}
    attentions = (shape for index in range(len(s.depths)) for shape in _attentions_of(s, index))
    return shapes | {
        f"attentions:{k}": (shape.num_heads, shape.query_side**2, shape.side**2) for k, shape in enumerate(attentions)
    }


def _attentions_of(s: Settings, index: int) -> Iterator[HeadShape]:
    """Yield the attentions of one stage, including the one that ends it."""
    key_dim, side = s.key_dim[index], s.sides[index]
    own = HeadShape(s.num_attention_heads[index], key_dim, key_dim * s.attention_ratio[index], side)
    yield from (own for _ in range(s.depths[index]))
    shrink = s.down_ops[index] if index < len(s.down_ops) else None
    if shrink:
        value_dim = shrink.key_dim * shrink.attention_ratio
        yield HeadShape(shrink.num_heads, shrink.key_dim, value_dim, side, shrink.stride)


def _stage(s: Settings, index: int) -> Iterator[nn.Module]:
    """Yield the layers in the flat order in which they are numbered on disk."""
    shapes, width = list(_attentions_of(s, index)), s.hidden_sizes[index]
    for shape in shapes[: s.depths[index]]:
        yield Attention(width, shape)
        if s.mlp_ratio[index] > 0:
            yield MLP(width, s.mlp_ratio[index])
    shrink = s.down_ops[index] if index < len(s.down_ops) else None
    if shrink:
        yield ShrinkingAttention(width, s.hidden_sizes[index + 1], shapes[-1])
        if shrink.mlp_ratio > 0:
            yield MLP(s.hidden_sizes[index + 1], shrink.mlp_ratio)


def _finish(
    features: dict[str, Tensor],
    x_BND: Tensor,
    pooled_BD: Tensor,
    logits: Mapping[str, Tensor],
    num_stages: int,
    wants: frozenset[str],
) -> dict[str, Tensor]:
    features |= {"tokens": x_BND, f"tokens:{num_stages}": x_BND, "pooled": pooled_BD, "pooled:mean": pooled_BD}
    features |= {f"logits:{name}": tensor for name, tensor in logits.items()}
    if "logits" in wants and not logits:  # of no classes
        features["logits"] = pooled_BD
    elif "logits" in wants:
        features["logits"] = sum(logits.values(), start=torch.zeros_like(pooled_BD[:, :1])) / len(logits)
    return {name: features[name] for name in wants}


def _attend(q: Tensor, k: Tensor, v: Tensor, bias_AQK: Tensor, attentions: list[Tensor] | None) -> Tensor:
    """q k v_BANh -> hardswish(attention), heads side by side, x_BQD."""
    return _fast_attend(q * q.shape[-1] ** -0.5, k, v, bias_AQK[None], attentions if attentions is not None else [])


def _fast_attend(q: Tensor, k: Tensor, v: Tensor, bias_1AQK: Tensor, attentions: list[Tensor] | None) -> Tensor:
    """Compute the same with the scale already in q. Keeps the weights only if `attentions` is a list."""
    if attentions is None and bias_1AQK[0, 0].numel() >= FLASH_FROM and v.shape[-1] <= 2 * q.shape[-1]:
        # the fused kernel needs heads of one width; padding costs less than writing the weights to memory
        if wider := v.shape[-1] - q.shape[-1]:
            q, k = F.pad(q, (0, wider)), F.pad(k, (0, wider))
        mixed = F.scaled_dot_product_attention(q, k, v, bias_1AQK, scale=1.0)
    else:
        weights_BAQK = (q @ k.transpose(-2, -1)).add_(bias_1AQK).softmax(dim=-1)
        if attentions is not None:
            attentions.append(weights_BAQK)
        mixed = weights_BAQK @ v
    return F.hardswish(mixed.transpose(1, 2).flatten(2))


FLASH_FROM = 1 << 14  # weights per head: measured on CPU, 2 to 2.5 times faster at 196 x 196, slower at 49 x 49


def _takes_flash(shape: HeadShape) -> bool:
    return shape.query_side**2 * shape.side**2 >= FLASH_FROM and shape.key_dim <= shape.value_dim <= 2 * shape.key_dim


def _fused(bias_AQK: Tensor, shape: HeadShape, dtype: torch.dtype) -> FusedAttention | None:
    """Build the compiled kernel, except where torch's uses matrix units for a large grid in bfloat16."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and _takes_flash(shape):
        return None
    return fused_attention(bias_AQK, shape.key_dim, shape.value_dim, dtype)


def _mixing(bias_AQK: Tensor, shape: HeadShape, weight_WI: Tensor, bias_W: Tensor) -> FusedAttention | None:
    """Build the kernel that mixes tokens before computing values, where that is less work. Not in bfloat16: processors
    have units for its linears, and the kernel's arithmetic is float32."""
    queries, keys, width, dtype = shape.query_side**2, shape.side**2, weight_WI.shape[1], weight_WI.dtype
    if dtype != torch.float32 or not mixes_first(queries, keys, width, shape.value_dim):
        return None
    return fused_attention(bias_AQK, shape.key_dim, shape.value_dim, dtype, (weight_WI, bias_W))


def _with_whole_rows(bias_1AQK: Tensor) -> Tensor:
    """Pad a square bias to a multiple of 16 queries and keys, -inf for the added keys. It makes the bfloat16 kernel on
    CPUs a quarter faster; in float32, and in small grids that do not use it, the linears lose what it gains."""
    tokens = bias_1AQK.shape[-1]
    missing = -tokens % 16
    if bias_1AQK.device.type != "cpu":
        return F.pad(bias_1AQK, (0, -tokens % 8))[..., :tokens]  # rows of 16 bytes, or CUDA copies them in each call
    if not missing or bias_1AQK.dtype != torch.bfloat16 or tokens**2 < FLASH_FROM:
        return bias_1AQK
    bias_1AQK = F.pad(bias_1AQK, (0, missing), value=-torch.inf)
    return F.pad(bias_1AQK, (0, 0, 0, missing))


def every_nth(x_BND: Tensor, shape: HeadShape) -> Tensor:
    """Take every stride-th row and column of the token grid."""
    x_BHWD = x_BND.reshape(len(x_BND), shape.side, shape.side, -1)
    return x_BHWD[:, :: shape.stride, :: shape.stride].flatten(1, 2)


def offset_index(shape: HeadShape) -> tuple[list[list[int]], int]:
    """Number the offsets between queries and keys by first appearance -> index_QK, the number of offsets."""
    numbers: dict[tuple[int, int], int] = {}
    keys = [(y, x) for y in range(shape.side) for x in range(shape.side)]
    queries = [(y * shape.stride, x * shape.stride) for y in range(shape.query_side) for x in range(shape.query_side)]
    index_QK = [
        [numbers.setdefault((abs(qy - ky), abs(qx - kx)), len(numbers)) for ky, kx in keys] for qy, qx in queries
    ]
    return index_QK, len(numbers)


def _bias_table(owner: nn.Module, shape: HeadShape) -> tuple[nn.Parameter, Tensor]:
    index, num_offsets = offset_index(shape)
    index_QK = torch.tensor(index, device="cpu")  # not on disk, so not on the meta device either
    owner.register_buffer("index_QK", index_QK, persistent=False)
    return nn.Parameter(torch.empty(shape.num_heads, num_offsets)), index_QK


def _heads(x_BND: Tensor, num_heads: int) -> Tensor:
    """x_BND -> (B, A, N, h)."""
    return x_BND.reshape(*x_BND.shape[:2], num_heads, -1).transpose(1, 2)


def _by_part(
    tensor: Tensor, num_heads: int, widths: Sequence[int], scales: Sequence[float], made: Sequence[int]
) -> Tensor:
    """Regroup output rows from heads, as on disk, to parts (all queries, all keys, all values), scale them, and pad
    each head's part with zeros to the width `made`."""
    by_head = torch.split(tensor.reshape(num_heads, sum(widths), -1), list(widths), dim=1)
    parts = [
        F.pad(part * scale, (0, 0, 0, width - part.shape[1])).flatten(0, 1)
        for part, scale, width in zip(by_head, scales, made, strict=True)
    ]
    return torch.cat(parts).reshape(-1, *tensor.shape[1:])


def _fast_stage(
    layers: Sequence[nn.Module], dtype: torch.dtype, last: bool = False
) -> list[FastAttention | FastShrinkingAttention | FastMLP]:
    """Join each attention with the MLP after it; the model's last MLP is a separate layer: see `FastMLP.mean`."""
    fast: list[FastAttention | FastShrinkingAttention | FastMLP] = []
    for n, layer in enumerate(layers):
        after = layers[n + 1] if n + 1 < len(layers) else None
        mlp = after if isinstance(after, MLP) and not (last and n + 2 == len(layers)) else None
        if isinstance(layer, Attention):
            fast.append(FastAttention(layer, mlp, dtype))
        elif isinstance(layer, ShrinkingAttention):
            fast.append(FastShrinkingAttention(layer, mlp, dtype))
        elif isinstance(layer, MLP) and last and n + 1 == len(layers):
            fast.append(FastMLP(layer, dtype))
    return fast


def _folded(plain: nn.Module, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Fold a linear and its batch norm: weight_OI, bias_O."""
    assert isinstance(plain, LinearNorm)
    weight_OI, bias_O = fold_batch_norm(plain.linear.weight, plain.norm)
    return (weight_OI * scale).to(dtype), (bias_O * scale).to(dtype)


def _fast_stem(plain: Levit, dtype: torch.dtype) -> Sequence[FusedConv | FusedStem]:
    """Return the four convolutions as one callable, or one after the other."""
    s = plain.settings
    layers = [layer for layer in plain.stem if isinstance(layer, ConvNorm)]
    folded = (fold_batch_norm(layer.conv.weight, layer.norm) for layer in layers)
    convs = [(weight.to(dtype), bias.to(dtype)) for weight, bias in folded]
    if whole := fused_stem(convs, s.geometry):
        return [whole]
    activations = ["hardswish"] * (len(convs) - 1) + ["linear"]
    return [
        fused_conv(weight, bias, stride=s.stride, padding=s.padding, activation=act)
        for (weight, bias), act in zip(convs, activations, strict=True)
    ]


def _fast_heads(heads: Sequence[nn.Module], dtype: torch.dtype) -> FusedLinear | None:
    """Stack all heads into one linear, in their order."""
    if not heads:
        return None
    weights, biases = zip(*(_folded_head(head) for head in heads), strict=True)
    return fused_linear(torch.cat(weights).to(dtype), torch.cat(biases).to(dtype))


def _folded_head(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the linear after it: weight and bias in float64."""
    assert isinstance(head, Head)
    scale_D, shift_D = batch_norm_affine(head.norm)
    weight_KD = head.linear.weight.double()
    return weight_KD * scale_D, head.linear.bias.double() + weight_KD @ shift_D


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    known = {field.name for field in fields(Settings)} - {"down_ops"}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items() if name in known
    }
    for name in ("image_size", "patch_size"):
        values[name] = _side(name, values.get(name, getattr(Settings, name)))
    architectures = config.get("architectures") or [""]
    values |= {"num_labels": num_labels(config), "input_size": size_HW, "architecture": str(architectures[0])}
    values |= {"has_identity_head": has_identity_head(config)}
    settings = Settings(**values)
    _check_numbers(settings)
    settings = Settings(**values | {"down_ops": _down_ops(settings, config.get("down_ops"))})
    _check_grid(settings)
    return settings


def _down_ops(s: Settings, stored: object) -> tuple[Shrink | None, ...]:
    """Return the stored entries, to which the reference adds one at each save, or derive them if there are none."""
    count = len(s.depths) - 1
    if stored is None:
        return tuple(Shrink(s.key_dim[0], s.hidden_sizes[n] // s.key_dim[0], 4, 2, 2) for n in range(count))
    if not isinstance(stored, list | tuple) or len(stored) < count:
        raise CheckpointError(f"config.json: down_ops: {count} entries are needed between {count + 1} stages")
    return tuple(_down_op(entry, n, s) for n, entry in enumerate(stored[:count]))


def _down_op(entry: object, n: int, s: Settings) -> Shrink | None:
    if isinstance(entry, list | tuple) and entry and entry[0] != "Subsample":
        if s.hidden_sizes[n] != s.hidden_sizes[n + 1]:
            message = (
                f"config.json: down_ops[{n}]: nothing leads from width {s.hidden_sizes[n]} to {s.hidden_sizes[n + 1]}"
            )
            raise CheckpointError(message, hint='["Subsample", key_dim, heads, attention_ratio, mlp_ratio, stride]')
        return None
    numbers = list(entry[1:]) if isinstance(entry, list | tuple) else []
    if len(numbers) != 5 or any(type(number) is not int or number < 1 for number in (*numbers[:3], *numbers[4:])):
        hint = '["Subsample", key_dim, heads, attention_ratio, mlp_ratio, stride], all whole and positive'
        raise CheckpointError(f"config.json: down_ops[{n}]: `{entry}` is not understood", hint=hint)
    return Shrink(*numbers)


def _check_numbers(s: Settings) -> None:
    for name in ("num_channels", "kernel_size", "stride"):
        if type(getattr(s, name)) is not int or getattr(s, name) < 1:
            raise CheckpointError(f"config.json: {name}: `{getattr(s, name)}` is not a positive number")
    if type(s.padding) is not int or s.padding < 0:
        raise CheckpointError(f"config.json: padding: `{s.padding}` is not a whole number from 0")
    for name in ("depths", "hidden_sizes", "num_attention_heads", "key_dim", "mlp_ratio", "attention_ratio"):
        values, least = getattr(s, name), 0 if name in ("mlp_ratio", "depths") else 1
        if not isinstance(values, tuple) or not all(type(value) is int and value >= least for value in values):
            raise CheckpointError(f"config.json: {name}: `{values}` is not a list of whole numbers from {least}")
        if len(values) != len(s.depths) or not values:
            raise CheckpointError(f"config.json: {name} has {len(values)} entries for {len(s.depths)} stages (depths)")
    if s.hidden_sizes[0] < 8:
        raise CheckpointError(
            f"config.json: hidden_sizes[0]: {s.hidden_sizes[0]} is too narrow for the stem, which has 1/8"
        )
    if min(s.hidden_sizes[:-1], default=s.key_dim[0]) < s.key_dim[0]:
        raise CheckpointError(f"config.json: key_dim[0] {s.key_dim[0]} is wider than a stage: {list(s.hidden_sizes)}")


def _check_grid(s: Settings) -> None:
    side, made = s.sides[0], s.grid_of(s.image_size)
    if side != made or side < 1:
        message = f"config.json: image_size {s.image_size} and patch_size {s.patch_size} make a grid of {side}"
        hint = f"four convolutions of stride {s.stride} make one of {made}"
        raise CheckpointError(message, hint=hint)
    if any(s.grid_of(size) != side for size in s.input_size):
        fitting = [size for size in range(1, 2 * s.image_size + 64) if s.grid_of(size) == side]
        message = f"image_size {s.input_size[0]}x{s.input_size[1]}: LeViT's bias tables are of a {side}x{side} grid"
        raise CheckpointError(
            message, hint=f"sides that give it: {fitting[0]} to {fitting[-1]}; the model's own: {s.image_size}"
        )


def _side(name: str, value: object) -> int:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {name}: `{value}` is not a positive number, which LeViT needs")
    return value


_PREPROCESSOR = {
    "image_processor_type": "LevitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _published(
    size: str,
    hidden: list[int],
    heads: list[int],
    depths: list[int],
    key: int,
    parameters: int,
    gmacs: float,
    top1: float,
) -> Published:
    return Published(
        repo=f"facebook/levit-{size}",
        architecture="LevitForImageClassificationWithTeacher",
        config={
            "hidden_sizes": hidden,
            "num_attention_heads": heads,
            "depths": depths,
            "key_dim": [key] * 3,
            "drop_path_rate": 0.1 if size == "384" else 0,
            "num_labels": 1000,
        },
        preprocessor=_PREPROCESSOR,
        parameters=parameters,
        gmacs=gmacs,
        image_size=224,
        accuracy=f"{top1} % ImageNet-1k top-1 (timm results)",
    )


PUBLISHED = (
    _published("128S", [128, 256, 384], [4, 6, 8], [2, 3, 4], 16, 7_777_058, 0.302, 76.52),
    _published("128", [128, 256, 384], [4, 8, 12], [4, 4, 4], 16, 9_213_936, 0.41, 78.49),
    _published("192", [192, 288, 384], [3, 5, 6], [4, 4, 4], 32, 10_947_069, 0.66, 79.86),
    _published("256", [256, 384, 512], [4, 6, 8], [4, 4, 4], 32, 18_893_876, 1.13, 81.51),
    _published("384", [384, 512, 768], [6, 9, 12], [4, 4, 4], 32, 39_128_836, 2.35, 82.60),
)
