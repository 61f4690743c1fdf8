"""A column of vectors, as it is stored, to numpy: without a copy where it holds floats, decoded where it does not.

Shapes: N rows, D values.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import InputError

Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]


def decode_vectors(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> Vectors:
    """A column and its field -> (N, D): float32 and float16 as they are stored, int8 and binary as float32 of length 1.

    One chunk of floats is a read-only view of Arrow's memory. Raises InputError for a field that holds no vectors."""
    stored_ND = stored_vectors(column, field)
    metadata = {name.decode(): value.decode() for name, value in (field.metadata or {}).items()}
    if metadata.get("encoding") == "int8":
        # rounding and clipping change lengths, and a ranking by inner product with them
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
    """A column and its field -> (N, values a row) of the stored type: int8 steps, or packed bits. InputError."""
    if not is_vector(field):
        raise InputError(f"column `{field.name}` is of type {field.type}: no vectors", hint="name a vector column")
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(_chunks(column, field))
    values: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), field.type.list_size)


def is_vector(field: pa.Field) -> bool:
    """Whether each row is one vector: not a map of pixels, patches or counts."""
    if not pa.types.is_fixed_size_list(field.type):
        return False
    encoded = b"encoding" in (field.metadata or {})
    return len(_shape(field)) == 1 and (encoded or pa.types.is_floating(field.type.value_type))


def length(field: pa.Field) -> int:
    """D: how many values the vector has, whatever they are stored as."""
    return int(_shape(field)[0])


def _shape(field: pa.Field) -> list[int]:
    """As its metadata has it; a list of another writer, without any, is one vector a row."""
    shape: list[int] = json.loads((field.metadata or {}).get(b"shape", b"null")) or [field.type.list_size]
    return shape


def _chunks(column: pa.ChunkedArray, field: pa.Field) -> list[pa.Array]:
    return column.chunks or [pa.array([], field.type)]
