"""Build what CLIP and SigLIP share: the text tower, the names of their blocks on disk, and config.json's two sections.

* A checkpoint's image tower is a family's backbone. Its text tower is a module of its own, which is loaded when the
  first prompt comes, so that a job over images keeps no vocabulary in a GPU's memory.
* Blocks have two dialects of names: transformers' (q, k and v apart) and OpenCLIP's (one matrix, `in_proj_weight`).

Shapes: B prompts, T tokens of a prompt, V tokens of the vocabulary, D width, E width of the space shared with images.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.errors import CheckpointError
from img2parquet.models.kernels.activations import activation
from img2parquet.models.transformer import (
    Block,
    BlockSettings,
    EncoderSettings,
    FastBlock,
    check_counts,
    check_heads,
    layer_norm,
    read_fields,
)

OPEN_CLIP_QKV = "attn.in_proj_weight"  # the end of the name of q, k and v in one matrix


@dataclass(frozen=True)
class TextSettings(BlockSettings):
    """config.json's `text_config` by the reference's names; a family's subclass has its own defaults and rules."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77  # tokens of a prompt, those at its ends included
    eos_token_id: int = 49407
    pad_token_id: int = 1
    attention_dropout: float = 0.0  # training only
    embedding_size: int = 512  # the width of the shared space; config.json has other names for it

    @property
    def pads_with_eos(self) -> bool:
        """Whether what follows the end of a prompt never counts, so that its end token can fill it."""
        return False

    def clean(self, text: str, tokenizer: Mapping[str, Any]) -> str:
        """Prepare a prompt as the reference does before its tokenizer's file comes in.

        tokenizer: the content of tokenizer_config.json."""
        return text

    def read_at(self, ids_BT: Tensor) -> Tensor:
        """Return the index of the token whose vector stands for each prompt, (B,)."""
        raise NotImplementedError


class TextTower(nn.Module):
    """The plain form: token ids in, vectors of the shared space out, projected and not normalised."""

    def __init__(
        self, settings: TextSettings, projection: nn.Module, scale_shape: tuple[int, ...], has_bias: bool, merged: bool
    ) -> None:
        """scale_shape: of `logit_scale` and `logit_bias` on disk. merged: the file has q, k and v as one matrix."""
        super().__init__()
        self.settings = s = settings
        self.tokens_VD = nn.Parameter(torch.empty(s.vocab_size, s.hidden_size))
        self.positions_TD = nn.Parameter(torch.empty(s.max_position_embeddings, s.hidden_size))
        self.blocks = nn.ModuleList(Block(s, merged_qkv=merged) for _ in range(s.num_hidden_layers))
        self.norm = layer_norm(s)
        self.projection = projection
        self.logit_scale = nn.Parameter(torch.empty(scale_shape))
        self.logit_bias = nn.Parameter(torch.empty(scale_shape)) if has_bias else None

    def forward(self, ids_BT: Tensor) -> Tensor:
        """ids_BT -> (B, E)."""
        x_BTD = F.embedding(ids_BT, self.tokens_VD) + self.positions_TD[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTD, _ = block(x_BTD)
        y_BE: Tensor = self.projection(_read(self.norm(x_BTD), ids_BT, self.settings))
        return y_BE


class FastTextTower:
    """The fast form, within 1e-5 of the plain one in float32 (tests/models/test_clip.py, test_siglip.py)."""

    def __init__(self, plain: TextTower, dtype: torch.dtype) -> None:
        self.settings = plain.settings
        self.tokens_VD, self.positions_TD = plain.tokens_VD.to(dtype), plain.positions_TD.to(dtype)
        self.blocks = [FastBlock(block, plain.settings, dtype) for block in plain.blocks]  # type: ignore[arg-type]
        self.norm, self.projection = deepcopy(plain.norm).to(dtype), deepcopy(plain.projection).to(dtype)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """ids_BT -> (B, E)."""
        x_BTD = F.embedding(ids_BT, self.tokens_VD) + self.positions_TD[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, with_weights=False)
        y_BE: Tensor = self.projection(self.norm(_read(x_BTD, ids_BT, self.settings)))
        return y_BE


def _read(x_BTD: Tensor, ids_BT: Tensor, s: TextSettings) -> Tensor:
    return x_BTD[torch.arange(len(ids_BT), device=ids_BT.device), s.read_at(ids_BT)]


class Projection(nn.Module):
    """Project to the shared space without a bias; OpenCLIP has the matrix the other way round."""

    def __init__(self, width: int, size: int, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        if transposed:
            self.weight_DE = nn.Parameter(torch.empty(width, size))
        else:
            self.weight_ED = nn.Parameter(torch.empty(size, width))

    def forward(self, x_BD: Tensor) -> Tensor:
        """x_BD -> (B, E)."""
        return x_BD @ self.weight_DE if self.transposed else F.linear(x_BD, self.weight_ED)


# --- names on disk ---


def block_keys(theirs: str, ours: str) -> dict[str, str]:
    """Map transformers' names of a tower's blocks, below `theirs`, to our own, below `ours`."""
    names = {
        "layer_norm1": "norm1",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.out_proj": "attention.out",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    return {f"{theirs}.{{}}.{name}": f"{ours}.{{}}.{own}" for name, own in names.items()}


def open_clip_block_keys(theirs: str, ours: str) -> dict[str, str]:
    """Map OpenCLIP's names of a tower's blocks, below `theirs`, to our own, below `ours`."""
    names = {
        "ln_1": "norm1",
        "attn.in_proj_weight": "attention.qkv.weight",
        "attn.in_proj_bias": "attention.qkv.bias",
        "attn.out_proj": "attention.out",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    return {f"{theirs}.{{}}.{name}": f"{ours}.{{}}.{own}" for name, own in names.items()}


# --- config.json ---

SomeEncoder = TypeVar("SomeEncoder", bound=EncoderSettings)
SomeText = TypeVar("SomeText", bound=TextSettings)
TOWERS = ("vision_config", "text_config")


def tower_config(config: Mapping[str, Any], tower: str) -> Mapping[str, Any]:
    """Return a tower's section of config.json; a bare tower's config is that section.

    Older files have it twice, and the reference prefers `vision_config_dict` with its own defaults."""
    if not any(one in config or f"{one}_dict" in config for one in TOWERS):
        return config
    for name in (f"{tower}_dict", tower):
        found = config.get(name)
        if found is not None:
            if not isinstance(found, Mapping):
                raise CheckpointError(f"config.json: {name}: `{found}` is not an object")
            return found
    return {}


def read_vision(
    kind: type[SomeEncoder], config: Mapping[str, Any], size_HW: tuple[int, int], **more: Any
) -> SomeEncoder:
    """Fill the settings of an image tower. The number of classes, and what `more` holds, is at config.json's top."""
    labels = {name: config[name] for name in ("id2label", "num_labels") if name in config}
    return read_fields(kind, {**tower_config(config, "vision_config"), **labels, **more}, size_HW)


def read_text(kind: type[SomeText], config: Mapping[str, Any], **derived: Any) -> SomeText:
    """Fill the settings of a text tower, and refuse values that cannot work. derived: what has another name there."""
    given, known = tower_config(config, "text_config"), {field.name for field in fields(kind)}
    s = kind(**{name: value for name, value in given.items() if name in known} | derived)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    try:
        check_counts(s, (*names, "vocab_size", "max_position_embeddings", "embedding_size"))
        check_epsilon(s)
        check_heads(s)
        if type(s.eos_token_id) is not int:
            raise CheckpointError(f"config.json: eos_token_id: `{s.eos_token_id}` is not a token's number")
    except CheckpointError as error:
        message = error.message.replace("config.json: ", "config.json: text_config.", 1)
        raise CheckpointError(message, known=error.known, hint=error.hint) from None
    activation(s.hidden_act, "config.json: text_config.hidden_act")
    return s


def check_epsilon(s: BlockSettings) -> None:
    value = s.layer_norm_eps
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"config.json: layer_norm_eps: `{value}` is not a number of at least 0")
