"""Values of a row as text: JSON in which float32 is written with as many digits as bring back the same float32."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa


def json_texts(column: pa.Array) -> list[str]:
    """One JSON text a value, ASCII and without a line end. Binary is base64; a float that is no number is null."""
    kind = column.type
    if _is_flat_float(kind) and column.null_count == 0:
        narrow = pa.types.is_float16(kind.value_type)
        rows_ND = np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), kind.list_size)
        if np.isfinite(rows_ND).all():
            digits = "%.5g" if narrow else "%.9g" if pa.types.is_float32(kind.value_type) else "%.17g"
            return ["[" + ", ".join([digits % x for x in row]) + "]" for row in rows_ND.tolist()]
    return [json.dumps(_plain(value, kind), default=str) for value in column.to_pylist()]


def _is_flat_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_floating(kind):
        return _short(value, kind) if math.isfinite(value) else None
    if pa.types.is_struct(kind):
        return {field.name: _plain(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [[_plain(k, kind.key_type), _plain(v, kind.item_type)] for k, v in value]
    if pa.types.is_nested(kind):
        return [_plain(one, kind.value_type) for one in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


def _short(value: float, kind: pa.DataType) -> float:
    if pa.types.is_float64(kind):
        return value
    return float(format(value, ".9g" if pa.types.is_float32(kind) else ".5g"))
