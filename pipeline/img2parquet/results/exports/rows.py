"""Read an output's committed rows for an export: find the columns by kind, and yield batches in the plan's order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from img2parquet.dataset.commit import PLAN, Output
from img2parquet.dataset.damage import reading_parts
from img2parquet.dataset.derived import derived_names, history_with
from img2parquet.errors import InputError, nearest
from img2parquet.outputs.class_names import distinct_names
from img2parquet.outputs.vectors import is_vector
from img2parquet.results.exports.arrow_types import plain_array, plain_type
from img2parquet.results.label_scores import SOFTMAX, LabelScores, scores_of_output
from img2parquet.results.label_scores import class_names as names_by_id
from img2parquet.results.reader import open_results
from img2parquet.storage import Store

BATCH_ROWS = 256  # decoded at one time; a part's file has at most 64 MiB of columns


@dataclass
class ExportRows:
    """The rows of one model. `fields` are those to export, `key` first, with types as `plain_type` returns them."""

    uri: str
    store: Store
    model: str
    dataset: ds.Dataset
    fields: tuple[pa.Field, ...]
    kinds: dict[str, str]  # column -> the kind of output that wrote it, from the run's identity
    label_names: list[str]  # of the model's classes, by id, distinct
    scores: dict[str, LabelScores]  # column of labels -> what its scores are
    parts: int
    parts_planned: int
    rows_read: int = 0

    @classmethod
    def at(cls, uri: str, model: str | None, columns: Sequence[str], storage_options: Mapping[str, Any]) -> ExportRows:
        """Open an output's rows. Raises InputError when it has no plan, no committed rows, or several models."""
        store = Store(storage_options)
        output = Output.at(uri, store)
        plan = output.stored_plan()
        if plan is None:
            raise InputError(f"{output.uri}: no {PLAN} here, so this is not an output of img2parquet")
        models, files = sorted(plan.identities), output.files()
        if model is None and len(models) > 1:
            known = models + derived_names(files)
            raise InputError(f"{output.uri} has several models: choose one with --model", known=known)
        model = model or models[0]
        dataset = open_results(uri, model, storage_options=storage_options)
        history = history_with(output, plan, model, files)
        identity = history.plan.identities[model]
        outputs = identity.get("outputs", [])
        kinds = {out.get("name", out["kind"]): out["kind"] for out in outputs}
        return cls(
            uri=output.uri,
            store=store,
            model=model,
            dataset=dataset,
            fields=_chosen(output.uri, dataset.schema, columns),
            kinds=kinds,
            label_names=distinct_names(names_by_id(identity.get("config", {}))),
            scores={o.get("name", "labels"): scores_of_output(o, identity) for o in outputs if o["kind"] == "labels"},
            parts=len(dataset.files),
            parts_planned=len(history.names[model]),
        )

    @property
    def names(self) -> list[str]:
        return [field.name for field in self.fields]

    def parts_of_batches(self, rows: int = BATCH_ROWS, names: Sequence[str] = ()) -> Iterator[Iterator[pa.RecordBatch]]:
        """Yield the batches of each part's file, and count their rows."""
        for fragment in self.dataset.get_fragments():
            yield self._batches_of(fragment, rows, list(names) or self.names)

    def batches(self, rows: int = BATCH_ROWS, names: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        for batches in self.parts_of_batches(rows, names):
            yield from batches

    def rows_with(self, *fields: pa.Field | None) -> Iterator[dict[str, Any]]:
        """Yield rows as Python values, one by one: these columns, and those that every format of images needs."""
        names = ["key", "shard", "width", "height", *(field.name for field in fields if field is not None)]
        for batch in self.batches(names=list(dict.fromkeys(names))):
            yield from self.python_rows(batch)

    def python_rows(self, batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """Yield a batch's rows as Python values. Labels get distinct names, and null labels are left out."""
        labels = [field.name for field in batch.schema if is_labels(field)]
        for row in batch.to_pylist():
            for name in labels:
                names = self.label_names if self.kinds.get(name) == "labels" else []
                whole = [label for label in row[name] or () if label and None not in label.values()]
                row[name] = [{**x, "name": names[x["id"]] if 0 <= x["id"] < len(names) else x["name"]} for x in whole]
            yield row

    def notes(self) -> Iterator[str]:
        if self.parts < self.parts_planned:
            done = f"{self.parts} of {self.parts_planned} parts are committed"
            yield f"{done}: the job has not finished, so rows are missing"

    @property
    def labels(self) -> pa.Field | None:
        """Find the column of names and scores."""
        return self._one("labels", is_labels)

    @property
    def label_scores(self) -> LabelScores:
        """What the scores of `labels` are."""
        return self.scores.get(self.labels.name, SOFTMAX) if self.labels is not None else SOFTMAX

    @property
    def mask(self) -> pa.Field | None:
        """Find the column of class maps."""
        return self._one("segmentation", is_mask)

    @property
    def vector(self) -> pa.Field | None:
        """Find the column of embeddings, or another column of vectors when there is none."""
        return self._one("embedding", is_vector)

    def _one(self, kind: str, fits: Any) -> pa.Field | None:
        """Find the field that `kind` wrote, or else the only one of its type. Raises InputError for several."""
        found = [field for field in self.fields if fits(field)]
        own = [field for field in found if self.kinds.get(field.name) == kind]
        candidates = own or found
        if len(candidates) > 1:
            raise InputError(
                f"{self.uri}: several columns could be the {kind}",
                known=[field.name for field in candidates],
                hint=f"choose one: `--columns {candidates[0].name}`",
            )
        return candidates[0] if candidates else None

    def _batches_of(self, fragment: Any, rows: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        options = {"batch_size": rows, "batch_readahead": 2, "fragment_readahead": 1, "columns": names}
        with reading_parts(self.uri):
            for batch in fragment.to_batches(schema=self.dataset.schema, **options):
                self.rows_read += batch.num_rows
                if batch.num_rows:
                    yield self._plain(batch)

    def _plain(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        fields = {field.name: field for field in self.fields}
        schema = pa.schema(
            [fields[name] if name in fields else _plain_field(batch.schema.field(name)) for name in batch.schema.names]
        )
        return pa.record_batch([plain_array(column) for column in batch.columns], schema=schema)


def is_labels(field: pa.Field) -> bool:
    if not pa.types.is_list(field.type) or not pa.types.is_struct(field.type.value_type):
        return False
    fits = {"id": pa.types.is_integer, "name": pa.types.is_string, "score": pa.types.is_floating}
    entry = field.type.value_type
    return {f.name for f in entry} == fits.keys() and all(fits[f.name](f.type) for f in entry)


def is_mask(field: pa.Field) -> bool:
    """Return whether a field holds masks: PNGs of class ids or COCO run lengths, with class names in its metadata."""
    return b"labels" in (field.metadata or {}) and not pa.types.is_fixed_size_list(field.type)


def class_names(field: pa.Field) -> list[str]:
    """Return the class names of a mask's field, by class id; no two are equal."""
    return distinct_names(json.loads(field.metadata[b"labels"]))


def _chosen(uri: str, schema: pa.Schema, columns: Sequence[str]) -> tuple[pa.Field, ...]:
    stored = [field for field in schema if field.name != "model"]
    known = [field.name for field in stored]
    for name in columns:
        if name not in known:
            raise InputError(f"{uri}: no column `{name}`", known=known, hint=nearest(name, known))
    chosen = [field for field in stored if not columns or field.name in {"key", *columns}]
    return tuple(map(_plain_field, chosen))


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))
