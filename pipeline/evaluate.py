"""Committed rows and a passthrough column that says what is true -> how often the model is right.

Shapes: K classes, H W a map.

* One pass over the committed files, three columns of them; what is held are counts: K x K of them at most.
* Which outputs are judged follows from what the model wrote: `labels` or `logits` against a class id or name, a
  segmentation's `mask` against a PNG of class ids, `visual_tokens` against codes. Rows without a truth are left out.
* Classes are called by id in the counts; names are the checkpoint's, or a probe's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.commit import PLAN, Output
from pipeline.derived import history_with
from pipeline.errors import InputError, PartFailed, StorageError, nearest
from pipeline.generations import History
from pipeline.job import JobSpec
from pipeline.judge import JUDGES, Judge, Task
from pipeline.plan import Plan
from pipeline.storage import Store

ROWS_AT_ONCE = 1024
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScore:
    """One class of the truth. `rows` are pixels of a mask; `iou` is None but for masks. None: nothing to divide by."""

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
class Bin:
    """Rows whose highest score lies in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Numbers that the task does not have are None."""

    uri: str
    model: str
    truth: str
    column: str
    task: str  # labels | mask | visual_tokens
    rows: int  # with a truth
    rows_without_truth: int
    top1: float | None = None  # labels: share of rows; visual_tokens: share of masked patches
    top5: float | None = (
        None  # None too where fewer than five classes were written for a row and the truth is not in it
    )
    calibration_error: float | None = None  # expected, of the highest score, over bins of equal width
    mean_iou: float | None = None  # over the classes that are in the truth or predicted
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None  # of the classes' recalls
    counted: int = 0  # rows, pixels or patches that were judged
    resized: int = 0  # masks that were not as large as their truth, and were made so
    classes: tuple[ClassScore, ...] = ()
    confusion: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (truth, predicted) -> rows or pixels
    calibration: tuple[Bin, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; the confusion as rows of truth, predicted, count."""
        pairs = [{"truth": t, "predicted": p, "count": n} for (t, p), n in sorted(self.confusion.items())]
        return {**asdict(self), "confusion": pairs}

    @property
    def headline(self) -> dict[str, float]:
        """The few numbers of a summary."""
        names = ("top1", "top5", "mean_iou", "pixel_accuracy", "calibration_error")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def evaluate(
    uri: str, truth: str, model: str | None = None, column: str | None = None, **storage_options: Any
) -> Evaluation:
    """How right a model's committed rows are by the passthrough column `truth`. Works while the job runs.

    model: needed where several models wrote what can be judged, or `<name>+probe`; column: of the model's output.
    Raises InputError for a column that is not there, or a truth that cannot be understood, naming its key."""
    output = Output.at(uri, Store(storage_options))
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is no output of img2parquet")
    files = output.files()
    return evaluate_files(output, history_with(output, plan, model, files), files, truth, model, column)


def evaluate_files(
    output: Output,
    history: History,
    files: Iterable[str],
    truth: str,
    model: str | None = None,
    column: str | None = None,
) -> Evaluation:
    """`evaluate`, where the plans and the listing are at hand."""
    task = _task(history.plan, output.uri, model, column)
    there = set(files)
    names = [name for name in history.names[task.model] if name in there]
    if not names:
        raise InputError(f"{output.uri}: nothing of model `{task.model}` is committed yet")
    judge = JUDGES[task.kind](task, truth)
    rows = without = 0
    with telling_damage(output.uri):
        for batch in _batches(output, names, truth, task):
            present = batch.filter(batch.column(truth).is_valid())
            rows, without = rows + present.num_rows, without + batch.num_rows - present.num_rows
            _judge(judge, present, truth, task, output.uri)
    if not rows:
        raise InputError(f"{output.uri}: no row of model `{task.model}` has a value in `{truth}`")
    return evaluation(output.uri, task, truth, judge, rows, without)


def _batches(output: Output, names: Sequence[str], truth: str, task: Task) -> Iterator[pa.RecordBatch]:
    """Three columns of these files, in order."""
    filesystem, root = output.store.arrow_filesystem(output.uri)
    dataset = ds.dataset([f"{root}/{name}" for name in names], format="parquet", filesystem=filesystem)
    _require(dataset.schema, truth, output.uri, task)
    columns = ["key", truth, task.column]
    options = {"batch_size": ROWS_AT_ONCE, "batch_readahead": 2, "fragment_readahead": 1}
    yield from dataset.scanner(columns=columns, **options).to_batches()


@contextmanager
def telling_damage(uri: str) -> Iterator[None]:
    """Raises StorageError for a committed file that is damaged, which Arrow's own words name."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        hint = f"`img2parquet verify {uri}` lists all that is wrong"
        raise StorageError(f"{uri}: a committed file cannot be read: {what}", hint=hint) from None


def scores_by_truth(job: JobSpec, output: Output, history: History) -> dict[str, dict[str, float]]:
    """`model.column` -> the headline numbers of each model whose job names a truth for an output (a `loss`), of each of
    its outputs that this truth can judge."""
    found = {}
    for model in job.models:
        truths = {str(truth) for wanted in model.outputs if (truth := getattr(wanted, "truth", None))}
        for truth in sorted(truths):
            for task in Task.of(model.name, history.plan.identities[model.name]):
                with suppress(InputError):  # a truth of another kind: several labels, a number, another output's
                    names = history.names[model.name]
                    evaluation = evaluate_files(output, history, names, truth, model.name, task.column)
                    found[f"{model.name}.{task.column}"] = evaluation.headline
    return found


def _judge(judge: Judge, batch: pa.RecordBatch, truth: str, task: Task, uri: str) -> None:
    try:
        judge.add(batch.column("key").to_pylist(), batch.column(truth), batch.column(task.column))
    except PartFailed as error:  # a part's reader may fail so; here it is the user's choice of a column
        raise InputError(f"{uri}: {error.message}", known=error.known, hint=error.hint) from None
    except ValueError as error:
        raise InputError(f"{uri}: column `{task.column}` cannot be read: {error}") from None


def evaluation(uri: str, task: Task, truth: str, judge: Judge, rows: int, without: int) -> Evaluation:
    """What a judge has counted, as numbers. rows: with a truth; without: those that have none."""
    counts = judge.confusion
    classes = tuple(_class_scores(counts, task))
    is_mask = task.kind == "mask"
    judged = [score for score in classes if score.rows or score.predicted]
    return Evaluation(
        uri=uri,
        model=task.model,
        truth=truth,
        column=task.column,
        task=task.kind,
        rows=rows,
        rows_without_truth=without,
        top1=None if is_mask else _share(judge.top1, judge.counted),
        top5=None if is_mask or not judge.has_top5 else _share(judge.top5, judge.counted),
        calibration_error=_calibration_error(judge.bins),
        mean_iou=_mean([score.iou for score in judged]) if is_mask else None,
        pixel_accuracy=_share(judge.top1, judge.counted) if is_mask else None,
        mean_accuracy=_mean([score.recall for score in classes]) if counts else None,
        counted=judge.counted,
        resized=judge.resized,
        classes=classes,
        confusion=dict(counts),
        calibration=tuple(_bins(judge.bins)),
    )


def _class_scores(counts: Counter[tuple[int, int]], task: Task) -> Iterable[ClassScore]:
    """Of every class that is true or predicted somewhere, by id."""
    rows, predicted = Counter[int](), Counter[int]()
    for (true, said), count in counts.items():
        rows[true] += count
        predicted[said] += count
    for id in sorted(rows.keys() | predicted.keys()):
        correct = counts[id, id]
        precision, recall = _share(correct, predicted[id]), _share(correct, rows[id])
        f1 = _share(2 * correct, rows[id] + predicted[id])
        iou = _share(correct, rows[id] + predicted[id] - correct) if task.kind == "mask" else None
        yield ClassScore(id, task.name_of(id), rows[id], predicted[id], correct, precision, recall, f1, iou)


def _bins(bins: npt.NDArray[np.float64]) -> Iterable[Bin]:
    """(bins, 3) of count, sum of confidence, sum of hits."""
    for place, (count, confidence, hits) in enumerate(bins):
        if count:
            edges = place / len(bins), (place + 1) / len(bins)
            yield Bin(*edges, int(count), float(confidence / count), float(hits / count))


def _calibration_error(bins: npt.NDArray[np.float64]) -> float | None:
    total = bins[:, 0].sum()
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total) if total else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _task(plan: Plan, uri: str, model: str | None, column: str | None) -> Task:
    """What is to be judged: one output of one model."""
    if model is not None and model not in plan.identities:
        known = sorted(plan.identities)
        raise InputError(f"{uri}: no model `{model}`", known=known, hint=nearest(model, known))
    tasks = [task for name in sorted(plan.identities) for task in Task.of(name, plan.identities[name])]
    mine = [task for task in tasks if model in (None, task.model) and column in (None, task.column)]
    if not mine:
        where = f"model `{model}`" if model else "no model"
        raise InputError(
            f"{uri}: {where} has {'nothing that a truth could judge' if column is None else f'no output `{column}`'}",
            known=[f"{task.model}: {task.column}" for task in tasks],
            hint="labels, logits, segmentation and visual_tokens can be judged",
        )
    if len({task.model for task in mine}) > 1:
        known = sorted({task.model for task in mine})
        raise InputError(f"{uri}: several models can be judged", known=known, hint="say --model")
    return min(mine, key=lambda task: task.preference)


def _require(schema: pa.Schema, truth: str, uri: str, task: Task) -> None:
    if truth not in schema.names:
        reserved = {"key", "shard", "width", "height", "warnings", task.column}
        known = [name for name in schema.names if name not in reserved]
        hint = nearest(truth, known) or "name it in the job's `input.keep`"
        raise InputError(f"{uri}: no column `{truth}`", known=known, hint=hint)
