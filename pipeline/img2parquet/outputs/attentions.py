"""Write attention weights, one column for each chosen layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from img2parquet.outputs import ColumnName
from img2parquet.outputs.masking import MaskableOutput


class Attentions(MaskableOutput):
    """Write each query's attention weights over the keys: (B, H, T, T) -> FixedSizeList of H x T x T.

    Layer k is in the column `attentions_<k>`."""

    kind: Literal["attentions"] = "attentions"
    name: ColumnName = Field("attentions", description="Prefix of the layers' column names.")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="Layers to write, from 0.")

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError(f"a layer is listed twice: {list(layers)}")
        return layers

    def features_of_columns(self) -> dict[str, str]:
        return {f"{self.name}_{k}": f"attentions:{k}" for k in self.layers}
