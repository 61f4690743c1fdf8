"""BEiT: a vision transformer with relative-position biases, layer scale and four heads (Bao et al. 2021).

Shapes: B batch, N patches, T = 1 + N tokens, D width, H heads, E width of one head, R distances in a bias table,
h w the patch grid, K classes, V visual vocabulary.

- Every input size works: bias tables are resized bilinearly and absolute positions bicubically to the input's grid.
- Resizing a table swaps height and width, as the reference does; it matters only for checkpoints whose own image size
  is not square.
- `pooled` is the mean over the patches *after a layer norm of its own*, or the class token after the final norm.
- For `out_indices` i, segmentation takes `hidden_states[i - 1]` and a backbone `hidden_states[i]`, as in the reference,
  with which the checkpoints were trained.
- Layers that no wanted feature needs are not run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.errors import CheckpointError, OutputUnavailable, nearest
from img2parquet.models.checkpoint import has_identity_head, num_labels
from img2parquet.models.family import Published
from img2parquet.models.kernels.activations import activation
from img2parquet.models.layers import attend, fold_layer_scale, fused_linear, resize_positions
from img2parquet.models.patch_sizes import PatchSizes, unread_note
from img2parquet.models.upernet import FcnHead, Neck, UperHead, fold_head, fold_neck

MODEL_TYPE = "beit"
PREFIX = "beit."
PROCESSOR = "BeitImageProcessor"
EMBEDDING = (
    "layer norm of the mean over the last layer's patch tokens; the class token after the final norm where the "
    "checkpoint says `use_mean_pooling: false`; nothing where its pooling norm was never trained"
)

# Names on disk and ours: the layout of published files, then transformers 5's names of the same modules in memory.
KEYS = {
    "embeddings.cls_token": "embed.cls_token",
    "embeddings.mask_token": "embed.mask_token",
    "embeddings.position_embeddings": "embed.positions",
    "embeddings.patch_embeddings.projection": "embed.patches",
    "encoder.relative_position_bias.relative_position_bias_table": "shared_bias.table_RH",
    "encoder.layer.{}.lambda_1": "blocks.{}.scale1",
    "encoder.layer.{}.lambda_2": "blocks.{}.scale2",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "encoder.layer.{}.attention.attention.query": "blocks.{}.attention.q",
    "encoder.layer.{}.attention.attention.key": "blocks.{}.attention.k",
    "encoder.layer.{}.attention.attention.value": "blocks.{}.attention.v",
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attention.out",
    "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table": (
        "blocks.{}.bias.table_RH"
    ),
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.up",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.down",
    "layernorm": "norm",
    "beit.layernorm": "encoder_norm",  # only beside a top-level `layernorm`: masked image modelling with CLS pooling
    "pooler.layernorm": "pool_norm",
    "classifier": "classifier",
    "lm_head": "lm_head",
    "fpn1.{}": "neck.up4.{}",
    "fpn2.{}": "neck.up2.{}",
    "decode_head.psp_modules.{}.{}": "head.psp.{}.{}",
    "decode_head.psp_modules.{}.{}.bn": "head.psp.{}.{}.norm",
    "decode_head.bottleneck.conv": "head.psp_bottleneck.conv",
    "decode_head.bottleneck.bn": "head.psp_bottleneck.norm",
    "decode_head.lateral_convs.{}.conv": "head.laterals.{}.conv",
    "decode_head.lateral_convs.{}.bn": "head.laterals.{}.norm",
    "decode_head.fpn_convs.{}.conv": "head.smooth.{}.conv",
    "decode_head.fpn_convs.{}.bn": "head.smooth.{}.norm",
    "decode_head.fpn_bottleneck.conv": "head.bottleneck.conv",
    "decode_head.fpn_bottleneck.bn": "head.bottleneck.norm",
    "decode_head.classifier": "head.classifier",
    "auxiliary_head.convs.{}.conv": "auxiliary_head.convs.{}.conv",
    "auxiliary_head.convs.{}.bn": "auxiliary_head.convs.{}.norm",
    "auxiliary_head.conv_cat.conv": "auxiliary_head.concat.conv",
    "auxiliary_head.conv_cat.bn": "auxiliary_head.concat.norm",
    # transformers 5, in memory
    "shared_position_bias.relative_position_bias_table": "shared_bias.table_RH",
    "layers.{}.lambda_1": "blocks.{}.scale1",
    "layers.{}.lambda_2": "blocks.{}.scale2",
    "layers.{}.layernorm_before": "blocks.{}.norm1",
    "layers.{}.layernorm_after": "blocks.{}.norm2",
    "layers.{}.attention.q_proj": "blocks.{}.attention.q",
    "layers.{}.attention.k_proj": "blocks.{}.attention.k",
    "layers.{}.attention.v_proj": "blocks.{}.attention.v",
    "layers.{}.attention.o_proj": "blocks.{}.attention.out",
    "layers.{}.relative_position_bias.relative_position_bias_table": "blocks.{}.bias.table_RH",
    "layers.{}.mlp.fc1": "blocks.{}.mlp.up",
    "layers.{}.mlp.fc2": "blocks.{}.mlp.down",
    "fpn.fpn1.conv_transpose1": "neck.up4.0",
    "fpn.fpn1.normalization": "neck.up4.1",
    "fpn.fpn1.conv_transpose2": "neck.up4.3",
    "fpn.fpn2": "neck.up2.0",
    "decode_head.psp_modules.blocks.{}.conv.convolution": "head.psp.{}.1.conv",
    "decode_head.psp_modules.blocks.{}.conv.normalization": "head.psp.{}.1.norm",
    "decode_head.psp_bottleneck.convolution": "head.psp_bottleneck.conv",
    "decode_head.psp_bottleneck.normalization": "head.psp_bottleneck.norm",
    "decode_head.lateral_convs.{}.convolution": "head.laterals.{}.conv",
    "decode_head.lateral_convs.{}.normalization": "head.laterals.{}.norm",
    "decode_head.fpn_convs.{}.convolution": "head.smooth.{}.conv",
    "decode_head.fpn_convs.{}.normalization": "head.smooth.{}.norm",
    "decode_head.fpn_bottleneck.convolution": "head.bottleneck.conv",
    "decode_head.fpn_bottleneck.normalization": "head.bottleneck.norm",
    "auxiliary_head.convs.{}.convolution": "auxiliary_head.convs.{}.conv",
    "auxiliary_head.convs.{}.normalization": "auxiliary_head.convs.{}.norm",
    "auxiliary_head.conv_cat.convolution": "auxiliary_head.concat.conv",
    "auxiliary_head.conv_cat.normalization": "auxiliary_head.concat.norm",
}

UNUSED = (
    "*relative_position_index",  # computed from the size
    "auxiliary_head.*",  # not built where config.json says `use_auxiliary_head: false`
)

AUXILIARY = "auxiliary_head.classifier.weight"
HEADS: Mapping[str, tuple[str, ...]] = {
    "BeitModel": ("pooler.layernorm.weight",),
    "BeitForMaskedImageModeling": ("lm_head.weight",),
    "BeitForImageClassification": ("pooler.layernorm.weight", "classifier.weight"),
    "BeitForSemanticSegmentation": ("decode_head.classifier.weight", AUXILIARY),
    "BeitBackbone": ("fpn1.0.weight",),
}
NECK_NAMES = {"fpn1.0.weight", "fpn.fpn1.conv_transpose1.weight"}


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_OWN_BIAS = {"use_relative_position_bias": True}
_PRETRAINED = {"use_mask_token": True, "use_shared_relative_position_bias": True}
_MASKED, _CLASSES = "BeitForMaskedImageModeling", "BeitForImageClassification"
_TIMM, _UNILM = "timm's results-imagenet.csv", "the authors' README (unilm)"


def _processor(size: int, resample: int, **more: Any) -> dict[str, Any]:
    squash = {"do_resize": True, "size": {"height": size, "width": size}, "resample": resample, "do_center_crop": False}
    values = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return squash | values | {"do_normalize": True, "image_processor_type": PROCESSOR} | more


def _published(
    repo: str, architecture: str, config: dict[str, Any], size: int, parameters: int, gmacs: float, accuracy: str = ""
) -> Published:
    config = {"image_size": size, **config}
    return Published("microsoft/" + repo, architecture, config, _processor(size, 2), parameters, gmacs, size, accuracy)


def _ade(repo: str, config: dict[str, Any], parameters: int, gmacs: float, accuracy: str) -> Published:
    config = {"image_size": 640, "num_labels": 150, **_OWN_BIAS, **config}
    processor = _processor(640, 3, do_reduce_labels=True)
    return Published(
        "microsoft/" + repo, "BeitForSemanticSegmentation", config, processor, parameters, gmacs, 640, accuracy
    )


PUBLISHED = (
    _published("beit-base-patch16-224-pt22k", _MASKED, _PRETRAINED, 224, 91_965_776, 18.80),
    _published("beit-large-patch16-224-pt22k", _MASKED, {**_LARGE, **_PRETRAINED}, 224, 311_534_016, 63.20),
    _published(
        "beit-base-patch16-224-pt22k-ft22k", _CLASSES, {**_OWN_BIAS, "num_labels": 21841}, 224, 102_557_713, 17.58
    ),
    _published(
        "beit-large-patch16-224-pt22k-ft22k",
        _CLASSES,
        {**_LARGE, **_OWN_BIAS, "num_labels": 21841},
        224,
        325_792_593,
        61.58,
    ),
    *(
        _published(repo, _CLASSES, {**width, **_OWN_BIAS, "num_labels": 1000}, size, parameters, gmacs, accuracy)
        for repo, width, size, parameters, gmacs, accuracy in (
            ("beit-base-patch16-224", {}, 224, 86_530_984, 17.56, f"top-1 85.24 % ({_TIMM}), 85.2 % ({_UNILM})"),
            ("beit-base-patch16-384", {}, 384, 86_744_104, 55.48, f"top-1 86.81 % ({_TIMM})"),
            ("beit-large-patch16-224", _LARGE, 224, 304_430_568, 61.55, f"top-1 87.49 % ({_TIMM})"),
            ("beit-large-patch16-384", _LARGE, 384, 304_998_888, 191.1, f"top-1 88.38 % ({_TIMM})"),
            ("beit-large-patch16-512", _LARGE, 512, 305_674_728, 362.0, f"top-1 88.58 % ({_TIMM})"),
        )
    ),
    _ade(
        "beit-base-finetuned-ade-640-640",
        {"out_indices": [3, 5, 7, 11]},
        163_407_980,
        965.0,
        f"ADE20k mIoU 53.6 ({_UNILM})",
    ),
    _ade(
        "beit-large-finetuned-ade-640-640",
        {**_LARGE, "out_indices": [7, 11, 15, 23]},
        441_271_084,
        1996.0,
        f"ADE20k mIoU 56.7 ({_UNILM})",
    ),
)


@dataclass(frozen=True)
class Settings(PatchSizes):
    """config.json by its own names, sizes as (height, width). Fields that only training reads are kept but not used."""

    vocab_size: int = 8192
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float = 0.4
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    semantic_loss_ignore_index: int = 255
    out_features: tuple[str, ...] = ()
    out_indices: tuple[int, ...] = ()
    add_fpn: bool = False
    reshape_hidden_states: bool = True
    num_labels: int = 2
    has_identity_head: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        return ("stem", *(f"stage{k}" for k in range(1, self.num_hidden_layers + 1)))

    @property
    def segmentation_states(self) -> tuple[int, ...]:
        """The hidden states that the segmentation head takes; index 0 wraps around to the last, as in the reference."""
        return tuple((i - 1) % (self.num_hidden_layers + 1) for i in self.out_indices)


# --- the model, from the top ---


class Beit(nn.Module):
    """The plain form: normalized pixels in, features out. It has the heads that the checkpoint has."""

    def __init__(self, settings: Settings, names: frozenset[str]) -> None:
        super().__init__()
        s = self.settings = settings
        has_lm_head, has_decoder = "lm_head.weight" in names, "decode_head.classifier.weight" in names
        has_pool_norm = s.use_mean_pooling and {"pooler.layernorm.weight", "classifier.weight"} & names
        self.embed: Embed | FastEmbed = Embed(s)
        self.shared_bias = RelativeBias(s) if s.use_shared_relative_position_bias else None
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.num_hidden_layers))
        self.norm = _layer_norm(s) if has_lm_head or not s.use_mean_pooling else None
        self.encoder_norm = _layer_norm(s) if has_lm_head and not s.use_mean_pooling else None
        self.pool_norm = _layer_norm(s) if has_pool_norm else None
        has_classifier = "classifier.weight" in names
        self.classifier: nn.Module | None = nn.Linear(s.hidden_size, s.num_labels) if has_classifier else None
        if s.has_identity_head and not has_classifier:
            self.classifier = nn.Identity()
        self.lm_head = nn.Linear(s.hidden_size, s.vocab_size) if has_lm_head else None
        self.neck = Neck(s.hidden_size) if has_decoder or (s.add_fpn and NECK_NAMES & names) else None
        self.head = UperHead(s.hidden_size, s.pool_scales, s.num_labels) if has_decoder else None
        has_auxiliary = has_decoder and s.use_auxiliary_head and AUXILIARY in names
        self.auxiliary_head = _auxiliary_head(s) if has_auxiliary else None

    def forward(self, x_BCHW: Tensor, wants: frozenset[str], mask_BN: Tensor | None = None) -> dict[str, Tensor]:
        """x_BCHW -> the wanted features; `mask_BN` (bool) replaces those patches by the mask token."""
        _check_wants(wants, self.gives())
        grid = x_BCHW.shape[2] // self.settings.patch_size[0], x_BCHW.shape[3] // self.settings.patch_size[1]
        run = Run(self, grid, wants)
        run.encode(x_BCHW, mask_BN)
        return {name: run.feature(name) for name in sorted(wants)}

    def gives(self) -> dict[str, tuple[int, ...]]:
        """List every feature with its shape, without the batch, at the settings' input size."""
        s, (h, w) = self.settings, self.settings.input_grid
        D, T, layers = s.hidden_size, 1 + h * w, range(s.num_hidden_layers)
        given: dict[str, tuple[int, ...]] = {"pooled": (D,)} if self.pools else {}
        given |= {"pooled:cls": (D,), "pooled:mean": (D,), "tokens": (T, D)}
        given |= {f"tokens:{k}": (T, D) for k in range(s.num_hidden_layers + 1)}
        given |= {f"attentions:{k}": (s.num_attention_heads, T, T) for k in layers}
        given |= {f"feature_maps:{name}": shape for name, shape in self._map_shapes(h, w)}
        given |= {"logits": (s.num_labels or D,)} if self.classifier is not None else {}
        given |= {"visual_tokens": (h * w, s.vocab_size)} if self.lm_head is not None else {}
        given |= {"segmentation": (s.num_labels, 4 * h, 4 * w)} if self.head is not None else {}
        return given | ({"segmentation:auxiliary": (s.num_labels, h, w)} if self.auxiliary_head is not None else {})

    @property
    def pools(self) -> bool:
        return self.pool_norm is not None or not self.settings.use_mean_pooling

    @property
    def maskable_patches(self) -> int:
        h, w = self.settings.input_grid
        return h * w if self.settings.use_mask_token else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts that a user should know and the list of features does not show."""
        never = "its pooling norm was never trained, so there is no `pooled`; `pooled:cls` and `pooled:mean` do without"
        lacking = "its files lack the auxiliary head that config.json names, so a loss is that of the main head alone"
        lacks = self.head is not None and self.settings.use_auxiliary_head and self.auxiliary_head is None
        said = [*([] if self.pools else [never]), *([lacking] if lacks else []), *self._resized()]
        return (*said, *unread_note(self.settings))

    def _resized(self) -> Iterator[str]:
        s, ((h, w), (to_h, to_w)) = self.settings, (self.settings.trained_grid, self.settings.input_grid)
        has = s.use_absolute_position_embeddings, s.use_relative_position_bias, s.use_shared_relative_position_bias
        if any(has) and (h, w) != (to_h, to_w):
            yield f"positions resized from {h}x{w} to {to_h}x{to_w} patches"

    def _map_shapes(self, h: int, w: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        s = self.settings
        if not s.add_fpn:
            shape = (s.hidden_size, h, w) if s.reshape_hidden_states else (1 + h * w, s.hidden_size)
            yield from ((name, shape) for name in s.stages)
        elif self.neck is not None:
            sizes = ((4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2))
            yield from ((name, (s.hidden_size, *size)) for name, size in zip(s.out_features, sizes, strict=True))

    def states_read(self, wants: frozenset[str]) -> set[int]:
        """The hidden states that the wanted features are computed from."""
        return {k for name in wants for k in self._states_of(name)}

    def _states_of(self, name: str) -> Sequence[int]:
        s, (kind, _, which) = self.settings, name.partition(":")
        if name.startswith("tokens:"):
            return (int(which),)
        if kind == "attentions":
            return ()
        if kind == "segmentation":
            return s.segmentation_states
        if kind == "feature_maps":
            return s.out_indices if s.add_fpn else (s.stages.index(which),)
        return (s.num_hidden_layers,)

    def layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def biases(self, grid: tuple[int, int]) -> Callable[[int], Tensor | None]:
        """Return a function from layer k to its attention bias for this grid, (1, H, T, T), or None without any."""
        shared = self.shared_bias(grid) if self.shared_bias is not None else None

        def of_layer(k: int) -> Tensor | None:
            own = self.layers()[k].bias
            if own is None:
                return shared
            bias: Tensor = own(grid) if shared is None else shared + own(grid)
            return bias

        return of_layer


class Run:
    """One forward pass: keeps the requested hidden states and attentions, and computes features from them."""

    def __init__(self, model: Beit, grid: tuple[int, int], wants: frozenset[str]) -> None:
        self.model, self.grid, self.keep = model, grid, model.states_read(wants)
        self.keep_attentions = {int(name.removeprefix("attentions:")) for name in wants if name[0] == "a"}
        self.states_BTD: dict[int, Tensor] = {}
        self.attentions_BHTT: dict[int, Tensor] = {}
        self.made_tokens_BTD: Tensor | None = None
        self.made_pyramid: list[Tensor] | None = None

    def encode(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> None:
        x_BTD = self.model.embed(x_BCHW, mask_BN)
        depth = max([*self.keep, *(k + 1 for k in self.keep_attentions)], default=0)
        bias = self.model.biases(self.grid) if depth else None
        for k in range(depth):
            self._keep(k, x_BTD)
            assert bias is not None
            x_BTD, weights_BHTT = self.model.blocks[k](x_BTD, bias(k), k in self.keep_attentions)
            if weights_BHTT is not None:
                self.attentions_BHTT[k] = weights_BHTT
        self._keep(depth, x_BTD)

    def _keep(self, k: int, x_BTD: Tensor) -> None:
        if k in self.keep:
            self.states_BTD[k] = x_BTD

    def feature(self, name: str) -> Tensor:
        kind, _, which = name.partition(":")
        if kind == "tokens" and which:
            return self.states_BTD[int(which)]
        if kind == "attentions":
            return self.attentions_BHTT[int(which)]
        if kind == "feature_maps":
            return self._feature_map(which)
        makers: dict[str, Callable[[], Tensor]] = {
            "tokens": self._tokens,
            "pooled": self._pooled,
            "pooled:cls": lambda: self._tokens()[:, 0],
            "pooled:mean": lambda: self._tokens()[:, 1:].mean(1),
            "logits": self._logits,
            "visual_tokens": self._visual_tokens,
            "segmentation": self._segmentation,
            "segmentation:auxiliary": self._auxiliary,
        }
        return makers[name]()

    def _tokens(self) -> Tensor:
        """The reference's `last_hidden_state`: after the final norm, which a mean-pooled encoder does not have."""
        if self.made_tokens_BTD is None:
            model, x_BTD = self.model, self.states_BTD[self.model.settings.num_hidden_layers]
            final = None if model.settings.use_mean_pooling else (model.encoder_norm or model.norm)
            self.made_tokens_BTD = x_BTD if final is None else final(x_BTD)
        return self.made_tokens_BTD

    def _pooled(self) -> Tensor:
        if self.model.pool_norm is None:
            return self._tokens()[:, 0]
        return self.model.pool_norm(self._tokens()[:, 1:].mean(1))  # type: ignore[no-any-return]

    def _logits(self) -> Tensor:
        assert self.model.classifier is not None
        return self.model.classifier(self._pooled())  # type: ignore[no-any-return]

    def _visual_tokens(self) -> Tensor:
        assert self.model.lm_head is not None and self.model.norm is not None
        return self.model.lm_head(self.model.norm(self._tokens()[:, 1:]))  # type: ignore[no-any-return]

    def _segmentation(self) -> Tensor:
        assert self.model.head is not None
        return self.model.head(self._pyramid(self.model.settings.segmentation_states))  # type: ignore[no-any-return]

    def _auxiliary(self) -> Tensor:
        assert self.model.auxiliary_head is not None
        state = self.model.settings.segmentation_states[2]  # the neck leaves this level as it is
        return self.model.auxiliary_head(_to_map(self.states_BTD[state], self.grid))  # type: ignore[no-any-return]

    def _feature_map(self, stage: str) -> Tensor:
        s = self.model.settings
        if s.add_fpn:
            self.made_pyramid = self.made_pyramid or self._pyramid(s.out_indices)
            return self.made_pyramid[s.out_features.index(stage)]
        x_BTD = self.states_BTD[s.stages.index(stage)]
        return _to_map(x_BTD, self.grid) if s.reshape_hidden_states else x_BTD

    def _pyramid(self, states: Sequence[int]) -> list[Tensor]:
        assert self.model.neck is not None
        return self.model.neck([_to_map(self.states_BTD[k], self.grid) for k in states])  # type: ignore[no-any-return]


class Embed(nn.Module):
    """x_BCHW -> x_BTD: patches (or the mask token), class token before them, absolute positions if trained."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.grid, self.patch_size = s.trained_grid, s.patch_size
        self.patches = nn.Conv2d(s.num_channels, s.hidden_size, kernel_size=s.patch_size, stride=s.patch_size)
        self.cls_token = _parameter(1, 1, s.hidden_size)
        self.mask_token = _parameter(1, 1, s.hidden_size) if s.use_mask_token else None
        N = s.trained_grid[0] * s.trained_grid[1]
        self.positions = _parameter(1, 1 + N, s.hidden_size) if s.use_absolute_position_embeddings else None

    def forward(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        x_BDhw = self.patches(x_BCHW)
        x_BND = x_BDhw.flatten(2).transpose(1, 2)
        if mask_BN is not None:
            x_BND = torch.where(mask_BN[..., None], _mask_token(self.mask_token), x_BND)
        x_BTD = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], dim=1)
        h, w = x_BDhw.shape[2:]
        return x_BTD if self.positions is None else x_BTD + self.positions_for((h, w))

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Return the trained positions resized to a grid, (1, T, D)."""
        assert self.positions is not None
        trained = self.positions.shape[1] - 1
        pixels_h, pixels_w = grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]
        if grid[0] * grid[1] == trained and pixels_h == pixels_w:
            return self.positions
        return resize_positions(self.positions, grid)  # treats every trained grid as square, as the reference does


class Block(nn.Module):
    """x_BTD -> x_BTD, and the attention weights if they are wanted."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.bias = RelativeBias(s) if s.use_relative_position_bias else None
        self.norm1, self.attention = _layer_norm(s), Attention(s)
        self.norm2, self.mlp = _layer_norm(s), Mlp(s)
        scaled = s.layer_scale_init_value > 0
        self.scale1 = _parameter(s.hidden_size) if scaled else None
        self.scale2 = _parameter(s.hidden_size) if scaled else None

    def forward(self, x_BTD: Tensor, bias: Tensor | None, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        y_BTD, weights_BHTT = self.attention(self.norm1(x_BTD), bias)
        x_BTD = x_BTD + (y_BTD if self.scale1 is None else self.scale1 * y_BTD)
        y_BTD = self.mlp(self.norm2(x_BTD))
        x_BTD = x_BTD + (y_BTD if self.scale2 is None else self.scale2 * y_BTD)
        return x_BTD, weights_BHTT if with_weights else None


class Attention(nn.Module):
    """x_BTD -> x_BTD and the softmax weights (B, H, T, T). Keys have no bias: it would cancel in the softmax."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads = s.num_attention_heads
        self.q = nn.Linear(s.hidden_size, s.hidden_size)
        self.k = nn.Linear(s.hidden_size, s.hidden_size, bias=False)
        self.v = nn.Linear(s.hidden_size, s.hidden_size)
        self.out = nn.Linear(s.hidden_size, s.hidden_size)

    def forward(self, x_BTD: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T, _ = x_BTD.shape
        q, k, v = (f(x_BTD).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x_BHTE, weights_BHTT = attend(q, k, v, bias)
        return self.out(x_BHTE.transpose(1, 2).flatten(2)), weights_BHTT


class Mlp(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.up = nn.Linear(s.hidden_size, s.intermediate_size)
        self.activation_name = s.hidden_act
        self.down = nn.Linear(s.intermediate_size, s.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(activation(self.activation_name)(self.up(x_BTD)))  # type: ignore[no-any-return]


class RelativeBias(nn.Module):
    """The bias that attention adds for each pair of tokens, (1, H, T, T), from a table over their distances."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.grid = s.trained_grid
        self.table_RH = _parameter(num_distances(s.trained_grid), s.num_attention_heads)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        bias = self.resized(grid)[distance_index(grid, self.table_RH.device)]
        return bias.permute(2, 0, 1)[None]

    def resized(self, grid: tuple[int, int]) -> Tensor:
        """Resize the table to another grid; the last three rows, of the class token, stay."""
        if grid == self.grid and grid[0] == grid[1]:
            return self.table_RH
        old_h, old_w = (2 * n - 1 for n in self.grid)
        patches, rest = self.table_RH[:-3], self.table_RH[-3:]
        image = patches.reshape(1, old_w, old_h, -1).permute(
            0, 3, 1, 2
        )  # not (old_h, old_w): see the module's docstring
        image = F.interpolate(image, size=[2 * n - 1 for n in grid], mode="bilinear", align_corners=False)
        return torch.cat([image[0].flatten(1).T, rest])


def num_distances(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def distance_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return the row of the bias table for each pair (query, key) of tokens: (T, T), class token first."""
    h, w = grid
    y_N, x_N = (n.flatten() for n in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
    rows_NN = (y_N[:, None] - y_N + h - 1) * (2 * w - 1) + (x_N[:, None] - x_N + w - 1)
    R = num_distances(grid)
    index_TT = F.pad(rows_NN, (1, 0, 1, 0))
    index_TT[0, :], index_TT[:, 0], index_TT[0, 0] = R - 3, R - 2, R - 1
    return index_TT


def _to_map(x_BTD: Tensor, grid: tuple[int, int]) -> Tensor:
    """x_BTD, whose class token is dropped -> (B, D, h, w)."""
    B, _, D = x_BTD.shape
    return x_BTD[:, 1:].transpose(1, 2).reshape(B, D, *grid)


def _auxiliary_head(s: Settings) -> FcnHead:
    convs, channels = s.auxiliary_num_convs, s.auxiliary_channels
    if channels < 1 or (convs < 1 and not s.auxiliary_concat_input and channels != s.hidden_size):
        _refuse("auxiliary_channels", channels, f"the width of what its classifier sees, with {convs} convolutions")
    return FcnHead(s.hidden_size, channels, convs, s.auxiliary_concat_input, s.num_labels)


def _layer_norm(s: Settings) -> nn.LayerNorm:
    return nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _mask_token(token: Tensor | None) -> Tensor:
    if token is None:
        raise OutputUnavailable(
            "masked patches need a mask token, which this checkpoint does not have",
            hint="use a pre-trained one (`use_mask_token: true`, as microsoft/beit-base-patch16-224-pt22k), or no mask",
        )
    return token


def _check_wants(wants: frozenset[str], given: Mapping[str, Any]) -> None:
    for name in sorted(wants - given.keys()):
        raise OutputUnavailable(f"BEiT: this checkpoint does not give `{name}`", known=given, hint=nearest(name, given))


# --- config.json, and the plain module ---


def build(settings: Settings, names: frozenset[str]) -> Beit:
    """Build the plain module with the heads whose names are on disk. Raises CheckpointError if they cannot work."""
    if "decode_head.classifier.weight" in names:
        _check_pyramid(settings, "semantic segmentation")
        if settings.num_labels < 1:
            _refuse("num_labels", settings.num_labels, "1 or more, which semantic segmentation needs")
    return Beit(settings, names)


def read_settings(config: Mapping[str, Any], size_HW: tuple[int, int]) -> Settings:
    """Read config.json, for an input of `size_HW`. Raises CheckpointError when a value cannot work."""
    values = {
        f.name: _typed(f.name, config[f.name], f.type) for f in fields(Settings) if config.get(f.name) is not None
    }
    values |= {name: _pair(name, config[name]) for name in ("image_size", "patch_size") if name in config}
    values |= {"num_labels": num_labels(config), "has_identity_head": has_identity_head(config)}
    values |= {"input_size": tuple(size_HW)}
    settings = Settings(**values)
    _check_widths(settings)
    _check_sizes(settings)
    _check_positions(settings)
    out_features, out_indices = _stages(settings, config)
    settings = replace(settings, out_features=out_features, out_indices=out_indices)
    _check_fpn(settings)
    return settings


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Check one field of config.json against its type in Settings; sizes and stages have their own readers."""
    if kind == "tuple[int, ...]":
        items = value if isinstance(value, (list, tuple)) else _refuse(name, value, "a list of ints")
        return tuple(_typed(name, item, "int") for item in items)
    if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool")):
        _refuse(name, value, f"of type {kind}")
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Read a size: one number or (height, width)."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        _refuse(name, value, "a positive int or two of them")
    return pair[0], pair[1]


def _refuse(name: str, value: Any, wanted: str, hint: str = "") -> NoReturn:
    raise CheckpointError(f"config.json: `{name}` is `{value}`, not {wanted}", hint=hint)


def _stages(s: Settings, config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return `out_features` and `out_indices`, each derived from the other; the last stage if neither is given."""
    names, indices = config.get("out_features"), config.get("out_indices")
    if names is not None:
        _check_stages("out_features", names, s.stages)
        if indices is None:
            return tuple(names), tuple(s.stages.index(name) for name in names)
    elif indices is None:
        indices = _legacy_indices(s, config) or [s.num_hidden_layers]
    count = len(s.stages)
    if not isinstance(indices, (list, tuple)) or not all(type(i) is int and -count <= i < count for i in indices):
        _refuse("out_indices", indices, f"a list of stages from 0 to {count - 1}")
    features = tuple(s.stages[i] for i in indices)
    _check_stages("out_indices", features, s.stages)
    if names is not None and tuple(names) != features:
        _refuse("out_features", names, f"the stages {list(features)} that `out_indices` names")
    return features, tuple(i % count for i in indices)


def _legacy_indices(s: Settings, config: Mapping[str, Any]) -> list[int] | None:
    """Read `segmentation_indices`, the old name of `out_indices`. Old files of every class have its default, even if
    a smaller model lacks those layers; then it is ignored."""
    legacy = config.get("segmentation_indices")
    fits = isinstance(legacy, (list, tuple)) and all(type(i) is int and 0 <= i <= s.num_hidden_layers for i in legacy)
    return list(legacy) if fits and legacy else None


def _check_stages(name: str, chosen: Any, stages: tuple[str, ...]) -> None:
    if not isinstance(chosen, (list, tuple)) or [x for x in stages if x in chosen] != list(chosen) or not chosen:
        raise CheckpointError(
            f"config.json: `{name}`: {chosen!r} is not stages in their order, each once", known=stages
        )


def _check_sizes(s: Settings) -> None:
    for name, size in (("image_size", s.image_size), ("the input's size", s.input_size)):
        if any(n < p for n, p in zip(size, s.patch_size, strict=True)):
            raise CheckpointError(
                f"{name} {size[0]}x{size[1]} is smaller than a patch, {s.patch_size[0]}x{s.patch_size[1]}",
                hint="use a multiple of the patch size",
            )


def _check_widths(s: Settings) -> None:
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "num_channels",
        "vocab_size",
    ):
        if getattr(s, name) < 1:
            _refuse(name, getattr(s, name), "1 or more")
    if any(scale < 1 for scale in s.pool_scales):
        _refuse("pool_scales", list(s.pool_scales), "a list of positive ints")
    if s.hidden_size % s.num_attention_heads:
        _refuse("num_attention_heads", s.num_attention_heads, f"a divisor of `hidden_size` {s.hidden_size}")
    if s.layer_norm_eps < 0:
        _refuse("layer_norm_eps", s.layer_norm_eps, "0 or more")
    activation(s.hidden_act)


def _check_positions(s: Settings) -> None:
    count = s.trained_grid[0] * s.trained_grid[1]
    if s.use_absolute_position_embeddings and isqrt(count) ** 2 != count:
        raise CheckpointError(
            f"config.json: `use_absolute_position_embeddings` with a grid of {s.trained_grid[0]}x{s.trained_grid[1]} "
            "patches: positions are resized from a square grid, and their number is not a square"
        )


def _check_fpn(s: Settings) -> None:
    if not s.add_fpn:
        return
    _check_pyramid(s, "`add_fpn`")
    if not s.reshape_hidden_states:
        _refuse("reshape_hidden_states", False, "true, which `add_fpn` needs: a pyramid is made of maps")


def _check_pyramid(s: Settings, wanted_by: str) -> None:
    if len(s.out_indices) != 4:
        hint = "[3, 5, 7, 11] is usual for a base-sized model"
        raise CheckpointError(
            f"config.json: {wanted_by} needs four `out_indices`, not {list(s.out_indices)}", hint=hint
        )
    if min(s.input_grid) < 2:
        raise CheckpointError(
            f"{wanted_by} halves the patch grid, which is {s.input_grid[0]}x{s.input_grid[1]}: the input is too small"
        )


# --- the fast form ---

BIAS_BYTES = 256 << 20  # of attention biases kept between batches; beyond it each layer's is computed in its turn


def fold(module: Beit, dtype: torch.dtype) -> Beit:
    """Return the fast form: q, k, v in one product, layer scale in the weights before it, biases and positions made
    once per input size, fused products, SDPA, batch norms folded; computed in float64, then cast."""
    fast = FastBeit(module, dtype)
    return fast.eval().requires_grad_(False)


class FastBeit(Beit):
    """The fast form. Of the plain module it keeps only what a new input size is computed from."""

    def __init__(self, plain: Beit, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.settings = plain.settings
        assert isinstance(plain.embed, Embed)
        self.embed = FastEmbed(plain.embed, dtype)
        self.blocks = nn.ModuleList(FastBlock(block, dtype) for block in plain.layers())
        self.bias_cache = BiasCache(plain, dtype)
        for name in ("norm", "encoder_norm", "pool_norm", "classifier", "lm_head"):
            part = getattr(plain, name)
            setattr(self, name, None if part is None else copy.deepcopy(part).to(dtype))
        self.neck = None if plain.neck is None else fold_neck(plain.neck, dtype)
        self.head = None if plain.head is None else fold_head(plain.head, dtype)
        auxiliary = plain.auxiliary_head
        self.auxiliary_head = None if auxiliary is None else fold_head(auxiliary, dtype)

    def biases(self, grid: tuple[int, int]) -> Callable[[int], Tensor | None]:
        return self.bias_cache.of_grid(grid)


class FastEmbed(nn.Module):
    """Compute patches as one matrix product; keep the positions of the last grid that was seen."""

    def __init__(self, plain: Embed, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.patch_size = dtype, plain.patch_size
        self.plain = [plain]  # in a list, or it would become a submodule
        self.patches = fused_linear(plain.patches.weight.flatten(1).to(dtype), _to(plain.patches.bias, dtype))
        self.mask_token = _to(plain.mask_token, dtype)
        self.kept: tuple[tuple[int, int], Tensor, Tensor | None] | None = None

    def forward(self, x_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        (ph, pw), x_BCHW = self.patch_size, x_BCHW.to(self.dtype)
        (B, C), h, w = x_BCHW.shape[:2], x_BCHW.shape[2] // ph, x_BCHW.shape[3] // pw
        x_BChpwp = x_BCHW[:, :, : h * ph, : w * pw].reshape(B, C, h, ph, w, pw)
        x_BND = self.patches(x_BChpwp.permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * ph * pw))
        if mask_BN is not None:
            x_BND = torch.where(mask_BN[..., None], _mask_token(self.mask_token), x_BND)
        first_11D, positions_1ND = self.starts((h, w))
        x_BND = x_BND if positions_1ND is None else x_BND + positions_1ND
        return torch.cat([first_11D.expand(len(x_BND), -1, -1), x_BND], dim=1)

    def starts(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Return the class token with its position, and the patches' positions."""
        if self.kept is None or self.kept[0] != grid:
            (plain,) = self.plain
            resized = None if plain.positions is None else plain.positions_for(grid)
            first = plain.cls_token if resized is None else plain.cls_token + resized[:, :1]
            self.kept = grid, first.to(self.dtype), None if resized is None else resized[:, 1:].to(self.dtype)
        return self.kept[1:]


class FastBlock(nn.Module):
    """A block whose four products include what follows them: bias, GELU, residual."""

    def __init__(self, plain: Block, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp, self.heads = plain.attention, plain.mlp, plain.attention.heads
        self.norm1, self.norm2 = copy.deepcopy(plain.norm1).to(dtype), copy.deepcopy(plain.norm2).to(dtype)
        q, k, v = attention.q, attention.k, attention.v
        bias = torch.cat([q.bias, torch.zeros_like(q.bias), v.bias])
        self.qkv = fused_linear(torch.cat([q.weight, k.weight, v.weight]).to(dtype), bias.to(dtype))
        self.out = fused_linear(*fold_layer_scale(attention.out, plain.scale1, dtype))
        self.up = fused_linear(mlp.up.weight.to(dtype), mlp.up.bias.to(dtype), mlp.activation_name)
        self.down = fused_linear(*fold_layer_scale(mlp.down, plain.scale2, dtype))

    def forward(self, x_BTD: Tensor, bias: Tensor | None, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        B, T, _ = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = None
        if with_weights:
            y_BHTE, weights = attend(q, k, v, bias)
        else:
            y_BHTE = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x_BTD = self.out(y_BHTE.transpose(1, 2).flatten(2), residual=x_BTD)
        return self.down(self.up(self.norm2(x_BTD)), residual=x_BTD), weights


class BiasCache:
    """The attention biases of the last grid that was seen. Keeps every layer's if they fit `BIAS_BYTES`, else only the
    resized tables; then a buffer that lives for one forward pass holds one layer's biases at a time."""

    def __init__(self, plain: Beit, dtype: torch.dtype) -> None:
        self.dtype, self.heads = dtype, plain.settings.num_attention_heads
        shared = [] if plain.shared_bias is None else [plain.shared_bias]
        own = [block.bias for block in plain.layers() if block.bias is not None]
        # a single entry if the layers have no biases of their own
        self.sources = [[*shared, bias] for bias in own] or [shared]
        self.grid, self.tables_HR, self.made = (0, 0), list[Tensor](), list[Tensor]()

    def of_grid(self, grid: tuple[int, int]) -> Callable[[int], Tensor | None]:
        if not self.sources[0]:
            return lambda k: None
        if grid != self.grid:
            self._make(grid)
        last, made = len(self.sources) - 1, self.made
        return (lambda k: made[min(k, last)]) if made else self._one_at_a_time(grid, self.tables_HR)

    def _make(self, grid: tuple[int, int]) -> None:
        self.made = []  # frees those of the other grid first
        # resizing is linear, so shared and own tables are summed before it
        tables = [torch.stack([part.resized(grid) for part in parts]).sum(0) for parts in self.sources]
        self.tables_HR = [table.T.to(self.dtype).contiguous() for table in tables]
        if len(tables) * self._room(grid, "meta").nbytes <= BIAS_BYTES:
            self.made = [spread(table, grid, self._room(grid, table.device)) for table in self.tables_HR]
        self.grid = grid

    def _one_at_a_time(self, grid: tuple[int, int], tables_HR: list[Tensor]) -> Callable[[int], Tensor]:
        room = self._room(grid, tables_HR[0].device)
        shared_HTT = spread(tables_HR[0], grid, room) if len(tables_HR) == 1 else None
        return lambda k: spread(tables_HR[k], grid, room) if shared_HTT is None else shared_HTT

    def _room(self, grid: tuple[int, int], device: torch.device | str) -> Tensor:
        """Allocate one layer's biases. Rows are aligned to 16 bytes, or CUDA would copy them in each call."""
        T = 1 + grid[0] * grid[1]
        return torch.empty(self.heads, T, T + -T % 8, dtype=self.dtype, device=device)


def spread(table_HR: Tensor, grid: tuple[int, int], room: Tensor) -> Tensor:
    """Spread a table over distances into the bias of each pair of tokens, (1, H, T, T) in the buffer `room`.

    Equal to a look-up by `distance_index`, and several times as fast: a query's row of patches is a window of the
    mirrored table."""
    (h, w), T = grid, room.shape[1]
    room[:, 0, :], room[:, :, 0], room[:, 0, 0] = table_HR[:, -3, None], table_HR[:, -2, None], table_HR[:, -1]
    mirrored = table_HR[:, :-3].reshape(-1, 2 * h - 1, 2 * w - 1).flip(1, 2)
    windows = mirrored.unfold(1, h, 1).unfold(2, w, 1)
    pairs = room.as_strided(*_patch_pairs(room, h, w))
    for y in range(h):
        pairs[:, y] = windows[:, h - 1 - y].flip(1)
    return room[None, :, :, :T]


def _patch_pairs(room: Tensor, h: int, w: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return size, stride and offset of the part without the class token, as (H, query's y, x, key's y, x)."""
    H, _, P = room.shape
    return (H, h, w, h, w), (room.stride(0), w * P, P, w, 1), P + 1


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype)
