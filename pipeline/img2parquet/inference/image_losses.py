"""Compare images at hand with their ground truth: images, labels -> the reference's loss of each image, (N,) float32.

The loss is that of the output `loss` of a job. Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from img2parquet.errors import InputError, PartFailed
from img2parquet.inference.embed_images import Floats, ImageLike, first_columns, loaded_model
from img2parquet.outputs.loss import Loss

if TYPE_CHECKING:
    from img2parquet.models import Mode
    from img2parquet.models.model import Model


def compute_loss(
    images: Iterable[ImageLike],
    labels: Sequence[Any],
    model: str | Model,
    *,
    of: Literal["auto", "classification", "segmentation", "visual_tokens"] = "auto",
    head: Literal["default", "cls", "distillation"] | None = None,
    reduce_labels: bool | None = None,
    mask: Sequence[Any] | None = None,
    preprocess: Mode = "exact",
    dtype: str | None = None,
    device: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
) -> Floats:
    """Compute the loss of each image against its label, (N,) float32: what transformers gives for that image alone.

    images, model, preprocess, dtype, device, image_size, weights, batch_size: as in `embed`.
    labels: one for each image. For a classifier a class id or name, or numbers for several labels or a regression; for
        a segmentation an array (H, W) of class ids, or the bytes of a PNG; for masked image modelling the codes of the
        patches. Arrays and tensors will do. None, or one that is ignored everywhere, gives NaN.
    of, head, reduce_labels: settings of the output `loss`.
    mask: for masked image modelling, which patches are hidden, row by row: 0 or 1 for each. Without it the model sees
        all of them, and all count.

    Raises InputError for an image or a label that cannot be used, with its index; ModelError when the model cannot be
    loaded; OutputUnavailable when it has no such head."""
    loaded = loaded_model(
        model, dtype=dtype, device=device, image_size=image_size, weights=weights, preprocess=preprocess
    )
    chosen = {"head": head, "reduce_labels": reduce_labels, "mask_column": None if mask is None else "mask"}
    given = {name: value for name, value in chosen.items() if value is not None}
    output = Loss.model_validate({"truth": "labels", "of": of, **given})
    if output.rule(loaded.card) == "visual_tokens" and mask is None:
        output = output.model_copy(update={"mask_ratio": 0.0})
    loaded.refuse_unknown(output.wants(loaded.card))
    passthrough = {"labels": [_plain(label) for label in labels]}
    passthrough |= {} if mask is None else {"mask": [_plain(one) for one in mask]}
    try:
        columns = list(first_columns(images, loaded, output, preprocess, batch_size, passthrough))
    except PartFailed as error:  # in a job, a column that cannot be understood fails a part
        raise InputError(error.message, known=error.known, hint=error.hint) from None
    losses = np.array([loss for column in columns for loss in column.to_pylist()], np.float32)
    for name, values in passthrough.items():
        if len(values) != len(losses):
            raise InputError(f"{name}: {len(values)} for {len(losses)} images", hint="give one for every image")
    return losses


def _plain(value: Any) -> Any:
    """Turn tensors and arrays into Python's numbers and lists; a map stays an array."""
    value = np.asarray(value) if hasattr(value, "__array__") else value
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim < 2 else value
