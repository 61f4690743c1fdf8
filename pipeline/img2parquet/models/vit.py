"""Plain vision transformers: ViT (Dosovitskiy et al. 2020; DINO's too), DINOv2, and DINOv2 with registers.

* One file serves three `model_type`s, which differ in names on disk, layer scale, SwiGLU, registers and the input of
  the classifier. The encoder is in `transformer.py`. `infra/BACKBONES.md` uses this file as its example of a family.
* `pooled` is the reference's `pooler_output`: ViT's class token through its pooling layer if the checkpoint has one,
  else (DINO, every classifier, DINOv2) the class token after the last layer norm.
* `tokens:<k>` are the reference's `hidden_states[k]`: the last of them is not normed, `tokens` is. Registers are
  between the class token and the patches, and no pooling reads them.
* An input size other than the trained one resizes the positions, with antialiasing if there are registers, as the
  reference does. DINOv2's own code shifted them by a tenth of a patch.
* A trained size that is not square is used as it is; the reference's DINOv2 would scramble such positions.

Shapes: B batch, C channels, H W image, N = h w patches, R registers, T = 1 + R + N tokens, D width, A heads, M hidden
width of an MLP, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from img2parquet.errors import CheckpointError
from img2parquet.models.family import Published
from img2parquet.models.kernels.activations import activation
from img2parquet.models.patch_sizes import check_patches
from img2parquet.models.transformer import (
    COUNTS,
    Encoder,
    FastEncoder,
    TransformerSettings,
    attention_shapes,
    cast_copy,
    check_counts,
    check_flags,
    check_heads,
    classifier,
    read_fields,
    token_shapes,
)

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
    # the names that transformers 5 uses in memory: ViT, then DINOv2
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
UNUSED = ("decoder.0.*",)  # reconstructs masked pixels (ViTForMaskedImageModeling), which no output uses
_MASK = ("embeddings.mask_token",)
_POOLER, _HEAD = ("pooler.dense.weight", "pooler.dense.bias"), ("classifier.weight", "classifier.bias")
HEADS: Mapping[str, tuple[str, ...]] = {
    "ViTModel": _POOLER,
    "ViTForMaskedImageModeling": _MASK,
    "ViTForImageClassification": _HEAD,
    **{f"{name}{kind}": _MASK for name in ("Dinov2", "Dinov2WithRegisters") for kind in ("Model", "Backbone")},
    **{f"{name}ForImageClassification": (*_MASK, *_HEAD) for name in ("Dinov2", "Dinov2WithRegisters")},
}
SPLIT_SWIGLU = "encoder.layer.0.mlp.gate_proj.weight"  # newer files store its two halves separately


@dataclass(frozen=True)
class Settings(TransformerSettings):
    """config.json by the reference's names and ViT's defaults, then what this run adds."""

    model_type: str = "vit"
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

    @property
    def is_dinov2(self) -> bool:
        return self.model_type != "vit"

    @property
    def mlp_width(self) -> int:
        width = int(self.hidden_size * self.mlp_ratio) if self.is_dinov2 else self.intermediate_size
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def head_width(self) -> int:
        """The width of what the classifier reads."""
        return 2 * self.hidden_size if self.is_dinov2 else self.hidden_size

    @property
    def pooled_size(self) -> int:
        return self.pooler_output_size or self.hidden_size

    @property
    def registers(self) -> int:
        return self.num_register_tokens

    @property
    def has_layer_scale(self) -> bool:
        return self.is_dinov2

    @property
    def has_swiglu(self) -> bool:
        return self.use_swiglu_ffn

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (1, self.hidden_size) if self.is_dinov2 else (1, 1, self.hidden_size)


DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # where a model_type's defaults differ from those above
    "vit": {},
    "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14},
    "dinov2_with_registers": {"layer_norm_eps": 1e-6, "num_register_tokens": 4},
}


class ViT(Encoder):
    """The plain form: the shared encoder, ViT's pooling layer and the classifier."""

    settings: Settings

    def __init__(self, s: Settings, names: frozenset[str]) -> None:
        super().__init__(s, "embeddings.mask_token" in names, SPLIT_SWIGLU in names)
        self.pooler = nn.Linear(s.hidden_size, s.pooled_size) if "pooler.dense.weight" in names else None
        self.head = classifier(s, s.head_width, "classifier.weight" in names)
        self.has_decoder = "decoder.0.weight" in names

    @property
    def notes(self) -> tuple[str, ...]:
        return super().notes + (("its decoder of masked pixels is not loaded",) if self.has_decoder else ())

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.pooler is not None, self.head is not None)

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW, mask_BN (true where a patch is hidden) -> the wanted features."""
        return finish(self, self.encode(x_BCHW, mask_BN), wants)


def build(settings: Settings, names: frozenset[str]) -> ViT:
    return ViT(settings, names)


def fold(module: ViT, dtype: torch.dtype) -> FastViT:
    return FastViT(module, dtype)


class FastViT(FastEncoder):
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_vit.py)."""

    settings: Settings

    def __init__(self, plain: ViT, dtype: torch.dtype) -> None:
        super().__init__(plain, dtype)
        self.pooler, self.head = cast_copy(plain.pooler, dtype), cast_copy(plain.head, dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.pooler is not None, self.head is not None)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        return finish(self, self.encode(x_BCHW, mask_BN, wants), wants)


def gives(s: Settings, has_pooler: bool, has_head: bool) -> dict[str, tuple[int, ...]]:
    """List every feature with its shape, without the batch, at the settings' input size."""
    (h, w), D = s.input_grid, s.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"pooled": (s.pooled_size if has_pooler else D,)}
    shapes |= {"pooled:cls": (D,), "pooled:mean": (D,)}
    if has_head:
        shapes["logits"] = (s.num_labels or s.head_width,)
    shapes |= token_shapes(s)
    if s.is_dinov2:
        shape = (D, h, w) if s.reshape_hidden_states else (s.tokens, D)
        shapes |= {f"feature_maps:{_stage(k)}": shape for k in range(s.num_hidden_layers + 1)}
    return shapes | attention_shapes(s)


def finish(model: ViT | FastViT, features: dict[str, Tensor], wants: frozenset[str]) -> dict[str, Tensor]:
    """Turn what `encode` gave into the wanted features."""
    s, x_BTD = model.settings, features["tokens"]
    class_BD = features["pooled:cls"] = x_BTD[:, 0]
    if "pooled" in wants:
        pooled = class_BD if model.pooler is None else activation(s.pooler_act)(model.pooler(class_BD))
        features["pooled"] = pooled
    if wants & {"pooled:mean", "logits"}:
        features["pooled:mean"] = x_BTD[:, s.first_patch :].mean(dim=1)
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


# --- config.json ---


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """Read config.json, for an input of `size_HW`. Raises CheckpointError when a value cannot work."""
    settings = read_fields(Settings, config, size_HW, DEFAULTS[config.get("model_type", MODEL_TYPE)])
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    check_counts(s, (*COUNTS, "pooled_size"))
    check_flags(s, ("qkv_bias", "use_swiglu_ffn", "apply_layernorm", "reshape_hidden_states"))
    for name, least in (("layer_norm_eps", 0), ("mlp_ratio", 0), ("num_register_tokens", 0)):
        value = getattr(s, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise CheckpointError(f"config.json: {name}: `{value}` is not a number of at least {least}")
    if s.mlp_width < 1:
        raise CheckpointError(f"config.json: mlp_ratio: `{s.mlp_ratio}` of hidden_size {s.hidden_size} is no width")
    check_heads(s)
    activation(s.hidden_act)
    activation(s.pooler_act, "config.json: pooler_act")
    check_patches(s)


# --- checkpoints that the authors published ---

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
    claim = f"{accuracy} % {_README}"
    return Published(f"facebook/dinov2-{name}", architecture, config, processor, parameters, gmacs, 224, claim)


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
