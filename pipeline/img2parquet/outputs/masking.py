"""Choose the patches that are hidden from the model (masked image modelling): at random, or from a column.

Shapes: B batch, N patches.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from img2parquet.errors import OutputUnavailable, PartFailed
from img2parquet.models import Card
from img2parquet.outputs import BatchRows, OutputSettings, TensorOutput, passthrough_column, require_feature

if TYPE_CHECKING:
    from torch import Tensor

Mask = npt.NDArray[np.bool_]


class MaskSettings(OutputSettings):
    """Settings shared by outputs that read the `visual_tokens` of masked patches, and the masks they define."""

    mask_ratio: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Share of the patches that are hidden from the model, drawn for each image from `seed` and its "
        "key; 0: the model sees all patches, and all of them count.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random masks.")
    mask_column: str | None = Field(
        default=None,
        description="A passthrough column with a list of one boolean for each patch, used instead of `mask_ratio`.",
    )

    @property
    def masks(self) -> bool:
        """Whether any patch is hidden from the model."""
        return self.mask_column is not None or self.mask_ratio > 0

    def columns_read(self) -> tuple[str, ...]:
        return () if self.mask_column is None else (self.mask_column,)

    def require_visual_tokens(self, card: Card, wanted_by: str) -> None:
        """Check that the checkpoint has that head and a mask token. Raises OutputUnavailable when it does not."""
        require_feature(card, "visual_tokens", wanted_by=wanted_by)
        if self.masks and not card.config.get("use_mask_token"):
            raise OutputUnavailable(
                f"{wanted_by}: model `{card.name}` has no mask token to put in place of masked patches",
                hint="use `mask_ratio: 0`, or a checkpoint with `use_mask_token: true`",
            )

    def mask_inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        """Return the mask as an input of the forward pass; nothing when the model sees all patches."""
        if not self.masks:
            return {}
        import torch

        return {"mask_BN": torch.from_numpy(self.mask_BN(card, rows))}

    def mask_BN(self, card: Card, rows: BatchRows) -> Mask:
        """Return the masked patches, (B, N), or all of them when no mask is configured.

        Raises PartFailed when the mask column is not kept, or a value in it is not a mask."""
        N = card.gives["visual_tokens"][0] if "visual_tokens" in card.gives else card.maskable_patches
        if self.mask_column is not None:
            given = passthrough_column(self.mask_column, rows)
            masks = [_as_mask(value, N, self.mask_column, key) for key, value in zip(rows.keys, given, strict=True)]
        elif self.masks:
            masks = [draw_mask(key, self.seed, N, self.count_masked(N)) for key in rows.keys]
        else:
            masks = [np.ones(N, bool) for _ in rows.keys]
        return np.stack(masks) if masks else np.empty((0, N), bool)

    def count_masked(self, N: int) -> int:
        """Return how many of N patches `mask_ratio` masks: at least one."""
        return max(1, round(self.mask_ratio * N))


class MaskableOutput(MaskSettings, TensorOutput):
    """A feature that is written as it is, of a model from which some patches may be hidden (`bool_masked_pos`)."""

    mask_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the patches that are hidden from the model, drawn for each image from `seed` and its "
        "key. It needs a checkpoint with a mask token.",
    )

    def wants(self, card: Card) -> frozenset[str]:
        if self.masks and not card.maskable_patches:
            name = "mask_ratio" if self.mask_column is None else "mask_column"
            wanted_by = f"output `{type(self).model_fields['kind'].default}`: `{name}`"
            raise OutputUnavailable(
                f"{wanted_by}: model `{card.name}` has no mask token to put in place of masked patches",
                hint=f"remove `{name}`, or use a checkpoint with a mask token",
            )
        return super().wants(card)

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        return self.mask_inputs(card, rows)

    @model_serializer(mode="wrap")
    def _without_a_mask(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings of a mask that there is not: identities from before stay as they are."""
        values: dict[str, Any] = serialize(self)
        return values if self.masks else {name: values[name] for name in values if name not in MASK_FIELDS}


MASK_FIELDS = tuple(MaskSettings.model_fields)


def draw_mask(key: str, seed: int, N: int, count: int) -> Mask:
    """Draw `count` of N patches from the seed and the image's key: (N,).

    The draws come from a hash, since the stream of a random generator may change with its library's version."""
    draws_N = np.frombuffer(hashlib.shake_256(f"{seed}\0{key}".encode()).digest(8 * N), "<u8")
    mask_N = np.zeros(N, bool)
    mask_N[np.argsort(draws_N, kind="stable")[:count]] = True
    return mask_N


def _as_mask(value: Any, N: int, column: str, key: str) -> Mask:
    mask_N = np.asarray([] if value is None else value)
    if mask_N.shape != (N,) or not np.isin(mask_N, (0, 1)).all():
        raise PartFailed(
            f"column `{column}` of `{key}` is not a mask: {N} booleans, one for each patch, row by row",
            hint="store such a list for every image, or use `mask_ratio`",
        )
    return mask_N.astype(bool)
