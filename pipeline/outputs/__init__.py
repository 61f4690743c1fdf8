"""Features to columns: one file per output kind, one line each in `OUTPUTS`. Importing any of them loads no torch.

An output is a frozen settings model (an entry of the job's `outputs:`) with the methods below. It reduces on the
device first (top-k, argmax, normalise) and moves to the host only what becomes a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from pipeline.models import Card

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = {
    "embedding": ("pipeline.outputs.embedding", "Embedding"),
    "logits": ("pipeline.outputs.logits", "Logits"),
    "labels": ("pipeline.outputs.labels", "Labels"),
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

    def wants(self, card: Card) -> frozenset[str]:
        """Features to ask of the model. Raises OutputUnavailable, naming what the checkpoint can give."""

    def fields(self, card: Card) -> list[pa.Field]:
        """The columns' Arrow fields, none nullable; tensors are flat lists with `shape` in the field's metadata."""

    def bytes_per_row(self, card: Card) -> int:
        """An upper bound of what one row adds to a part."""

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        """Further inputs of the forward pass (a mask); most outputs need none."""

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        """One array per field, each as long as the batch."""
