"""Parquet to rows: how row groups become parts, which types pass through, and what a failing store is not."""

from __future__ import annotations

import datetime
import decimal
import io
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2parquet.errors import InputError, PartFailed, StorageError
from img2parquet.read import PartLimits, read_part
from img2parquet.read.parquet import ParquetRows
from img2parquet.read.part_packing import pack
from img2parquet.read.passthrough import TYPES, column_of
from img2parquet.read.row_groups import HIVE_NULL
from img2parquet.schema import Part, Piece, Reject, Row, Wanted
from img2parquet.storage import Store
from tests.read.broken_shards import LFS_POINTER, parquet
from tests.read.test_tar import mutate


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def parts_of(source: ParquetRows, **limits: int) -> list[Part]:
    return [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(**limits)))]


def rows_of(source: ParquetRows, **limits: int) -> list[Row]:
    items = [item for part in parts_of(source, **limits) for item in source.read(part)]
    assert all(isinstance(item, Row) for item in items), items
    return [item for item in items if isinstance(item, Row)]


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    group=st.integers(1, 40),
    rows=st.integers(1, 12),
    size_bytes=st.integers(1, 3000),
)
def test_every_row_once_whatever_the_groups(
    tmp_path_factory: pytest.TempPathFactory, files: list[int], group: int, rows: int, size_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("groups")
    for n, count in enumerate(files):
        image = [{"bytes": bytes([i]) * 50, "path": f"{n}/{i}"} for i in range(count)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        write(folder / f"{n}.parquet", {"image": pa.array(image, kind)}, row_group_size=group)
    source = ParquetRows(uris=(f"{folder}/*.parquet",))
    parts = parts_of(source, rows=rows, size_bytes=size_bytes)
    assert all(part.rows is not None and part.rows <= rows for part in parts)
    read = [row for part in parts for row in source.read(part)]
    assert [row.key for row in read] == [f"{n}/{i}" for n, count in enumerate(files) for i in range(count)]
    assert [row.image for row in read if isinstance(row, Row)] == [bytes([int(r.key.split("/")[1])]) * 50 for r in read]


def test_a_large_row_group_is_cut_evenly(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"x"] * 100, "id": list(range(100))})
    pieces = [piece for part in parts_of(ParquetRows(uris=(uri,), key="id"), rows=30) for piece in part.pieces]
    assert [(piece.start, piece.stop, piece.rows) for piece in pieces] == [
        (0, 25, 25), (25, 50, 25), (50, 75, 25), (75, 100, 25),
    ]  # fmt: skip


def test_small_files_share_a_part_and_neighbouring_groups_one_piece(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.parquet", {"image": [b"x"] * 10, "id": list(range(10))}, row_group_size=2)
    (part,) = parts_of(ParquetRows(uris=(f"{tmp_path}/*.parquet",), key="id"))
    assert [(Path(piece.uri).name, piece.start, piece.stop) for piece in part.pieces] == [
        ("a.parquet", 0, 10), ("b.parquet", 0, 10),
    ]  # fmt: skip


KEPT = {
    "int8": pa.array([1, None], pa.int8()),
    "text": pa.array(["é", ""], pa.large_string()),
    "words": pa.array(["a", "b"]).dictionary_encode(),
    "when": pa.array([1, 2**60 + 1], pa.timestamp("ns", tz="UTC")),
    "day": pa.array([datetime.date(2020, 1, 1), None]),
    "price": pa.array([decimal.Decimal("1.50"), None]),
    "boxes": pa.array([[{"x": 1.5, "name": "a"}], []]),
    "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
    "blob": pa.array([b"\0\xff", None], pa.binary()),
    "long": pa.array([2**62 + 1, None], pa.duration("ns")),
    "clock": pa.array([1, None], pa.time64("ns")),
    "half": pa.array([1.5, None], pa.float16()),
    "huge": pa.array([decimal.Decimal(10) ** 50, None], pa.decimal256(60, 2)),
    "view": pa.array(["é", None], pa.string_view()),
    "times": pa.array([[10**9 + 1, None], None], pa.list_(pa.timestamp("ns"))),
    "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_columns_come_through_as_they_were(tmp_path: Path, name: str) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "id": ["a", "b"], name: KEPT[name]})
    source = ParquetRows(uris=(uri,), key="id", keep=(name,))
    field = source.passthrough().field(name)
    plain = KEPT[name].dictionary_decode() if name == "words" else KEPT[name]
    assert field.type == plain.type and field.nullable
    rows = [pickle.loads(pickle.dumps(row)) for row in rows_of(source)]
    assert column_of([row.passthrough[name] for row in rows], field.type) == plain


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("as_type", TYPES)
def test_every_type_converts_or_says_so(tmp_path: Path, name: str, as_type: str) -> None:
    """No type ends in an exception."""
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "id": ["a", "b"], name: KEPT[name]})
    rows = rows_of(ParquetRows(uris=(uri,), key="id", keep=(f"{name}:{as_type}",)))
    values = column_of([row.passthrough[name] for row in rows], TYPES[as_type]).to_pylist()
    for row, value, is_given in zip(rows, values, KEPT[name].is_valid().to_pylist(), strict=True):
        assert row.warnings == ((f"{name}_not_{as_type}",) if is_given and value is None else ())


FAR = {  # values that no calendar of Python holds
    "time": pa.array([0, 10**18, None], pa.timestamp("us")),
    "zoned": pa.array([0, 10**18, None], pa.timestamp("us", tz="Europe/Berlin")),
    "day": pa.array([0, 2**31 - 1, None], pa.date32()),
    "span": pa.array([0, 2**62, None], pa.duration("ms")),
    "nested": pa.array([[{"t": 0}], [{"t": -(10**18)}], None], pa.list_(pa.struct([("t", pa.timestamp("us"))]))),
}


@pytest.mark.parametrize("name", FAR)
def test_a_time_out_of_every_calendar_costs_neither_row_nor_reader(tmp_path: Path, name: str) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2", b"3"], "id": ["a", "b", "c"], "x": FAR[name]})
    rows = rows_of(ParquetRows(uris=(uri,), key="id", keep=("x",)))
    column = column_of([row.passthrough["x"] for row in rows], FAR[name].type)
    assert column.slice(0, 1) == FAR[name].slice(0, 1)
    assert column.to_pylist()[1:] == [None, None]
    assert [row.warnings for row in rows] == [(), ("x_unreadable",), ()]


TEXTS = {
    "when": ["1970-01-01 00:00:00.000000001Z", "2006-07-14 23:58:24.606846977Z"],
    "day": ["2020-01-01", None],
    "price": ["1.50", None],
    "blob": ["\0\\xff", None],
    "vector": ["[1.0, 2.0]", "[3.0, 4.0]"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_times_and_numbers_as_text(tmp_path: Path, name: str) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "id": ["a", "b"], name: KEPT[name]})
    rows = rows_of(ParquetRows(uris=(uri,), key="id", keep=(f"{name}:string",)))
    assert [row.passthrough[name] for row in rows] == TEXTS[name]


def test_folders_of_the_path_are_columns(tmp_path: Path) -> None:
    for year, place in (("2020", "a b"), ("2021", "c")):
        folder = tmp_path / f"year={year}" / f"place={quote(place)}"
        folder.mkdir(parents=True)
        write(folder / "a.parquet", {"image": [b"1"], "id": ["x"]})
    source = ParquetRows(uris=(f"{tmp_path}/**/*.parquet",), key="id", keep=("year:int64", "place"))
    assert source.passthrough() == pa.schema([("year", pa.int64()), ("place", pa.string())])
    assert [row.passthrough for row in rows_of(source)] == [
        {"year": 2020, "place": "a b"}, {"year": 2021, "place": "c"},
    ]  # fmt: skip
    (tmp_path / f"year={HIVE_NULL}" / "place=").mkdir(parents=True)
    write(tmp_path / f"year={HIVE_NULL}" / "place=" / "a.parquet", {"image": [b"1"], "id": ["x"]})
    assert rows_of(source)[-1].passthrough == {"year": None, "place": ""}
    with pytest.raises(InputError, match="no column `month`"):
        list(ParquetRows(uris=source.uris, key="id", keep=("month",)).plan(PartLimits()))


def test_a_named_type_converts(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "id": [1, 2], "n": ["7", "seven"]})
    source = ParquetRows(uris=(uri,), key="id", keep=("n:int64",))
    assert source.passthrough().field("n").type == pa.int64()
    assert [(row.key, row.passthrough["n"], row.warnings) for row in rows_of(source)] == [
        ("1", 7, ()), ("2", None, ("n_not_int64",)),
    ]  # fmt: skip


def test_image_types(tmp_path: Path) -> None:
    kinds = {"large": pa.large_binary(), "view": pa.binary_view()}
    for name, kind in kinds.items():
        uri = write(tmp_path / f"{name}.parquet", {"image": pa.array([b"1", b"2"], kind), "id": ["a", "b"]})
        assert [row.image for row in rows_of(ParquetRows(uris=(uri,), key="id"))] == [b"1", b"2"]
    uri = write(tmp_path / "c.parquet", {"img": [{"bytes": b"1", "path": "p"}], "id": ["a"]})
    assert [row.key for row in rows_of(ParquetRows(uris=(uri,), image="img", key="id"))] == ["a"]


def test_a_path_without_bytes_is_empty(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [{"bytes": None, "path": "p"}, {"bytes": b"x", "path": None}, None]})
    source = ParquetRows(uris=(uri,))
    items = [item for part in parts_of(source) for item in source.read(part)]
    assert [(item.key, item.reason) for item in items if isinstance(item, Reject)] == [
        ("p", "not_found"), ("2", "empty"),
    ]  # fmt: skip


def test_the_nearest_column_is_named(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"1"], "label": [1], "id": ["a"]})
    with pytest.raises(InputError, match="did you mean `label`"):
        ParquetRows(uris=(uri,), key="id", keep=("labels",)).passthrough()
    with pytest.raises(InputError, match="did you mean `image`"):
        list(ParquetRows(uris=(uri,), key="id", image="images").plan(PartLimits()))


class FailingFile(io.BytesIO):
    """Answers until its data pages are asked for."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() < 50_000:
            raise StorageError("the store gave up", hint="wait")
        return super().read(size)


def test_a_store_that_gives_up_fails_the_part_and_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = [bytes([i]) * 10_000 for i in range(20)]
    columns = {"image": image, "id": list(range(20))}
    uri = write(tmp_path / "a.parquet", columns, compression="none", use_dictionary=False)
    source = ParquetRows(uris=(uri,), key="id")
    (part,) = parts_of(source)

    def open_failing(self: Store, uri: str, **_: object) -> BinaryIO:
        return FailingFile(Path(uri).read_bytes())

    monkeypatch.setattr(Store, "open", open_failing)
    with pytest.raises(PartFailed, match="gave up"):
        list(source.read(part))


def test_only_the_wanted_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = [bytes([i]) * 100_000 for i in range(40)]
    uri = write(
        tmp_path / "a.parquet",
        {"image": image, "id": list(range(40))},
        row_group_size=4,
        compression="none",
        use_dictionary=False,
    )
    source = ParquetRows(uris=(uri,), key="id")
    part = parts_of(source, rows=4)[5]
    read: list[int] = []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    def open_counting(self: Store, uri: str, **_: object) -> BinaryIO:
        return Counting(Path(uri).read_bytes())

    monkeypatch.setattr(Store, "open", open_counting)
    assert [row.key for row in source.read(part)] == ["20", "21", "22", "23"]
    assert 400_000 < sum(read) < 1_500_000


def test_only_neighbouring_ranges_become_one_piece() -> None:
    def piece(uri: str, start: int, stop: int | None) -> Piece:
        return Piece(uri, 10, "e", start, stop, 1)

    pieces = [piece("a", 0, 5), piece("a", 5, 9), piece("a", 10, 12), piece("b", 12, 13), piece("c", 0, None)]
    (part,) = pack(pieces, PartLimits())
    assert [(p.uri, p.start, p.stop, p.size_bytes, p.rows) for p in part] == [
        ("a", 0, 9, 20, 2), ("a", 10, 12, 10, 1), ("b", 12, 13, 10, 1), ("c", 0, None, 10, 1),
    ]  # fmt: skip


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9", b"ok"]).view(pa.string())
    nested = pa.array([[b"\xff"], [b"ok"]]).cast(pa.list_(pa.binary())).view(pa.list_(pa.string()))
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "id": text, "nested": nested})
    assert [row.key for row in rows_of(ParquetRows(uris=(uri,), key="id"))] == ["caf\\xe9", "ok"]
    source = ParquetRows(uris=(uri,), key="id", keep=("nested",))
    (part,) = parts_of(source)
    first, second = (item for item in source.read(part) if isinstance(item, Row))
    assert (first.passthrough, first.warnings) == ({"nested": None}, ("nested_unreadable",))
    assert (second.passthrough["nested"].to_pylist(), second.warnings) == ([["ok"]], ())


PATHS = ["0.png", None, "1.png", "0.png", "", "0.png", "2.png"]
NAMES = ["0.png", "1", "1.png", "0.png#3", "4", "0.png#5", "2.png"]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("group", [2, 100])
def test_rows_without_a_path_of_their_own_are_named_by_their_number(tmp_path: Path, rows: int, group: int) -> None:
    """Wherever a file is cut: its parts, and the rows that a retry reads, have the same names."""
    image = [{"bytes": b"%d" % i, "path": path} for i, path in enumerate(PATHS)]
    for name in "ab":
        write(tmp_path / f"{name}.parquet", {"image": image}, row_group_size=group)
    source = ParquetRows(uris=(f"{tmp_path}/*.parquet",))
    parts = parts_of(source, rows=rows)
    read = [item for part in parts for item in read_part(source, part)]
    assert [item.key for item in read] == NAMES * 2 and all(isinstance(item, Row) for item in read)
    for part in parts:
        for item in read_part(source, part):
            alone = replace(part, only=(Wanted(item.row, item.key, item.shard),))
            assert list(read_part(source, alone)) == [item]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_row_numbers_as_keys(tmp_path: Path, rows: int) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"0", b"1", b"2"]}, row_group_size=2)
    assert [row.key for row in rows_of(ParquetRows(uris=(uri,), key="row_number"), rows=rows)] == ["0", "1", "2"]
    named = write(tmp_path / "b.parquet", {"image": [b"0", b"1"], "row_number": [7, 8]})
    assert [row.key for row in rows_of(ParquetRows(uris=(named,), key="row_number"))] == ["7", "8"]


IMAGES = [b"111", None, b"333"]


@pytest.mark.parametrize(
    "image",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary_view()),
        pa.array(IMAGES, pa.binary(3)),
        pa.array(IMAGES).dictionary_encode(),
        pa.array([{"path": "x", "bytes": b"111"}, None, {"path": None, "bytes": b"333"}]),
        pa.array([{"bytes": b"111", "w": 1}, {"bytes": None, "w": 2}, {"bytes": b"333", "w": 3}]),
    ],
    ids=lambda image: str(image.type),
)
def test_every_type_of_bytes_is_read(tmp_path: Path, image: pa.Array) -> None:
    source = ParquetRows(uris=(write(tmp_path / "a.parquet", {"image": image, "id": ["a", "b", "c"]}),), key="id")
    items = [item for part in parts_of(source) for item in source.read(part)]
    assert [item.reason if isinstance(item, Reject) else bytes(item.image) for item in items] == [
        b"111",
        "empty",
        b"333",
    ]


def test_a_file_without_images_or_rows_has_no_types(tmp_path: Path) -> None:
    """A writer that saw no value gives the type null."""
    write(tmp_path / "a.parquet", {"image": [b"1"], "id": ["a"], "n": [1]})
    write(tmp_path / "b.parquet", {"image": pa.nulls(0), "id": pa.nulls(0), "n": pa.nulls(0)})
    write(tmp_path / "c.parquet", {"image": [None], "id": ["c"], "n": [2]})
    write(tmp_path / "d.parquet", {"other": pa.nulls(0)})
    source = ParquetRows(uris=(f"{tmp_path}/*.parquet",), key="id", keep=("n",))
    items = [item for part in parts_of(source) for item in source.read(part)]
    assert [(item.key, getattr(item, "reason", "row")) for item in items] == [("a", "row"), ("c", "empty")]


def test_the_hint_for_rows_without_names_works(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"0"]})
    with pytest.raises(InputError, match="or to `row_number`"):
        list(ParquetRows(uris=(uri,)).plan(PartLimits()))


def test_a_list_of_images_and_a_pointer_are_told(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [[b"0", b"1"]], "id": [1]})
    with pytest.raises(InputError, match="unnest"):
        list(ParquetRows(uris=(uri,), key="id").plan(PartLimits()))
    Path(uri).write_bytes(LFS_POINTER)
    with pytest.raises(InputError, match="git lfs pull"):
        list(ParquetRows(uris=(uri,), key="id").plan(PartLimits()))


def test_a_path_without_bytes_is_read(output_root: str) -> None:
    """As `datasets` writes an image folder: absolute paths, or those relative to the file."""
    for name in ("in/0.jpg", "in/x//1.jpg"):
        Store().create(f"{output_root}/{name}", name.encode())
    paths = [
        f"{output_root}/in/0.jpg",
        "in/0.jpg",
        "in/x//1.jpg",
        "in/2.jpg",
        "https://h/a.jpg",
        "hf://d/a.jpg",
        "a" * 300,
    ]
    images = [{"bytes": None, "path": path} for path in paths]
    Store().create(f"{output_root}/a.parquet", parquet({"image": [*images, {"bytes": b"own", "path": "p"}]}))
    source = ParquetRows(uris=(f"{output_root}/a.parquet",))
    (part,) = parts_of(source)
    items = list(source.read(part))
    found = [bytes(item.image).decode() if isinstance(item, Row) else item.reason for item in items]
    assert found == ["in/0.jpg", "in/0.jpg", "in/x//1.jpg", "not_found", "empty", "unsupported", "not_found", "own"]
    assert [item.key for item in items] == [*paths, "p"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_fuzz(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Whatever is done to a file: refused when it is planned, or as many rows and rejects as were planned."""
    columns = {"image": [bytes([i]) * 300 for i in range(12)], "id": [str(i) for i in range(12)], "n": list(range(12))}
    path = tmp_path_factory.mktemp("fuzz") / "a.parquet"
    path.write_bytes(mutate(parquet(columns, row_group_size=4), random.Random(seed)))
    source = ParquetRows(uris=(str(path),), key="id", keep=("n",))
    try:
        parts = parts_of(source, rows=5)
    except InputError:
        return
    for part in parts:
        assert [item.row for item in source.read(part)] == list(range(part.rows or 0))
