"""Reduce columns to the Arrow types that the formats write, and write dates, times and durations as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from img2parquet.errors import InputError

STORED_OTHERWISE = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
PER_SECOND = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # decimals


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain type that holds the same values: no dictionaries, views or extension types."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return STORED_OTHERWISE.get(kind) or with_children(kind, plain_type)


def plain_array(column: pa.Array) -> pa.Array:
    """Convert a column to its `plain_type`. Raises InputError for a map or fixed-size list that holds list views."""
    kind = plain_type(column.type)
    if not find_type(column.type, _is_list_view):
        return column.cast(kind)
    # no cast here: casting a list view to a list, pyarrow 26 leaves out the last offset
    if pa.types.is_struct(kind):
        children = [plain_array(child) for child in column.flatten()]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=column.is_null())
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise InputError(f"a column of type {column.type} cannot be exported", hint="leave it out with --columns")
    array_class = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(column), 0))
    offsets = pa.concat_arrays([pa.array([0], ends.type), ends])
    return array_class.from_arrays(offsets, plain_array(column.flatten()), type=kind, mask=column.is_null())


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def with_children(kind: pa.DataType, convert: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Convert the children of a nested type, and list views to lists. Return other types unchanged."""

    def child(field: pa.Field) -> pa.Field:
        return field.with_type(convert(field.type))

    if pa.types.is_struct(kind):
        return pa.struct([child(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(child(kind.key_field), child(kind.item_field), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(child(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(child(kind.value_field))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(child(kind.value_field))
    return kind


def times_as_text(column: pa.Array) -> pa.Array:
    """Write dates, times, timestamps and durations as text: `2024-02-29 12:00:00`, `PT1.5S`.

    Timestamps with a zone are converted to UTC and end in Z. Raises InputError for a year that text cannot hold."""
    kind = column.type
    if pa.types.is_duration(kind):
        return pa.array([_duration(value, PER_SECOND[kind.unit]) for value in column.cast(pa.int64()).to_pylist()])
    if pa.types.is_timestamp(kind) and kind.tz:
        column = column.cast(pa.timestamp(kind.unit, "UTC"))
    texts = column.cast(pa.string())
    beyond = texts.filter(pc.fill_null(pc.starts_with(texts, "<"), False))  # Arrow writes `<value out of range: ...>`
    if len(beyond):
        raise InputError(
            f"a {kind} cannot be written as text: {beyond[0].as_py().strip('<>')}",
            hint="leave the column out with --columns, or use a format of Parquet or Arrow files",
        )
    return texts


def _duration(value: int | None, decimals: int) -> str | None:
    if value is None:
        return None
    digits = f"{abs(value):0{decimals + 1}d}"
    whole, fraction = digits[: len(digits) - decimals], digits[len(digits) - decimals :].rstrip("0")
    return f"PT{'-' if value < 0 else ''}{whole}{'.' if fraction else ''}{fraction}S"


def find_type(kind: pa.DataType, fits: Callable[[pa.DataType], Any]) -> bool:
    """Return whether a type or one of its children fits."""
    return bool(fits(kind)) or any(find_type(kind.field(i).type, fits) for i in range(kind.num_fields))
