"""Checkpoints to models: one file per family, one line each in `FAMILIES`. Importing this loads no torch.

A family of your own: write one file with the names of `Family` below, add its line, and run `tests/models`;
`infra/BACKBONES.md` goes through `vit.py` step by step. Without any: `transformers:...` and `timm:...` (external.py).

What a forward pass gives is a dict of named features, and a caller names the ones it wants, so nothing unasked is
computed or kept. Names (B batch, T tokens, D width, h w map size):

    pooled              (B, D)        the family's own image vector, as its file says
    pooled:cls          (B, D)        the class token        } without any pooling layer's own weights
    pooled:mean         (B, D)        mean over the patches  }
    logits              (B, K)        the classification head; `logits:<head>` where there are several
    tokens              (B, T, D)     last hidden state, as the reference's `last_hidden_state`
    tokens:<k>          (B, T, D)     `hidden_states[k]` of the reference, k = 0 is the embedding's output
    feature_maps:<name> (B, C, h, w)  a backbone's stage (`stem`, `stage1`, ...)
    attentions:<k>      (B, H, T, T)  attention weights of layer k, from 0
    segmentation        (B, K, h, w)  per-class maps, before upsampling to the image
    visual_tokens       (B, N, V)     scores over the visual vocabulary for every patch (masked image modelling)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.preprocess import PreprocessSettings

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.model import Model

FAMILIES = {
    "beit": "pipeline.models.beit",
    "bit": "pipeline.models.bit",
    "dinov2": "pipeline.models.vit",
    "dinov2_with_registers": "pipeline.models.vit",
    "levit": "pipeline.models.levit",
    "vit": "pipeline.models.vit",
    "vit_msn": "pipeline.models.vit_msn",
}  # `model_type` in config.json -> the file of its family


def load_model(
    model: str,
    *,
    name: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    storage_options: Mapping[str, object] | None = None,
    fast: bool = True,
) -> Model:
    """A folder, any URI of one, `org/name@revision`, or these after `transformers:`, or `timm:<name>` -> a callable
    from images to features.

    `dtype` is float32, bfloat16, float16 or auto; `image_size` is what reaches the model, where it is not the
    checkpoint's own; `weights="random(0)"` builds a published model without its files; `fast=False` keeps the plain
    form. Raises UnknownModel, CheckpointError, MissingDependency, StorageError."""
    from pipeline.models import model as loader

    return loader.load_model(
        model,
        name=name,
        dtype=dtype,
        device=device,
        image_size=image_size,
        weights=weights,
        storage_options=storage_options,
        fast=fast,
    )


def read_card(
    model: str,
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Card:
    """What `load_model(...).card` would be, without filling the weights (they are hashed)."""
    from pipeline.models import model as loader

    return loader.read_card(model, name=name, image_size=image_size, weights=weights, storage_options=storage_options)


def published() -> list[tuple[Family, Published]]:
    """Every checkpoint that a family knows by name, for the catalogue."""
    from pipeline.models import model as loader

    return loader.published()


@dataclass(frozen=True)
class Card:
    """What is known of a model before an image is seen: identity, sizes, and what it can give.

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
    reduces_labels: bool = False  # the processor takes class 0 of a segmentation's truth for background
    implementation: str = "native"  # or whose code computes it, with its version: see external.py


class Backbone(Protocol):
    """What a family's module is: plain torch, normalised float pixels in, the wanted features out."""

    def gives(self) -> dict[str, tuple[int, ...]]:
        """Features that this module can give, each with its shape without the batch."""

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], **inputs: Tensor) -> dict[str, Tensor]:
        """x_BCHW float, normalised -> the wanted features, by name. `mask_BN` (bool) is the one optional input."""


@dataclass(frozen=True)
class Published:
    """A checkpoint that its authors published: what is needed to build it without its files, and what was claimed."""

    repo: str  # org/name on the hub
    architecture: str  # the reference class in its config.json
    config: Mapping[str, Any]  # what its config.json says beyond the family's defaults
    preprocessor: Mapping[str, Any]  # its preprocessor_config.json
    parameters: int
    gmacs: float  # multiply-accumulates of one image at `image_size`, in 1e9
    image_size: int
    accuracy: str = ""  # as published, with its source


class Family(Protocol):
    """What a family's module file offers to the loader, as module-level names."""

    MODEL_TYPE: str  # `model_type` in config.json; of several, the one that the family is listed under
    PREFIX: str | tuple[str, ...]  # base prefix that names on disk may have, per key: "levit."
    PROCESSOR: str  # image processor class when preprocessor_config.json is absent or names none
    EMBEDDING: str  # one sentence: what `pooled` means
    KEYS: Mapping[str, str]  # name on disk (prefix stripped, `{}` for each number) -> our name, every dialect.
    # A key covers itself and whatever follows a dot (`.weight`); the longest one that fits is taken.
    UNUSED: tuple[str, ...]  # fnmatch patterns of names on disk (prefix stripped) that inference does not read
    HEADS: Mapping[str, tuple[str, ...]]  # reference class -> the names that `build` looks for in its files (for
    # `weights: random(seed)`, where there are no files to look into)
    PUBLISHED: tuple[Published, ...]

    def read_settings(self, config: Mapping[str, Any], size_HW: tuple[int, int]) -> Any:
        """config.json, and the size of what reaches the model -> the family's frozen Settings. Unknown keys are
        tolerated; a value that cannot work, or a size that the architecture cannot take, raises CheckpointError with
        what, where and what to try."""

    def build(self, settings: Any, names: frozenset[str]) -> Backbone:
        """The plain, readable module, with the heads that the checkpoint has: `names` are the names on disk, prefix
        stripped. Built under `torch.device("meta")` by the loader, then filled all or nothing; a buffer that is not
        on disk must be made with an explicit `device="cpu"`, or later."""

    def fold(self, module: Backbone, dtype: Any) -> Backbone:
        """The fast form of a filled plain module: whatever depends only on weights is computed once, in float64 or
        float32, then cast to `dtype`, on the device where the module's weights are. Equal within the tolerance that
        its test states."""
