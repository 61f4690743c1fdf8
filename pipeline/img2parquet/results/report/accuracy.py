"""Score a sample's rows against ground-truth columns, as `evaluate` scores all rows, for the page.

A ground-truth value that cannot be interpreted is left out and counted here, where `evaluate` would refuse it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.errors import InputError, PartFailed
from img2parquet.outputs.labels import LABELS
from img2parquet.results.evaluation.evaluate import ClassScore, Evaluation, to_evaluation
from img2parquet.results.evaluation.scorers import SCORERS, ScoringTask

CLASSES_SHOWN = 16  # of the confusion matrix: the most frequent
AGREES = 0.9  # a column whose values are class names this often is taken for ground truth, unasked
MOST_FOREIGN_ID = 1 << 16
NO_CLASS = "no class"  # every score was below the output's threshold


@dataclass(frozen=True)
class ModelAccuracy:
    """Accuracy on the sample. `wrong`: rows whose first label is not the true one. `names` and `confusion` cover the
    classes shown, with `others` last when there are more; the counts are (true, predicted)."""

    found: Evaluation
    wrong: frozenset[int]
    not_understood: int
    classes: list[ClassScore]  # that occur in the ground truth, the most frequent first
    names: list[str]
    confusion: npt.NDArray[np.int64]

    @property
    def bins(self) -> list[tuple[float, float, int]]:
        return [(b.confidence, b.accuracy, b.rows) for b in self.found.calibration]


def score_sample(
    table: pa.Table, task: ScoringTask, truth: str, rows: Iterable[int] | None = None, uri: str = ""
) -> ModelAccuracy:
    """Score the rows of a table, by default all. Raises InputError when no row has a usable ground-truth value."""
    counting = SCORERS[task.kind](task, truth)
    keys = table["key"].to_pylist() if "key" in table.column_names else list(map(str, range(table.num_rows)))
    truths, said = table[truth].combine_chunks(), table[task.column].combine_chunks()
    judged = without = 0
    wrong: list[int] = []
    mistakes: list[str] = []
    for row in range(table.num_rows) if rows is None else rows:
        if not truths[row].is_valid or not said[row].is_valid:
            without += 1
            continue
        right, counted = counting.top1, counting.counted
        try:
            counting.add([str(keys[row])], truths.slice(row, 1), said.slice(row, 1))
        except (PartFailed, ValueError) as error:
            mistakes.append((str(error).splitlines() or [type(error).__name__])[0])
            continue
        judged += 1
        if counting.counted > counted and counting.top1 == right:
            wrong.append(row)
    if not judged:
        raise InputError(mistakes[0] if mistakes else f"no sampled row has a value in `{truth}`")
    found = to_evaluation(uri, task, truth, counting, judged, without)
    classes = sorted((c for c in found.classes if c.rows), key=lambda c: (-c.rows, c.id))
    return ModelAccuracy(found, frozenset(wrong), len(mistakes), classes, *_confusion(found))


def tasks_of(table: pa.Table, model: str, identity: Mapping[str, Any]) -> list[ScoringTask]:
    """List what can be scored in a sample: one output of each kind, in the order of the job."""
    first: dict[str, ScoringTask] = {}
    for task in ScoringTask.of(model, identity):
        if task.column in table.column_names:
            first.setdefault(task.kind, task)
    return list(first.values())


def foreign_labels(
    table: pa.Table, model: str, predictions: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[pa.Table, ScoringTask]:
    """Give ids to the labels of files that img2parquet did not write: their own ids, or else the order of the names."""
    pairs = {(label.get("id"), str(label["name"])) for labels in predictions for label in labels}
    names = _names_by_id(pairs)
    ids = {name: id for id, name in enumerate(names)}
    rows = [
        [{"id": ids[str(x["name"])], "name": str(x["name"]), "score": float(x["score"])} for x in labels]
        for labels in predictions
    ]
    column = "labels of the sample"
    return table.append_column(column, pa.array(rows, LABELS)), ScoringTask(
        model, column, "labels", 0, names, -1, False
    )


def _names_by_id(pairs: set[tuple[Any, str]]) -> tuple[str, ...]:
    ids = [id for id, _ in pairs]
    names = sorted({name for _, name in pairs})
    whole = all(type(id) is int and 0 <= id < MOST_FOREIGN_ID for id in ids)
    if not whole or len(set(ids)) < len(ids) or len(names) < len(ids):
        return tuple(names)
    by_id = dict(pairs)
    return tuple(by_id.get(id, f"class {id}") for id in range(max(ids, default=-1) + 1))


def guess_truth(columns: Iterable[tuple[str, Sequence[Any]]], names: set[str]) -> str | None:
    """Find the text column whose values are class names, or None. Columns of numbers are never guessed."""
    for column, values in columns:
        texts = [value for value in values if isinstance(value, str) and value]
        if texts and 2 * len(texts) >= len(values) and sum(t in names for t in texts) >= AGREES * len(texts):
            return column
    return None


def truths_named(identity: Mapping[str, Any]) -> Iterator[str]:
    """List the columns that a job names as ground truth for a loss."""
    for output in identity.get("outputs", ()):
        if isinstance(output, Mapping) and output.get("truth"):
            yield str(output["truth"])


def _confusion(found: Evaluation) -> tuple[list[str], npt.NDArray[np.int64]]:
    seen = {score.id: score.rows + score.predicted for score in found.classes}
    names = {score.id: score.name if score.id >= 0 else NO_CLASS for score in found.classes}
    shown = sorted(sorted(seen, key=lambda id: (-seen[id], id))[:CLASSES_SHOWN], key=lambda id: (id < 0, names[id]))
    index = {id: i for i, id in enumerate(shown)}
    side = len(shown) + (len(seen) > len(shown))
    matrix = np.zeros((side, side), np.int64)
    for (true, said), count in found.confusion.items():
        matrix[index.get(true, side - 1), index.get(said, side - 1)] += count
    return [names[id] for id in shown] + ["others"] * (side - len(shown)), matrix
