"""Read stored labels and logits as the model that wrote them means them: its run's identity says how.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from img2parquet.outputs.score_function import DECISION, ScoreFunction, score_function

Label = TypeVar("Label", bound=Mapping[str, Any])


@dataclass(frozen=True)
class LabelScores:
    """What the scores of a column are. `softmax`: the best class is predicted; `sigmoid`: every class of at least
    `decision`, a job's `threshold` or 0.5; `none`: they are values of a regression. `most`: how many classes a row
    has at most, None where it has all."""

    function: ScoreFunction = "softmax"
    decision: float = DECISION
    most: int | None = None

    def predicted(self, labels: Sequence[Label]) -> list[Label]:
        """Return the labels that are predicted for a row, from all of its labels, best first."""
        if self.function == "softmax":
            return list(labels[:1])
        return [label for label in labels if self.function == "none" or label["score"] >= self.decision]

    def in_words(self, score: float) -> str:
        """Format a score: a probability in percent, a value as it is."""
        return f"{score:.4g}" if self.function == "none" else f"{100 * score:.0f} %"

    def of_logits(self, logits_NK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Compute scores, (N, K) -> (N, K)."""
        if self.function == "none":
            return logits_NK
        if self.function == "sigmoid":
            return 0.5 * (1 + np.tanh(0.5 * logits_NK))  # does not overflow
        exp_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
        shares_NK: npt.NDArray[np.float64] = exp_NK / exp_NK.sum(1, keepdims=True)
        return shares_NK


SOFTMAX = LabelScores()


def scores_of_output(output: Mapping[str, Any], identity: Mapping[str, Any]) -> LabelScores:
    """Return what the scores of an output `labels` or `logits` are. output: one of the run identity's `outputs`.

    Labels of earlier versions are always a softmax. Logits are read as config.json says, with the `threshold` of the
    labels beside them."""
    if output["kind"] == "labels":
        decision = float(output.get("threshold") or DECISION)
        return LabelScores(identity.get("scores", "softmax"), decision, output.get("top_k"))
    labels = [one for one in identity.get("outputs", ()) if one["kind"] == "labels"]
    thresholds = {one["threshold"] for one in labels if one.get("threshold")}
    config = identity.get("config", {})
    count = len(class_names(config)) or config.get("num_classes") or len(config.get("id2label") or ())
    count = count or config.get("num_labels", 2)
    return LabelScores(score_function(config, int(count)), float(min(thresholds, default=DECISION)))


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return class names by id, from `id2label` or timm's `label_names`; () where `id2label` does not count from 0."""
    names, written = config.get("id2label"), config.get("pretrained_cfg")
    of_timm = config.get("label_names") or (written.get("label_names") if isinstance(written, Mapping) else None)
    listed = of_timm or config.get("labels")
    if not names:
        return tuple(map(str, listed)) if isinstance(listed, list) else ()
    by_id = {str(id): str(name) for id, name in names.items()}
    ids = list(map(str, range(len(by_id))))
    return tuple(by_id[id] for id in ids) if by_id.keys() == set(ids) else ()
