"""Rows to one CSV file (RFC 4180, UTF-8, with a header): lists, structs and vectors as JSON, binary as base64.

A null is an empty field, an empty text is `""`. A text is what it was, also one that begins with `=`: a spreadsheet
that runs formulas must be told to take the column as text.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv

from pipeline.exports import Options
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source
from pipeline.exports.text import json_texts


class Csv:
    shape = "file"
    takes: frozenset[str] = frozenset()
    last = ""

    def __init__(self, options: Options) -> None:
        pass

    def check(self, source: Source) -> None:
        pass  # any rows will do

    def write(self, source: Source, work: Workspace) -> None:
        schema = pa.schema([(f.name, pa.string() if _is_text(f.type) else f.type) for f in source.fields])
        with work.file() as sink, pc_csv.CSVWriter(sink, schema) as writer:
            for batch in source.batches():
                writer.write_batch(pa.record_batch([flat(batch.column(n)) for n in schema.names], schema=schema))


def flat(column: pa.Array) -> pa.Array:
    """A column whose values CSV can hold."""
    if not _is_text(column.type):
        return column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.string())
    if _is_binary(column.type):
        texts = pa.array([text[1:-1] for text in json_texts(column)], pa.string())  # without JSON's quotes
    else:
        texts = pa.array(json_texts(column), pa.string())
    return pc.if_else(pc.is_null(column), pa.scalar(None, pa.string()), texts)


def _is_text(kind: pa.DataType) -> bool:
    """Whether it is text there: nested, binary, and what pyarrow does not write as a value of its own."""
    own = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_float32, pa.types.is_float64, pa.types.is_temporal)
    return not any(is_own(kind) for is_own in own)


def _is_binary(kind: pa.DataType) -> bool:
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(is_binary(kind) for is_binary in binary)
