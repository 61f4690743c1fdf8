"""Write hidden states, one column for each chosen layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from img2parquet.outputs import ColumnName
from img2parquet.outputs.masking import MaskableOutput


class Tokens(MaskableOutput):
    """Write hidden states: (B, T, D) -> FixedSizeList of T x D.

    The last one is in the column `tokens`, that of layer k in `tokens_<k>`."""

    kind: Literal["tokens"] = "tokens"
    name: ColumnName = Field("tokens", description="Column name, and prefix of the layers' column names.")
    last: bool = Field(True, description="Write the last hidden state, after the model's final normalisation.")
    hidden_states: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="Layers to write as well, numbered as in the reference's `hidden_states[k]`: 0 is the output of "
        "the embedding layer.",
    )

    @model_validator(mode="after")
    def _writes_something(self) -> Tokens:
        if not self.last and not self.hidden_states:
            raise ValueError("nothing to write: list layers in `hidden_states`, or keep `last: true`")
        if len(set(self.hidden_states)) < len(self.hidden_states):
            raise ValueError(f"`hidden_states` lists a layer twice: {list(self.hidden_states)}")
        return self

    def features_of_columns(self) -> dict[str, str]:
        last = {self.name: "tokens"} if self.last else {}
        return last | {f"{self.name}_{k}": f"tokens:{k}" for k in self.hidden_states}
