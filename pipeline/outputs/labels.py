"""Logits -> the best classes of each row, with names and softmax scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.errors import OutputUnavailable
from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, OutputSettings, not_finite, require

if TYPE_CHECKING:
    from torch import Tensor

LABEL = pa.struct(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
LABELS = pa.list_(pa.field("element", LABEL, nullable=False))


class Labels(OutputSettings):
    """(B, K) -> list<struct<id, name, score>>, best first; of equal scores the lower id is first."""

    kind: Literal["labels"] = "labels"
    name: ColumnName = Field("labels", description="The column.")
    top_k: int = Field(5, ge=1, description="How many classes at most.")
    threshold: float = Field(0.0, ge=0, le=1, description="Classes below this score are left out; a list may be empty.")
    head: Literal["default", "cls", "distillation"] = Field(
        "default", description="`default`: the checkpoint's answer (LeViT: the mean of both heads); else one head."
    )

    @property
    def feature(self) -> str:
        return "logits" if self.head == "default" else f"logits:{self.head}"

    def column_names(self) -> tuple[str, ...]:
        return (self.name,)

    def wants(self, card: Card) -> frozenset[str]:
        require(card, self.feature, wanted_by="output `labels`")
        classes = card.gives[self.feature][0]
        if len(card.labels) not in (0, classes):
            message = f"model `{card.name}` names {len(card.labels)} classes, but its head has {classes}"
            raise OutputUnavailable(message, hint="mend `id2label` in its config.json, or ask for `logits`")
        return frozenset([self.feature])

    def fields(self, card: Card) -> list[pa.Field]:
        return [pa.field(self.name, LABELS, nullable=False)]

    def bytes_per_row(self, card: Card) -> int:
        k = min(self.top_k, card.gives[self.feature][0])
        longest_first = sorted((len(name.encode()) for name in class_names(card, self.feature)), reverse=True)
        return sum(longest_first[:k]) + 16 * k + 16

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        top_ids, top_scores = top_classes(features[self.feature].detach().float(), self.top_k)
        ids_Bk, scores_Bk = top_ids.int().cpu().numpy(), top_scores.cpu().numpy()
        unknown = [key for key, score in zip(rows.keys, scores_Bk[:, 0], strict=True) if score != score]
        if unknown:
            raise not_finite(self.name, unknown, "float32")
        kept_Bk = scores_Bk >= self.threshold
        ids_N, stops_B = ids_Bk[kept_Bk], kept_Bk.sum(axis=1).cumsum()
        names_N = pa.array(class_names(card, self.feature)).take(pa.array(ids_N))
        best_N = pa.StructArray.from_arrays(
            [pa.array(ids_N), names_N, pa.array(scores_Bk[kept_Bk])], fields=list(LABEL)
        )
        return [pa.ListArray.from_arrays(pa.array([0, *stops_B], pa.int32()), best_N, type=LABELS)]


def top_classes(logits_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Float32 logits -> ids_Bk and softmax scores_Bk, best first, ties by id whatever the device."""
    k = min(k, logits_BK.shape[1])
    top = logits_BK.topk(k, dim=1)
    ids_Bk = top.indices
    # topk takes any of the classes that tie for the last place
    tied_B = (logits_BK >= top.values[:, -1:]).sum(dim=1) > k
    if tied_B.any():
        ids_Bk[tied_B] = logits_BK[tied_B].argsort(dim=1, descending=True, stable=True)[:, :k]
    ids_Bk = ids_Bk.sort(dim=1).values
    order_Bk = logits_BK.gather(1, ids_Bk).argsort(dim=1, descending=True, stable=True)
    ids_Bk = ids_Bk.gather(1, order_Bk)
    return ids_Bk, logits_BK.softmax(dim=1).gather(1, ids_Bk)


def class_names(card: Card, feature: str) -> tuple[str, ...]:
    """Names by class id; a checkpoint that has none gets the reference's `LABEL_<id>`."""
    return card.labels or tuple(f"LABEL_{i}" for i in range(card.gives[feature][0]))
