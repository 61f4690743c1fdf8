"""Load checkpoints as models that turn images into named features. Importing this loads no torch.

`family.py` lists the families (`FAMILIES`) and says what a new one must offer; each family has one file. `external.py`
runs models of transformers and timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from img2parquet.errors import InputError
from img2parquet.models.family import FAMILIES, Backbone, Card, Family, Mode, ModelSpec, Published

if TYPE_CHECKING:
    from img2parquet.models.model import Model

__all__ = [
    "FAMILIES", "Backbone", "Card", "Family", "Mode", "ModelSpec", "Published", "load_model", "published", "read_card",
]  # fmt: skip


def load_model(
    model: str | ModelSpec,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    fast: bool = True,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    storage_options: Mapping[str, object] | None = None,
    preprocess: Mode = "exact",
) -> Model:
    """Load a checkpoint as a callable from images to features.

    model: a folder, the URI of one, `org/name@revision`, `transformers:` before any of these, or `timm:<name>`; or a
        ModelSpec, which then holds the last five arguments.
    dtype: float32, bfloat16, float16 or auto (bfloat16 where the device multiplies matrices in it, float16 on a
        T4 or V100, else float32).
    fast: False keeps the plain form of the model.
    image_size: size of the images that reach the model; default: the checkpoint's own.
    weights: `random(0)` builds a published model without its files.
    preprocess: `pil` makes the pixels of the processor's PIL backend, or of timm; default: of its torchvision backend.

    Raises UnknownModel, CheckpointError, MissingDependency, StorageError, and InputError for a dtype or device that
    cannot be used."""
    from img2parquet.models import model as loader

    if isinstance(model, str):
        model = ModelSpec(model, name, image_size, weights, storage_options or {}, preprocess)
    elif preprocess != "exact" or any(field is not None for field in (name, image_size, weights, storage_options)):
        fields = "name, image_size, weights, storage_options and preprocess"
        raise InputError(f"{fields} must be given in the ModelSpec, not beside it")
    return loader.load_model(model, dtype, device, fast)


def read_card(model: str | ModelSpec) -> Card:
    """Return what `load_model(model).card` would be, without loading the weights (they are hashed).

    Raises UnknownModel, CheckpointError, MissingDependency, StorageError."""
    from img2parquet.models import model as loader

    return loader.open_checkpoint(ModelSpec(model) if isinstance(model, str) else model).card()


def published() -> list[tuple[Family, Published]]:
    """List every checkpoint that a family knows by name, for the catalog."""
    from img2parquet.models import model as loader

    return loader.published()
