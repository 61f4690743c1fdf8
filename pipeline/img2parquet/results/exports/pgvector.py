"""Export rows for Postgres with pgvector: `table.sql` creates the table, `rows.copy` is for COPY (text format).

    psql -v ON_ERROR_STOP=1 -f table.sql && psql -c "\\copy <table> from 'rows.copy'"

* float32 vectors become `vector(D)`, or `halfvec(D)` where only that can be indexed; float16 ones are `halfvec(D)`,
  binary ones `bit(D)`, and int8 ones are decoded.
* Other columns get the nearest type of Postgres; nested ones are `jsonb`. Postgres counts microseconds, and keeps a
  timestamp with a zone as an instant.
* Postgres' text cannot hold NUL, which is replaced by its picture; a note says how often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from img2parquet.errors import InputError
from img2parquet.outputs.vectors import decode_vectors, is_vector, length, stored_vectors
from img2parquet.results.exports import ExportOptions
from img2parquet.results.exports.arrow_types import times_as_text
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.json_text import json_texts
from img2parquet.results.exports.rows import ExportRows

ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")  # not a backslash followed by `u0000`
NULL = r"\N"
NAME_BYTES = 63  # Postgres truncates longer names
MOST_VALUES = {"vector": 16_000, "halfvec": 16_000, "bit": 64_000}
MOST_INDEXED = {"vector": 2_000, "halfvec": 4_000, "bit": 64_000}  # by HNSW and IVFFlat
SYSTEM_COLUMNS = {"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}  # of every table, so that no column can have one
FIRST_DATE = (-4713, "-11-24")  # 4714 BC by today's calendar, day 0 of Julian days
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f", "\v": "\\v"})
TYPES = (
    (pa.types.is_boolean, "boolean"), (pa.types.is_int8, "smallint"), (pa.types.is_int16, "smallint"),
    (pa.types.is_uint8, "smallint"), (pa.types.is_int32, "integer"), (pa.types.is_uint16, "integer"),
    (pa.types.is_int64, "bigint"), (pa.types.is_uint32, "bigint"), (pa.types.is_uint64, "numeric"),
    (pa.types.is_float16, "real"), (pa.types.is_float32, "real"), (pa.types.is_float64, "double precision"),
    (pa.types.is_string, "text"), (pa.types.is_large_string, "text"), (pa.types.is_binary, "bytea"),
    (pa.types.is_large_binary, "bytea"), (pa.types.is_fixed_size_binary, "bytea"), (pa.types.is_date, "date"),
    (pa.types.is_time, "time"), (lambda kind: pa.types.is_timestamp(kind) and kind.tz, "timestamptz"),
    (pa.types.is_timestamp, "timestamp"), (pa.types.is_duration, "interval"), (pa.types.is_decimal, "numeric"),
    (pa.types.is_null, "text"), (pa.types.is_nested, "jsonb"),
)  # fmt: skip


class PgVector:
    shape = "folder"
    takes = frozenset({"name"})
    last = "table.sql"

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        for name in [self.options.name or source.model, *source.names]:
            if not 0 < len(name.encode()) <= NAME_BYTES or "\0" in name:
                hint = "--name names the table, --columns leaves columns out"
                raise InputError(f"`{name}` cannot be a name in Postgres: expected 1 to {NAME_BYTES} bytes", hint=hint)
        for field in source.fields:
            kind = sql_type(field).partition("(")[0]
            if kind in MOST_VALUES and length(field) > MOST_VALUES[kind]:
                message = f"column `{field.name}` has {length(field):,} values; pgvector's {kind} holds"
                raise InputError(f"{message} {MOST_VALUES[kind]:,}", hint="leave it out with --columns")

    def write(self, source: ExportRows, work: Workspace) -> None:
        names = column_names(source.names)
        columns = [f"  {identifier(names[field.name])} {sql_type(field)}" for field in source.fields]
        with work.text("table.sql") as out:
            table = identifier(self.options.name or source.model)
            body = ",\n".join(columns)
            out.write(f"CREATE EXTENSION IF NOT EXISTS vector;\nCREATE TABLE {table} (\n{body}\n);\n")
        without_vector = dict.fromkeys(source.names, 0)
        with work.text("rows.copy") as out:
            for batch in source.batches():
                values = [copy_texts(batch.column(field.name), field, work) for field in source.fields]
                for field, texts in zip(source.fields, values, strict=True):
                    without_vector[field.name] += _is_vector_type(field) * texts.count(NULL)
                out.writelines("\t".join(row) + "\n" for row in zip(*values, strict=True))
        for note in notes(source.fields, names, without_vector):
            work.note(note)


def notes(fields: tuple[pa.Field, ...], names: dict[str, str], without_vector: dict[str, int]) -> Iterator[str]:
    """Yield a note for each column that Postgres stores differently, or that pgvector cannot index."""
    yield from (
        f"column `{old}` is named `{new}`: Postgres reserves the name" for old, new in names.items() if old != new
    )
    for field in fields:
        kind = sql_type(field).partition("(")[0]
        if kind in MOST_VALUES and length(field) > MOST_INDEXED[kind]:
            yield (
                f"column `{field.name}` has {length(field):,} values; pgvector stores them, but indexes at most "
                f"{MOST_INDEXED['halfvec']:,}: index `binary_quantize({identifier(names[field.name])})`, or run the "
                "job with `dtype: binary`"
            )
        elif kind == "halfvec" and not pa.types.is_float16(field.type.value_type):
            yield (
                f"column `{field.name}` has {length(field):,} values, more than pgvector indexes as vector "
                f"({MOST_INDEXED['vector']:,}): written as halfvec, in half precision"
            )
        if without_vector[field.name]:
            yield (
                f"column `{field.name}`: {without_vector[field.name]} vectors are null, or have values that pgvector "
                f"cannot hold; written as NULL"
            )
        if getattr(field.type, "unit", "") == "ns":
            yield f"column `{field.name}`: Postgres rounds its nanoseconds to microseconds"


def column_names(names: list[str]) -> dict[str, str]:
    """Return the columns' names in Postgres: reserved ones get an underscore."""
    found = {}
    for name in names:
        new = name
        while new in SYSTEM_COLUMNS or (new != name and new in names):
            new += "_"
        found[name] = new
    return found


def sql_type(field: pa.Field) -> str:
    if is_vector(field) and length(field):
        if (field.metadata or {}).get(b"encoding") == b"binary":
            return f"bit({length(field)})"
        if b"encoding" in (field.metadata or {}) or not pa.types.is_float64(field.type.value_type):
            only_half = MOST_INDEXED["vector"] < length(field) <= MOST_INDEXED["halfvec"]
            is_half = pa.types.is_float16(field.type.value_type) or only_half
            return f"{'halfvec' if is_half else 'vector'}({length(field)})"
    return next((sql for fits, sql in TYPES if fits(field.type)), "text")


def _is_vector_type(field: pa.Field) -> bool:
    return sql_type(field).partition("(")[0] in MOST_VALUES


def identifier(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def copy_texts(column: pa.Array, field: pa.Field, work: Workspace) -> list[str]:
    """Encode each value as one field of COPY's text format: `\\N` is null."""
    kind = sql_type(field).partition("(")[0]
    if kind in MOST_VALUES:
        texts = iter(_vector_texts(column.drop_null(), field, kind))
        return [next(texts) if is_valid else NULL for is_valid in column.is_valid().to_pylist()]
    as_text = _writer(kind, work)
    if kind == "jsonb":
        return [NULL if text == "null" else as_text(text) for text in json_texts(column)]
    if pa.types.is_temporal(column.type):
        column = times_as_text(_within_interval(column, field))
    elif kind == "numeric":
        column = column.cast(pa.string())
    return [NULL if value is None else as_text(value) for value in column.to_pylist()]


def _vector_texts(column: pa.Array, field: pa.Field, kind: str) -> list[str]:
    """Encode vectors. Those with a null, NaN or infinite value, also after rounding to half precision, become null."""
    if kind == "bit":
        bits_ND = np.unpackbits(stored_vectors(column, field), axis=1, count=length(field))
        return ["".join(map(str, row)) for row in bits_ND.tolist()]
    values_ND = decode_vectors(_without_nulls(column), field)
    if kind == "halfvec":
        with np.errstate(over="ignore"):
            values_ND = values_ND.astype(np.float16)
    finite_N = np.logical_and.reduce(np.isfinite(values_ND), axis=1)
    whole_ND = np.where(finite_N[:, None], values_ND, np.zeros_like(values_ND))
    texts = json_texts(pa.FixedSizeListArray.from_arrays(pa.array(whole_ND.reshape(-1)), length(field)))
    return [text if is_finite else NULL for text, is_finite in zip(texts, finite_N.tolist(), strict=True)]


def _without_nulls(column: pa.Array) -> pa.Array:
    values = column.flatten()
    if not values.null_count:
        return column
    nan = pa.scalar(float("nan"), values.type)
    return pa.FixedSizeListArray.from_arrays(pc.if_else(values.is_valid(), values, nan), column.type.list_size)


def _writer(kind: str, work: Workspace) -> Callable[[Any], str]:
    if kind == "bytea":
        return lambda value: "\\\\x" + value.hex()
    if kind == "boolean":
        return lambda value: "t" if value else "f"
    if kind == "jsonb":  # Postgres also refuses JSON's escape of a NUL
        return lambda text: work.counted(text, ESCAPED_NUL.sub(r"\1\\u2400", text), "Postgres").translate(ESCAPES)
    if kind in ("date", "timestamp", "timestamptz"):
        return _date
    return lambda value: work.plain(str(value), "Postgres").translate(ESCAPES)


def _within_interval(column: pa.Array, field: pa.Field) -> pa.Array:
    if pa.types.is_duration(column.type):
        try:
            column.cast(pa.duration("us"), safe=column.type.unit != "ns")
        except pa.ArrowInvalid:
            message = f"column `{field.name}` has durations beyond 292,471 years, which Postgres cannot hold"
            raise InputError(message, hint="leave it out with --columns") from None
    return column


def _date(text: str) -> str:
    """Write a year before 1 as Postgres does: `-0043-03-15` (astronomical) is `0044-03-15 BC`."""
    if not text.startswith(("-", "0000-")):
        return text
    dash = text.index("-", 1)
    year, rest = text[:dash], text[dash:]
    if (int(year), rest) < FIRST_DATE:
        raise InputError(f"Postgres has no date as early as {text}", hint="leave the column out with --columns")
    return f"{1 - int(year):04d}{rest} BC"
