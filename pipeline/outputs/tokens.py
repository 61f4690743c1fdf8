"""Hidden states -> one column for each layer asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.outputs import ColumnName, TensorOutput


class Tokens(TensorOutput):
    """(B, T, D) -> FixedSizeList of T x D: `tokens` for the last hidden state, `tokens_<k>` for layer k."""

    kind: Literal["tokens"] = "tokens"
    name: ColumnName = Field("tokens", description="The column, and what the layers' columns begin with.")
    last: bool = Field(True, description="Write the last hidden state, after the model's final normalisation.")
    hidden_states: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="Layers to write as well, as the reference's `hidden_states[k]`: 0 is the embeddings' output."
    )

    @model_validator(mode="after")
    def _writes_something(self) -> Tokens:
        if not self.last and not self.hidden_states:
            raise ValueError("nothing to write: name layers in `hidden_states`, or leave `last: true`")
        if len(set(self.hidden_states)) < len(self.hidden_states):
            raise ValueError(f"`hidden_states` names a layer twice: {list(self.hidden_states)}")
        return self

    def features_of_columns(self) -> dict[str, str]:
        last = {self.name: "tokens"} if self.last else {}
        return last | {f"{self.name}_{k}": f"tokens:{k}" for k in self.hidden_states}
