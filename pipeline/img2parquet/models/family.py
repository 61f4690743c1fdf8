"""Declare what a model family offers, and list the families. Add a new backbone here; importing this loads no torch.

To add a family of your own: write one file with the names of `Family` below, add a line for it to `FAMILIES`, and run
`tests/models`. `infra/BACKBONES.md` explains each step with `vit.py` as the example. Models of other libraries need no
file: see `transformers:...` and `timm:...` in `external.py`.

A forward pass returns a dict of named features. The caller names the ones it wants, so that nothing else is computed or
kept. Names (B batch, T tokens, D width, h w map size):

    pooled              (B, D)        the family's own image vector, described in its file
    pooled:cls          (B, D)        the class token        } both without the weights of a pooling layer
    pooled:mean         (B, D)        mean over the patches  }
    pooled:tower        (B, D)        of an image tower beside a text tower: its vector before the projection
    logits              (B, K)        the classification head; `logits:<head>` where there are several
    tokens              (B, T, D)     last hidden state, the reference's `last_hidden_state`
    tokens:<k>          (B, T, D)     `hidden_states[k]` of the reference; k = 0 is the output of the embedding
    feature_maps:<name> (B, C, h, w)  a stage of the backbone (`stem`, `stage1`, ...)
    attentions:<k>      (B, H, T, T)  attention weights of layer k, counted from 0
    segmentation        (B, K, h, w)  per-class maps, before upsampling to the image; `segmentation:auxiliary`: those of
                                      a second head, which only enters the loss
    visual_tokens       (B, N, V)     scores over the visual vocabulary for every patch (masked image modelling)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.models.prompts import ClassPrompts, ClassWeights

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {
    "beit": "img2parquet.models.beit",
    "bit": "img2parquet.models.bit",
    "clip": "img2parquet.models.clip",
    "clip_vision_model": "img2parquet.models.clip",
    "dinov2": "img2parquet.models.vit",
    "dinov2_with_registers": "img2parquet.models.vit",
    "levit": "img2parquet.models.levit",
    "siglip": "img2parquet.models.siglip",
    "siglip_vision_model": "img2parquet.models.siglip",
    "vit": "img2parquet.models.vit",
    "vit_msn": "img2parquet.models.vit_msn",
}  # `model_type` in config.json -> the module of its family


class TensorNames(Protocol):
    """The names of tensors on disk, for the reader of weights."""

    @property
    def MODEL_TYPE(self) -> str:
        """`model_type` in config.json; of several, the one that the family is listed under."""

    @property
    def PREFIX(self) -> str | tuple[str, ...]:
        """Base prefix that names on disk may have, per key: `levit.`."""

    @property
    def KEYS(self) -> Mapping[str, str]:
        """Name on disk (prefix stripped, `{}` for each number) -> our name, in every dialect. A key covers itself and
        whatever follows a dot (`.weight`); the longest one that fits is taken."""

    @property
    def UNUSED(self) -> tuple[str, ...]:
        """fnmatch patterns of names on disk (prefix stripped) that this part of the model does not read."""


class Family(TensorNames, Protocol):
    """The module-level names that a family's file offers to the loader. One with a text tower also has `TEXT`."""

    PROCESSOR: str  # image processor class when preprocessor_config.json is absent or names none
    EMBEDDING: str  # one sentence: what `pooled` means
    HEADS: Mapping[str, tuple[str, ...]]  # reference class -> the names that `build` looks for in its files (for
    # `weights: random(seed)`, which has no files to look into)
    PUBLISHED: tuple[Published, ...]

    def read_settings(self, config: Mapping[str, Any], size_HW: tuple[int, int]) -> Any:
        """Read config.json, for an input of `size_HW`, into the family's frozen Settings. Ignores unknown keys. Raises
        CheckpointError, saying what, where and what to try, when a value cannot work or the architecture cannot take
        the size."""

    def build(self, settings: Any, names: frozenset[str]) -> Backbone:
        """Build the plain, readable module, with the heads that the checkpoint has; `names` are the names on disk,
        prefix stripped. The loader calls this under `torch.device("meta")` and then fills every weight or fails, so a
        buffer that is not on disk must be made later, or with an explicit `device="cpu"`."""

    def fold(self, module: Backbone, dtype: Any) -> Backbone:
        """Return the fast form of a filled plain module. Whatever depends only on weights is computed once, in float64
        or float32, then cast to `dtype`, on the device of the module's weights. Equal to the plain form within the
        tolerance that the family's test states."""


class Backbone(Protocol):
    """A family's module, in its plain or fast form: normalized float pixels in, the wanted features out."""

    def gives(self) -> dict[str, tuple[int, ...]]:
        """List the features that this module can give, each with its shape without the batch."""

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], **inputs: Tensor) -> dict[str, Tensor]:
        """x_BCHW float, normalized -> the wanted features, by name. `mask_BN` (bool) is the one optional input."""


@dataclass(frozen=True)
class TextFamily:
    """The text tower of a family: the names of its tensors, its plain form (None where a checkpoint has none), and the
    fast form of that. `build` takes config.json and the names on disk, the base prefix stripped."""

    MODEL_TYPE: str
    KEYS: Mapping[str, str]
    UNUSED: tuple[str, ...]
    build: Callable[[Mapping[str, Any], frozenset[str]], Any]
    fold: Callable[[Any, Any], Callable[[Tensor], Tensor]]
    PREFIX: str = ""
    problem: str = "single_label_classification"  # `problem_type` of classes that are prompts


@dataclass(frozen=True)
class Published:
    """A checkpoint that its authors published: what is needed to build it without its files, and their claims."""

    repo: str  # org/name on the hub
    architecture: str  # the reference class in its config.json
    config: Mapping[str, Any]  # what its config.json says beyond the family's defaults
    preprocessor: Mapping[str, Any]  # its preprocessor_config.json
    parameters: int
    gmacs: float  # multiply-accumulates of one image at `image_size`, in 1e9
    image_size: int
    accuracy: str = ""  # as published, with its source


Mode = Literal["exact", "fast", "pil"]  # a job's `preprocess`


@dataclass(frozen=True)
class ModelSpec:
    """Which model to open: the fields that a job file has for a model, and the options for reading its URI."""

    model: str  # a folder, a URI, `org/name@revision`, `transformers:...` or `timm:...`
    name: str | None = None  # None: the last segment of `model`
    image_size: int | tuple[int, int] | None = None  # None: the checkpoint's own
    weights: str | None = None  # `random(seed)`: a published architecture without its files
    storage_options: Mapping[str, object] = field(default_factory=dict)
    preprocess: Mode = (
        "exact"  # "pil": the pixels of the processor's PIL backend, or of timm; "fast" changes no setting
    )
    prompts: ClassPrompts | None = None  # classes described by words, for a model with a text tower
    class_weights: ClassWeights | None = field(default=None, compare=False)  # computed before, of these prompts

    @property
    def resolved_name(self) -> str:
        """The model's name in outputs and messages: `name`, or the last segment of `model` without its revision."""
        return self.name or re.split(r"[/\\]", self.model.rstrip("/"))[-1].partition("@")[0].split(":")[-1]


@dataclass(frozen=True)
class Card:
    """The facts of a model that are known before any image is read: identity, sizes, and the features it can give.

    `gives` maps each feature's name to its shape without the batch, at this image size."""

    name: str
    family: str
    source: str
    weights_hash: str
    config: Mapping[str, Any]
    preprocess: PreprocessSettings
    gives: Mapping[str, tuple[int, ...]]
    embedding: str  # one sentence: what `pooled` means here
    labels: tuple[str, ...] = ()  # by class id; () where there is no head
    parameters: int = 0
    notes: tuple[str, ...] = field(default=())
    reduces_labels: bool = False  # the processor treats class 0 of a segmentation's ground truth as background
    maskable_patches: int = 0  # patches that a mask may hide, row by row; 0 without a mask token
    has_text: bool = False  # a text tower, for prompts
    prompts: str = ""  # digest of the prompts that its classes are, and of the tokenizer that reads them
    implementation: str = "native"  # or whose code computes it, with its version: see external.py


def head_notes(
    config: Mapping[str, Any], gives: Mapping[str, tuple[int, ...]], labels: tuple[str, ...]
) -> Iterator[str]:
    """Yield what a user should know about the classes of a model's heads. labels: their names by id."""
    if {"logits", "segmentation"} & gives.keys() and config.get("id2label") and not labels:
        yield "`id2label` in config.json does not count from 0, so its classes have no names"
    if gives.get("segmentation", (0,))[0] == 1:
        yield "its segmentation head has a single class, which every pixel of a mask has"
