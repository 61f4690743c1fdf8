"""Pooled features -> one vector a row: as floats, as 8-bit integers with one scale, or as sign bits.

* The scale of `int8` depends on nothing but the length D, so equal images have equal bytes in every part: components of
  a vector of length 1 are about 1/sqrt(D), and INT8_REACH times that is the largest that 127 stands for.
* How both are decoded is in the field's metadata; `pipeline.decode_vectors` does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.errors import OutputUnavailable
from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, TensorOutput, tensor_column, to_host

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

INT8_REACH = 6.0  # demo vectors reach 4.1; recall@10 falls as this grows: 0.980 at 4, 0.973 at 6, 0.947 at 12
NEVER_NEGATIVE = {"bit"}  # pooled after a ReLU: recall@10 of the sign bits was 0.06
FEATURES = {"model": "pooled", "cls": "pooled:cls", "mean": "pooled:mean"}


class Embedding(TensorOutput):
    """A vector for search, clustering or a probe: (B, D) -> FixedSizeList of D, of D/8 bytes where it is `binary`."""

    kind: Literal["embedding"] = "embedding"
    name: ColumnName = Field("embedding", description="The column.")
    pool: Literal["model", "cls", "mean"] = Field(
        "model",
        description="`model`: the family's own image vector, as `img2parquet models` says; `cls`: the class token; "
        "`mean`: the mean over the patches.",
    )
    normalize: Literal["none", "l2"] = Field("none", description="`l2`: every vector has length 1 (zero stays zero).")
    dtype: Literal["float32", "float16", "int8", "binary"] = Field(  # type: ignore[assignment]  # two more than a tensor
        "float32",
        description="Type of the stored values. `int8`: a third of float32's file, needs `normalize: l2`; `binary`: "
        "one bit a value, its sign; both cost recall (infra/bench/results/recall.md). A value beyond 65504 fails the "
        "part under float16.",
    )

    @model_validator(mode="after")
    def _has_a_scale(self) -> Embedding:
        if self.dtype == "int8" and self.normalize != "l2":
            raise ValueError("`dtype: int8` has one scale for all vectors: it needs `normalize: l2`")
        return self

    def wants(self, card: Card) -> frozenset[str]:
        if self.dtype == "binary" and card.family in NEVER_NEGATIVE:
            message = f"output `embedding`: the vectors of model `{card.name}` ({card.family}) have no negative values"
            raise OutputUnavailable(message + ", so their sign bits say nothing", hint="store int8 or float16")
        return super().wants(card)

    def fields(self, card: Card) -> list[pa.Field]:
        D = card.gives[FEATURES[self.pool]][0]
        if self.dtype == "int8":
            return [
                _field(self.name, pa.int8(), D, D, scale=repr(int8_scale(D)), decode="value * scale, then to length 1")
            ]
        if self.dtype == "binary":
            rule = "bits from the highest of each byte; 1 is +1/sqrt(D), 0 is -1/sqrt(D)"
            return [_field(self.name, pa.uint8(), -(-D // 8), D, decode=rule)]
        return super().fields(card)

    def bytes_per_row(self, card: Card) -> int:
        if self.dtype in ("int8", "binary"):
            values = self.fields(card)[0].type.list_size
            return int(4 * values + values // 8 + 16)  # Parquet's smallest integer; zstd leaves a third of it
        return super().bytes_per_row(card)

    def features_of_columns(self) -> dict[str, str]:
        return {self.name: FEATURES[self.pool]}

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        if self.normalize == "none" and self.dtype != "binary":
            return super().columns(card, features, rows)
        values_BD = to_host(features[FEATURES[self.pool]], "float32")
        if self.normalize == "l2":
            values_BD = unit_length(values_BD)
        if self.dtype in ("int8", "binary"):
            tensor_column(self.name, values_BD, rows)  # a NaN would become a number
            codes_BN = int8_codes(values_BD) if self.dtype == "int8" else sign_bits(values_BD)
            return [pa.FixedSizeListArray.from_arrays(pa.array(codes_BN.reshape(-1)), codes_BN.shape[1])]
        return [tensor_column(self.name, values_BD.astype(self.dtype), rows)]


def int8_scale(D: int) -> float:
    """What one step of an 8-bit component is worth, for vectors of D values and length 1."""
    return float(min(1.0, INT8_REACH / D**0.5) / 127)


def int8_codes(unit_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int8]:
    """Vectors of length 1 -> int8, (B, D); the nearest step, and what is beyond the scale's reach at its end."""
    import numpy as np

    steps_BD = np.rint(unit_BD.astype(np.float64) / int8_scale(unit_BD.shape[1]))
    codes_BD: npt.NDArray[np.int8] = np.clip(steps_BD, -127, 127).astype(np.int8)
    return codes_BD


def sign_bits(values_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Signs packed in bytes, (B, ceil(D / 8)), the first value in the highest bit: what FAISS and numpy call packed."""
    import numpy as np

    return np.packbits(values_BD > 0, axis=1)


def _field(name: str, value: pa.DataType, size: int, D: int, **more: str) -> pa.Field:
    metadata = {"shape": json.dumps([D]), "encoding": "int8" if value == pa.int8() else "binary", **more}
    return pa.field(name, pa.list_(value, size), nullable=False, metadata=metadata)


def unit_length(values_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Rows divided by their length. In float64, where the squares of no float32 overflow or vanish."""
    import numpy as np

    wide_BD = values_BD.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, which the column refuses by the row's key
        length_B1 = np.linalg.norm(wide_BD, axis=1, keepdims=True)
        unit_BD: npt.NDArray[np.floating[Any]] = wide_BD / np.where(length_B1 == 0, 1, length_B1)
    return unit_BD.astype(np.float32)
