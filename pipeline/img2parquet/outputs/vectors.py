"""Read a stored column of vectors into numpy: floats without a copy, int8 and binary decoded.

Shapes: N rows, D values.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.errors import InputError

Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]


def decode_vectors(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> Vectors:
    """Decode a column of vectors, given its field, to an array (N, D).

    float32 and float16 are returned as stored, int8 and binary as float32 vectors of length 1. A single chunk of floats
    is a read-only view of Arrow's memory. Raises InputError for a column that holds no vectors."""
    stored_ND = stored_vectors(column, field)
    metadata = {name.decode(): value.decode() for name, value in (field.metadata or {}).items()}
    if metadata.get("encoding") == "int8":
        # normalise again: rounding and clipping change lengths, and rankings by inner product with them
        values_ND = stored_ND.astype(np.float32) * np.float32(metadata["scale"])
        length_N1 = np.linalg.norm(values_ND, axis=1, keepdims=True).astype(np.float32)
        units_ND: npt.NDArray[np.float32] = values_ND / np.maximum(length_N1, np.float32(1e-30))
        return units_ND
    if metadata.get("encoding") == "binary":
        D = length(field)
        signs_ND = np.unpackbits(stored_ND, axis=1, count=D).astype(np.float32) * np.float32(2) - np.float32(1)
        return signs_ND / np.float32(D**0.5)
    return stored_ND


def stored_vectors(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> npt.NDArray[Any]:
    """Return a column's stored values, such as int8 steps or packed bits: (N, values per row).

    Raises InputError for a column that holds no vectors, or none for some rows."""
    if not is_vector(field):
        message = f"column `{field.name}` holds no vectors: its type is {field.type}"
        raise InputError(message, hint="choose a column of vectors, such as `embedding`")
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(_chunks(column, field))
    if column.null_count or column.flatten().null_count:  # of another writer
        raise InputError(f"column `{field.name}` has rows without a vector", hint="leave these rows out")
    values: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), field.type.list_size)


def is_vector(field: pa.Field) -> bool:
    """Whether each row of the column is one vector, not a map of pixels, patches or counts."""
    if not pa.types.is_fixed_size_list(field.type):
        return False
    encoded = b"encoding" in (field.metadata or {})
    return len(_shape(field)) == 1 and (encoded or pa.types.is_floating(field.type.value_type))


def length(field: pa.Field) -> int:
    """Return D, the number of values of a vector, whatever their stored type."""
    return int(_shape(field)[0])


def _shape(field: pa.Field) -> list[int]:
    """Return the shape in the field's metadata; without metadata, from another writer, a row is one vector."""
    shape: list[int] = json.loads((field.metadata or {}).get(b"shape", b"null")) or [field.type.list_size]
    return shape


def _chunks(column: pa.ChunkedArray, field: pa.Field) -> list[pa.Array]:
    return column.chunks or [pa.array([], field.type)]
