"""Lists of URIs to rows: cutting at records, relative names, and what a failing store is not."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2parquet.errors import AccessDenied, InputError, JobFailed, NotFound, PartFailed, Unreachable
from img2parquet.read import PartLimits
from img2parquet.read.linked_images import _absolute
from img2parquet.read.passthrough import column_of
from img2parquet.read.row_groups import HIVE_NULL
from img2parquet.read.table import Table
from img2parquet.schema import Part, Reject, Row
from img2parquet.storage import Store

CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


class AnyName(Store):
    """Every name leads to its own bytes; counts how many reads are under way."""

    most = under_way = 0
    lock = threading.Lock()

    def read(self, uri: str, start: int = 0, stop: int | None = None, **options: Any) -> bytes:
        if uri.endswith((".csv", ".tsv", ".txt", ".jsonl", ".parquet")):
            return super().read(uri, start, stop, **options)
        with AnyName.lock:
            AnyName.under_way += 1
            AnyName.most = max(AnyName.most, AnyName.under_way)
        try:
            if "denied" in uri:
                raise AccessDenied(f"{uri}: access denied", hint="look at the policy")
            if "down" in uri:
                raise Unreachable(f"{uri}: no answer")
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


QUOTES = {  # records, of which some open a quote that closes nowhere or in another record -> the captions
    "closed nowhere": ('1.jpg,"best\n2.jpg,third\n3.jpg,fourth\n', ['"best', "third", "fourth"]),
    "closed by another's": ('1.jpg,"best\n2.jpg,third\n3.jpg,"fourth"\n', ['"best', "third", "fourth"]),
    "closed at the end of a line": ('1.jpg,"best\n2.jpg,third"\n3.jpg,x\n', ['"best', 'third"', "x"]),
    "text behind it": ('1.jpg,"12" vinyl\n2.jpg,x\n', ['"12" vinyl', "x"]),
    "blanks behind it": ('1.jpg,"a, b" \n"2.jpg" ,x\n', ["a, b ", "x"]),
    "within a cell": ('1.jpg,5" wide\n2.jpg,"a ""b"" c"\n', ['5" wide', 'a "b" c']),
    "a caption of several lines": ('1.jpg,"a\nb, c\n"\n2.jpg,x\n', ["a\nb, c\n", "x"]),
    "a caption that names a file": ('1.jpg,"see 7.jpg\nor 8.jpg"\n2.jpg,x\n', ["see 7.jpg\nor 8.jpg", "x"]),
}


@pytest.mark.parametrize("form", ["csv", "tsv"])
@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("case", QUOTES)
def test_a_quote_takes_no_other_record_with_it(tmp_path: Path, any_name: None, case: str, rows: int, form: str) -> None:
    """Wherever the list is cut into parts."""
    text, captions = QUOTES[case]
    if form == "tsv":
        text = re.sub(",(?! )", "\t", text)
    path = tmp_path / f"a.{form}"
    path.write_text(("uri,note\n" if form == "csv" else "uri\tnote\n") + text)
    items = read(Table(uris=(str(path),), keep=("note",)), rows)
    assert [item.passthrough["note"] for item in items if isinstance(item, Row)] == captions
    assert len(items) == len(captions)


DIALECTS = {
    "semicolons": "uri;note\n1.jpg;a, b\n2.jpg;c\n",
    "tabs": "uri\tnote\n1.jpg\ta, b\n2.jpg\tc\n",
    "bars": 'uri|note\n1.jpg|"a, b"\n2.jpg|c\n',
    "commas": 'uri,note\n1.jpg,"a, b"\n2.jpg,c\n',
    "Excel's line": 'sep=;\r\n"uri";"note"\r\n1.jpg;"a, b"\r\n2.jpg;c\r\n',
    "a byte order mark": '\ufeff"uri";"note"\r\n1.jpg;"a, b"\r\n2.jpg;c\r\n',
    "blanks around names": 'note , uri\n"a, b",1.jpg\nc,2.jpg\n',
    "unused names twice": 'uri,note,x,x,\n1.jpg,"a, b",1,2,3\n2.jpg,c,1,2,3\n',
}


@pytest.mark.parametrize("form", ["csv", "tsv"])
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("case", DIALECTS)
def test_the_header_tells_how_cells_are_separated(
    tmp_path: Path, any_name: None, case: str, rows: int, form: str
) -> None:
    path = tmp_path / f"a.{form}"
    path.write_bytes(DIALECTS[case].encode())
    items = read(Table(uris=(str(path),), keep=("note",)), rows)
    assert [(i.key, i.passthrough) for i in items if isinstance(i, Row)] == [
        ("1.jpg", {"note": "a, b"}), ("2.jpg", {"note": "c"}),
    ]  # fmt: skip
    assert [row.key for row in read(Table(uris=(str(path),)), rows)] == ["1.jpg", "2.jpg"]


OBJECTS = [{"uri": "1.jpg", "note": "a"}, {"uri": "2.jpg", "note": "b"}]
REFUSED = {  # text of a list -> what the message says
    "a.csv uri,note,note\n1.jpg,a,b\n": r"more than one column `note`",
    "a.csv uri,uri,note\n1.jpg,2.jpg,b\n": r"more than one column `uri`",
    "a.csv URI,note\n1.jpg,a\n": r"(?s)no column `uri`.*did you mean `URI`",
    "a.csv uri,Note\n1.jpg,a\n": r"(?s)no column `note`.*did you mean `Note`",
    "a.csv 1.jpg,a\n2.jpg,b\n": r"(?s)no column `uri`.*looks like data",
    "a.csv uri,note\r1.jpg,a\r": r"(?s)carriage return.*tr ",
    "a.csv uri,note\n": r"hold no rows",
    "a.csv PK\3\4": r"Excel",
    "a.csv PAR1": r"input.format: parquet",
    "a.csv BZh9": r"bzip2 -d",
    "a.txt 1.jpg\n": r"(?s)no column `note`.*known: uri",
    f"a.jsonl {json.dumps(OBJECTS)}": r"(?s)a JSON array.*jq -c '\.\[\]'",
    f"a.jsonl {json.dumps(OBJECTS, indent=1)}": r"(?s)a JSON array.*jq -c '\.\[\]'",
    f"a.jsonl {json.dumps(OBJECTS[0], indent=1)}": r"(?s)no line is a JSON object.*jq -c \. ",
    f"a.jsonl {json.dumps(OBJECTS[0])}{json.dumps(OBJECTS[1])}": r"(?s)no line is a JSON object.*Extra data",
    'a.jsonl {"uri": "1.jpg"}\n{"uri": "2.jpg"}': r"no column `note`",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_list_with_these_columns_is_told(tmp_path: Path, case: str) -> None:
    name, _, text = case.partition(" ")
    (tmp_path / name).write_text(text, newline="")
    with pytest.raises(InputError, match=REFUSED[case]):
        parts_of(Table(uris=(str(tmp_path / name),), keep=("note",)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["csv", "tsv", "txt", "jsonl"])
def test_other_encodings_are_told(tmp_path: Path, form: str, encoding: str) -> None:
    path = tmp_path / f"a.{form}"
    path.write_bytes("uri\n1.jpg\n".encode(encoding))
    with pytest.raises(InputError, match=r"(?s)in UTF-16.*iconv"):
        parts_of(Table(uris=(str(path),)))


def test_bytes_that_are_not_utf8_are_told(tmp_path: Path, any_name: None, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("uri,note\n1.jpg,\\xe9\n2.jpg,café\n3.jpg,café\n".encode("latin-1"))
    parts_of(Table(uris=(str(path),)))
    assert [record.message.count("byte 20 is not UTF-8") for record in caplog.records] == [1]
    caplog.clear()
    path.write_text("uri,note\n1.jpg,\\xe9\n2.jpg,café\n", encoding="utf-8")
    parts_of(Table(uris=(str(path),)))
    assert not caplog.records


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_text_is_one_uri_a_line(tmp_path: Path, any_name: None, rows: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes('\ufeff1.jpg\r\n\r\n http://h/2,3.jpg?a=b  \n \n"4".jpg\n# gone\n6.jpg'.encode())
    items = read(Table(uris=(str(path),)), rows)
    assert [(item.key, getattr(item, "reason", "row")) for item in items] == [
        ("1.jpg", "row"), ("http://h/2,3.jpg?a=b", "row"),
        ('"4".jpg', "row"), ("# gone", "not_found"), ("6.jpg", "row"),
    ]  # fmt: skip
    path = path.rename(tmp_path / "a.csv")
    assert len(read(Table(uris=(str(path),), format="txt", uri="address"), rows)) == 5


def test_objects_may_leave_names_out(tmp_path: Path, any_name: None) -> None:
    path = tmp_path / "a.jsonl"
    lines = ["x", '{"uri": "1.jpg"}', *['{"uri": "2.jpg", "other": 1}'] * 300, '{"note": 7, "uri": "3.jpg"}']
    path.write_text("\n".join(lines))
    items = [item for item in read(Table(uris=(str(path),), keep=("note:int64",))) if isinstance(item, Row)]
    assert [(row.key, row.passthrough["note"]) for row in (items[0], items[-1])] == [("1.jpg", None), ("3.jpg", 7)]


def test_folders_of_a_parquet_lists_path_are_columns(tmp_path: Path, any_name: None) -> None:
    for folder in ("year=2020", f"year={HIVE_NULL}"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"uri": ["a", "b"]}), tmp_path / folder / "l.parquet")
    source = Table(uris=(f"{tmp_path}/*/l.parquet",), keep=("year:int64", "uri"))
    assert [item.passthrough["year"] for item in read(source, rows=1) if isinstance(item, Row)] == [2020] * 2 + [
        None
    ] * 2


def test_a_parquet_list_keeps_its_types(tmp_path: Path, any_name: None) -> None:
    columns = {"url": ["a", "b", "c"], "id": [7, 8, 9], "boxes": [[1.5], [], None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    source = Table(uris=(str(tmp_path / "a.parquet"),), uri="url", key="id", keep=("boxes",))
    assert source.passthrough() == pa.schema([("boxes", pa.list_(pa.float64()))])
    rows = [i for i in read(source, rows=2) if isinstance(i, Row)]
    assert [row.key for row in rows] == ["7", "8", "9"]
    assert column_of([row.passthrough["boxes"] for row in rows], pa.list_(pa.float64())).to_pylist() == columns["boxes"]


def test_a_parquet_list_keeps_what_python_cannot_hold(tmp_path: Path, any_name: None) -> None:
    when = pa.array([0, 10**18, None], pa.timestamp("us"))
    pq.write_table(pa.table({"uri": ["a", "b", "c"], "when": when, "uri2": ["a", "b", "c"]}), tmp_path / "a.parquet")
    source = Table(uris=(str(tmp_path / "a.parquet"),), keep=("when", "uri"))
    rows = [i for i in read(source) if isinstance(i, Row)]
    assert column_of([row.passthrough["when"] for row in rows], when.type).is_valid().to_pylist() == [
        True,
        False,
        False,
    ]
    assert [row.warnings for row in rows] == [(), ("when_unreadable",), ()]
    assert [row.passthrough["uri"] for row in rows] == ["a", "b", "c"]
    as_text = [i for i in read(Table(uris=source.uris, keep=("when:string",))) if isinstance(i, Row)]
    assert [(row.passthrough["when"], row.warnings) for row in as_text] == [
        ("1970-01-01 00:00:00.000000", ()), (None, ("when_not_string",)), (None, ()),
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
        ("x//a.jpg", "/d/l.csv", "/d/x/a.jpg"),
        ("x//a.jpg", "s3://b/p/l.csv", "s3://b/p/x//a.jpg"),
        ("/a.jpg", "s3://b/p/l.csv", "/a.jpg"),
        ("a.jpg", "s3://b/p//l.csv", "s3://b/p//a.jpg"),
        ("a.jpg", "s3://b//l.csv", "s3://b//a.jpg"),
        ("./x//../a.jpg", "gs://b/p/l.csv", "gs://b/p/x/a.jpg"),
        ("a.jpg", "https://h/d/l.csv?x=/y/", "https://h/d/a.jpg"),
    ],
)
def test_relative_names(uri: str, list_uri: str, absolute: str) -> None:
    assert _absolute(uri, list_uri) == absolute


@pytest.mark.parametrize("scheme", ["", "http://h/", "https://h/"])
def test_what_one_row_may_not_read_is_a_reject(tmp_path: Path, any_name: None, scheme: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("uri\n" + "".join(f"{scheme}{name}\n" for name in ("denied", "x", "gone", "denied2", "down", "y")))
    for rows in (1, 2, 100):  # a part of one row asks the others before it gives up
        items = read(Table(uris=(str(path),)), rows)
        assert [getattr(item, "reason", "row") for item in items] == [
            "refused", "row", "not_found", "refused", "unreachable", "row",
        ]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("name", ["denied", "down"])
def test_a_store_that_refuses_everything_fails_the_job(
    tmp_path: Path, any_name: None, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: not after each of its rows."""
    asked: list[str] = []
    real = AnyName.read
    monkeypatch.setattr(AnyName, "read", lambda self, uri, *at, **how: asked.append(uri) or real(self, uri, *at, **how))
    path = tmp_path / "a.csv"
    path.write_text("uri\n" + "".join(f"http://h{i % 9}/{name}{i}\n" for i in range(1000)))
    with pytest.raises(JobFailed, match=rf"(?s)nothing that the list names.*{name}.*same command again"):
        read(Table(uris=(str(path),)), rows)
    assert len(asked) < 400


def test_another_store_that_denies_an_object_fails_the_part(tmp_path: Path, any_name: None) -> None:
    path = tmp_path / "a.csv"
    path.write_text("uri\ns3://b/x\ns3://b/denied\n")
    with pytest.raises(PartFailed, match=r"(?s)denied.*policy"):
        read(Table(uris=(str(path),)))


def test_a_server_that_never_answers_is_not_asked_for_each_row(tmp_path: Path, any_name: None) -> None:
    path = tmp_path / "a.csv"
    names = [f"http://dead/down{i}" for i in range(200)]
    path.write_text("uri\nhttp://h/x\n" + "\n".join(names) + "\nhttp://h/y\n")
    items = read(Table(uris=(str(path),), threads=2))
    assert [getattr(item, "reason", "row") for item in items] == ["row", *["unreachable"] * 200, "row"]
    assert sum("its server answered none" in item.message for item in items if isinstance(item, Reject)) > 150


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
