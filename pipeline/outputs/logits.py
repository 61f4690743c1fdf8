"""The classification head's raw scores -> one vector a row."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.outputs import ColumnName, TensorOutput


class Logits(TensorOutput):
    """(B, K) -> FixedSizeList of K, before softmax; place k is class id k."""

    kind: Literal["logits"] = "logits"
    name: ColumnName = Field("logits", description="The column.")
    head: Literal["default", "cls", "distillation"] = Field(
        "default", description="`default`: the checkpoint's answer (LeViT: the mean of both heads); else one head."
    )

    def features_of_columns(self) -> dict[str, str]:
        return {self.name: "logits" if self.head == "default" else f"logits:{self.head}"}
