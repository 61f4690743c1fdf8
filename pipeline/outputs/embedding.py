"""Pooled features -> one vector a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, TensorOutput, tensor_column, to_host

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

FEATURES = {"model": "pooled", "cls": "pooled:cls", "mean": "pooled:mean"}


class Embedding(TensorOutput):
    """A vector for search, clustering or a probe: (B, D) -> FixedSizeList of D."""

    kind: Literal["embedding"] = "embedding"
    name: ColumnName = Field("embedding", description="The column.")
    pool: Literal["model", "cls", "mean"] = Field(
        "model",
        description="`model`: the family's own image vector, as `img2parquet models` says; `cls`: the class token; "
        "`mean`: the mean over the patches.",
    )
    normalize: Literal["none", "l2"] = Field("none", description="`l2`: every vector has length 1 (zero stays zero).")

    def features_of_columns(self) -> dict[str, str]:
        return {self.name: FEATURES[self.pool]}

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        if self.normalize == "none":
            return super().columns(card, features, rows)
        unit_BD = unit_length(to_host(features[FEATURES[self.pool]], "float32"))
        return [tensor_column(self.name, unit_BD.astype(self.dtype), rows)]


def unit_length(values_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Rows divided by their length. In float64, where the squares of no float32 overflow or vanish."""
    import numpy as np

    wide_BD = values_BD.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, which the column refuses by the row's key
        length_B1 = np.linalg.norm(wide_BD, axis=1, keepdims=True)
        unit_BD: npt.NDArray[np.floating[Any]] = wide_BD / np.where(length_B1 == 0, 1, length_B1)
    return unit_BD.astype(np.float32)
