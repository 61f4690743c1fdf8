"""Rows to a folder that Hugging Face's `datasets.load_dataset` opens: Parquet files and a card that names them.

Masks are images there, vectors lists of fixed length; one file for each part.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exports import Options
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source, class_names, is_mask

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Datasets:
    shape = "folder"
    takes = frozenset({"name"})
    last = "README.md"

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, source: Source) -> None:
        pass  # any rows will do

    def write(self, source: Source, work: Workspace) -> None:
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
    """What `datasets` calls the type of a column."""
    if _is_png(field):
        return {"_type": "Image"}
    named: dict[str, Any] = _feature(field.type)
    return named


def _feature(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_fixed_size_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type), "length": kind.list_size}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    names = {"double": "float64", "float": "float32", "halffloat": "float16"}
    return {"_type": "Value", "dtype": names.get(str(kind), str(kind))}


def _is_png(field: pa.Field) -> bool:
    return is_mask(field) and pa.types.is_binary(field.type)


def _field(field: pa.Field) -> pa.Field:
    return pa.field(field.name, IMAGE) if _is_png(field) else field.with_nullable(True)


def _batch(batch: pa.RecordBatch, schema: pa.Schema, source: Source) -> pa.RecordBatch:
    columns = []
    for field in source.fields:
        column = batch.column(field.name)
        if _is_png(field):
            column = pa.StructArray.from_arrays([column, pa.nulls(len(column), pa.string())], fields=list(IMAGE))
        columns.append(column)
    return pa.record_batch(columns, schema=schema)
