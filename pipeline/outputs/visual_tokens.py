"""Scores over a visual vocabulary -> the best codes of each masked patch (masked image modelling).

Shapes: B batch, N patches, M masked patches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, not_finite
from pipeline.outputs.masking import Mask, MaskSettings

if TYPE_CHECKING:
    from torch import Tensor

PATCH = pa.struct(
    [
        pa.field("patch", pa.int32(), nullable=False),
        pa.field("codes", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("scores", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
    ]
)
PATCHES = pa.list_(pa.field("element", PATCH, nullable=False))


class VisualTokens(MaskSettings):
    """(B, N, V) -> for each masked patch its place in the grid (row by row from 0), the codes with the best scores,
    best first, and their softmax scores. Without a mask, for every patch."""

    kind: Literal["visual_tokens"] = "visual_tokens"
    name: ColumnName = Field(default="visual_tokens", description="The column.")
    top_k: int = Field(default=1, ge=1, description="How many codes for each patch at most.")

    def column_names(self) -> tuple[str, ...]:
        return (self.name,)

    def wants(self, card: Card) -> frozenset[str]:
        self.require_visual_tokens(card, "output `visual_tokens`")
        return frozenset(["visual_tokens"])

    def fields(self, card: Card) -> list[pa.Field]:
        return [pa.field(self.name, PATCHES, nullable=False)]

    def bytes_per_row(self, card: Card) -> int:
        N, V = card.gives["visual_tokens"]
        most = N if self.mask_column is not None or not self.masks else self.count_masked(N)
        return most * (16 + 10 * min(self.top_k, V)) + 16

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        return self.mask_inputs(card, rows)

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        patches: list[list[dict[str, Any]]] = []
        for key, scores_NV, mask_N in zip(rows.keys, features["visual_tokens"], self.mask_BN(card, rows), strict=True):
            if not bool(scores_NV.isfinite().all()):
                raise not_finite(self.name, [key], "float32")
            patches.append(self._best(scores_NV, mask_N))
        return [pa.array(patches, PATCHES)]

    def _best(self, scores_NV: Tensor, mask_N: Mask) -> list[dict[str, Any]]:
        import torch

        places_M = np.flatnonzero(mask_N)
        scores_MV = scores_NV.detach()[torch.from_numpy(places_M).to(scores_NV.device)].float()
        # stable: of equal scores the lower code, whatever the device
        order_MV = scores_MV.sort(dim=1, descending=True, stable=True).indices
        codes_Mk = order_MV[:, : self.top_k]
        best_Mk = scores_MV.softmax(1).gather(1, codes_Mk)
        rows = zip(places_M.tolist(), codes_Mk.tolist(), best_Mk.tolist(), strict=True)
        return [{"patch": place, "codes": codes, "scores": scores} for place, codes, scores in rows]
