"""Rows to Postgres with pgvector: `table.sql` makes the table, `rows.copy` is what COPY reads (text format).

    psql -v ON_ERROR_STOP=1 -f table.sql && psql -c "\\copy <table> from 'rows.copy'"

float32 vectors are `vector(D)`, float16 ones `halfvec(D)`, binary ones `bit(D)`, int8 ones decoded.
Postgres' text has no NUL: it becomes the picture of one, and the export says how often.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.exports import Options
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source
from pipeline.exports.text import json_texts
from pipeline.vectors import decode_vectors, is_vector, length, stored_vectors

ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")  # not a backslash followed by `u0000`
NAME_BYTES = 63  # Postgres cuts longer names off
MOST_VALUES = {"vector": 16_000, "halfvec": 16_000, "bit": 64_000}
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f", "\v": "\\v"})
TYPES = (
    (pa.types.is_boolean, "boolean"), (pa.types.is_int8, "smallint"), (pa.types.is_int16, "smallint"),
    (pa.types.is_uint8, "smallint"), (pa.types.is_int32, "integer"), (pa.types.is_uint16, "integer"),
    (pa.types.is_int64, "bigint"), (pa.types.is_uint32, "bigint"), (pa.types.is_uint64, "numeric"),
    (pa.types.is_float16, "real"), (pa.types.is_float32, "real"), (pa.types.is_float64, "double precision"),
    (pa.types.is_string, "text"), (pa.types.is_large_string, "text"), (pa.types.is_binary, "bytea"),
    (pa.types.is_large_binary, "bytea"), (pa.types.is_date, "date"), (pa.types.is_timestamp, "timestamp"),
    (pa.types.is_decimal, "numeric"), (pa.types.is_nested, "jsonb"),
)  # fmt: skip


class PgVector:
    shape = "folder"
    takes = frozenset({"name"})
    last = "table.sql"

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, source: Source) -> None:
        for name in [self.options.name or source.model, *source.names]:
            if len(name.encode()) > NAME_BYTES or "\0" in name:
                hint = "--name names the table, --columns leaves columns out"
                raise InputError(f"`{name}` cannot be a name in Postgres: more than {NAME_BYTES} bytes", hint=hint)
        for field in source.fields:
            kind = sql_type(field).partition("(")[0]
            if kind in MOST_VALUES and length(field) > MOST_VALUES[kind]:
                message = f"column `{field.name}` has {length(field):,} values; pgvector's {kind} holds"
                raise InputError(f"{message} {MOST_VALUES[kind]:,}", hint="leave it out with --columns")

    def write(self, source: Source, work: Workspace) -> None:
        table = identifier(self.options.name or source.model)
        columns = ",\n".join(f"  {identifier(field.name)} {sql_type(field)}" for field in source.fields)
        with work.text("table.sql") as out:
            out.write(f"CREATE EXTENSION IF NOT EXISTS vector;\nCREATE TABLE {table} (\n{columns}\n);\n")
        with work.text("rows.copy") as out:
            for batch in source.batches():
                values = [copy_texts(batch.column(field.name), field, work) for field in source.fields]
                out.writelines("\t".join(row) + "\n" for row in zip(*values, strict=True))


def sql_type(field: pa.Field) -> str:
    if is_vector(field):
        if b"encoding" in field.metadata:
            return f"{'bit' if field.metadata[b'encoding'] == b'binary' else 'vector'}({length(field)})"
        stored = field.type.value_type
        if not pa.types.is_float64(stored):
            return f"{'halfvec' if pa.types.is_float16(stored) else 'vector'}({length(field)})"
    return next((sql for fits, sql in TYPES if fits(field.type)), "text")


def identifier(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def copy_texts(column: pa.Array, field: pa.Field, work: Workspace) -> list[str]:
    """One field of COPY's text format for each value: `\\N` is null."""
    kind = sql_type(field).partition("(")[0]
    if kind == "bit":
        bits_ND = np.unpackbits(stored_vectors(column, field), axis=1, count=length(field))
        return ["".join(map(str, row)) for row in bits_ND.tolist()]
    if kind in ("vector", "halfvec"):
        values_ND = decode_vectors(column, field)
        return json_texts(pa.FixedSizeListArray.from_arrays(pa.array(values_ND.reshape(-1)), length(field)))
    as_text = _writer(kind, work)
    if kind == "jsonb":
        return [r"\N" if text == "null" else as_text(text) for text in json_texts(column)]
    return [r"\N" if value is None else as_text(value) for value in column.to_pylist()]


def _writer(kind: str, work: Workspace) -> Callable[[Any], str]:
    if kind == "bytea":
        return lambda value: "\\\\x" + value.hex()
    if kind == "boolean":
        return lambda value: "t" if value else "f"
    if kind == "jsonb":  # JSON's own escape of a NUL is refused too
        return lambda text: work.counted(text, ESCAPED_NUL.sub(r"\1\\u2400", text), "Postgres").translate(ESCAPES)
    return lambda value: work.plain(str(value), "Postgres").translate(ESCAPES)
