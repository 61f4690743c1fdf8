"""Write the best classes of each row, with names and scores.

Shapes: B batch, K classes, k best of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from img2parquet.errors import InputError, NotFinite, OutputUnavailable
from img2parquet.models import Card
from img2parquet.outputs import (
    BatchRows,
    ColumnName,
    OutputSettings,
    not_finite_error,
    require_class_names,
    require_feature,
)
from img2parquet.outputs.score_function import ScoreFunction, check_problem, score_function, scores_of

if TYPE_CHECKING:
    from torch import Tensor

    from img2parquet.models.model import Model

LABEL = pa.struct(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
LABELS = pa.list_(pa.field("element", LABEL, nullable=False))


class Labels(OutputSettings):
    """Write the best classes, best first and equal scores by id: (B, K) -> list<struct<id, name, score>>.

    Scores are a softmax over the classes, or a sigmoid of each class where config.json says
    `problem_type: multi_label_classification` or there is only one class; for `regression` they are the values."""

    kind: Literal["labels"] = "labels"
    name: ColumnName = Field("labels", description="Column name.")
    top_k: int = Field(5, ge=1, description="Maximum number of classes per row.")
    threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Leave out classes below this score; a list may be empty. Not for regression, which has values.",
    )
    head: Literal["default", "cls", "distillation"] = Field(
        "default",
        description="`default`: the checkpoint's own prediction (LeViT: the mean of both heads); else the named head.",
    )

    @property
    def feature(self) -> str:
        return "logits" if self.head == "default" else f"logits:{self.head}"

    def column_names(self) -> tuple[str, ...]:
        return (self.name,)

    def wants(self, card: Card) -> frozenset[str]:
        require_feature(card, self.feature, wanted_by="output `labels`")
        require_class_names(card, wanted_by="output `labels`")
        classes = card.gives[self.feature][0]
        if len(card.labels) not in (0, classes):
            message = f"model `{card.name}` names {len(card.labels)} classes, but its head has {classes}"
            raise OutputUnavailable(message, hint="correct `id2label` in its config.json, or use the output `logits`")
        check_problem(card, "output `labels`")
        if self.threshold and self.score_function(card) == "none":
            message = f"output `labels`: `threshold` compares probabilities, and model `{card.name}` is a regression"
            raise OutputUnavailable(message, hint="remove `threshold`")
        return frozenset([self.feature])

    def fields(self, card: Card) -> list[pa.Field]:
        function = self.score_function(card)
        metadata = None if function == "softmax" else {"scores": function}
        return [pa.field(self.name, LABELS, nullable=False, metadata=metadata)]

    def score_function(self, card: Card) -> ScoreFunction:
        """Return the function from the model's logits to the stored scores."""
        return score_function(card.config, card.gives[self.feature][0])

    def bytes_per_row(self, card: Card) -> int:
        k = min(self.top_k, card.gives[self.feature][0])
        longest_first = sorted((len(name.encode()) for name in class_names(card, self.feature)), reverse=True)
        return sum(longest_first[:k]) + 16 * k + 16

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        logits_BK = features[self.feature].detach().float()
        finite_B = logits_BK.amax(dim=1).isfinite().tolist()  # a single NaN makes the maximum one
        if not all(finite_B):
            raise not_finite_error(self.name, [row for row, finite in enumerate(finite_B) if not finite], "float32")
        top_ids, top_scores = top_classes(logits_BK, self.top_k, self.score_function(card))
        ids_Bk, scores_Bk = top_ids.int().cpu().numpy(), top_scores.cpu().numpy()
        kept_Bk = (scores_Bk >= self.threshold) | (self.score_function(card) == "none")
        ids_N, stops_B = ids_Bk[kept_Bk], kept_Bk.sum(axis=1).cumsum()
        names_N = pa.array(class_names(card, self.feature)).take(pa.array(ids_N))
        best_N = pa.StructArray.from_arrays(
            [pa.array(ids_N), names_N, pa.array(scores_Bk[kept_Bk])], fields=list(LABEL)
        )
        return [pa.ListArray.from_arrays(pa.array([0, *stops_B], pa.int32()), best_N, type=LABELS)]


def class_labels(
    logits_BK: Tensor, model: Model, *, top_k: int = 5, threshold: float = 0.0
) -> list[list[dict[str, Any]]]:
    """Turn a model's logits into labels: for each image a list of `id`, `name` and `score`, best first.

    They are those of a job's output `labels`: scores are a softmax, a sigmoid of each class, or a regression's values,
    as the checkpoint says. logits_BK: the feature `logits`, or that of one of two heads, on any device. top_k,
    threshold: as in a job.

    Raises OutputUnavailable when the checkpoint's classes have no names by id, and InputError for logits that are not
    finite or of another number of classes."""
    K = model.card.gives.get("logits", (0,))[0]
    if top_k < 1 or not 0 <= threshold <= 1:
        raise InputError(f"top_k: {top_k}, threshold: {threshold}", hint="use 1 or more, and a score from 0 to 1")
    output = Labels(name="labels", head="default", top_k=top_k, threshold=threshold)
    output.wants(model.card)
    if logits_BK.dim() != 2 or logits_BK.shape[1] != K:
        message = f"logits of shape {tuple(logits_BK.shape)}, where model `{model.card.name}` has {K} classes"
        raise InputError(message, hint='pass `model(images)["logits"]`')
    rows = BatchRows([f"image {i}" for i in range(len(logits_BK))], [(0, 0)] * len(logits_BK))
    try:
        (column,) = output.columns(model.card, {output.feature: logits_BK}, rows)
    except NotFinite as error:
        raise InputError(f"images {', '.join(map(str, error.rows))}: {error.message}") from None
    found: list[list[dict[str, Any]]] = column.to_pylist()
    return found


def top_classes(logits_BK: Tensor, k: int, function: ScoreFunction = "softmax") -> tuple[Tensor, Tensor]:
    """Find the k best classes, best first and ties by id on any device: float32 (B, K) -> ids (B, k), scores (B, k)."""
    k = min(k, logits_BK.shape[1])
    top = logits_BK.topk(k, dim=1)
    ids_Bk = top.indices
    # topk takes any of the classes that tie for the last rank
    tied_B = (logits_BK >= top.values[:, -1:]).sum(dim=1) > k
    if tied_B.any():
        ids_Bk[tied_B] = logits_BK[tied_B].argsort(dim=1, descending=True, stable=True)[:, :k]
    ids_Bk = ids_Bk.sort(dim=1).values
    order_Bk = logits_BK.gather(1, ids_Bk).argsort(dim=1, descending=True, stable=True)
    ids_Bk = ids_Bk.gather(1, order_Bk)
    return ids_Bk, scores_of(logits_BK, function).gather(1, ids_Bk)


def class_names(card: Card, feature: str) -> tuple[str, ...]:
    """Return names by class id; a checkpoint without names gets the reference's `LABEL_<id>`."""
    return card.labels or tuple(f"LABEL_{i}" for i in range(card.gives[feature][0]))
