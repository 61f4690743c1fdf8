"""Count how a model's labels, values, masks or masked patches compare with the ground truth, batch by batch.

Shapes: B rows, K classes, k best of them, H W a map, N patches, M masked patches.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from img2parquet.outputs.class_names import distinct_names
from img2parquet.outputs.ground_truth import IGNORED, Cell, class_id, class_ids_of, class_map, numbers, parsed
from img2parquet.outputs.segmentation import class_ids
from img2parquet.results.label_scores import SOFTMAX, LabelScores, class_names, scores_of_output

BINS = 15
STEPS = 100  # of thresholds that are tried
MOST_PIXELS = 64_000_000  # of a mask
KINDS = {"segmentation": "mask", "visual_tokens": "visual_tokens"}
KIND_BY_SCORES = {"softmax": "labels", "sigmoid": "multi_label", "none": "regression"}  # of labels and logits
PREFERENCE = ("logits", "labels", "segmentation", "visual_tokens")  # logits come first, since they hold every class
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoringTask:
    """One output of one model that can be scored, with its class names."""

    model: str
    column: str
    kind: str  # labels | multi_label | regression | mask | visual_tokens
    preference: int
    names: tuple[str, ...]
    ignored: int
    reduces_labels: bool
    scores: LabelScores = SOFTMAX

    @classmethod
    def of(cls, model: str, identity: Mapping[str, Any]) -> Iterator[ScoringTask]:
        """List the outputs of a model that can be scored, from its run identity."""
        config = identity.get("config", {})
        for output in identity.get("outputs", ()):
            if output["kind"] in PREFERENCE and output.get("head", "default") == "default":
                scores = scores_of_output(output, identity)
                yield cls(
                    model=model,
                    column=output.get("name", output["kind"]),
                    kind=KINDS.get(output["kind"]) or KIND_BY_SCORES[scores.function],
                    preference=PREFERENCE.index(output["kind"]),
                    names=class_names(config),
                    ignored=int(config.get("semantic_loss_ignore_index", 255)),
                    reduces_labels=bool(identity.get("reduces_labels", False)),
                    scores=scores,
                )

    def name_of(self, id: int) -> str:
        """Return a class's name, which no other class has, or its id when it has none."""
        return self._distinct[id] if 0 <= id < len(self.names) else str(id)

    @cached_property
    def _distinct(self) -> list[str]:
        return distinct_names(self.names)


@dataclass
class ErrorSums:
    """Sums over rows for each of K values: float64 (K,), or 0.0 before the first row."""

    count: int = 0
    absolute: Any = 0.0
    squared: Any = 0.0
    truth: Any = 0.0
    truth_squared: Any = 0.0

    def add(self, true_K: npt.NDArray[np.float64], said_K: npt.NDArray[np.float64]) -> None:
        self.count += 1
        self.absolute += np.abs(said_K - true_K)
        self.squared += (said_K - true_K) ** 2
        self.truth += true_K
        self.truth_squared += true_K**2

    def r2(self) -> float | None:
        """Return the share of the truth's variance that is explained, as a mean over the values; None without any."""
        variance_K = self.truth_squared - self.truth**2 / max(1, self.count)
        if not self.count or np.any(variance_K <= 1e-12 * self.truth_squared):
            return None
        return float(np.mean(1 - self.squared / variance_K))


class Scorer(Protocol):
    """Counts over batches. `bins`: (BINS, 3) of rows, sum of confidence and hits, by the highest score.

    `classes` counts the rows or pixels of each class that are true, predicted, and both. `errors` has the sums of a
    regression."""

    confusion: Counter[tuple[int, int]]
    bins: npt.NDArray[np.float64]
    counted: int
    top1: int
    top5: int
    has_top5: bool
    resized: int
    truncated: int  # rows that may have more predicted classes than were stored
    errors: ErrorSums

    @property
    def classes(self) -> Mapping[int, tuple[int, int, int]]: ...

    def __init__(self, task: ScoringTask, truth: str) -> None: ...

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        """Count one batch. Raises PartFailed when a ground-truth value cannot be interpreted."""


class _CountingScorer:
    def __init__(self, task: ScoringTask, truth: str) -> None:
        self.task, self.truth = task, truth
        self.confusion: Counter[tuple[int, int]] = Counter()
        self.bins = np.zeros((BINS, 3))
        self.counted = self.top1 = self.top5 = self.resized = 0
        self.has_top5 = True
        self.truncated, self.errors = 0, ErrorSums()

    @property
    def classes(self) -> Mapping[int, tuple[int, int, int]]:
        rows, predicted = Counter[int](), Counter[int]()
        for (true, said), count in self.confusion.items():
            rows[true] += count
            predicted[said] += count
        return {id: (rows[id], predicted[id], self.confusion[id, id]) for id in sorted(rows.keys() | predicted.keys())}


def true_class(value: Any, task: ScoringTask, K: int, column: str, key: str) -> int | None:
    """Return the class id for a ground-truth value; None for the ignored id. Raises PartFailed for no class.

    Digits are an id unless they are a class's name: a kept column is text unless the job gave it a type."""
    is_id = isinstance(value, str) and value not in task.names and value.strip().isdigit()
    return class_id(int(value) if is_id else value, task.names, K, Cell(column, key))


class LabelScorer(_CountingScorer):
    """Scores labels and logits against class ids or names.

    A row without any class, all being below a threshold, counts as wrong, as class -1."""

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        is_logits = pa.types.is_fixed_size_list(said.type)
        rows = _of_logits(said) if is_logits else _of_labels(said)
        for key, truth, (ids, scores) in zip(keys, truths.to_pylist(), rows, strict=True):
            K = said.type.list_size if is_logits else len(self.task.names) or 1 << 30
            true = true_class(truth, self.task, K, self.truth, key)
            if true is not None:
                self._count(true, ids, scores, K)

    def _count(self, true: int, ids: Sequence[int], scores: Sequence[float], K: int) -> None:
        best = ids[0] if ids else -1
        self.counted += 1
        self.confusion[true, best] += 1
        self.top1 += best == true
        self.top5 += true in ids[:5]
        # five classes or all there are; a true class among fewer counts all the same
        self.has_top5 = self.has_top5 and (len(ids) >= min(5, K) or true in ids)
        if ids:
            self.bins[_bin(scores[0])] += (1, scores[0], best == true)


class MultiLabelScorer(_CountingScorer):
    """Scores independent classes, each predicted from the task's decision on, against sets of classes.

    A row is right when exactly its true classes are predicted. Calibration covers every class with a stored score.
    `steps`: (STEPS + 1, 2) of false and true pairs of row and class, by score."""

    def __init__(self, task: ScoringTask, truth: str) -> None:
        super().__init__(task, truth)
        self.has_top5 = False
        self.rows, self.predicted, self.correct = Counter[int](), Counter[int](), Counter[int]()
        self.steps = np.zeros((STEPS + 1, 2), np.int64)

    @property
    def classes(self) -> Mapping[int, tuple[int, int, int]]:
        ids = sorted(self.rows.keys() | self.predicted.keys())
        return {id: (self.rows[id], self.predicted[id], self.correct[id]) for id in ids}

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        K = said.type.list_size if pa.types.is_fixed_size_list(said.type) else len(self.task.names) or 1 << 30
        for key, truth, scores in zip(keys, truths.to_pylist(), _all_scores(said, self.task.scores), strict=True):
            true = class_ids_of(truth, self.task.names, K, Cell(self.truth, key))
            predicted = {id for id, score in scores.items() if score >= self.task.scores.decision}
            self.counted += 1
            self.top1 += predicted == true
            self.truncated += len(predicted) == self.task.scores.most and len(predicted) < K
            self.rows.update(true)
            self.predicted.update(predicted)
            self.correct.update(true & predicted)
            for id, score in scores.items():
                self.bins[_bin(score)] += (1, score, id in true)
                self.steps[int(score * STEPS), int(id in true)] += 1

    def best_threshold(self) -> tuple[float, float] | None:
        """Return the threshold, of steps of 0.01, from which on predictions have the highest F1, and that F1."""
        false_S, true_S = self.steps[::-1].cumsum(0)[::-1].T  # predicted from each step on
        f1_S = 2 * true_S / np.maximum(1, true_S + false_S + self.rows.total())
        best = int(f1_S.argmax())
        return (best / STEPS, float(f1_S[best])) if self.counted else None


class RegressionScorer(_CountingScorer):
    """Scores values against numbers: one for each row and value of the head. No row is right or wrong."""

    def __init__(self, task: ScoringTask, truth: str) -> None:
        super().__init__(task, truth)
        self.has_top5 = False

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        is_logits = pa.types.is_fixed_size_list(said.type)
        for key, truth, values in zip(keys, truths.to_pylist(), _all_scores(said, self.task.scores), strict=True):
            cell, K = Cell(self.truth, key), len(values) if is_logits else len(self.task.names) or len(values)
            if len(values) < K:
                hint = "evaluate the output `logits`, or run with a larger `top_k`"
                raise cell.error(f"only {len(values)} of the model's {K} values were written", hint=hint)
            self.errors.add(np.array(numbers(truth, K, False, cell)), np.array([values[id] for id in range(K)]))
            self.counted += 1
            self.top1 += 1


class MaskScorer(_CountingScorer):
    """Scores masks against PNGs of class ids.

    A mask of another size is scaled to the size of its ground truth, by the nearest pixel."""

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        K = len(self.task.names) or 1 << 16
        for key, truth, mask in zip(keys, truths.to_pylist(), said.to_pylist(), strict=True):
            true_HW = class_map(truth, K, self.task.ignored, self.task.reduces_labels, Cell(self.truth, key))
            said_HW = read_mask(mask)
            if said_HW.shape != true_HW.shape:
                self.resized += 1
                said_HW = _as_large(said_HW, true_HW.shape)
            counts = true_HW != self.task.ignored
            self._count(true_HW[counts], said_HW[counts])

    def _count(self, true_N: Ints, said_N: Ints) -> None:
        width = int(max(true_N.max(initial=0), said_N.max(initial=0))) + 1
        pairs, numbers = np.unique(true_N * width + said_N, return_counts=True)
        for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            self.confusion[pair // width, pair % width] += number
        self.counted += len(true_N)
        self.top1 += int((true_N == said_N).sum())


class TokenScorer(_CountingScorer):
    """Scores visual tokens against lists of codes, for every patch or for the masked ones.

    There is no confusion matrix, since a vocabulary is large."""

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        for key, truth, patches in zip(keys, truths.to_pylist(), said.to_pylist(), strict=True):
            places = [patch["patch"] for patch in patches]
            for code, patch in zip(self._codes(truth, places, key), patches, strict=True):
                if code != IGNORED:
                    self._count(code, patch)

    def _codes(self, truth: Any, places: Sequence[int], key: str) -> list[int]:
        """Select the codes of the patches that were predicted."""
        cell, truth = Cell(self.truth, key), parsed(truth)
        if not isinstance(truth, list) or not all(type(code) is int for code in truth):
            raise cell.error(f"`{truth!r:.60}` is not a list of codes")
        if len(truth) == len(places):
            return truth
        if not places or max(places) >= len(truth):
            raise cell.error(
                f"{len(truth)} codes, where {len(places)} patches were masked, up to {max(places, default=0)}"
            )
        return [truth[at] for at in places]

    def _count(self, code: int, patch: Mapping[str, Any]) -> None:
        codes, right = patch["codes"], patch["codes"][0] == code
        self.counted += 1
        self.top1 += right
        self.top5 += code in codes[:5]
        self.has_top5 = self.has_top5 and (len(codes) >= 5 or code in codes)
        self.bins[_bin(patch["scores"][0])] += (1, patch["scores"][0], right)


SCORERS: Mapping[str, type[Scorer]] = {
    "labels": LabelScorer,
    "multi_label": MultiLabelScorer,
    "regression": RegressionScorer,
    "mask": MaskScorer,
    "visual_tokens": TokenScorer,
}


def _of_labels(said: pa.Array) -> Iterator[tuple[list[int], list[float]]]:
    for row in said.to_pylist():
        yield [label["id"] for label in row], [label["score"] for label in row]


def _all_scores(said: pa.Array, scores: LabelScores) -> Iterator[dict[int, float]]:
    """Yield the stored scores of each row by class id, or those of its logits."""
    if pa.types.is_fixed_size_list(said.type):
        yield from (dict(enumerate(row)) for row in scores.of_logits(_logits(said)).tolist())
    else:
        yield from ({label["id"]: label["score"] for label in row} for row in said.to_pylist())


def _logits(said: pa.Array) -> npt.NDArray[np.float64]:
    values_N: npt.NDArray[np.float64] = said.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    return values_N.reshape(len(said), said.type.list_size)


def _of_logits(said: pa.Array) -> Iterator[tuple[list[int], list[float]]]:
    """Yield the five best classes of each row with their softmax scores; among equals the lower id comes first."""
    for logits_K in _logits(said):
        ids = np.argsort(-logits_K, kind="stable")[:5]
        exp_K = np.exp(logits_K - logits_K.max())
        yield ids.tolist(), (exp_K[ids] / exp_K.sum()).tolist()


def read_mask(value: Any, nowhere: int = 0) -> Ints:
    """Decode a PNG of class ids, or COCO run lengths of each class, to (H, W) ids.

    nowhere: the id of pixels that no run covers. Raises ValueError when the value is not a mask or has more than
    MOST_PIXELS."""
    try:
        if isinstance(value, bytes):
            with Image.open(io.BytesIO(value), formats=["PNG"]) as image:
                _check_size(image.height, image.width)
                if image.mode not in ("L", "P", "1", "I", "I;16"):
                    raise ValueError(f"a PNG of mode {image.mode} holds colours, not class ids")
                ids_HW: Ints = np.asarray(image).astype(np.int64)
                return ids_HW
        if not value:
            raise ValueError("no run lengths")
        _check_size(*value[0]["size"])
        return np.ascontiguousarray(class_ids(value, nowhere))
    except (OSError, SyntaxError, LookupError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a mask: {error}") from None


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MOST_PIXELS:
        raise ValueError(f"a mask of {width} x {height} pixels")


def _as_large(ids_HW: Ints, shape: tuple[int, ...]) -> Ints:
    rows = (np.arange(shape[0]) + 0.5) * ids_HW.shape[0] / shape[0]
    columns = (np.arange(shape[1]) + 0.5) * ids_HW.shape[1] / shape[1]
    large_HW: Ints = ids_HW[rows.astype(int)][:, columns.astype(int)]
    return large_HW


def _bin(score: float) -> int:
    """Return the bin of a score: BINS of equal width, each without its lower edge."""
    return min(BINS - 1, max(0, int(np.ceil(score * BINS)) - 1))
