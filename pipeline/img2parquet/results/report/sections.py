"""Assemble everything that the page shows, as plain values, from a run's summary and its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from img2parquet.errors import InputError, nearest
from img2parquet.outputs.class_names import distinct_names
from img2parquet.results.evaluation.scorers import ScoringTask
from img2parquet.results.label_scores import SOFTMAX, LabelScores, class_names, scores_of_output
from img2parquet.results.report import masks
from img2parquet.results.report.accuracy import (
    MOST_FOREIGN_ID,
    ModelAccuracy,
    foreign_labels,
    guess_truth,
    score_sample,
    tasks_of,
)
from img2parquet.results.report.embedding_map import EmbeddingMap, map_embeddings, vectors
from img2parquet.results.report.row_sample import SEED, RowSample
from img2parquet.results.report.run_summary import RunSummary
from img2parquet.results.report.speed import Speed, speed
from img2parquet.results.report.thumbnails import Thumbnails, gather
from img2parquet.results.source_images import Place

RANDOM, UNSURE, WRONG = 24, 18, 18
LABELS_SHOWN, LABEL_GALLERIES, OF_A_LABEL = 24, 12, 8
GROUPS = 12  # colours on the map
MASKS, MASK_PX = 18, 176
MASKS_JUDGED = 400
TOP = 5


@dataclass(frozen=True)
class Gallery:
    """A titled selection of rows."""

    title: str
    about: str
    rows: list[int]


@dataclass
class ModelSection:
    """One model's section of the page. Rows are indexes into its sample."""

    sample: RowSample
    identity: dict[str, Any]
    predictions: list[list[dict[str, Any]]]  # best first; [] for a row that has none
    label_scores: LabelScores = SOFTMAX
    rows: int | None = None  # of the model in total, where known
    galleries: list[Gallery] = field(default_factory=list)
    judged: dict[str, ModelAccuracy] = field(default_factory=dict)  # by task: labels, multi_label, regression, ...
    scores: dict[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # over all rows, as the run computed them; by task
    fitted: Mapping[str, Any] = field(
        default_factory=dict
    )  # of a derived partition: how good its classifier is, or its prompts
    embedding_map: EmbeddingMap | None = None
    groups: list[str] = field(default_factory=list)  # each row's group, for the map
    group_names: list[str] = field(default_factory=list)  # the most frequent, which have a colour
    mask_rows: list[int] = field(default_factory=list)
    overlays: dict[int, int] = field(default_factory=dict)  # row -> picture
    areas: list[tuple[int, str, float]] = field(default_factory=list)  # class, name, share of pixels

    @property
    def places(self) -> list[Place]:
        return list(zip(self.sample.texts("shard"), self.sample.texts("key"), strict=False))

    @property
    def is_whole(self) -> bool:
        """Whether the sample holds every row."""
        return bool(self.sample.table.num_rows == self.rows)

    def predicted(self, row: int) -> list[dict[str, Any]]:
        """The predicted labels of a row: the first, or each that is probable; for a regression, every value."""
        return self.label_scores.predicted(self.predictions[row])

    @property
    def values(self) -> dict[str, list[float]]:
        """The values of a regression by name; none for other models."""
        found: dict[str, list[float]] = {}
        if self.label_scores.function == "none":
            for label in (label for labels in self.predictions for label in labels):
                found.setdefault(str(label["name"]), []).append(float(label["score"]))
        return dict(sorted(found.items()))

    @property
    def confidences(self) -> list[float]:
        return [float(labels[0]["score"]) for labels in self.predictions if labels]

    @property
    def median_confidence(self) -> float:
        return float(np.median(self.confidences)) if self.confidences else 0.0

    def truth_of(self, row: int) -> str:
        """The ground truth of a row, as its class's name where it is an id."""
        found = self.judged["labels"].found
        value = str(self.sample.table[found.truth][row].as_py())
        names = {str(score.id): score.name for score in found.classes}
        return value if value in names.values() else names.get(value.strip(), value)

    @property
    def label_counts(self) -> list[tuple[str, int]]:
        if self.label_scores.function == "none":
            return []
        counts = Counter(str(label["name"]) for row in range(len(self.predictions)) for label in self.predicted(row))
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    @property
    def in_galleries(self) -> set[int]:
        rows = {row for gallery in self.galleries for row in gallery.rows} | set(self.mask_rows)
        if self.embedding_map:
            rows |= {row for i, j, _ in self.embedding_map.pairs for row in (i, j)}
            rows |= {row for query, near in self.embedding_map.neighbours for row in (query, *(i for i, _ in near))}
        return rows


@dataclass(frozen=True)
class PageContent:
    """Everything that the page shows."""

    summary: RunSummary
    sections: list[ModelSection]
    pictures: Thumbnails
    speed: Speed | None


def show(summary: RunSummary, samples: Sequence[RowSample], truth: str | None) -> PageContent:
    """Assemble the page's content. Raises InputError when no model has the ground-truth column."""
    _check_truth(samples, truth)
    sections = [_section(summary, sample, truth) for sample in samples]
    large = {s.places[row] for s in sections for row in s.in_galleries if s.places}
    pictures = gather(summary, samples, large)
    for section in sections:
        _lay_masks(section, pictures)
    return PageContent(summary, sections, pictures, speed(summary.meters))


def _check_truth(samples: Sequence[RowSample], truth: str | None) -> None:
    if truth is None or not samples or any(truth in sample.table.column_names for sample in samples):
        return
    known = sorted({name for sample in samples for name in sample.columns.passthrough})
    raise InputError(
        f"no model has a column `{truth}`", known=known, hint=nearest(truth, known) or "name it in `input.keep`"
    )


def _section(summary: RunSummary, sample: RowSample, truth: str | None) -> ModelSection:
    identity = dict(summary.identities.get(sample.model, {}))
    said = told_apart(predictions(sample, identity), identity.get("config", {}))
    section = ModelSection(sample, identity, said, label_scores(sample, identity))
    section.rows = summary.rows_written.get(sample.model)
    section.fitted = summary.fitted.get(sample.model, {})
    _judge(summary, section, truth)
    _group(section)
    if sample.columns.embedding in sample.table.column_names:
        field = sample.table.schema.field(sample.columns.embedding)
        section.embedding_map = map_embeddings(vectors(sample.table[field.name], field), section.groups, SEED)
    _look_at_masks(section)
    section.galleries = list(_galleries(section))
    return section


def predictions(sample: RowSample, identity: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return each row's labels, best first, from the labels column or the scores of the logits."""
    columns, table = sample.columns, sample.table
    if columns.labels in table.column_names:
        rows = table[columns.labels].to_pylist()
        return [[label for label in row or [] if label] for row in rows]
    if columns.logits not in table.column_names:
        return [[] for _ in range(table.num_rows)]
    logits_NK = vectors(table[columns.logits]).astype(np.float64)
    score_NK = label_scores(sample, identity).of_logits(logits_NK)
    names = dict(enumerate(class_names(identity.get("config", {}))))
    best_NT = np.argsort(-logits_NK, axis=1, kind="stable")[:, :TOP]
    return [
        [{"id": int(k), "name": names.get(int(k), f"LABEL_{k}"), "score": float(score[k])} for k in best]
        for best, score in zip(best_NT, score_NK, strict=True)
    ]


def told_apart(rows: list[list[dict[str, Any]]], config: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Give labels of different classes different names, where their ids tell the classes apart."""
    seen = {(label.get("id"), str(label["name"])) for labels in rows for label in labels}
    by_id = {id: name for id, name in seen if type(id) is int and 0 <= id < MOST_FOREIGN_ID}
    if len(by_id) < len(seen):
        return rows
    named = dict(enumerate(class_names(config))) | by_id
    names = distinct_names([named.get(id, f"class {id}") for id in range(max(named, default=-1) + 1)])
    return [[{**label, "name": names[label["id"]]} for label in labels] for labels in rows]


def label_scores(sample: RowSample, identity: Mapping[str, Any]) -> LabelScores:
    """Return what the scores of `predictions` are."""
    column = sample.columns.labels or sample.columns.logits
    outputs = [output for output in identity.get("outputs", ()) if output.get("name", output["kind"]) == column]
    return scores_of_output(outputs[0], identity) if outputs else SOFTMAX


def _judge(summary: RunSummary, section: ModelSection, truth: str | None) -> None:
    """Score each kind of output in the sample against the first ground-truth candidate that applies to it."""
    sample, table = section.sample, section.sample.table
    order = np.random.default_rng(SEED).permutation(table.num_rows)
    rows = {"mask": order[:MASKS_JUDGED].tolist()}
    for task in _tasks(section):
        said, mistakes = table, []
        if task.kind == "labels" and not section.identity:
            said, task = foreign_labels(table, sample.model, section.predictions)
        for column in _truths_in_question(section, task, truth):
            try:
                section.judged[task.kind] = score_sample(said, task, column, rows.get(task.kind), summary.output.uri)
                break
            except InputError as error:
                mistakes.append(error.message)
        else:
            if truth is not None and mistakes:
                summary.note(f"{task.column} of {sample.model} is not scored: {mistakes[0]}")
        if f"{sample.model}.{task.column}" in summary.scores:
            section.scores[task.kind] = summary.scores[f"{sample.model}.{task.column}"]


def _tasks(section: ModelSection) -> list[ScoringTask]:
    """By the run's identity; of files that have none, by their types."""
    sample, columns = section.sample, section.sample.columns
    if section.identity:
        return tasks_of(sample.table, sample.model, section.identity)
    found = []
    if any(section.predictions):
        found.append(ScoringTask(sample.model, str(columns.labels), "labels", 0, (), -1, False))
    if columns.mask in sample.table.column_names:
        names = masks.class_names(sample.table.schema.field(columns.mask), {})
        listed = tuple(names.get(id, f"class {id}") for id in range(max(names, default=-1) + 1))
        found.append(ScoringTask(sample.model, str(columns.mask), "mask", 0, listed, 255, False))
    return found


def _truths_in_question(section: ModelSection, task: ScoringTask, truth: str | None) -> list[str]:
    """The one that was named, else those that the job names, else for labels a column of class names."""
    table = section.sample.table
    if truth is not None:
        return [truth] if truth in table.column_names else []
    found = [name for name in section.sample.columns.truths if name in table.column_names]
    if task.kind == "labels":
        names = {*task.names, *(str(label["name"]) for labels in section.predictions for label in labels)}
        columns = [(name, table[name].to_pylist()) for name in section.sample.columns.passthrough]
        guessed = guess_truth(columns, names)
        found += [guessed] if guessed else []
    return found


def _group(section: ModelSection) -> None:
    """Group rows to colour the map: by predicted label, or else by a text column with few values."""
    if any(section.predictions) and section.label_scores.function != "none":
        predicted = [section.predicted(row) for row in range(len(section.predictions))]
        section.groups = [str(labels[0]["name"]) if labels else "" for labels in predicted]
    else:
        for name in section.sample.columns.passthrough:
            values = ["" if v is None else str(v) for v in section.sample.table[name].to_pylist()]
            if 1 < len(set(values)) <= min(40, max(2, len(values) // 4)):
                section.groups = values
                break
    counts = Counter(group for group in section.groups if group)
    section.group_names = [n for n, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:GROUPS]


def _galleries(section: ModelSection) -> Any:
    rows = section.sample.table.num_rows
    order = np.random.default_rng(SEED).permutation(rows).tolist()
    if not section.sample.columns.mask:
        yield Gallery("Random rows", "Rows of the sample, chosen by seed.", order[:RANDOM])
    if not any(section.predictions):
        return
    by_score = sorted((i for i in order if section.predictions[i]), key=lambda i: section.predictions[i][0]["score"])
    if section.label_scores.function == "none":
        yield Gallery("Lowest values", "Rows whose largest value is the lowest.", by_score[:UNSURE])
        yield Gallery("Highest values", "Rows with the highest values.", by_score[::-1][:UNSURE])
        return
    if section.label_scores.function == "sigmoid":
        decision = section.label_scores.decision
        by_doubt = sorted(by_score, key=lambda i: min(abs(x["score"] - decision) for x in section.predictions[i]))
        about = f"Rows with a label whose score is closest to {decision:g}, from which it is predicted."
        yield Gallery("Least confident", about, by_doubt[:UNSURE])
    else:
        yield Gallery("Least confident", "Rows whose first label has the lowest confidence.", by_score[:UNSURE])
    if "labels" in section.judged:
        wrong = [i for i in reversed(by_score) if i in section.judged["labels"].wrong]
        if wrong:
            yield Gallery(
                "Confidently wrong",
                "Rows whose first label differs from the ground truth, the most confident first.",
                wrong[:WRONG],
            )
    for name, count in section.label_counts[:LABEL_GALLERIES]:
        of_label = [i for i in order if any(label["name"] == name for label in section.predicted(i))]
        yield Gallery(name, f"{count:,} of the sample", of_label[:OF_A_LABEL])


def _look_at_masks(section: ModelSection) -> None:
    sample, columns = section.sample, section.sample.columns
    if columns.mask not in sample.table.column_names:
        return
    names = masks.class_names(sample.table.schema.field(columns.mask), section.identity.get("config", {}))
    order = np.random.default_rng(SEED).permutation(sample.table.num_rows)
    section.mask_rows = [int(i) for i in order[:MASKS]]
    section.areas = _areas(section, names, order[:MASKS_JUDGED])


def _areas(section: ModelSection, names: dict[int, str], order: Any) -> list[tuple[int, str, float]]:
    """Compute each class's share of pixels, from the histograms or else from some masks."""
    table, columns = section.sample.table, section.sample.columns
    if columns.histogram in table.column_names:
        totals = vectors(table[columns.histogram]).astype(np.float64).sum(0)
    else:
        totals = np.zeros(max(names, default=0) + 1)
        for i in order:
            found = masks.ids(table[columns.mask][int(i)].as_py())
            if found is not None:
                counts = np.bincount(found[found >= 0].reshape(-1), minlength=len(totals))
                totals = np.pad(totals, (0, max(0, len(counts) - len(totals)))) + np.pad(
                    counts, (0, max(0, len(totals) - len(counts)))
                )
    shares = totals / max(totals.sum(), 1)
    named = [(k, names.get(k, f"class {k}"), float(share)) for k, share in enumerate(shares) if share > 0]
    return sorted(named, key=lambda item: -item[2])


def _lay_masks(section: ModelSection, pictures: Thumbnails) -> None:
    """Draw the masks that are shown as overlays for their thumbnails."""
    for row in section.mask_rows:
        found = masks.ids(section.sample.table[section.sample.columns.mask][row].as_py())
        if found is not None:
            scale = min(1.0, MASK_PX / max(found.shape))
            size = (max(1, round(found.shape[1] * scale)), max(1, round(found.shape[0] * scale)))
            section.overlays[row] = pictures.add(masks.coloured(found, MASK_PX), size)
