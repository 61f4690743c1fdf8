"""BiT (Big Transfer): a ResNetV2 with standardized convolution weights and group norm.

What is unusual, all of it needed to reproduce the published numbers:
* a convolution standardizes its weight per output channel (mean 0, variance 1), which `fold` does once;
* the stem's max-pool is padded with zeros, not -inf, and in `bottleneck` models before the norm, which counts them;
* `preactivation` blocks feed norm and activation to both branches at the start of a stage, and never dilate: an
  `output_stride` below 32 only drops strides; `bottleneck` blocks (ViT-hybrid) do dilate;
* stage outputs (`feature_maps:stage1` ...) are not normed, `feature_maps:last` (the reference's
  `last_hidden_state`) is.

Shapes: B batch, C channels, H W height and width, O I output and input channels of a convolution, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.errors import CheckpointError, nearest
from img2parquet.models.checkpoint import has_identity_head, num_labels
from img2parquet.models.family import Published
from img2parquet.models.kernels.activations import ACTIVATIONS, activation
from img2parquet.models.kernels.group_norm import EPS, FusedGroupNorm, fused_group_norm
from img2parquet.models.layers import fused_conv

MODEL_TYPE = "bit"
PREFIX = "bit."
PROCESSOR = "BitImageProcessor"
EMBEDDING = (
    "the mean over positions of the last (normed, activated) feature map: the reference's `pooler_output`, "
    "(B, C, 1, 1) there and (B, C) here; `pooled:mean` is the same"
)

KEYS = {
    "embedder.convolution": "stem.conv",
    "embedder.norm": "stem.norm",
    "encoder.stages.{}.layers.{}.downsample.conv": "stages.{}.{}.shortcut.conv",
    "encoder.stages.{}.layers.{}.downsample.norm": "stages.{}.{}.shortcut.norm",
    **{
        f"encoder.stages.{{}}.layers.{{}}.{name}": f"stages.{{}}.{{}}.{name}"
        for name in ("norm1", "conv1", "norm2", "conv2", "norm3", "conv3")
    },
    "norm": "norm",
    "classifier.{}": "head",
}
UNUSED: tuple[str, ...] = ()
HEADS = {"BitModel": (), "BitBackbone": (), "BitForImageClassification": ("classifier.1.weight", "classifier.1.bias")}

PUBLISHED = (
    Published(
        repo="google/bit-50",
        architecture="BitForImageClassification",
        config={"conv_layer": "std_conv", "num_labels": 1000},
        preprocessor={
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": 448},
            "resample": 2,
            "do_center_crop": True,
            "crop_size": {"height": 448, "width": 448},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        parameters=25_549_352,
        gmacs=16.35,
        image_size=448,
        accuracy="80.39 % ImageNet-1k top-1 (timm results, resnetv2_50x1_bit)",
    ),
)

Padding = Literal["SAME"] | None
Norm = Callable[[Tensor], Tensor]
LAYER_TYPES = ("preactivation", "bottleneck")
WEIGHT_EPS = 1e-8  # added to a weight's variance under the root
POOLED = frozenset({"feature_maps:last", "pooled", "pooled:mean", "logits"})


@dataclass(frozen=True)
class Settings:
    """config.json by its own names. `drop_path_rate` is kept but not used: it acts in training only."""

    input_size: tuple[int, int]  # the one field that config.json does not have
    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "preactivation"
    hidden_act: str = "relu"
    global_padding: Padding = None
    num_groups: int = 32
    drop_path_rate: float = 0.0
    embedding_dynamic_padding: bool = False
    output_stride: int = 32
    width_factor: int = 1
    out_features: tuple[str, ...] = ("stage4",)
    out_indices: tuple[int, ...] = (4,)
    num_labels: int = 2
    has_identity_head: bool = False

    @property
    def preactivation(self) -> bool:
        return self.layer_type == "preactivation"

    @property
    def stage_names(self) -> tuple[str, ...]:
        return ("stem", *(f"stage{k}" for k in range(1, len(self.depths) + 1)))

    @property
    def width(self) -> int:
        """The number of channels of the last map."""
        return self.stages[-1].outputs

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(_stages(self))


@dataclass(frozen=True)
class Stage:
    """The geometry of a stage, derived from the settings."""

    inputs: int
    outputs: int
    depth: int
    stride: int
    dilations: tuple[int, ...]  # of each block's 3x3 convolution, in `bottleneck` models only

    @property
    def middle(self) -> int:
        return round_width(self.outputs / 4)


def _stages(s: Settings) -> Iterator[Stage]:
    inputs, reached_stride, dilation = s.embedding_size, 4, 1
    for index, (width, depth) in enumerate(zip(s.hidden_sizes, s.depths, strict=True)):
        stride = 1 if index == 0 else 2
        if reached_stride >= s.output_stride:
            stride, dilation = 1, dilation * stride
        first_dilation = 1 if dilation in (1, 2) else 2
        dilations = (first_dilation, *(dilation,) * (depth - 1))
        outputs = round_width(width * s.width_factor)
        yield Stage(inputs, outputs, depth, stride, dilations)
        inputs, reached_stride = outputs, reached_stride * stride


def round_width(width: float) -> int:
    """Round to a multiple of 8, at least 8, and by no more than a tenth down."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


# --- the model, from the top ---


class Bit(nn.Module):
    """Normalized pixels in, features out. The plain and the fast form are built from different parts."""

    def __init__(
        self,
        settings: Settings,
        stem: Stem | FastStem,
        stages: Sequence[nn.Module],
        norm: Norm,
        head: nn.Linear | nn.Identity | None,
    ) -> None:
        super().__init__()
        self.settings, self.stem, self.stages, self.norm, self.head = settings, stem, nn.ModuleList(stages), norm, head

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], **inputs: Tensor) -> dict[str, Tensor]:
        """x_BCHW -> the wanted features. Runs only the stages that they need."""
        features: dict[str, Tensor] = {}
        for name, x_BCHW in self.walk(x_BCHW, self.depth_of(wants)):  # noqa: B020 - the last map is used below
            features |= {name: x_BCHW} if name in wants else {}
        return features | (self.finish(x_BCHW, wants) if wants & POOLED else {})

    def walk(self, x_BCHW: Tensor, depth: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the maps of the stem and the first `depth` stages, by name, before the norm."""
        x_BCHW = self.stem(x_BCHW)
        yield "feature_maps:stem", x_BCHW
        for name, stage in zip(self.settings.stage_names[1 : depth + 1], self.stages, strict=False):
            x_BCHW = stage(x_BCHW)
            yield f"feature_maps:{name}", x_BCHW

    def depth_of(self, wants: frozenset[str]) -> int:
        """Return the number of stages that the wanted features need."""
        names = self.settings.stage_names
        if wants & POOLED:
            return len(names) - 1
        return max((k for k, name in enumerate(names) if f"feature_maps:{name}" in wants), default=0)

    def finish(self, x_BCHW: Tensor, wants: frozenset[str]) -> dict[str, Tensor]:
        """Compute the features of the last stage's map, after the norm; means and head are float32 in every form."""
        last_BCHW = self.norm(x_BCHW)
        pooled_BC = last_BCHW.mean((2, 3), dtype=torch.float32)
        made = {"feature_maps:last": last_BCHW, "pooled": pooled_BC, "pooled:mean": pooled_BC}
        if self.head is not None and "logits" in wants:
            dtype = self.head.weight.dtype if isinstance(self.head, nn.Linear) else pooled_BC.dtype
            made["logits"] = self.head(pooled_BC.to(dtype))
        return {name: value for name, value in made.items() if name in wants}

    def gives(self) -> dict[str, tuple[int, ...]]:
        """List every feature with its shape, without the batch, at the settings' input size."""
        s = self.settings
        maps = dict(zip(s.stage_names, map_shapes(s), strict=True))
        given: dict[str, tuple[int, ...]] = {"pooled": (s.width,), "pooled:mean": (s.width,)}
        given |= {f"feature_maps:{name}": shape for name, shape in maps.items()}
        given |= {"feature_maps:last": maps[s.stage_names[-1]]}
        return given | ({"logits": (s.num_labels or s.width,)} if self.head is not None else {})


class Stem(nn.Module):
    """x_BCHW -> a quarter of its height and width: convolution, zeros around it, [norm], max-pool."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.conv = WSConv(s.num_channels, s.embedding_size, 7, s, stride=2)
        self.norm = nn.Identity() if s.preactivation else GNAct(s.embedding_size, s)
        self.pool = StemPool(s)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.pool(self.conv(x_BCHW), self.norm)


class StemPool:
    """The stem's padding and max-pool, with the norm between them."""

    def __init__(self, s: Settings) -> None:
        self.border = 0 if s.global_padding == "SAME" else 1
        self.dynamic = s.embedding_dynamic_padding  # a second padding, on top of the border

    def __call__(self, x_BCHW: Tensor, norm: Norm) -> Tensor:
        x_BCHW = norm(F.pad(x_BCHW, (self.border,) * 4))  # not MaxPool2d(padding=1), which pads with -inf
        return F.max_pool2d(pad_same(x_BCHW, 3, 2) if self.dynamic else x_BCHW, 3, 2)

    def size(self, size: int) -> int:
        size += 2 * self.border
        return -(-size // 2) if self.dynamic else (size - 3) // 2 + 1


class Preactivation(nn.Module):
    """Norms before convolutions (ResNet v2): x_BCHW -> shortcut + residual branch."""

    def __init__(self, s: Settings, stage: Stage, index: int) -> None:
        super().__init__()
        inputs, middle, outputs, stride = _widths(stage, index)
        self.shortcut = Shortcut(s, stage) if index == 0 else None
        self.norm1, self.conv1 = GNAct(inputs, s), WSConv(inputs, middle, 1, s)
        self.norm2, self.conv2 = GNAct(middle, s), WSConv(middle, middle, 3, s, stride=stride)
        self.norm3, self.conv3 = GNAct(middle, s), WSConv(middle, outputs, 1, s)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed_BCHW = self.norm1(x_BCHW)
        shortcut_BCHW = x_BCHW if self.shortcut is None else self.shortcut(normed_BCHW)
        y_BCHW: Tensor = self.conv2(self.norm2(self.conv1(normed_BCHW)))
        y_BCHW = self.conv3(self.norm3(y_BCHW))
        return y_BCHW + shortcut_BCHW


class Bottleneck(nn.Module):
    """Norms after convolutions (ResNet v1.5): x_BCHW -> activation(shortcut + residual branch)."""

    def __init__(self, s: Settings, stage: Stage, index: int) -> None:
        super().__init__()
        inputs, middle, outputs, stride = _widths(stage, index)
        self.shortcut = Shortcut(s, stage) if index == 0 else None
        self.conv1, self.norm1 = WSConv(inputs, middle, 1, s), GNAct(middle, s)
        self.conv2, self.norm2 = WSConv(middle, middle, 3, s, stride, stage.dilations[index]), GNAct(middle, s)
        self.conv3, self.norm3 = WSConv(middle, outputs, 1, s), GNAct(outputs, s, activation="linear")
        self.activation = s.hidden_act

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.shortcut is None else self.shortcut(x_BCHW)
        y_BCHW = self.norm2(self.conv2(self.norm1(self.conv1(x_BCHW))))
        return ACTIVATIONS[self.activation](self.norm3(self.conv3(y_BCHW)) + shortcut_BCHW)


class Shortcut(nn.Module):
    """The 1x1 convolution beside a stage's first block, with a norm of its own in `bottleneck` models."""

    def __init__(self, s: Settings, stage: Stage) -> None:
        super().__init__()
        self.conv = WSConv(stage.inputs, stage.outputs, 1, s, stride=stage.stride)
        self.norm = nn.Identity() if s.preactivation else GNAct(stage.outputs, s, activation="linear")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.conv(x_BCHW))  # type: ignore[no-any-return]


class GNAct(nn.Module):
    """Group norm and activation."""

    def __init__(self, channels: int, s: Settings, activation: str | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.groups, self.activation = s.num_groups, activation or s.hidden_act

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](torch.group_norm(x_BCHW, self.groups, self.weight, self.bias, EPS))


class WSConv(nn.Module):
    """A convolution without bias that standardizes its weight."""

    def __init__(self, inputs: int, outputs: int, kernel: int, s: Settings, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.at = Geometry(kernel, stride, dilation, dynamic=s.global_padding == "SAME" and stride > 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        at, weight_OIHW = self.at, standardise(self.weight).to(self.weight.dtype)
        return F.conv2d(at.pad(x_BCHW), weight_OIHW, None, at.stride, at.padding, at.dilation)


@dataclass(frozen=True)
class Geometry:
    """A convolution's padding and stride. `dynamic` pads as TensorFlow's SAME does, by the size of the input."""

    kernel: int
    stride: int
    dilation: int
    dynamic: bool

    @property
    def padding(self) -> int:
        return 0 if self.dynamic else (self.stride - 1 + self.dilation * (self.kernel - 1)) // 2

    def pad(self, x_BCHW: Tensor) -> Tensor:
        return pad_same(x_BCHW, self.kernel, self.stride) if self.dynamic else x_BCHW


def standardise(weight_OIHW: Tensor) -> Tensor:
    """Scale a weight to mean 0 and variance 1 for each output channel, in float64."""
    variance, mean = torch.var_mean(weight_OIHW.double(), dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight_OIHW.double() - mean) * torch.rsqrt(variance + WEIGHT_EPS)


def pad_same(x_BCHW: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros so that a window at every `stride` has all its pixels; an odd one goes right and below."""
    (top, bottom), (left, right) = (_same(size, kernel, stride) for size in x_BCHW.shape[2:])
    return F.pad(x_BCHW, (left, right, top, bottom))


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    lacking = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return lacking // 2, lacking - lacking // 2


def _widths(stage: Stage, index: int) -> tuple[int, int, int, int]:
    """Return input, middle and output channels of a stage's block, and its stride."""
    first = index == 0
    return stage.inputs if first else stage.outputs, stage.middle, stage.outputs, stage.stride if first else 1


def map_shapes(s: Settings) -> Iterator[tuple[int, int, int]]:
    """Return (channels, height, width) of the maps of the stem and each stage."""
    pool = StemPool(s)
    height, width = (pool.size(-(-size // 2)) for size in s.input_size)
    yield s.embedding_size, height, width
    for stage in s.stages:
        height, width = -(-height // stage.stride), -(-width // stage.stride)
        yield stage.outputs, height, width


# --- the fast form ---


def fold(module: Bit, dtype: torch.dtype) -> Bit:
    """Return the fast form: weights standardized once, packed convolutions, channels last, and norm, residual and ReLU
    in one pass over memory. Means and head stay float32."""
    stages = [nn.Sequential(*map(partial(_fast_block, dtype=dtype), stage.children())) for stage in module.stages]
    stem, norm = FastStem(cast(Stem, module.stem), dtype), _fast(module.norm) or nn.Identity()
    return Bit(module.settings, stem, stages, norm, copy.deepcopy(module.head)).eval().requires_grad_(False)


def _fast_block(plain: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(plain, Preactivation):
        return FastPreactivation(plain, dtype)
    return FastBottleneck(cast(Bottleneck, plain), dtype)


class FastStem(nn.Module):
    """Converts pixels of any layout and float dtype to channels last and the dtype of the fast form."""

    def __init__(self, stem: Stem, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.norm, self.pool, self.dtype = FastConv(stem.conv, dtype), _fast(stem.norm), stem.pool, dtype

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv(x_BCHW.to(self.dtype, memory_format=torch.channels_last))
        if self.pool.border and not self.pool.dynamic and self.norm is None:
            return pool_with_zeros(x_BCHW)
        return self.pool(x_BCHW, self.norm or nn.Identity())


def pool_with_zeros(x_BCHW: Tensor) -> Tensor:
    """Compute max_pool2d(pad(x, 1), 3, 2) without a padded copy: only the windows at the rim see a zero."""
    y_BCHW = F.max_pool2d(x_BCHW, 3, 2, padding=1)
    for dim in (2, 3):
        y_BCHW.select(dim, 0).clamp_min_(0)
        if 2 * y_BCHW.shape[dim] - 1 >= x_BCHW.shape[dim]:
            y_BCHW.select(dim, -1).clamp_min_(0)
    return y_BCHW


class FastPreactivation(nn.Module):
    def __init__(self, plain: Preactivation, dtype: torch.dtype) -> None:
        super().__init__()
        self.shortcut = FastConv(plain.shortcut.conv, dtype) if plain.shortcut is not None else None
        self.norm1, self.norm2, self.norm3 = (_fused(norm) for norm in (plain.norm1, plain.norm2, plain.norm3))
        self.conv1, self.conv2, self.conv3 = (FastConv(conv, dtype) for conv in (plain.conv1, plain.conv2, plain.conv3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed_BCHW = self.norm1(x_BCHW)
        shortcut_BCHW = x_BCHW if self.shortcut is None else self.shortcut(normed_BCHW)
        y_BCHW = self.conv2(self.norm2(self.conv1(normed_BCHW), in_place=True))
        return self.conv3(self.norm3(y_BCHW, in_place=True), shortcut_BCHW)


class FastBottleneck(nn.Module):
    def __init__(self, plain: Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        shortcut = plain.shortcut
        self.shortcut = FastConv(shortcut.conv, dtype) if shortcut is not None else None
        self.shortcut_norm = _fast(shortcut.norm) if shortcut is not None else None
        self.norm1, self.norm2 = _fused(plain.norm1), _fused(plain.norm2)
        self.norm3 = _fused(plain.norm3, activation=plain.activation)  # after the residual
        self.conv1, self.conv2, self.conv3 = (FastConv(conv, dtype) for conv in (plain.conv1, plain.conv2, plain.conv3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW
        if self.shortcut is not None and self.shortcut_norm is not None:
            shortcut_BCHW = self.shortcut_norm(self.shortcut(x_BCHW), in_place=True)
        y_BCHW = self.conv2(self.norm1(self.conv1(x_BCHW), in_place=True))
        return self.norm3(self.conv3(self.norm2(y_BCHW, in_place=True)), shortcut_BCHW, in_place=True)


class FastConv:
    def __init__(self, conv: WSConv, dtype: torch.dtype) -> None:
        self.at, weight_OIHW = conv.at, standardise(conv.weight).to(dtype)
        at = self.at
        self.conv = fused_conv(weight_OIHW, stride=at.stride, padding=at.padding, dilation=at.dilation)

    def __call__(self, x_BCHW: Tensor, residual_BOHW: Tensor | None = None) -> Tensor:
        return self.conv(self.at.pad(x_BCHW), residual_BOHW)


def _fused(norm: GNAct, activation: str | None = None) -> FusedGroupNorm:
    return fused_group_norm(norm.weight, norm.bias, norm.groups, activation or norm.activation)


def _fast(norm: Norm) -> FusedGroupNorm | None:
    return _fused(norm) if isinstance(norm, GNAct) else None


# --- settings and building ---


def build(settings: Settings, names: frozenset[str]) -> Bit:
    """Build the plain model, with a classifier if the checkpoint has one. Raises CheckpointError if it cannot fit."""
    s = settings
    block = Preactivation if s.preactivation else Bottleneck
    stages = [nn.Sequential(*(block(s, stage, k) for k in range(stage.depth))) for stage in s.stages]
    norm = GNAct(s.width, s) if s.preactivation else nn.Identity()
    return Bit(s, Stem(s), stages, norm, _head(s, HEADS["BitForImageClassification"][0] in names))


def _head(s: Settings, on_disk: bool) -> nn.Linear | nn.Identity | None:
    if not on_disk:
        return nn.Identity() if s.has_identity_head else None
    if s.width != s.hidden_sizes[-1]:
        raise CheckpointError(
            f"config.json: a classifier reads hidden_sizes[-1] = {s.hidden_sizes[-1]} channels, but width_factor "
            f"{s.width_factor} and rounding to multiples of 8 make the last stage {s.width} wide",
            hint="the classifier works with width_factor 1 and hidden_sizes that are multiples of 8",
        )
    return nn.Linear(s.width, s.num_labels)


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """Read config.json, for an input of `size_HW`. Raises CheckpointError for values that cannot work."""
    depths = _counts(config, "depths")
    stage_names = ("stem", *(f"stage{k}" for k in range(1, len(depths) + 1)))
    features, indices = _out_stages(config, stage_names)
    settings = Settings(
        input_size=size_HW,
        num_channels=_count(config, "num_channels"),
        embedding_size=_count(config, "embedding_size"),
        hidden_sizes=_counts(config, "hidden_sizes"),
        depths=depths,
        layer_type=_layer_type(config),
        hidden_act=_activation(config),
        global_padding=_padding(config),
        num_groups=_count(config, "num_groups"),
        drop_path_rate=_drop_path_rate(config),
        embedding_dynamic_padding=_dynamic_padding(config),
        output_stride=_count(config, "output_stride"),
        width_factor=_count(config, "width_factor"),
        out_features=features,
        out_indices=indices,
        num_labels=num_labels(config),
        has_identity_head=has_identity_head(config),
    )
    _check_widths(settings)
    _check_groups(settings)
    _check_size(settings)
    return settings


def _check_widths(s: Settings) -> None:
    if len(s.hidden_sizes) != len(s.depths):
        raise CheckpointError(
            f"config.json: hidden_sizes names {len(s.hidden_sizes)} stages and depths {len(s.depths)}",
            hint="each stage needs one of both",
        )
    if s.embedding_size == 1:
        raise CheckpointError(
            "config.json: embedding_size: with 1 channel the first shortcut has one weight per output, and one number "
            "cannot be standardised",
            hint="use 8 or more",
        )
    if s.preactivation and s.width != s.hidden_sizes[-1]:
        raise CheckpointError(
            f"config.json: width_factor {s.width_factor} and rounding to multiples of 8 make the last stage {s.width} "
            f"wide, but the final norm of a `preactivation` model has hidden_sizes[-1] = {s.hidden_sizes[-1]} channels",
            hint="multiply hidden_sizes instead and leave width_factor at 1; `bottleneck` models have no such norm",
        )


def _check_groups(s: Settings) -> None:
    normed = {"embedding_size": s.embedding_size}
    for k, stage in enumerate(s.stages, 1):
        normed[f"a quarter of stage{k}"] = stage.middle
        normed[f"stage{k}"] = stage.outputs
    for what, channels in normed.items():
        if channels % s.num_groups:
            raise CheckpointError(
                f"config.json: num_groups: {s.num_groups} groups do not divide the {channels} channels of {what}",
                hint=f"use a divisor of all of {sorted(set(normed.values()))}",
            )


def _check_size(s: Settings) -> None:
    smallest = min(min(height, width) for _, height, width in map_shapes(s))
    if smallest < 1:
        raise CheckpointError(
            f"input of {s.input_size[0]} x {s.input_size[1]} pixels: nothing is left of it after the stem",
            hint="use a larger image_size",
        )


def _out_stages(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return `out_features` and `out_indices`, each derived from the other if only one is given, or the last stage."""
    given_features, given_indices = config.get("out_features"), config.get("out_indices")
    if given_features is None and given_indices is None:
        return (names[-1],), (len(names) - 1,)
    indices = None if given_indices is None else _in_order(given_indices, "out_indices", range(-len(names), len(names)))
    of_indices = None if indices is None else tuple(names[k] for k in indices)
    features = of_indices if given_features is None else _in_order(given_features, "out_features", names)
    assert features is not None
    for what, stages in (("out_indices", of_indices or ()), ("out_features", features)):
        if list(stages) != sorted(set(stages), key=names.index):
            raise CheckpointError(f"config.json: {what}: {list(stages)} are not in the model's order, each once")
    if of_indices is not None and of_indices != features:
        raise CheckpointError(f"config.json: out_features {list(features)} and out_indices {given_indices} differ")
    return features, tuple(names.index(name) for name in features) if indices is None else indices


def _in_order(value: Any, field: str, known: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"config.json: {field}: `{value}` is not a list")
    for entry in value:
        if isinstance(entry, bool) or entry not in known:
            raise CheckpointError(f"config.json: {field}: no stage `{entry}`", known=map(str, known))
    return tuple(value)


def _padding(config: Mapping[str, Any]) -> Padding:
    value = config.get("global_padding")
    if value is None:
        return None
    if isinstance(value, str) and value.upper() == "SAME":
        return "SAME"
    if isinstance(value, str) and value.upper() == "VALID":
        raise CheckpointError(
            f"config.json: global_padding: `{value}` takes 2 pixels off the map in every 3x3 convolution, so it cannot "
            "be added to the shortcut beside it",
            hint="the reference fails on it too; published models use null, or `same`",
        )
    raise CheckpointError(f"config.json: global_padding: `{value}`", known=("null", "same"))


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_act", Settings.hidden_act)
    activation(name)
    return str(name)


def _layer_type(config: Mapping[str, Any]) -> str:
    value = config.get("layer_type", Settings.layer_type)
    if value not in LAYER_TYPES:
        hint = nearest(str(value), LAYER_TYPES)
        raise CheckpointError(f"config.json: layer_type: `{value}`", known=LAYER_TYPES, hint=hint)
    return str(value)


def _count(config: Mapping[str, Any], field: str) -> int:
    return _checked_count(config.get(field, getattr(Settings, field)), field)


def _counts(config: Mapping[str, Any], field: str) -> tuple[int, ...]:
    value = config.get(field, getattr(Settings, field))
    if not isinstance(value, list | tuple) or not value:
        raise CheckpointError(f"config.json: {field}: `{value}` is not a list with a number for each stage")
    return tuple(_checked_count(entry, field) for entry in value)


def _checked_count(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {field}: `{value}` is not a whole number from 1 up")
    return value


def _drop_path_rate(config: Mapping[str, Any]) -> float:
    value = config.get("drop_path_rate", Settings.drop_path_rate)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"config.json: drop_path_rate: `{value}` is not a number")
    return value


def _dynamic_padding(config: Mapping[str, Any]) -> bool:
    value = config.get("embedding_dynamic_padding", Settings.embedding_dynamic_padding)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: embedding_dynamic_padding: `{value}` is neither true nor false")
    return value
