"""Write values as JSON, where a float32 has as many digits as are needed to read back the same float32.

Binary becomes base64, NaN and infinity null, a decimal a string with all its digits, and a map a list of pairs. Times
are ISO 8601 strings: `2024-02-29T12:00:00Z`, `PT1.5S`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from img2parquet.results.exports.arrow_types import times_as_text


def json_texts(column: pa.Array) -> list[str]:
    """Encode each value as one line of ASCII JSON."""
    kind = column.type
    if _is_flat_float(kind) and column.null_count == 0:
        narrow = pa.types.is_float16(kind.value_type)
        rows_ND = np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), kind.list_size)
        if np.isfinite(rows_ND).all():
            digits = "%.5g" if narrow else "%.9g" if pa.types.is_float32(kind.value_type) else "%.17g"
            return ["[" + ", ".join([digits % x for x in row]) + "]" for row in rows_ND.tolist()]
    return [json.dumps(value) for value in json_values(column)]


def json_values(column: pa.Array) -> list[Any]:
    """Return each value in Python's form of JSON."""
    kind = column.type
    if pa.types.is_map(kind):
        entry = pa.struct([kind.key_field.with_name("key"), kind.item_field.with_name("value")])
        found = json_values(column.cast(pa.list_(entry)))
        return [None if entries is None else [[e["key"], e["value"]] for e in entries] for entries in found]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        children = zip(*map(json_values, column.flatten()), strict=True)
        pairs = zip(column.is_valid().to_pylist(), children, strict=True)
        return [dict(zip(names, values, strict=True)) if valid else None for valid, values in pairs]
    if pa.types.is_nested(kind):
        inside: Iterator[Any] = iter(json_values(column.flatten()))  # without what lies below a null
        counts = pc.list_value_length(column).to_pylist()
        return [None if count is None else list(islice(inside, count)) for count in counts]
    return _flat_values(column)


def _flat_values(column: pa.Array) -> list[Any]:
    kind = column.type
    if pa.types.is_floating(kind):
        return [None if x is None or not math.isfinite(x) else _short(x, kind) for x in column.to_pylist()]
    if pa.types.is_duration(kind):
        return list(times_as_text(column).to_pylist())
    if pa.types.is_temporal(kind):
        return list(pc.replace_substring(times_as_text(column), " ", "T").to_pylist())
    if pa.types.is_decimal(kind):
        return list(column.cast(pa.string()).to_pylist())
    values = column.to_pylist()
    return [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in values]


def _is_flat_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _short(value: float, kind: pa.DataType) -> float:
    if pa.types.is_float64(kind):
        return value
    return float(format(value, ".9g" if pa.types.is_float32(kind) else ".5g"))
