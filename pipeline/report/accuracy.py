"""Predictions of a sample against a truth column: top-1, top-k, per class, confusion, calibration; IoU of masks.

The one place where the report judges: `judge` and `judge_masks` are all that the page knows of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES_SHOWN = 16  # of the confusion matrix: the most frequent
BINS = 10
AGREES = 0.9  # a column whose values are class names this often is the truth, unasked


@dataclass(frozen=True)
class Judged:
    """Shares in 0..1. `classes`: (name, rows, recall, precision), the most frequent first. `confusion`: names of the
    classes shown, with `others` last where there are more, and counts (true, predicted). `bins`: (mean confidence,
    accuracy, rows) of the filled bins."""

    rows: int
    without_truth: int
    top1: float
    topk: float
    k: int
    classes: list[tuple[str, int, float, float]]
    names: list[str]
    confusion: npt.NDArray[np.int64]
    bins: list[tuple[float, float, int]]
    calibration_error: float


@dataclass(frozen=True)
class JudgedMasks:
    """`classes`: (class id, IoU, pixels of truth) of the classes that are in either."""

    masks: int
    skipped: int
    mean_iou: float
    pixel_accuracy: float
    classes: list[tuple[int, float, int]]


def guess_truth(columns: Iterable[tuple[str, Sequence[Any]]], names: set[str]) -> str | None:
    """The text column whose values are class names; None where there is none. Numbers are never guessed."""
    for column, values in columns:
        texts = [value for value in values if isinstance(value, str) and value]
        if texts and 2 * len(texts) >= len(values) and sum(t in names for t in texts) >= AGREES * len(texts):
            return column
    return None


def judge(predictions: Sequence[Sequence[dict[str, Any]]], truth: Sequence[Any]) -> Judged | None:
    """predictions: each row's labels, best first, with id, name and score. truth: a class name or id, or None.

    None where no row has both."""
    rows = [(p, true) for p, t in zip(predictions, truth, strict=True) if p and (true := _name(t, p)) is not None]
    known = {str(label["id"]): label["name"] for p in predictions for label in p}
    if not rows:
        return None
    by_id = not any(t in {label["name"] for p in predictions for label in p} for _, t in rows)
    rows = [(p, known.get(t, t) if by_id else t) for p, t in rows]
    first = [p[0]["name"] for p, _ in rows]
    answers = [t for _, t in rows]
    right = np.array([f == t for f, t in zip(first, answers, strict=True)])
    found = [t in [label["name"] for label in p] for p, t in rows]
    bins, error = _calibration(np.array([float(p[0]["score"]) for p, _ in rows]), right)
    names, confusion = _confusion(answers, first)
    return Judged(
        rows=len(rows), without_truth=len(truth) - len(rows), top1=float(right.mean()), topk=float(np.mean(found)),
        k=max(len(p) for p, _ in rows), classes=_per_class(answers, first), names=names, confusion=confusion,
        bins=bins, calibration_error=error,
    )  # fmt: skip


def _name(truth: Any, prediction: Sequence[dict[str, Any]]) -> str | None:
    return None if truth is None or truth == "" or isinstance(truth, float | bytes) else str(truth)


def _per_class(true: list[str], first: list[str]) -> list[tuple[str, int, float, float]]:
    of_truth, of_prediction = Counter(true), Counter(first)
    hits = Counter(t for t, f in zip(true, first, strict=True) if t == f)
    return [
        (name, rows, hits[name] / rows, hits[name] / of_prediction[name] if of_prediction[name] else 0.0)
        for name, rows in sorted(of_truth.items(), key=lambda item: (-item[1], item[0]))
    ]


def _confusion(true: list[str], first: list[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    counts = Counter(true) + Counter(first)
    names = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    shown = sorted(names[:CLASSES_SHOWN])
    index = {name: i for i, name in enumerate(shown)}
    others = len(names) > len(shown)
    side = len(shown) + others
    matrix = np.zeros((side, side), np.int64)
    for t, f in zip(true, first, strict=True):
        matrix[index.get(t, side - 1), index.get(f, side - 1)] += 1
    return shown + (["others"] if others else []), matrix


def _calibration(
    scores: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]
) -> tuple[list[tuple[float, float, int]], float]:
    """Reliability in equal bins of confidence, and the expected calibration error."""
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    bins = []
    for b in range(BINS):
        inside = place == b
        if inside.any():
            bins.append((float(scores[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    error = sum(abs(confidence - accuracy) * rows for confidence, accuracy, rows in bins) / max(1, len(scores))
    return bins, error


def judge_masks(
    pairs: Iterable[tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]], num_classes: int
) -> JudgedMasks | None:
    """pairs: predicted and true class ids (H, W); a class beyond the model's (255) is ignored. None without a pair of
    one size."""
    matrix, masks, skipped = np.zeros((num_classes, num_classes), np.int64), 0, 0
    for ours, true in pairs:
        if ours is None or true is None or ours.shape != true.shape:
            skipped += 1
            continue
        valid = (true >= 0) & (true < num_classes) & (ours >= 0) & (ours < num_classes)
        flat = true[valid] * num_classes + ours[valid]
        matrix += np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)
        masks += 1
    if not masks or not matrix.sum():
        return None
    hits, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    there = union > 0
    classes = [(int(k), float(hits[k] / union[k]), int(matrix[k].sum())) for k in np.flatnonzero(there)]
    return JudgedMasks(
        masks, skipped, float((hits[there] / union[there]).mean()), float(hits.sum() / matrix.sum()), classes
    )
