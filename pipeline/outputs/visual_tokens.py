"""Scores over a visual vocabulary -> the best codes of each masked patch (masked image modelling).

Shapes: B batch, N patches, M masked patches, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from pipeline.errors import OutputUnavailable, PartFailed
from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, OutputSettings, not_finite, require

if TYPE_CHECKING:
    from torch import Tensor

Mask = npt.NDArray[np.bool_]

PATCH = pa.struct(
    [
        pa.field("patch", pa.int32(), nullable=False),
        pa.field("codes", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("scores", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
    ]
)
PATCHES = pa.list_(pa.field("element", PATCH, nullable=False))


class VisualTokens(OutputSettings):
    """(B, N, V) -> for each masked patch its place in the grid (row by row from 0), the codes with the best scores,
    best first, and their softmax scores. Without a mask, for every patch."""

    kind: Literal["visual_tokens"] = "visual_tokens"
    name: ColumnName = Field(default="visual_tokens", description="The column.")
    top_k: int = Field(default=1, ge=1, description="How many codes for each patch at most.")
    mask_ratio: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Share of the patches that the model does not see, drawn for each image from `seed` and its key; "
        "0: it sees all, and every patch is written.",
    )
    seed: int = Field(default=0, ge=0, description="What the masks are drawn from.")
    mask_column: str | None = Field(
        default=None,
        description="A passthrough column with a list of one boolean for each patch, instead of `mask_ratio`.",
    )

    @property
    def masks(self) -> bool:
        return self.mask_column is not None or self.mask_ratio > 0

    def column_names(self) -> tuple[str, ...]:
        return (self.name,)

    def wants(self, card: Card) -> frozenset[str]:
        require(card, "visual_tokens", wanted_by="output `visual_tokens`")
        if self.masks and not card.config.get("use_mask_token"):
            raise OutputUnavailable(
                f"output `visual_tokens`: model `{card.name}` has no mask token to put in place of masked patches",
                hint="use `mask_ratio: 0`, or a checkpoint with `use_mask_token: true`",
            )
        return frozenset(["visual_tokens"])

    def fields(self, card: Card) -> list[pa.Field]:
        return [pa.field(self.name, PATCHES, nullable=False)]

    def bytes_per_row(self, card: Card) -> int:
        N, V = card.gives["visual_tokens"]
        most = N if self.mask_column is not None or not self.masks else self._masked(N)
        return most * (16 + 10 * min(self.top_k, V)) + 16

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        if not self.masks:
            return {}
        import torch

        return {"mask_BN": torch.from_numpy(self._mask(card, rows))}

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        patches: list[list[dict[str, Any]]] = []
        for key, scores_NV, mask_N in zip(rows.keys, features["visual_tokens"], self._mask(card, rows), strict=True):
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

    def _mask(self, card: Card, rows: BatchRows) -> Mask:
        """Which patches are masked, or, where none is, written: (B, N)."""
        N = card.gives["visual_tokens"][0]
        if self.mask_column is not None:
            given = self._given(self.mask_column, rows)
            masks = [_as_mask(value, N, self.mask_column, key) for key, value in zip(rows.keys, given, strict=True)]
        elif self.masks:
            masks = [drawn(key, self.seed, N, self._masked(N)) for key in rows.keys]
        else:
            masks = [np.ones(N, bool) for _ in rows.keys]
        return np.stack(masks) if masks else np.empty((0, N), bool)

    def _masked(self, N: int) -> int:
        return max(1, round(self.mask_ratio * N))

    def _given(self, column: str, rows: BatchRows) -> Any:
        if column not in rows.passthrough:
            known = tuple(rows.passthrough)
            raise PartFailed(f"output `visual_tokens`: no passthrough column `{column}`", known=known, hint="`keep` it")
        return rows.passthrough[column]


def drawn(key: str, seed: int, N: int, count: int) -> Mask:
    """`count` of N patches, drawn from the seed and the image's key alone. From a hash: a random generator's stream may
    change with its library's version."""
    draws_N = np.frombuffer(hashlib.shake_256(f"{seed}\0{key}".encode()).digest(8 * N), "<u8")
    mask_N = np.zeros(N, bool)
    mask_N[np.argsort(draws_N, kind="stable")[:count]] = True
    return mask_N


def _as_mask(value: Any, N: int, column: str, key: str) -> Mask:
    said = np.asarray([] if value is None else value)
    if said.shape != (N,) or not np.isin(said, (0, 1)).all():
        raise PartFailed(
            f"column `{column}` of `{key}` is not a mask: {N} booleans, one for each patch, row by row",
            hint="give a list for every image, or use `mask_ratio`",
        )
    return said.astype(bool)
