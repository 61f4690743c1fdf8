"""Features to columns: one file per output kind, one line each in `OUTPUTS`. Importing any of them loads no torch.

An output is a frozen settings model (an entry of the job's `outputs:`) with the methods below. It reduces on the
device first (top-k, argmax, normalise) and moves to the host only what becomes a column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import OutputUnavailable, PartFailed, nearest
from pipeline.models import Card

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

OUTPUTS = {
    "embedding": ("pipeline.outputs.embedding", "Embedding"),
    "logits": ("pipeline.outputs.logits", "Logits"),
    "labels": ("pipeline.outputs.labels", "Labels"),
    "tokens": ("pipeline.outputs.tokens", "Tokens"),
    "feature_maps": ("pipeline.outputs.feature_maps", "FeatureMaps"),
    "attentions": ("pipeline.outputs.attentions", "Attentions"),
    "segmentation": ("pipeline.outputs.segmentation", "Segmentation"),
    "visual_tokens": ("pipeline.outputs.visual_tokens", "VisualTokens"),
    "loss": ("pipeline.outputs.loss", "Loss"),
}


@dataclass(frozen=True)
class BatchRows:
    """What an output may know of the rows behind a batch, in the batch's order. `sizes_HW` are the source images'."""

    keys: Sequence[str]
    sizes_HW: Sequence[tuple[int, int]]
    passthrough: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Output(Protocol):
    """What every output kind offers. `kind`, `name` and the other fields are what a job file says."""

    @property
    def kind(self) -> str: ...

    def column_names(self) -> tuple[str, ...]:
        """The columns, before any model is known: a job is refused when two outputs of a model share one."""

    def columns_read(self) -> tuple[str, ...]:
        """The passthrough columns that this output needs: a job that does not keep them is refused."""

    def wants(self, card: Card) -> frozenset[str]:
        """Features to ask of the model. Raises OutputUnavailable, naming what the checkpoint can give."""

    def fields(self, card: Card) -> list[pa.Field]:
        """The columns' Arrow fields; tensors are flat lists with `shape` in the field's metadata. None is nullable but
        a loss, which a row without a truth does not have."""

    def bytes_per_row(self, card: Card) -> int:
        """An upper bound of what one row adds to a part."""

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        """Further inputs of the forward pass (a mask); most outputs need none."""

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        """One array per field, each as long as the batch. Raises PartFailed, naming the row's key, for features that
        are not finite in the column's type: they are never written."""


ColumnName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
FloatType = Literal["float32", "float16"]
ARROW_FLOATS = {"float32": pa.float32(), "float16": pa.float16()}
FLOAT_BYTES = {"float32": 4, "float16": 2}


class OutputSettings(BaseModel):
    """What every output's settings have in common: they cannot change, and a field that is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def columns_read(self) -> tuple[str, ...]:
        return ()

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        return {}


class TensorOutput(OutputSettings):
    """Features that are written as they are: one flat column for each, with its shape in the field's metadata.

    A subclass says which feature fills which column. Values that are not finite, or that float16 cannot hold, fail
    the part and are never written: a vector with a NaN in it poisons every index that it is put into."""

    dtype: FloatType = Field(
        "float32", description="Type of the stored values. A value beyond 65504 fails the part under float16."
    )

    def features_of_columns(self) -> dict[str, str]:
        """Column -> the feature that fills it, in the columns' order."""
        raise NotImplementedError

    def column_names(self) -> tuple[str, ...]:
        return tuple(self.features_of_columns())

    def wants(self, card: Card) -> frozenset[str]:
        wanted = self.features_of_columns().values()
        for feature in wanted:
            require(card, feature, wanted_by=f"output `{type(self).model_fields['kind'].default}`")
        return frozenset(wanted)

    def fields(self, card: Card) -> list[pa.Field]:
        wanted = self.features_of_columns().items()
        return [tensor_field(column, card.gives[feature], self.dtype) for column, feature in wanted]

    def bytes_per_row(self, card: Card) -> int:
        shapes = [card.gives[feature] for feature in self.features_of_columns().values()]
        return sum(tensor_bytes(shape, self.dtype) for shape in shapes)

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        wanted = self.features_of_columns().items()
        return [tensor_column(column, to_host(features[feature], self.dtype), rows) for column, feature in wanted]


def require(card: Card, feature: str, *, wanted_by: str) -> None:
    """Raises OutputUnavailable, naming what the checkpoint can give, where it cannot give `feature`."""
    if feature in card.gives:
        return
    kind = feature.partition(":")[0]
    alike = [name for name in card.gives if name.partition(":")[0] == kind]
    message = f"{wanted_by} needs `{feature}`, which model `{card.name}` ({card.family}) does not give"
    raise OutputUnavailable(message, known=sorted(card.gives), hint=nearest(feature, alike))


def passthrough_column(column: str, rows: BatchRows) -> Sequence[Any]:
    """One value for each row. Raises PartFailed where the column is not kept."""
    if column not in rows.passthrough:
        raise PartFailed(f"no passthrough column `{column}`", known=tuple(rows.passthrough), hint="`keep` it")
    return rows.passthrough[column]


def tensor_field(name: str, shape: Sequence[int], dtype: FloatType) -> pa.Field:
    """A plain FixedSizeList: DuckDB, Polars, Spark, FAISS and Lance read it, unlike extension types."""
    values = pa.list_(ARROW_FLOATS[dtype], math.prod(shape))
    return pa.field(name, values, nullable=False, metadata={"shape": json.dumps(list(shape))})


def tensor_bytes(shape: Sequence[int], dtype: FloatType) -> int:
    """An upper bound for one row of a tensor: its values, one bit each for Parquet's repetition levels, and levels
    that start a new run."""
    size = math.prod(shape)
    return size * FLOAT_BYTES[dtype] + size // 8 + 16


def to_host(feature: Tensor, dtype: FloatType) -> npt.NDArray[np.floating[Any]]:
    """(B, ...) on any device -> (B, N) in memory. Narrowed before it is moved."""
    import torch

    from pipeline.device import to_host as moved

    narrow = feature.detach().to(torch.float16 if dtype == "float16" else torch.float32)
    host: npt.NDArray[np.floating[Any]] = moved(narrow.flatten(start_dim=1)).numpy()
    return host


def tensor_column(name: str, values_BN: npt.NDArray[np.floating[Any]], rows: BatchRows) -> pa.Array:
    """(B, N) of float32 or float16 -> a FixedSizeList column; raises PartFailed for what is not finite."""
    import numpy as np

    finite_B = np.isfinite(values_BN).all(axis=1)
    if not finite_B.all():
        raise not_finite(name, [rows.keys[int(i)] for i in np.flatnonzero(~finite_B)], str(values_BN.dtype))
    return pa.FixedSizeListArray.from_arrays(pa.array(values_BN.reshape(-1)), values_BN.shape[1])


def not_finite(column: str, keys: Sequence[str], dtype: str) -> PartFailed:
    """The error for features that are NaN, infinite or too large for the column's type."""
    more = f" and {len(keys) - 1} more rows of its batch" if len(keys) > 1 else ""
    message = f"column `{column}`: the model's values for `{keys[0]}`{more} are not finite in {dtype}"
    return PartFailed(message, hint="compute and store in float32: `dtype: float32` of the job and of the output")
