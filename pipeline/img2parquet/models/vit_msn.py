"""ViTMSN (masked siamese networks): a plain pre-norm vision transformer, whose encoder is in `transformer.py`.

* The published checkpoints are backbones. The image vector is the class token after the last layer norm, which the
  reference's own classifier reads; the reference has no pooler.
* `tokens:<k>` are the reference's `hidden_states[k]`, so the last of them is not normed and `tokens` is.
* An input size other than the trained one, square or not, resizes the positions (the reference's
  `interpolate_pos_encoding`). Rows and columns that fill no whole patch are dropped, as in the reference.
* `mask_BN` (the reference's `bool_masked_pos`) needs a checkpoint with a mask token.

Shapes: B batch, C channels, H W image, h w grid, N = h w patches, T = 1 + N tokens, D width, A heads, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from img2parquet.errors import CheckpointError
from img2parquet.models.family import Published
from img2parquet.models.kernels.activations import activation
from img2parquet.models.patch_sizes import check_patches
from img2parquet.models.transformer import (
    Encoder,
    EncoderSettings,
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

MODEL_TYPE = "vit_msn"
PREFIX = "vit."
PROCESSOR = "ViTImageProcessor"
EMBEDDING = (
    "the class token after the last layer norm, `last_hidden_state[:, 0]` of the reference, which has no pooler; "
    "`pooled:mean` is the mean over the patches instead"
)

KEYS = {
    "embeddings.cls_token": "embed.class_11D",
    "embeddings.mask_token": "embed.mask_D",
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
    # the names that transformers 5 uses in memory
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
class Settings(TransformerSettings):
    """config.json by the reference's names and defaults, then what this run adds."""

    layer_norm_eps: float = 1e-6


class ViTMSN(Encoder):
    """The plain form: the shared encoder and, in a fine-tuned checkpoint, a classifier."""

    def __init__(self, settings: Settings, names: frozenset[str]) -> None:
        super().__init__(settings, with_mask="embeddings.mask_token" in names)
        self.head = classifier(settings, settings.hidden_size, "classifier.weight" in names)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head is not None)

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW, mask_BN (true where a patch is hidden) -> the wanted features."""
        return finish(self, self.encode(x_BCHW, mask_BN), wants)


def build(settings: Settings, names: frozenset[str]) -> ViTMSN:
    return ViTMSN(settings, names)


def fold(module: ViTMSN, dtype: torch.dtype) -> FastViTMSN:
    return FastViTMSN(module, dtype)


class FastViTMSN(FastEncoder):
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_vit_msn.py)."""

    def __init__(self, plain: ViTMSN, dtype: torch.dtype) -> None:
        super().__init__(plain, dtype)
        self.head = cast_copy(plain.head, dtype)

    def gives(self) -> dict[str, tuple[int, ...]]:
        return gives(self.settings, self.head is not None)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        return finish(self, self.encode(x_BCHW, mask_BN, wants), wants)


def gives(s: EncoderSettings, has_head: bool) -> dict[str, tuple[int, ...]]:
    """List every feature with its shape, without the batch, at the settings' input size."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("pooled", "pooled:cls", "pooled:mean"), (s.hidden_size,))
    if has_head:
        shapes["logits"] = (s.num_labels or s.hidden_size,)
    return shapes | token_shapes(s) | attention_shapes(s)


def finish(model: ViTMSN | FastViTMSN, features: dict[str, Tensor], wants: frozenset[str]) -> dict[str, Tensor]:
    """Turn what `encode` gave into the wanted features."""
    x_BTD = features["tokens"]
    features |= {"pooled": x_BTD[:, 0], "pooled:cls": x_BTD[:, 0]}
    if "pooled:mean" in wants:
        features["pooled:mean"] = x_BTD[:, 1:].mean(dim=1)
    if model.head is not None and "logits" in wants:
        features["logits"] = model.head(x_BTD[:, 0])
    return {name: features[name] for name in wants}


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """Read config.json, for an input of `size_HW`. Raises CheckpointError when a value cannot work."""
    settings = read_fields(Settings, config, size_HW)
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    check_counts(s)
    if not isinstance(s.layer_norm_eps, int | float) or s.layer_norm_eps < 0:
        raise CheckpointError(f"config.json: layer_norm_eps: `{s.layer_norm_eps}` is not a small positive number")
    check_flags(s)
    check_heads(s)
    activation(s.hidden_act)
    check_patches(s)


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
