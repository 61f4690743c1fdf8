"""Write the raw scores of a classification head, one vector per row."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from img2parquet.outputs import ColumnName, TensorOutput


class Logits(TensorOutput):
    """Write the scores before softmax, indexed by class id: (B, K) -> FixedSizeList of K."""

    kind: Literal["logits"] = "logits"
    name: ColumnName = Field("logits", description="Column name.")
    head: Literal["default", "cls", "distillation"] = Field(
        "default",
        description="`default`: the checkpoint's own prediction (LeViT: the mean of both heads); else the named head.",
    )

    def features_of_columns(self) -> dict[str, str]:
        return {self.name: "logits" if self.head == "default" else f"logits:{self.head}"}
