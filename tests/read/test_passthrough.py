"""Values of every kind to the types that `keep` knows."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2parquet.read.passthrough import TYPES, Passthrough, convert, convert_all, parse_keep, to_valid_text

NOT = object()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("value", "string", "int64", "float64", "bool_"),
    [
        (None, None, None, None, None),
        ("x", "x", NOT, NOT, NOT),
        ("", "", NOT, NOT, NOT),
        (" 7 ", " 7 ", 7, 7.0, NOT),
        ("1_0", "1_0", NOT, NOT, NOT),
        ("٣", "٣", NOT, NOT, NOT),
        ("1e3", "1e3", NOT, 1000.0, NOT),
        ("1", "1", 1, 1.0, True),
        ("TRUE", "TRUE", NOT, NOT, True),
        (True, "true", NOT, NOT, True),
        (2, "2", 2, 2.0, NOT),
        (2.0, "2.0", 2, 2.0, NOT),
        (2.5, "2.5", NOT, 2.5, NOT),
        (2**63, str(2**63), NOT, 2.0**63, NOT),
        (10**400, "1" + "0" * 400, NOT, NOT, NOT),
        ([1], "[1]", NOT, NOT, NOT),
        ({"é": 1}, '{"é": 1}', NOT, NOT, NOT),
    ],
)
def test_conversions(value: Any, string: Any, int64: Any, float64: Any, bool_: Any) -> None:
    for name, expected in {"string": string, "int64": int64, "float64": float64, "bool": bool_}.items():
        if expected is NOT:
            with pytest.raises(ValueError):
                convert(value, name)
        else:
            assert convert(value, name) == expected and type(convert(value, name)) is type(expected)


@settings(max_examples=50, deadline=None)
@given(JSON, st.sampled_from(list(TYPES)))
def test_whatever_comes_out_is_what_arrow_takes(value: Any, type_name: str) -> None:
    columns, remarks = convert_all([Passthrough("a", type_name)], {"a": value})
    assert len(pa.array([columns["a"]], TYPES[type_name])) == 1
    assert bool(remarks) == (columns["a"] is None and value is not None)


@given(st.text() | st.binary())
def test_text_is_valid_and_stays_what_it_was(text: str | bytes) -> None:
    assert isinstance(to_valid_text(text).encode(), bytes)
    if isinstance(text, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        assert to_valid_text(text) == text


def test_keep_entries() -> None:
    assert parse_keep(["a", "b:int64", "dc:title:string"]) == (
        Passthrough("a"),
        Passthrough("b", "int64"),
        Passthrough("dc:title", "string"),
    )
    for entry, says in (("a:int", "did you mean `int64`"), ("dc:title", "dc:title:string"), (":string", "expected")):
        with pytest.raises(ValueError, match=says):
            parse_keep([entry])


def test_infinities() -> None:
    assert math.isinf(convert("-inf", "float64")) and math.isnan(convert("NaN", "float64"))
