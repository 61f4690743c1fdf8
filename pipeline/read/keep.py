"""`keep:` entries to passthrough columns, and a source's values to theirs.

A value that is missing becomes null. One that does not convert becomes null too, and the row gets the remark
`<column>_not_<type>`: a wrong label must not look like a missing one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import nearest

TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Kept:
    """One entry of `keep`; `type_name` is None where the source's own type is wanted."""

    name: str
    type_name: str | None = None

    def field(self, default: str = "string") -> pa.Field:
        return pa.field(self.name, TYPES[self.type_name or default], nullable=True)


def parse_keep(entries: Sequence[str]) -> tuple[Kept, ...]:
    """`name` and `name:type` to Kept. Raises ValueError, as settings do."""
    kept = tuple(_parse(entry) for entry in entries)
    names = [column.name for column in kept]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"keep names `{name}` twice")
    return kept


def _parse(entry: str) -> Kept:
    name, colon, type_name = entry.rpartition(":")
    if not colon:
        name, type_name = entry, ""
    if not name.strip():
        raise ValueError(f"keep has `{entry}`: expected `name` or `name:type`")
    if colon and type_name not in TYPES:
        hint = nearest(type_name, TYPES) or f"a name that contains a colon needs its type: `{entry}:string`"
        raise ValueError(f"keep has `{entry}`: unknown type `{type_name}`; known: {', '.join(TYPES)}; {hint}")
    return Kept(name, type_name or None)


def convert_all(
    kept: Sequence[Kept], values: Mapping[str, Any], default: str | None = "string"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A row's raw values to its passthrough columns, and remarks on those that did not convert. With no default, a
    value without a named type stays what it is."""
    columns: dict[str, Any] = {}
    remarks: list[str] = []
    for column in kept:
        type_name = column.type_name or default
        try:
            value = values.get(column.name)
            columns[column.name] = convert(value, type_name) if type_name else value
        except ValueError:
            columns[column.name] = None
            remarks.append(f"{column.name}_not_{type_name}")
    return columns, tuple(remarks)


def convert(value: Any, type_name: str) -> Any:
    """A JSON value, or the text of a cell, to a column's type; None stays None. Raises ValueError."""
    return None if value is None else CONVERTERS[type_name](value)


def to_valid_text(text: str | bytes) -> str:
    """Text that Arrow can store: what is not Unicode is spelled out as escapes, so that two names stay two."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _to_string(value: Any) -> str:
    return to_valid_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


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
