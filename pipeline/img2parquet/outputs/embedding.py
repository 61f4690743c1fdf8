"""Write one pooled vector per row: as floats, as 8-bit integers with one scale, or as sign bits.

- The scale of `int8` depends only on the number of values D, so equal images have equal bytes in every part. The
  components of a vector of length 1 are about 1/sqrt(D); 127 stands for INT8_REACH times that.
- The field's metadata says how both encodings are decoded; `img2parquet.decode_vectors` does it.

Shapes: B batch, D values of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from img2parquet.errors import OutputUnavailable
from img2parquet.models import Card
from img2parquet.outputs import BatchRows, ColumnName, feature_to_numpy, tensor_column
from img2parquet.outputs.masking import MaskableOutput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

INT8_REACH = 6.0  # demo vectors reach 4.1; recall@10 falls as this grows: 0.980 at 4, 0.973 at 6, 0.947 at 12
NEVER_NEGATIVE = {"bit"}  # pooled after a ReLU: recall@10 of the sign bits was 0.06
FEATURES = {"model": "pooled", "cls": "pooled:cls", "mean": "pooled:mean", "tower": "pooled:tower"}


class Embedding(MaskableOutput):
    """Write a vector for search, clustering or a probe: (B, D) -> FixedSizeList of D (D/8 bytes for `binary`)."""

    kind: Literal["embedding"] = "embedding"
    name: ColumnName = Field("embedding", description="Column name.")
    pool: Literal["model", "cls", "mean", "tower"] = Field(
        "model",
        description="`model`: the family's own image vector, described by `img2parquet models`; `cls`: the class "
        "token; `mean`: the mean over the patches; `tower`: the vector of CLIP's or SigLIP's image tower before it is "
        "projected into the space shared with text.",
    )
    normalize: Literal["none", "l2"] = Field(
        "none", description="`l2`: scale every vector to length 1 (a zero vector stays zero)."
    )
    dtype: Literal["float32", "float16", "int8", "binary"] = Field(  # type: ignore[assignment]  # adds two types
        "float32",
        description="Type of the stored values. `int8`: a third of float32's file size, needs `normalize: l2`; "
        "`binary`: one bit per value, its sign; both cost recall (infra/bench/results/recall.md). With float16, a "
        "value beyond 65504 fails the part.",
    )

    @model_validator(mode="after")
    def _has_a_scale(self) -> Embedding:
        if self.dtype == "int8" and self.normalize != "l2":
            raise ValueError("`dtype: int8` uses one scale for all vectors, so it needs `normalize: l2`")
        return self

    def wants(self, card: Card) -> frozenset[str]:
        if self.dtype == "binary" and card.family in NEVER_NEGATIVE:
            message = f"output `embedding`: the vectors of model `{card.name}` ({card.family}) have no negative values"
            hint = "use `dtype: int8` or `dtype: float16`"
            raise OutputUnavailable(message + ", so their sign bits carry no information", hint=hint)
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
        values_BD = feature_to_numpy(features[FEATURES[self.pool]], "float32")
        if self.normalize == "l2":
            values_BD = unit_length(values_BD)
        if self.dtype in ("int8", "binary"):
            tensor_column(self.name, values_BD, rows)  # refuses a NaN, which the encoding would turn into a number
            codes_BN = int8_codes(values_BD) if self.dtype == "int8" else sign_bits(values_BD)
            return [pa.FixedSizeListArray.from_arrays(pa.array(codes_BN.reshape(-1)), codes_BN.shape[1])]
        return [tensor_column(self.name, values_BD.astype(self.dtype), rows)]


def int8_scale(D: int) -> float:
    """Return the value of one step of an 8-bit component, for vectors of D values and length 1."""
    return float(min(1.0, INT8_REACH / D**0.5) / 127)


def int8_codes(unit_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int8]:
    """Round vectors of length 1 to the nearest int8 steps, clipping components beyond the scale: (B, D) -> (B, D)."""
    import numpy as np

    steps_BD = np.rint(unit_BD.astype(np.float64) / int8_scale(unit_BD.shape[1]))
    codes_BD: npt.NDArray[np.int8] = np.clip(steps_BD, -127, 127).astype(np.int8)
    return codes_BD


def sign_bits(values_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Pack signs into bytes, the first value in the highest bit as in FAISS and numpy: (B, D) -> (B, ceil(D / 8))."""
    import numpy as np

    return np.packbits(values_BD > 0, axis=1)


def _field(name: str, value: pa.DataType, size: int, D: int, **more: str) -> pa.Field:
    metadata = {"shape": json.dumps([D]), "encoding": "int8" if value == pa.int8() else "binary", **more}
    return pa.field(name, pa.list_(value, size), nullable=False, metadata=metadata)


def unit_length(values_BD: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Divide rows by their length; zero rows stay zero: (B, D) -> (B, D) float32.

    Computed in float64, where the square of no float32 overflows or vanishes."""
    import numpy as np

    wide_BD = values_BD.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, which the column refuses and reports with the row's key
        length_B1 = np.linalg.norm(wide_BD, axis=1, keepdims=True)
        unit_BD: npt.NDArray[np.floating[Any]] = wide_BD / np.where(length_B1 == 0, 1, length_B1)
    return unit_BD.astype(np.float32)
