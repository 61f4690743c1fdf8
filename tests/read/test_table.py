"""Lists of URIs to rows: cutting at records, relative names, and what a failing store is not."""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import AccessDenied, InputError, NotFound, PartFailed
from pipeline.read import PartLimits
from pipeline.read.table import Table, _absolute
from pipeline.schema import Part, Reject, Row
from pipeline.storage import Store

CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


class AnyName(Store):
    """Every name leads to its own bytes; counts how many reads are under way."""

    most = under_way = 0
    lock = threading.Lock()

    def read(self, uri: str, start: int = 0, stop: int | None = None, **options: Any) -> bytes:
        if uri.endswith((".csv", ".jsonl", ".parquet")):
            return super().read(uri, start, stop, **options)
        with AnyName.lock:
            AnyName.under_way += 1
            AnyName.most = max(AnyName.most, AnyName.under_way)
        try:
            if "denied" in uri:
                raise AccessDenied(f"{uri}: access denied", hint="look at the policy")
            if "gone" in uri:
                raise NotFound(f"{uri}: not found")
            return uri.encode()
        finally:
            with AnyName.lock:
                AnyName.under_way -= 1


@pytest.fixture
def any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "store", property(lambda self: AnyName()))


def parts_of(source: Table, rows: int = 100) -> list[Part]:
    return [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(rows=rows)))]


def read(source: Table, rows: int = 100) -> list[Row | Reject]:
    return [item for part in parts_of(source, rows) for item in source.read(part)]


@settings(max_examples=60, deadline=None)
@given(
    notes=st.lists(CELLS, min_size=1, max_size=12),
    rows=st.integers(1, 5),
    form=st.sampled_from(["csv", "jsonl"]),
    blank=st.booleans(),
)
def test_every_record_once_wherever_the_list_is_cut(
    tmp_path_factory: pytest.TempPathFactory, notes: list[str], rows: int, form: str, blank: bool
) -> None:
    """Notes hold commas, quotes, line breaks, anything."""
    sink = io.StringIO()
    if form == "csv":
        writer = csv.writer(sink, lineterminator="\n\n" if blank else "\n")
        writer.writerows([("uri", "note"), *((f"{i}.jpg", note) for i, note in enumerate(notes))])
    else:
        lines = [json.dumps({"uri": f"{i}.jpg", "note": note}) for i, note in enumerate(notes)]
        sink.write(("\n\n" if blank else "\n").join(lines))
    path = tmp_path_factory.mktemp("lists") / f"a.{form}"
    path.write_bytes(sink.getvalue().encode())
    source = Table(uris=(str(path),), keep=("note",))
    parts = parts_of(source, rows)
    items = [item for part in parts for item in source.read(part)]
    assert [part.rows for part in parts] == [len(list(source.read(part))) for part in parts]
    assert [item.key for item in items] == [f"{i}.jpg" for i in range(len(notes))]
    assert all(isinstance(item, Reject) and item.reason == "not_found" for item in items)


def test_cells_pass_through_with_their_line_breaks(tmp_path: Path, any_name: None) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('uri,note,n\r\na,"x ""y""\r\nz",1\r\nb,,x\r\nc,caf\xe9,2\r\n'.encode("latin-1"))
    items = read(Table(uris=(str(path),), keep=("note", "n:int64")), rows=1)
    assert [(item.passthrough, item.warnings) for item in items if isinstance(item, Row)] == [
        ({"note": 'x "y"\r\nz', "n": 1}, ()),
        ({"note": None, "n": None}, ("n_not_int64",)),
        ({"note": "caf\\xe9", "n": 2}, ()),
    ]


def test_a_parquet_list_keeps_its_types(tmp_path: Path, any_name: None) -> None:
    columns = {"url": ["a", "b", "c"], "id": [7, 8, 9], "boxes": [[1.5], [], None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    source = Table(uris=(str(tmp_path / "a.parquet"),), uri="url", key="id", keep=("boxes",))
    assert source.passthrough() == pa.schema([("boxes", pa.list_(pa.float64()))])
    assert [(i.key, i.passthrough["boxes"]) for i in read(source, rows=2) if isinstance(i, Row)] == [
        ("7", [1.5]), ("8", []), ("9", None),
    ]  # fmt: skip


def test_lists_that_disagree_are_refused_naming_both(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a"], "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"uri": ["a"], "n": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"(?s)a\.parquet.*b\.parquet.*int64.*string.*name:type"):
        parts_of(Table(uris=(f"{tmp_path}/*.parquet",), keep=("n",)))
    assert len(parts_of(Table(uris=(f"{tmp_path}/*.parquet",), keep=("n:string",)))) == 1


@pytest.mark.parametrize(
    ("uri", "list_uri", "absolute"),
    [
        ("a.jpg", "s3://b/lists/l.csv", "s3://b/lists/a.jpg"),
        ("../img/a b.jpg", "s3://b/lists/l.csv", "s3://b/img/a b.jpg"),
        ("../../../a.jpg", "s3://b/lists/l.csv", "s3://b/a.jpg"),
        ("a.jpg", "s3://b/l.csv", "s3://b/a.jpg"),
        ("https://h/a.jpg?x=1", "/d/l.csv", "https://h/a.jpg?x=1"),
        ("/x/a.jpg", "/d/l.csv", "/x/a.jpg"),
        ("./x/a.jpg", "/d/l.csv", "/d/x/a.jpg"),
    ],
)
def test_relative_names(uri: str, list_uri: str, absolute: str) -> None:
    assert _absolute(uri, list_uri) == absolute


def test_a_refusing_store_fails_the_part_but_a_missing_object_does_not(tmp_path: Path, any_name: None) -> None:
    path = tmp_path / "a.csv"
    path.write_text("uri\nx\ngone\ny\n")
    assert [getattr(item, "reason", "row") for item in read(Table(uris=(str(path),)))] == ["row", "not_found", "row"]
    path.write_text("uri\nx\ndenied\ny\n")
    with pytest.raises(PartFailed, match=r"(?s)denied.*policy"):
        read(Table(uris=(str(path),)))


def test_order_is_the_lists_and_few_are_fetched_at_once(tmp_path: Path, any_name: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"uri": "{i}"}}\n' for i in range(300)))
    AnyName.most = 0
    assert [item.key for item in read(Table(uris=(str(path),), threads=3), rows=1000)] == [str(i) for i in range(300)]
    assert 1 <= AnyName.most <= 3


def test_a_list_is_not_read_from_its_start_for_each_part(
    tmp_path: Path, any_name: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("uri,note\n" + "".join(f"{i},{'x' * 1000}\n" for i in range(2000)))
    source = Table(uris=(str(path),))
    part = parts_of(source, rows=100)[-1]
    asked: list[int] = []
    plain = AnyName.read

    def counting(self: AnyName, uri: str, start: int = 0, stop: int | None = None, **options: Any) -> bytes:
        data = plain(self, uri, start, stop, **options)
        asked.append(len(data))
        return data

    monkeypatch.setattr(AnyName, "read", counting)
    assert [item.key for item in source.read(part)] == [str(i) for i in range(1900, 2000)]
    assert sum(asked) < 300_000 < path.stat().st_size
