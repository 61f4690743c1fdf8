"""Turn a model's features into result columns: one file per output kind, one line each in `OUTPUTS`.

To add an output:

1. Write `outputs/<kind>.py` with a settings class: an entry of the job's `outputs:`. Derive it from `TensorOutput` if
   it writes features as they are (`logits.py` is the shortest example), else from `OutputSettings` (see `labels.py`).
   Declare `kind: Literal["<kind>"] = "<kind>"`. Every other field needs a description: `img2parquet schema` shows it.
2. Implement the methods of the protocol `Output` below. Reduce on the device first (top-k, argmax, normalise), and move
   only what becomes a column to the host. Import torch inside functions: importing an output must not load torch.
3. Add a line to `OUTPUTS`. The job file then accepts the kind, and `tests/outputs/test_outputs.py` tests it; list its
   settings there in `VARIANTS`.

The files:

    embedding.py      write a pooled vector: floats, 8-bit integers or sign bits
    logits.py         write the raw scores of a classification head
    labels.py         write the best classes with names and scores
    tokens.py         write hidden states
    feature_maps.py   write the stages of a convolutional backbone
    attentions.py     write attention weights
    segmentation.py   write masks of class ids, and pixel counts
    visual_tokens.py  write the best codes of masked patches
    loss.py           compare with a ground-truth column
    score_function.py read what the scores of a classification head mean
    ground_truth.py   parse and check the values of a ground-truth column
    masking.py        choose the patches that are masked
    resize_maps.py    upsample class maps, a few classes at a time
    vectors.py        decode a stored vector column to numpy

Shapes: B batch, N values of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from img2parquet.errors import NotFinite, OutputUnavailable, PartFailed, nearest
from img2parquet.models import Card

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

OUTPUTS = {
    "embedding": ("img2parquet.outputs.embedding", "Embedding"),
    "logits": ("img2parquet.outputs.logits", "Logits"),
    "labels": ("img2parquet.outputs.labels", "Labels"),
    "tokens": ("img2parquet.outputs.tokens", "Tokens"),
    "feature_maps": ("img2parquet.outputs.feature_maps", "FeatureMaps"),
    "attentions": ("img2parquet.outputs.attentions", "Attentions"),
    "segmentation": ("img2parquet.outputs.segmentation", "Segmentation"),
    "visual_tokens": ("img2parquet.outputs.visual_tokens", "VisualTokens"),
    "loss": ("img2parquet.outputs.loss", "Loss"),
}


@dataclass(frozen=True)
class BatchRows:
    """The rows behind a batch, in the batch's order, as far as outputs may depend on them.

    `keys` are the rows' keys, `sizes_HW` the heights and widths of their source images in pixels, and `passthrough` has
    the values of each passthrough column by name."""

    keys: Sequence[str]
    sizes_HW: Sequence[tuple[int, int]]
    passthrough: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Output(Protocol):
    """The interface of an output kind: a frozen settings object that declares, sizes and computes its columns.

    A `card` describes a model: `card.gives` maps each feature that the checkpoint can give to its shape without the
    batch dimension, such as `{"pooled": (384,), "logits": (1000,)}`. For each model of a job, `column_names`,
    `columns_read`, `wants`, `fields` and `bytes_per_row` are called before anything is read, `inputs` and `columns` for
    every batch, by several threads at once."""

    @property
    def kind(self) -> str:
        """The name of the output in job files; a key of `OUTPUTS`."""

    def column_names(self) -> tuple[str, ...]:
        """Return the names of the columns it writes, whatever the model.

        A job whose outputs share a column name within one model is refused."""

    def columns_read(self) -> tuple[str, ...]:
        """Return the passthrough columns that it reads. A job that does not keep them is refused."""

    def wants(self, card: Card) -> frozenset[str]:
        """Return the features that it needs from the model, as keys of `card.gives`.

        Raises OutputUnavailable, with the features that the checkpoint can give, when one is missing."""

    def fields(self, card: Card) -> list[pa.Field]:
        """Return the Arrow fields of the columns, in the order of `column_names`.

        Tensors are flat FixedSizeLists with their `shape` as JSON in the field's metadata. No field is nullable, except
        a loss: a row without ground truth has none."""

    def bytes_per_row(self, card: Card) -> int:
        """Return an upper bound, in bytes, for what one row adds to an uncompressed Parquet file.

        The planner sizes part files with it."""

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        """Return inputs of the forward pass besides the pixels, such as a mask; most outputs need none.

        An output with inputs gets a forward pass of its own. Raises PartFailed when a row has none or a bad one."""

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        """Compute the columns: one array per field, each with one value per row of the batch.

        `features` are those that `wants` named, each (B, *card.gives[name]) on the model's device and in its dtype.
        Raises NotFinite, with the rows, for values that are not finite in the column's type. It is called again without
        these rows, which are rejected. Raises PartFailed for ground truth that cannot be interpreted."""


ColumnName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
FloatType = Literal["float32", "float16"]
ARROW_FLOATS = {"float32": pa.float32(), "float16": pa.float16()}
FLOAT_BYTES = {"float32": 4, "float16": 2}


class OutputSettings(BaseModel):
    """The base of all output settings: immutable, without unknown fields, reading no column and adding no input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def columns_read(self) -> tuple[str, ...]:
        return ()

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        return {}


class TensorOutput(OutputSettings):
    """Write features as they are: one flat column for each, with its shape in the field's metadata.

    Rows with values that are not finite, or that float16 cannot hold, are rejected: a vector with a NaN poisons every
    index that it is put into."""

    dtype: FloatType = Field(
        "float32",
        description="Type of the stored values. With float16, an image with a value beyond 65504 is rejected.",
    )

    def features_of_columns(self) -> dict[str, str]:
        """Return the feature that fills each column, by column name and in the order of the columns."""
        raise NotImplementedError

    def column_names(self) -> tuple[str, ...]:
        return tuple(self.features_of_columns())

    def wants(self, card: Card) -> frozenset[str]:
        wanted = self.features_of_columns().values()
        for feature in wanted:
            require_feature(card, feature, wanted_by=f"output `{type(self).model_fields['kind'].default}`")
        return frozenset(wanted)

    def fields(self, card: Card) -> list[pa.Field]:
        wanted = self.features_of_columns().items()
        return [tensor_field(column, card.gives[feature], self.dtype) for column, feature in wanted]

    def bytes_per_row(self, card: Card) -> int:
        shapes = [card.gives[feature] for feature in self.features_of_columns().values()]
        return sum(tensor_bytes(shape, self.dtype) for shape in shapes)

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        wanted = self.features_of_columns().items()
        return [
            tensor_column(column, feature_to_numpy(features[feature], self.dtype), rows) for column, feature in wanted
        ]


def require_feature(card: Card, feature: str, *, wanted_by: str) -> None:
    """Check that the checkpoint can give `feature`. Raises OutputUnavailable, with those it can give, when not."""
    if feature in card.gives:
        return
    kind = feature.partition(":")[0]
    alike = [name for name in card.gives if name.partition(":")[0] == kind]
    message = f"{wanted_by} needs `{feature}`, which model `{card.name}` ({card.family}) does not give"
    raise OutputUnavailable(message, known=sorted(card.gives), hint=nearest(feature, alike))


def require_class_names(card: Card, *, wanted_by: str) -> None:
    """Check that config.json's `id2label`, if it has one, names the classes 0, 1, ... Raises OutputUnavailable."""
    if card.config.get("id2label") and not card.labels:
        ids = ", ".join(list(map(str, card.config["id2label"]))[:3])
        message = f"{wanted_by}: `id2label` in config.json of model `{card.name}` does not count from 0: {ids}, ..."
        raise OutputUnavailable(message, hint="correct its ids, or use an output that needs no names, as `logits`")


def passthrough_column(column: str, rows: BatchRows) -> Sequence[Any]:
    """Return a passthrough column: one value for each row. Raises PartFailed when the job does not keep the column."""
    if column not in rows.passthrough:
        hint = f"add `{column}` to `input.keep`"
        raise PartFailed(f"no passthrough column `{column}`", known=tuple(rows.passthrough), hint=hint)
    return rows.passthrough[column]


def tensor_field(name: str, shape: Sequence[int], dtype: FloatType) -> pa.Field:
    """Declare a tensor column as a plain FixedSizeList with its shape in the metadata.

    DuckDB, Polars, Spark, FAISS and Lance read this type, unlike Arrow's extension types."""
    values = pa.list_(ARROW_FLOATS[dtype], math.prod(shape))
    return pa.field(name, values, nullable=False, metadata={"shape": json.dumps(list(shape))})


def tensor_bytes(shape: Sequence[int], dtype: FloatType) -> int:
    """Return an upper bound, in bytes, for one row of a tensor column.

    It covers the values, one bit each for Parquet's repetition levels, and levels that start a new run."""
    size = math.prod(shape)
    return size * FLOAT_BYTES[dtype] + size // 8 + 16


def feature_to_numpy(feature: Tensor, dtype: FloatType) -> npt.NDArray[np.floating[Any]]:
    """Flatten and convert a feature, then move it to host memory: (B, ...) on any device -> (B, N) in numpy.

    It is converted on the device, so that float16 moves half the bytes."""
    import torch

    from img2parquet.models.tensors import to_host

    narrow = feature.detach().to(torch.float16 if dtype == "float16" else torch.float32)
    host: npt.NDArray[np.floating[Any]] = to_host(narrow.flatten(start_dim=1)).numpy()
    return host


def tensor_column(name: str, values_BN: npt.NDArray[np.floating[Any]], rows: BatchRows) -> pa.Array:
    """Make a FixedSizeList column of (B, N) float32 or float16. Raises NotFinite."""
    import numpy as np

    finite_B = np.isfinite(values_BN).all(axis=1)
    if not finite_B.all():
        raise not_finite_error(name, np.flatnonzero(~finite_B).tolist(), str(values_BN.dtype))
    return pa.FixedSizeListArray.from_arrays(pa.array(values_BN.reshape(-1)), values_BN.shape[1])


def not_finite_error(column: str, rows: Sequence[int], dtype: str) -> NotFinite:
    """Make the error for rows, by their indices in the batch, whose values `dtype` cannot hold or that are NaN."""
    return NotFinite(f"column `{column}`: the model's values are not finite in {dtype}", rows)
