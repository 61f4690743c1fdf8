"""Score the committed rows of a model against a ground-truth column.

Shapes: K classes, H W a map.

* One pass reads three columns of the committed files. Only counts are kept in memory, K x K of them at most.
* The outputs decide how they are scored: `labels` or `logits` against a class id or name, or several where config.json
  says `problem_type: multi_label_classification`, or numbers for `regression`; a segmentation's `mask` against a PNG of
  class ids, `visual_tokens` against codes. Rows without ground truth are left out.
* Counts refer to classes by id; names come from the checkpoint, or from the classifier of a derived partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from img2parquet.dataset.commit import PLAN, Output
from img2parquet.dataset.damage import reading_parts
from img2parquet.dataset.derived import history_with
from img2parquet.dataset.generations import History
from img2parquet.dataset.plan import Plan
from img2parquet.errors import InputError, PartFailed, nearest
from img2parquet.job import JobSpec
from img2parquet.results.evaluation.scorers import SCORERS, MultiLabelScorer, Scorer, ScoringTask
from img2parquet.storage import Store

ROWS_AT_ONCE = 1024
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class; a score with nothing to divide by is None. For masks, `rows` counts pixels; only masks
    have an `iou`."""

    id: int
    name: str
    rows: int
    predicted: int
    correct: int
    precision: float | None
    recall: float | None
    f1: float | None
    iou: float | None = None


@dataclass(frozen=True)
class CalibrationBin:
    """Calibration of the rows whose highest score lies in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Numbers that do not apply to the task are None."""

    uri: str
    model: str
    truth: str
    column: str
    task: str  # labels | multi_label | regression | mask | visual_tokens
    rows: int  # with ground truth
    rows_without_truth: int
    top1: float | None = None  # labels: share of rows; visual_tokens: share of masked patches
    exact: float | None = None  # multi_label: share of rows whose predicted classes are the true ones
    f1: float | None = None  # multi_label: over all pairs of row and class
    macro_f1: float | None = None  # multi_label: mean over the classes that are true or predicted somewhere
    threshold: float | None = None  # multi_label: a class is predicted from this score on; the job's, or 0.5
    best_threshold: float | None = None  # multi_label: that with the highest f1, of steps of 0.01
    best_f1: float | None = None  # multi_label: f1 with it
    mean_absolute_error: float | None = None  # regression
    root_mean_squared_error: float | None = None  # regression
    r2: float | None = None  # regression: share of the truth's variance that is explained, mean over several values
    top5: float | None = (
        None  # None too where fewer than five classes were written for a row and the truth is not in it
    )
    calibration_error: float | None = (
        None  # expected, of the highest score (multi_label: of every score), over bins of equal width
    )
    mean_iou: float | None = None  # over the classes that are true or predicted somewhere
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None  # of the classes' recalls
    counted: int = 0  # rows, pixels or patches that were scored
    truncated: int = 0  # multi_label: rows with `top_k` predicted classes, which may have more
    resized: int = 0  # masks that were scaled to the size of their ground truth
    classes: tuple[ClassScore, ...] = ()
    confusion: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (truth, predicted) -> rows or pixels
    calibration: tuple[CalibrationBin, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the confusion matrix as a list of truth, predicted and count."""
        pairs = [{"truth": t, "predicted": p, "count": n} for (t, p), n in sorted(self.confusion.items())]
        return {**asdict(self), "confusion": pairs}

    @property
    def headline(self) -> dict[str, float]:
        """The few numbers for a summary."""
        names = (
            "top1", "top5", "f1", "macro_f1", "exact", "mean_absolute_error", "root_mean_squared_error", "r2",
            "mean_iou", "pixel_accuracy", "calibration_error",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def evaluate(
    uri: str,
    truth: str,
    model: str | None = None,
    column: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score the committed rows of a model against a ground-truth column. Works while the job runs.

    uri: the job's `output.uri`. truth: the passthrough column (`input.keep`) that holds the ground truth.
    model: needed when several models have outputs that can be scored; `<name>+probe` scores a probe's labels.
    column: the output to score; by default the first of logits, labels, segmentation and visual_tokens.
    storage_options: as under `output` in the job file.

    Raises InputError when a column is missing or a ground-truth value cannot be interpreted, naming the row's key."""
    output = Output.at(uri, Store(storage_options or {}))
    plan, files = open_plan(output), output.files()
    return evaluate_files(output, history_with(output, plan, model, files), files, truth, model, column)


def open_plan(output: Output) -> Plan:
    """Read the plan of an output. Raises InputError where there is none."""
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is not an output of img2parquet")
    return plan


def evaluate_files(
    output: Output,
    history: History,
    files: Iterable[str],
    truth: str,
    model: str | None = None,
    column: str | None = None,
) -> Evaluation:
    """Score like `evaluate`, with plans and a listing that were read before."""
    task = task_of(history.plan, output.uri, model, column)
    there = set(files)
    names = [name for name in history.names[task.model] if name in there]
    if not names:
        raise InputError(f"{output.uri}: no rows of model `{task.model}` are committed yet")
    scorer = SCORERS[task.kind](task, truth)
    rows = without = 0
    with reading_parts(output.uri):
        for batch in read_columns(output, names, ("key", truth, task.column), truth, task):
            present = batch.filter(batch.column(truth).is_valid())
            rows, without = rows + present.num_rows, without + batch.num_rows - present.num_rows
            _score(scorer, present, truth, task, output.uri)
    if not rows:
        raise InputError(f"{output.uri}: no row of model `{task.model}` has a value in `{truth}`")
    return to_evaluation(output.uri, task, truth, scorer, rows, without)


def read_columns(
    output: Output, names: Sequence[str], columns: Sequence[str], truth: str, task: ScoringTask
) -> Iterator[pa.RecordBatch]:
    """Read columns of these files, in order. Raises InputError when there is no column `truth`."""
    filesystem, root = output.store.arrow_filesystem(output.uri)
    dataset = ds.dataset([f"{root}/{name}" for name in names], format="parquet", filesystem=filesystem)
    _require(dataset.schema, truth, output.uri, task)
    options = {"batch_size": ROWS_AT_ONCE, "batch_readahead": 2, "fragment_readahead": 1}
    yield from dataset.scanner(columns=list(dict.fromkeys(columns)), **options).to_batches()


def scores_by_truth(job: JobSpec, output: Output, history: History) -> dict[str, dict[str, float]]:
    """Score every output of the models whose job names a ground-truth column (for a `loss`), where that column applies.

    Returns the headline numbers by `model.column`."""
    found = {}
    for model in job.models:
        truths = {str(truth) for wanted in model.outputs if (truth := getattr(wanted, "truth", None))}
        for truth in sorted(truths):
            for task in ScoringTask.of(model.name, history.plan.identities[model.name]):
                with suppress(InputError):  # ground truth of another kind: several labels, a number, for another output
                    names = history.names[model.name]
                    evaluation = evaluate_files(output, history, names, truth, model.name, task.column)
                    found[f"{model.name}.{task.column}"] = evaluation.headline
    return found


def _score(scorer: Scorer, batch: pa.RecordBatch, truth: str, task: ScoringTask, uri: str) -> None:
    try:
        scorer.add(batch.column("key").to_pylist(), batch.column(truth), batch.column(task.column))
    except PartFailed as error:  # fails a part in a job; here it is the user's choice of a column
        raise InputError(f"{uri}: {error.message}", known=error.known, hint=error.hint) from None
    except ValueError as error:
        raise InputError(f"{uri}: column `{task.column}` cannot be read: {error}") from None


def to_evaluation(uri: str, task: ScoringTask, truth: str, scorer: Scorer, rows: int, without: int) -> Evaluation:
    """Turn a scorer's counts into scores. rows: with ground truth; without: rows that have none."""
    counts = scorer.confusion
    classes = tuple(_class_scores(scorer.classes, task))
    is_mask, has_top = task.kind == "mask", task.kind in ("labels", "visual_tokens")
    is_multi = task.kind == "multi_label"
    errors = scorer.errors
    best = (scorer.best_threshold() if isinstance(scorer, MultiLabelScorer) else None) or (None, None)
    judged = [score for score in classes if score.rows or score.predicted]
    return Evaluation(
        uri=uri,
        model=task.model,
        truth=truth,
        column=task.column,
        task=task.kind,
        rows=rows,
        rows_without_truth=without,
        top1=_share(scorer.top1, scorer.counted) if has_top else None,
        top5=_share(scorer.top5, scorer.counted) if has_top and scorer.has_top5 else None,
        exact=_share(scorer.top1, scorer.counted) if is_multi else None,
        f1=_share(2 * sum(c.correct for c in classes), sum(c.rows + c.predicted for c in classes))
        if is_multi
        else None,
        macro_f1=_mean([score.f1 for score in judged]) if is_multi else None,
        threshold=task.scores.decision if is_multi else None,
        best_threshold=best[0],
        best_f1=best[1],
        mean_absolute_error=float(np.mean(errors.absolute / errors.count)) if errors.count else None,
        root_mean_squared_error=float(np.sqrt(np.mean(errors.squared / errors.count))) if errors.count else None,
        r2=errors.r2(),
        calibration_error=_calibration_error(scorer.bins),
        mean_iou=_mean([score.iou for score in judged]) if is_mask else None,
        pixel_accuracy=_share(scorer.top1, scorer.counted) if is_mask else None,
        mean_accuracy=_mean([score.recall for score in classes]) if counts else None,
        counted=scorer.counted,
        truncated=scorer.truncated,
        resized=scorer.resized,
        classes=classes,
        confusion=dict(counts),
        calibration=tuple(_bins(scorer.bins)),
    )


def _class_scores(counts: Mapping[int, tuple[int, int, int]], task: ScoringTask) -> Iterable[ClassScore]:
    """Score every class that is true or predicted somewhere, by id."""
    for id, (rows, predicted, correct) in counts.items():
        precision, recall = _share(correct, predicted), _share(correct, rows)
        f1 = _share(2 * correct, rows + predicted)
        iou = _share(correct, rows + predicted - correct) if task.kind == "mask" else None
        yield ClassScore(id, task.name_of(id), rows, predicted, correct, precision, recall, f1, iou)


def _bins(bins: npt.NDArray[np.float64]) -> Iterable[CalibrationBin]:
    """Turn (bins, 3) of count, sum of confidence and sum of hits into calibration bins."""
    for place, (count, confidence, hits) in enumerate(bins):
        if count:
            edges = place / len(bins), (place + 1) / len(bins)
            yield CalibrationBin(*edges, int(count), float(confidence / count), float(hits / count))


def _calibration_error(bins: npt.NDArray[np.float64]) -> float | None:
    total = bins[:, 0].sum()
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total) if total else None


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def task_of(plan: Plan, uri: str, model: str | None, column: str | None) -> ScoringTask:
    """Choose what to score: one output of one model."""
    if model is not None and model not in plan.identities:
        known = sorted(plan.identities)
        raise InputError(f"{uri}: no model `{model}`", known=known, hint=nearest(model, known))
    tasks = [task for name in sorted(plan.identities) for task in ScoringTask.of(name, plan.identities[name])]
    mine = [task for task in tasks if model in (None, task.model) and column in (None, task.column)]
    if not mine:
        where = f"model `{model}`" if model else "no model"
        raise InputError(
            f"{uri}: {where} has {'no output that can be scored' if column is None else f'no output `{column}`'}",
            known=[f"{task.model}: {task.column}" for task in tasks],
            hint="labels, logits, segmentation and visual_tokens can be scored",
        )
    if len({task.model for task in mine}) > 1:
        known = sorted({task.model for task in mine})
        raise InputError(f"{uri}: several models can be scored", known=known, hint="choose one with --model")
    return min(mine, key=lambda task: task.preference)


def _require(schema: pa.Schema, truth: str, uri: str, task: ScoringTask) -> None:
    if truth not in schema.names:
        reserved = {"key", "shard", "width", "height", "warnings", task.column}
        known = [name for name in schema.names if name not in reserved]
        hint = nearest(truth, known) or "name it in the job's `input.keep`"
        raise InputError(f"{uri}: no column `{truth}`", known=known, hint=hint)
