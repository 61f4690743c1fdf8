"""Write the best codes of each masked patch, from scores over a visual vocabulary (masked image modelling).

Shapes: B batch, N patches, M masked patches, V vocabulary, k best codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from img2parquet.models import Card
from img2parquet.outputs import BatchRows, ColumnName, not_finite_error
from img2parquet.outputs.masking import Mask, MaskSettings

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
    """Write the best codes of masked patches: (B, N, V) -> list<struct<patch, codes, scores>>.

    `patch` is the index in the grid, row by row from 0; `codes` are those with the best softmax scores, best first.
    Without a mask, all patches are written."""

    kind: Literal["visual_tokens"] = "visual_tokens"
    name: ColumnName = Field(default="visual_tokens", description="Column name.")
    top_k: int = Field(default=1, ge=1, description="Maximum number of codes per patch.")

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
        finite_B = features["visual_tokens"].isfinite().flatten(1).all(1).tolist()
        if not all(finite_B):
            raise not_finite_error(self.name, [row for row, finite in enumerate(finite_B) if not finite], "float32")
        for scores_NV, mask_N in zip(features["visual_tokens"], self.mask_BN(card, rows), strict=True):
            patches.append(self._best(scores_NV, mask_N))
        return [pa.array(patches, PATCHES)]

    def _best(self, scores_NV: Tensor, mask_N: Mask) -> list[dict[str, Any]]:
        import torch

        places_M = np.flatnonzero(mask_N)
        scores_MV = scores_NV.detach()[torch.from_numpy(places_M).to(scores_NV.device)].float()
        # stable: the lower of equally scored codes comes first on any device
        order_MV = scores_MV.sort(dim=1, descending=True, stable=True).indices
        codes_Mk = order_MV[:, : self.top_k]
        best_Mk = scores_MV.softmax(1).gather(1, codes_Mk)
        rows = zip(places_M.tolist(), codes_Mk.tolist(), best_Mk.tolist(), strict=True)
        return [{"patch": place, "codes": codes, "scores": scores} for place, codes, scores in rows]
