"""Export rows as a folder that Hugging Face's `datasets.load_dataset` opens: Parquet files, and a card that names them.

Masks become images, vectors lists of fixed length, and maps lists of `key` and `value`. There is one file for each
part.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.errors import InputError
from img2parquet.results.exports import ExportOptions
from img2parquet.results.exports.arrow_types import find_type, with_children
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.rows import ExportRows, class_names, is_mask

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Datasets:
    shape = "folder"
    takes = frozenset({"name"})
    last = "README.md"

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        """Raise InputError for a column or struct field named `_type`, which `datasets` reserves."""
        kept = pa.struct(source.fields)
        if find_type(kept, lambda kind: pa.types.is_struct(kind) and kind.get_field_index("_type") >= 0):
            raise InputError(
                "`datasets` cannot hold a column or field with the name `_type`", hint="leave it out with --columns"
            )

    def write(self, source: ExportRows, work: Workspace) -> None:
        schema = pa.schema([_field(field) for field in source.fields])
        features = {field.name: feature(field) for field in source.fields}
        info = json.dumps({"info": {"features": features}})
        schema = schema.with_metadata({"huggingface": info})
        for number, batches in enumerate(source.parts_of_batches(1024)):
            with (
                work.file(f"data/train-{number:05d}.parquet") as sink,
                pq.ParquetWriter(sink, schema, compression="zstd") as writer,
            ):
                for batch in batches:
                    writer.write_batch(_batch(batch, schema, source))
        with work.text("README.md") as card:
            card.write("---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n")
            card.write("    path: data/train-*.parquet\n---\n\n")
            title = (self.options.name or source.model).replace("\n", " ")
            card.write(f"# {title}\n\nWritten by img2parquet. Rows are images: `key` and `shard` say which.\n")
            for field in filter(is_mask, source.fields):
                card.write(f"\nClasses of `{field.name}`, by id:\n\n    {json.dumps(class_names(field))}\n")


def feature(field: pa.Field) -> dict[str, Any]:
    """Name a column's type as `datasets` does."""
    if _is_png(field):
        return {"_type": "Image"}
    named: dict[str, Any] = _feature(stored_type(field.type))
    return named


def _feature(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_fixed_size_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type), "length": kind.list_size}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    names = {"double": "float64", "float": "float32", "halffloat": "float16", "date32[day]": "date32"}
    return {"_type": "Value", "dtype": names.get(str(kind), str(kind))}


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the nearest type that every version of `datasets` opens."""
    if pa.types.is_map(kind):
        return pa.list_(pa.struct([("key", stored_type(kind.key_type)), ("value", stored_type(kind.item_type))]))
    if pa.types.is_large_list(kind):
        return pa.list_(stored_type(kind.value_type))
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_date64(kind):  # Parquet has no such type
        return pa.date32()
    return with_children(kind, stored_type)


def _is_png(field: pa.Field) -> bool:
    return is_mask(field) and pa.types.is_binary(field.type)


def _field(field: pa.Field) -> pa.Field:
    if _is_png(field):
        return pa.field(field.name, IMAGE)
    return field.with_nullable(True).with_type(stored_type(field.type))


def _batch(batch: pa.RecordBatch, schema: pa.Schema, source: ExportRows) -> pa.RecordBatch:
    columns = []
    for field in source.fields:
        column = batch.column(field.name)
        if _is_png(field):
            column = pa.StructArray.from_arrays([column, pa.nulls(len(column), pa.string())], fields=list(IMAGE))
        columns.append(column.cast(schema.field(field.name).type))
    return pa.record_batch(columns, schema=schema)
