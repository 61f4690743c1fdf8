"""Attention weights -> one column for each layer asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.outputs import ColumnName, TensorOutput


class Attentions(TensorOutput):
    """(B, H, T, T), each query's weights over the keys -> FixedSizeList of H x T x T in `attentions_<k>`."""

    kind: Literal["attentions"] = "attentions"
    name: ColumnName = Field("attentions", description="What the layers' columns begin with.")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="Layers, from 0.")

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError(f"a layer is named twice: {list(layers)}")
        return layers

    def features_of_columns(self) -> dict[str, str]:
        return {f"{self.name}_{k}": f"attentions:{k}" for k in self.layers}
