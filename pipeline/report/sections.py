"""An account and its samples -> everything that the page shows, as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import InputError, nearest
from pipeline.judge import Task
from pipeline.report import masks
from pipeline.report.account import Account
from pipeline.report.accuracy import Judged, foreign_labels, guess_truth, judge, tasks_of
from pipeline.report.likeness import Likeness, likeness, vectors
from pipeline.report.pictures import Pictures, gather
from pipeline.report.sample import SEED, Sample
from pipeline.report.speed import Speed, speed
from pipeline.source_images import Place

RANDOM, UNSURE, WRONG = 24, 18, 18
LABELS_SHOWN, LABEL_GALLERIES, OF_A_LABEL = 24, 12, 8
GROUPS = 12  # colours on the map
MASKS, MASK_PX = 18, 176
MASKS_JUDGED = 400
TOP = 5


@dataclass(frozen=True)
class Gallery:
    title: str
    about: str
    rows: list[int]


@dataclass
class Section:
    """One model. Rows are places in its sample."""

    sample: Sample
    identity: dict[str, Any]
    predictions: list[list[dict[str, Any]]]  # best first; [] for a row that has none
    rows: int | None = None  # of the model in all, where that is known
    galleries: list[Gallery] = field(default_factory=list)
    judged: dict[str, Judged] = field(default_factory=dict)  # by task: labels, mask, visual_tokens
    scores: dict[str, Mapping[str, float]] = field(default_factory=dict)  # of all rows, as the run counted; by task
    fitted: Mapping[str, Any] = field(default_factory=dict)  # of a probe's partition: how good its classifier is
    likeness: Likeness | None = None
    groups: list[str] = field(default_factory=list)  # each row's, for the map
    group_names: list[str] = field(default_factory=list)  # the most frequent, which have a colour
    mask_rows: list[int] = field(default_factory=list)
    overlays: dict[int, int] = field(default_factory=dict)  # row -> picture
    areas: list[tuple[int, str, float]] = field(default_factory=list)  # class, name, share of pixels

    @property
    def places(self) -> list[Place]:
        return list(zip(self.sample.texts("shard"), self.sample.texts("key"), strict=False))

    @property
    def is_whole(self) -> bool:
        """Whether the sample is all that there is."""
        return bool(self.sample.table.num_rows == self.rows)

    @property
    def confidences(self) -> list[float]:
        return [float(labels[0]["score"]) for labels in self.predictions if labels]

    @property
    def median_confidence(self) -> float:
        return float(np.median(self.confidences)) if self.confidences else 0.0

    def truth_of(self, row: int) -> str:
        """What the column of truths says of a row, by its class's name where it is an id."""
        found = self.judged["labels"].found
        value = str(self.sample.table[found.truth][row].as_py())
        names = {str(score.id): score.name for score in found.classes}
        return value if value in names.values() else names.get(value.strip(), value)

    @property
    def label_counts(self) -> list[tuple[str, int]]:
        counts = Counter(str(labels[0]["name"]) for labels in self.predictions if labels)
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    @property
    def in_galleries(self) -> set[int]:
        rows = {row for gallery in self.galleries for row in gallery.rows} | set(self.mask_rows)
        if self.likeness:
            rows |= {row for i, j, _ in self.likeness.pairs for row in (i, j)}
            rows |= {row for query, near in self.likeness.neighbours for row in (query, *(i for i, _ in near))}
        return rows


@dataclass(frozen=True)
class Shown:
    account: Account
    sections: list[Section]
    pictures: Pictures
    speed: Speed | None


def show(account: Account, samples: Sequence[Sample], truth: str | None) -> Shown:
    """Everything that is on the page. Raises InputError for a truth column that no model has."""
    _check_truth(samples, truth)
    sections = [_section(account, sample, truth) for sample in samples]
    large = {s.places[row] for s in sections for row in s.in_galleries if s.places}
    pictures = gather(account, samples, large)
    for section in sections:
        _lay_masks(section, pictures)
    return Shown(account, sections, pictures, speed(account.meters))


def _check_truth(samples: Sequence[Sample], truth: str | None) -> None:
    if truth is None or not samples or any(truth in sample.table.column_names for sample in samples):
        return
    known = sorted({name for sample in samples for name in sample.columns.passthrough})
    raise InputError(f"no column `{truth}` here", known=known, hint=nearest(truth, known) or "name it in `input.keep`")


def _section(account: Account, sample: Sample, truth: str | None) -> Section:
    identity = dict(account.identities.get(sample.model, {}))
    section = Section(sample, identity, predictions(sample, identity))
    section.rows = account.rows_written.get(sample.model)
    section.fitted = account.fitted.get(sample.model, {})
    _judge(account, section, truth)
    _group(section)
    if sample.columns.embedding in sample.table.column_names:
        field = sample.table.schema.field(sample.columns.embedding)
        section.likeness = likeness(vectors(sample.table[field.name], field), section.groups, SEED)
    _look_at_masks(section)
    section.galleries = list(_galleries(section))
    return section


def predictions(sample: Sample, identity: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Each row's labels, best first: the column, or the softmax of the logits."""
    columns, table = sample.columns, sample.table
    if columns.labels in table.column_names:
        rows = table[columns.labels].to_pylist()
        return [[label for label in row or [] if label] for row in rows]
    if columns.logits not in table.column_names:
        return [[] for _ in range(table.num_rows)]
    logits_NK = vectors(table[columns.logits]).astype(np.float64)
    exp_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    share_NK = exp_NK / exp_NK.sum(1, keepdims=True)
    names = dict(identity.get("config", {}).get("id2label") or {})
    best_NT = np.argsort(-share_NK, axis=1, kind="stable")[:, :TOP]
    return [
        [{"id": int(k), "name": str(names.get(str(k), f"LABEL_{k}")), "score": float(share[k])} for k in best]
        for best, share in zip(best_NT, share_NK, strict=True)
    ]


def _judge(account: Account, section: Section, truth: str | None) -> None:
    """Every kind of output that the sample holds, by the first of the truths in question that it can be judged by."""
    sample, table = section.sample, section.sample.table
    order = np.random.default_rng(SEED).permutation(table.num_rows)
    rows = {"mask": order[:MASKS_JUDGED].tolist()}
    for task in _tasks(section):
        said, mistakes = table, []
        if task.kind == "labels" and not section.identity:
            said, task = foreign_labels(table, sample.model, section.predictions)
        for column in _truths_in_question(section, task, truth):
            try:
                section.judged[task.kind] = judge(said, task, column, rows.get(task.kind), account.output.uri)
                break
            except InputError as error:
                mistakes.append(error.message)
        else:
            if truth is not None and mistakes:
                account.note(f"{task.column} of {sample.model} is not judged: {mistakes[0]}")
        if f"{sample.model}.{task.column}" in account.scores:
            section.scores[task.kind] = account.scores[f"{sample.model}.{task.column}"]


def _tasks(section: Section) -> list[Task]:
    """By the run's identity; of files that have none, by their types."""
    sample, columns = section.sample, section.sample.columns
    if section.identity:
        return tasks_of(sample.table, sample.model, section.identity)
    found = []
    if any(section.predictions):
        found.append(Task(sample.model, str(columns.labels), "labels", 0, (), -1, False))
    if columns.mask in sample.table.column_names:
        names = masks.class_names(sample.table.schema.field(columns.mask), {})
        listed = tuple(names.get(id, f"class {id}") for id in range(max(names, default=-1) + 1))
        found.append(Task(sample.model, str(columns.mask), "mask", 0, listed, 255, False))
    return found


def _truths_in_question(section: Section, task: Task, truth: str | None) -> list[str]:
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


def _group(section: Section) -> None:
    """What colours the map: the predicted label, else a text column with few values."""
    if any(section.predictions):
        section.groups = [str(labels[0]["name"]) if labels else "" for labels in section.predictions]
    else:
        for name in section.sample.columns.passthrough:
            values = ["" if v is None else str(v) for v in section.sample.table[name].to_pylist()]
            if 1 < len(set(values)) <= min(40, max(2, len(values) // 4)):
                section.groups = values
                break
    counts = Counter(group for group in section.groups if group)
    section.group_names = [n for n, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:GROUPS]


def _galleries(section: Section) -> Any:
    rows = section.sample.table.num_rows
    order = np.random.default_rng(SEED).permutation(rows).tolist()
    if not section.sample.columns.mask:
        yield Gallery("At random", "Rows of the sample, chosen by seed.", order[:RANDOM])
    if not any(section.predictions):
        return
    by_score = sorted((i for i in order if section.predictions[i]), key=lambda i: section.predictions[i][0]["score"])
    yield Gallery("Least sure", "The lowest confidence in the first label.", by_score[:UNSURE])
    if "labels" in section.judged:
        wrong = [i for i in reversed(by_score) if i in section.judged["labels"].wrong]
        if wrong:
            yield Gallery(
                "Most surely wrong", "Where the first label is not the truth, the surest first.", wrong[:WRONG]
            )
    for name, count in section.label_counts[:LABEL_GALLERIES]:
        of_label = [i for i in order if section.predictions[i] and section.predictions[i][0]["name"] == name]
        yield Gallery(name, f"{count:,} of the sample", of_label[:OF_A_LABEL])


def _look_at_masks(section: Section) -> None:
    sample, columns = section.sample, section.sample.columns
    if columns.mask not in sample.table.column_names:
        return
    names = masks.class_names(sample.table.schema.field(columns.mask), section.identity.get("config", {}))
    order = np.random.default_rng(SEED).permutation(sample.table.num_rows)
    section.mask_rows = [int(i) for i in order[:MASKS]]
    section.areas = _areas(section, names, order[:MASKS_JUDGED])


def _areas(section: Section, names: dict[int, str], order: Any) -> list[tuple[int, str, float]]:
    """The share of pixels that each class has, from the histograms, else from some masks."""
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


def _lay_masks(section: Section, pictures: Pictures) -> None:
    """The masks that are shown, as pictures to lie over their thumbnails."""
    for row in section.mask_rows:
        found = masks.ids(section.sample.table[section.sample.columns.mask][row].as_py())
        if found is not None:
            scale = min(1.0, MASK_PX / max(found.shape))
            size = (max(1, round(found.shape[1] * scale)), max(1, round(found.shape[0] * scale)))
            section.overlays[row] = pictures.add(masks.coloured(found, MASK_PX), size)
