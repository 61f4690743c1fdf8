"""Export rows as one CSV file (RFC 4180, UTF-8, with a header): lists, structs and vectors as JSON, binary as base64.

Timestamps with a zone are in UTC, and durations in ISO 8601 (`PT1.5S`).
A null is an empty field, an empty text is `""`. Texts are not altered, not even those that begin with `=`: import the
column as text into a spreadsheet that runs formulas.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv

from img2parquet.results.exports import ExportOptions
from img2parquet.results.exports.arrow_types import times_as_text
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.json_text import json_texts, json_values
from img2parquet.results.exports.rows import ExportRows


class Csv:
    shape = "file"
    takes: frozenset[str] = frozenset()
    last = ""

    def __init__(self, options: ExportOptions) -> None:
        pass

    def check(self, source: ExportRows) -> None:
        pass  # no column is required

    def write(self, source: ExportRows, work: Workspace) -> None:
        schema = pa.schema([(field.name, csv_type(field.type)) for field in source.fields])
        with work.file() as sink, pc_csv.CSVWriter(sink, schema) as writer:
            for batch in source.batches():
                writer.write_batch(pa.record_batch([flat(batch.column(n)) for n in schema.names], schema=schema))


def flat(column: pa.Array) -> pa.Array:
    """Convert a column to values that CSV can hold."""
    kind = column.type
    if pa.types.is_temporal(kind):
        texts = times_as_text(column)  # checks dates too: pyarrow would write `<value out of range>`
        return texts.cast(pa.string()) if csv_type(kind) == pa.string() else column
    if csv_type(kind) != pa.string() or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.cast(csv_type(kind))
    if pa.types.is_nested(kind):
        texts = pa.array(json_texts(column), pa.string())
        return pc.if_else(pc.is_null(column), pa.scalar(None, pa.string()), texts)
    return pa.array(json_values(column), pa.string())


def csv_type(kind: pa.DataType) -> pa.DataType:
    """Return the type to pass to pyarrow's CSV writer: string where its own text would not be read back elsewhere."""
    if pa.types.is_float16(kind):
        return pa.float32()
    types = pa.types
    own = (
        types.is_integer, types.is_boolean, types.is_floating, types.is_decimal, types.is_date, types.is_time,
        types.is_null,
    )  # fmt: skip
    return kind if any(is_own(kind) for is_own in own) else pa.string()
