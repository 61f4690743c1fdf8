"""Parse `keep:` into passthrough columns, and convert a source's values to their types.

* A missing value becomes null. A value that does not convert becomes null too, and its row gets the warning
  `<column>_not_<type>`: a wrong label must not look like a missing one.
* Values of Parquet files that keep their type travel as Arrow arrays of one value, since Python's objects do not hold
  all of them: a time in nanoseconds, for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from img2parquet.errors import nearest

TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
INVALID: Any = object()  # a value that its file holds in a form that breaks its type's rules


@dataclass(frozen=True, slots=True)
class Passthrough:
    """One entry of `keep`; `type_name` is None for the source's own type."""

    name: str
    type_name: str | None = None

    def field(self, default: str = "string") -> pa.Field:
        return pa.field(self.name, TYPES[self.type_name or default], nullable=True)


def parse_keep(entries: Sequence[str]) -> tuple[Passthrough, ...]:
    """Parse entries `name` and `name:type`. Raises ValueError for one that is malformed or named twice."""
    kept = tuple(_parse(entry) for entry in entries)
    names = [column.name for column in kept]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"keep names `{name}` twice")
    return kept


def _parse(entry: str) -> Passthrough:
    name, colon, type_name = entry.rpartition(":")
    if not colon:
        name, type_name = entry, ""
    if not name.strip():
        raise ValueError(f"keep has `{entry}`: expected `name` or `name:type`")
    if colon and type_name not in TYPES:
        hint = nearest(type_name, TYPES) or f"a name that contains a colon needs its type: `{entry}:string`"
        raise ValueError(f"keep has `{entry}`: unknown type `{type_name}`; known: {', '.join(TYPES)}; {hint}")
    return Passthrough(name, type_name or None)


def convert_all(
    kept: Sequence[Passthrough], values: Mapping[str, Any], default: str | None = "string"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert a row's raw values to its passthrough columns; also return warnings for those that did not convert.

    Columns without a type in `keep` get the type `default`; if that is None, their values stay as they are, except that
    INVALID becomes null with the warning `<column>_unreadable`."""
    columns: dict[str, Any] = {}
    remarks: list[str] = []
    for column in kept:
        type_name, value = column.type_name or default, values.get(column.name)
        try:
            columns[column.name] = convert(value, type_name) if type_name else value
        except ValueError:
            columns[column.name] = None
            remarks.append(f"{column.name}_not_{type_name}")
        if columns[column.name] is INVALID:
            columns[column.name] = None
            remarks.append(f"{column.name}_unreadable")
    return columns, tuple(remarks)


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return a column of passthrough values, each an Arrow array of one value or a Python value."""
    if not any(isinstance(value, pa.Array) for value in values):
        return pa.array(values, kind)
    cells = [value if isinstance(value, pa.Array) else pa.array([value], kind) for value in values]
    return pa.concat_arrays(cells)


def convert(value: Any, type_name: str) -> Any:
    """Convert a JSON value, or the text of a cell, to a column's type; None stays None. Raises ValueError."""
    return None if value is None else CONVERTERS[type_name](value)


def to_valid_text(text: str | bytes) -> str:
    """Return text that Arrow can store. Invalid Unicode becomes escapes, so that different names stay different."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _to_string(value: Any) -> str:
    try:
        return to_valid_text(value if isinstance(value, str | bytes) else json.dumps(value, ensure_ascii=False))
    except TypeError as error:  # no value of JSON
        raise ValueError(value) from error


def _to_int(value: Any) -> int:
    if isinstance(value, str) and INTEGER.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError(value)
    return value


def _to_float(value: Any) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(value) from error


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, str | int) else ""
    if word not in BOOLEANS:
        raise ValueError(value)
    return BOOLEANS[word]


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "string": _to_string, "int64": _to_int, "float64": _to_float, "bool": _to_bool
}  # fmt: skip
