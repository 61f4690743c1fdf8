"""Which patches of an image the model does not see (masked image modelling): drawn, or given in a column.

Shapes: B batch, N patches.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.errors import OutputUnavailable, PartFailed
from pipeline.models import Card
from pipeline.outputs import BatchRows, OutputSettings, passthrough_column, require

if TYPE_CHECKING:
    from torch import Tensor

Mask = npt.NDArray[np.bool_]


class MaskSettings(OutputSettings):
    """The settings of an output that reads `visual_tokens` of masked patches, and the masks that they ask for."""

    mask_ratio: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Share of the patches that the model does not see, drawn for each image from `seed` and its key; "
        "0: it sees all, and every patch counts.",
    )
    seed: int = Field(default=0, ge=0, description="What the masks are drawn from.")
    mask_column: str | None = Field(
        default=None,
        description="A passthrough column with a list of one boolean for each patch, instead of `mask_ratio`.",
    )

    @property
    def masks(self) -> bool:
        return self.mask_column is not None or self.mask_ratio > 0

    def columns_read(self) -> tuple[str, ...]:
        return () if self.mask_column is None else (self.mask_column,)

    def require_visual_tokens(self, card: Card, wanted_by: str) -> None:
        """Raises OutputUnavailable for a checkpoint without that head, or without what stands for a masked patch."""
        require(card, "visual_tokens", wanted_by=wanted_by)
        if self.masks and not card.config.get("use_mask_token"):
            raise OutputUnavailable(
                f"{wanted_by}: model `{card.name}` has no mask token to put in place of masked patches",
                hint="use `mask_ratio: 0`, or a checkpoint with `use_mask_token: true`",
            )

    def mask_inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        """What the forward pass needs: nothing where the model sees all."""
        if not self.masks:
            return {}
        import torch

        return {"mask_BN": torch.from_numpy(self.mask_BN(card, rows))}

    def mask_BN(self, card: Card, rows: BatchRows) -> Mask:
        """Which patches are masked, or, where none is, all: (B, N)."""
        N = card.gives["visual_tokens"][0]
        if self.mask_column is not None:
            given = passthrough_column(self.mask_column, rows)
            masks = [_as_mask(value, N, self.mask_column, key) for key, value in zip(rows.keys, given, strict=True)]
        elif self.masks:
            masks = [drawn(key, self.seed, N, self.count_masked(N)) for key in rows.keys]
        else:
            masks = [np.ones(N, bool) for _ in rows.keys]
        return np.stack(masks) if masks else np.empty((0, N), bool)

    def count_masked(self, N: int) -> int:
        return max(1, round(self.mask_ratio * N))


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
