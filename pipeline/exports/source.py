"""An output's committed rows for an export: which columns are what, and batches of them in the plan's order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.commit import PLAN, Output
from pipeline.derived import derived_names, history_with
from pipeline.errors import InputError, nearest
from pipeline.evaluate import telling_damage
from pipeline.results import open_results
from pipeline.storage import Store
from pipeline.vectors import is_vector

BATCH_ROWS = 256  # of decoded rows at one time; a part's file is 64 MiB of columns at most


@dataclass
class Source:
    """One model's rows. `fields` are those that go along, `key` first."""

    uri: str
    store: Store
    model: str
    dataset: ds.Dataset
    fields: tuple[pa.Field, ...]
    kinds: dict[str, str]  # column -> the kind of output that wrote it, as the run's identity says
    parts: int
    parts_planned: int
    rows_read: int = 0

    @classmethod
    def at(cls, uri: str, model: str | None, columns: Sequence[str], storage_options: dict[str, Any]) -> Source:
        """Raises InputError for a folder that is no output, or has nothing committed, or several models."""
        store = Store(storage_options)
        output = Output.at(uri, store)
        plan = output.stored_plan()
        if plan is None:
            raise InputError(f"{output.uri}: no {PLAN} here, so this is no output of img2parquet")
        models, files = sorted(plan.identities), output.files()
        if model is None and len(models) > 1:
            known = models + derived_names(files)
            raise InputError(f"{output.uri} has several models: name one with --model", known=known)
        model = model or models[0]
        dataset = open_results(uri, model, **storage_options)
        history = history_with(output, plan, model, files)
        outputs = history.plan.identities[model].get("outputs", [])
        kinds = {out.get("name", out["kind"]): out["kind"] for out in outputs}
        return cls(
            uri=output.uri,
            store=store,
            model=model,
            dataset=dataset,
            fields=_chosen(output.uri, dataset.schema, columns),
            kinds=kinds,
            parts=len(dataset.files),
            parts_planned=len(history.names[model]),
        )

    @property
    def names(self) -> list[str]:
        return [field.name for field in self.fields]

    def parts_of_batches(self, rows: int = BATCH_ROWS, names: Sequence[str] = ()) -> Iterator[Iterator[pa.RecordBatch]]:
        """For each part's file its batches. What is read once is counted."""
        for fragment in self.dataset.get_fragments():
            yield self._batches_of(fragment, rows, list(names) or self.names)

    def batches(self, rows: int = BATCH_ROWS, names: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        for batches in self.parts_of_batches(rows, names):
            yield from batches

    def rows_with(self, *fields: pa.Field | None) -> Iterator[dict[str, Any]]:
        """Rows as Python values, one by one: these columns, and what every format of images names."""
        names = ["key", "shard", "width", "height", *(field.name for field in fields if field is not None)]
        for batch in self.batches(names=list(dict.fromkeys(names))):
            yield from batch.to_pylist()

    def notes(self) -> Iterator[str]:
        if self.parts < self.parts_planned:
            yield f"{self.parts} of {self.parts_planned} parts are committed: the job has not ended, rows are missing"

    @property
    def labels(self) -> pa.Field | None:
        """The column of names and scores."""
        return self._one("labels", is_labels)

    @property
    def mask(self) -> pa.Field | None:
        """The column of class maps."""
        return self._one("segmentation", is_mask)

    @property
    def vector(self) -> pa.Field | None:
        """The column of embeddings; another column of vectors where there is no embedding."""
        return self._one("embedding", is_vector)

    def _one(self, kind: str, fits: Any) -> pa.Field | None:
        """The field that `kind` wrote, else the only one of such a type. InputError for several."""
        found = [field for field in self.fields if fits(field)]
        own = [field for field in found if self.kinds.get(field.name) == kind]
        candidates = own or found
        if len(candidates) > 1:
            raise InputError(
                f"{self.uri}: several columns could be the {kind} that is meant",
                known=[field.name for field in candidates],
                hint=f"name one: `--columns {candidates[0].name}`",
            )
        return candidates[0] if candidates else None

    def _batches_of(self, fragment: Any, rows: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        options = {"batch_size": rows, "batch_readahead": 2, "fragment_readahead": 1, "columns": names}
        with telling_damage(self.uri):
            for batch in fragment.to_batches(schema=self.dataset.schema, **options):
                self.rows_read += batch.num_rows
                if batch.num_rows:
                    yield batch


def is_labels(field: pa.Field) -> bool:
    if not pa.types.is_list(field.type) or not pa.types.is_struct(field.type.value_type):
        return False
    return {f.name for f in field.type.value_type} == {"id", "name", "score"}


def is_mask(field: pa.Field) -> bool:
    """PNG of class ids, or COCO's run lengths of each class: both name their classes in the field's metadata."""
    return b"labels" in (field.metadata or {}) and not pa.types.is_fixed_size_list(field.type)


def class_names(field: pa.Field) -> list[str]:
    """Of a mask's field, by class id."""
    names: list[str] = json.loads(field.metadata[b"labels"])
    return names


def _chosen(uri: str, schema: pa.Schema, columns: Sequence[str]) -> tuple[pa.Field, ...]:
    stored = [field for field in schema if field.name != "model"]
    known = [field.name for field in stored]
    for name in columns:
        if name not in known:
            raise InputError(f"{uri}: no column `{name}`", known=known, hint=nearest(name, known))
    return tuple(field for field in stored if not columns or field.name in {"key", *columns})
