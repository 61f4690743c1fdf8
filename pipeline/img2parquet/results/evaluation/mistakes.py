"""Rank the rows whose given label is probably wrong, by confident learning (Northcutt et al. 2021).

* A class's threshold is the mean probability that the model gives it over the rows that are labelled with it. A row is
  suspect when another class reaches its threshold, and has a higher probability than every other class that does.
* Suspects are ranked by their normalised margin: the probability of the given class less that of the best other one.
* Two passes read three columns; sums for each class and the worst suspects are all that is kept in memory.
* With `labels`, classes that were not written for a row have probability 0; `logits` have all of them.

Shapes: B rows, K classes.
"""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.dataset.commit import Output
from img2parquet.dataset.damage import reading_parts
from img2parquet.dataset.derived import history_with
from img2parquet.errors import AlreadyExists, InputError, PartFailed
from img2parquet.results.evaluation.evaluate import open_plan, read_columns, task_of
from img2parquet.results.evaluation.scorers import ScoringTask, true_class
from img2parquet.storage import Store, resolve

MOST = 100_000  # suspects that are written
COLUMNS = ("rank", "key", "shard", "given", "suggested", "margin", "given_score", "suggested_score")
Doubles = npt.NDArray[np.float64]


class Suspect(NamedTuple):
    """A row whose label is probably wrong. Classes by id; scores are the model's probabilities."""

    margin: float  # from -1, the most suspect, to 0 and a little above
    key: str
    shard: str
    given: int
    suggested: int
    given_score: float
    suggested_score: float


@dataclass(frozen=True)
class MistakesSummary:
    """The result of `find_mistakes`."""

    uri: str
    model: str
    column: str
    rows: int  # with a label
    suspects: int
    written: int


def find_mistakes(
    uri: str,
    truth: str,
    to: str,
    model: str | None = None,
    column: str | None = None,
    *,
    most: int = MOST,
    storage_options: Mapping[str, Any] | None = None,
) -> MistakesSummary:
    """Write the rows whose label in a kept column is probably wrong to a CSV, the most suspect first.

    The model should not have been trained on these labels: it would have learnt the mistakes too.

    uri: the job's `output.uri`. truth: the passthrough column (`input.keep`) with class ids or names. to: path or URI
    of the CSV; never overwritten. model, column: as for `evaluate`; the output must score classes against each other.
    most: suspects that are written. storage_options: as under `output` in the job file.

    Raises InputError when a column is missing, a label cannot be interpreted, the output is of another kind, or the
    file exists."""
    output = Output.at(uri, Store(storage_options or {}))
    files = output.files()
    history = history_with(output, open_plan(output), model, files)
    task = task_of(history.plan, output.uri, model, column)
    if task.kind != "labels":
        hint = "choose `labels` or `logits` of a model that scores classes against each other"
        raise InputError(f"{output.uri}: `{task.column}` of model `{task.model}` is a {task.kind} output", hint=hint)
    names, columns = [name for name in history.names[task.model] if name in files], ("key", "shard", truth, task.column)

    def blocks() -> Iterator[_Block]:
        with reading_parts(output.uri):
            for batch in read_columns(output, names, columns, truth, task):
                yield from _block(batch, truth, task, output.uri)

    sums_K, counts_K = np.zeros(0), np.zeros(0)
    for block in blocks():
        more = max(0, block.scores_BK.shape[1] - len(sums_K))
        sums_K, counts_K = np.pad(sums_K, (0, more)), np.pad(counts_K, (0, more))
        np.add.at(sums_K, block.given_B, block.of_given_B)
        np.add.at(counts_K, block.given_B, 1)
    if not counts_K.any():
        raise InputError(f"{output.uri}: no row of model `{task.model}` has a value in `{truth}`")
    # a class that no row is labelled with cannot be suggested: how sure the model should be of it is not known
    thresholds_K = np.divide(sums_K, counts_K, out=np.full(len(sums_K), np.inf), where=counts_K > 0)
    worst, suspects = list[tuple[float, int, Suspect]](), 0
    for block in blocks():
        for suspect in _suspects(block, thresholds_K):
            suspects += 1
            heapq.heappush(worst, (-suspect.margin, -suspects, suspect))
            if len(worst) > most:
                heapq.heappop(worst)
    ranked = [suspect for _, _, suspect in sorted(worst, reverse=True)]
    try:
        Store().create(resolve(to), _encode(ranked, task))
    except AlreadyExists:
        raise InputError(f"{to} exists, and is not overwritten", hint="name another file") from None
    return MistakesSummary(resolve(to), task.model, task.column, int(counts_K.sum()), suspects, len(ranked))


class _Block(NamedTuple):
    keys: list[str]
    shards: list[str]
    given_B: npt.NDArray[np.int64]
    scores_BK: Doubles

    @property
    def of_given_B(self) -> Doubles:
        found: Doubles = self.scores_BK[np.arange(len(self.given_B)), self.given_B]
        return found


def _block(batch: pa.RecordBatch, truth: str, task: ScoringTask, uri: str) -> Iterator[_Block]:
    """Read the rows of a batch that have a label; yield nothing where none has."""
    said = batch.column(task.column)
    K = said.type.list_size if pa.types.is_fixed_size_list(said.type) else len(task.names) or 1 << 30
    rows, given = list[int](), list[int]()
    keys, truths = batch.column("key").to_pylist(), batch.column(truth).to_pylist()
    for row, (key, value) in enumerate(zip(keys, truths, strict=True)):
        try:
            id = None if value is None else true_class(value, task, K, truth, key)
        except PartFailed as error:  # fails a part in a job; here it is the user's choice of a column
            raise InputError(f"{uri}: {error.message}", known=error.known, hint=error.hint) from None
        if id is not None:
            rows.append(row)
            given.append(id)
    if rows:
        shards = batch.column("shard").to_pylist()
        scores_BK = _probabilities(said.take(pa.array(rows)), task, max(given) + 1)
        yield _Block([keys[row] for row in rows], [shards[row] for row in rows], np.array(given, np.int64), scores_BK)


def _probabilities(said: pa.Array, task: ScoringTask, least: int) -> Doubles:
    """Return the probability of every class, (B, K). least: of K, where a checkpoint does not name its classes."""
    if pa.types.is_fixed_size_list(said.type):
        values_N = said.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        return task.scores.of_logits(values_N.reshape(len(said), said.type.list_size))
    labels = said.flatten()
    ids_N = labels.field("id").to_numpy()
    scores_BK = np.zeros((len(said), max(len(task.names), least, ids_N.max(initial=-1) + 1)))
    rows_N = np.repeat(np.arange(len(said)), said.value_lengths().to_numpy(zero_copy_only=False))
    scores_BK[rows_N, ids_N] = labels.field("score").to_numpy()
    return scores_BK


def _suspects(block: _Block, thresholds_K: Doubles) -> Iterator[Suspect]:
    rows_B, given_B = np.arange(len(block.given_B)), block.given_B
    confident_BK = np.where(block.scores_BK >= thresholds_K[: block.scores_BK.shape[1]], block.scores_BK, -np.inf)
    suggested_B = confident_BK.argmax(axis=1)
    is_suspect_B = np.isfinite(confident_BK[rows_B, suggested_B]) & (suggested_B != given_B)
    others_BK = block.scores_BK.copy()
    others_BK[rows_B, given_B] = -np.inf
    margin_B = block.of_given_B - others_BK.max(axis=1)
    for row in np.flatnonzero(is_suspect_B):
        suggested = int(suggested_B[row])
        yield Suspect(
            float(margin_B[row]), block.keys[row], block.shards[row], int(given_B[row]), suggested,
            float(block.of_given_B[row]), float(block.scores_BK[row, suggested]),
        )  # fmt: skip


def _encode(suspects: list[Suspect], task: ScoringTask) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow(COLUMNS)
    for rank, one in enumerate(suspects, 1):
        scores = (f"{value:.6f}" for value in (one.margin, one.given_score, one.suggested_score))
        writer.writerow([rank, one.key, one.shard, task.name_of(one.given), task.name_of(one.suggested), *scores])
    return sink.getvalue().encode()
