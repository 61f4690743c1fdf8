"""Decide how the scores of a classification head are read: what config.json's `problem_type` says, or its classes.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from img2parquet.errors import OutputUnavailable
from img2parquet.models import Card

if TYPE_CHECKING:
    from torch import Tensor

Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
ScoreFunction = Literal["softmax", "sigmoid", "none"]
DECISION = 0.5  # of several labels, those with at least this score are predicted
PROBLEMS: tuple[Problem, ...] = ("regression", "single_label_classification", "multi_label_classification")


def score_function(config: Mapping[str, Any], num_labels: int) -> ScoreFunction:
    """Return the function from logits to scores, as the reference's image classification pipeline chooses it.

    Regression keeps the values, several labels or a single class take a sigmoid each, and everything else a softmax."""
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or num_labels == 1 else "softmax"


def scores_of(logits_BK: Tensor, function: ScoreFunction) -> Tensor:
    """Apply a score function to float32 logits: (B, K) -> (B, K)."""
    if function == "none":
        return logits_BK
    return logits_BK.sigmoid() if function == "sigmoid" else logits_BK.softmax(dim=1)


def check_problem(card: Card, wanted_by: str) -> None:
    """Raise OutputUnavailable when config.json has no class, or a `problem_type` that the reference does not know."""
    named = card.config.get("id2label")
    if (len(named) if isinstance(named, Mapping) else card.config.get("num_labels")) == 0:
        message = f"{wanted_by}: model `{card.name}` has no classes (`num_labels: 0` in its config.json)"
        raise OutputUnavailable(message, hint="use the output `embedding`, or `logits` for what its head would read")
    problem = card.config.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        message = f"{wanted_by}: config.json of model `{card.name}` has the unknown `problem_type: {problem}`"
        raise OutputUnavailable(message, known=PROBLEMS)
