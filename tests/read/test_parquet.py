"""Parquet to rows: how row groups become parts, which types pass through, and what a failing store is not."""

from __future__ import annotations

import datetime
import decimal
import io
import random
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, PartFailed, StorageError
from pipeline.read import PartLimits
from pipeline.read.pack import pack
from pipeline.read.parquet import ParquetRows
from pipeline.schema import Part, Piece, Reject, Row
from pipeline.storage import Store
from tests.read.broken_shards import parquet
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
    "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_columns_come_through_as_they_were(tmp_path: Path, name: str) -> None:
    uri = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "id": ["a", "b"], name: KEPT[name]})
    source = ParquetRows(uris=(uri,), key="id", keep=(name,))
    field = source.passthrough().field(name)
    plain = KEPT[name].dictionary_decode() if name == "words" else KEPT[name]
    assert field.type == plain.type and field.nullable
    assert pa.array([row.passthrough[name] for row in rows_of(source)], field.type) == plain


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
        ("p", "empty"), ("row 1", "no_key"), ("row 2", "no_key"),
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
    assert [getattr(item, "reason", "row") for item in source.read(part)] == ["shard_damaged", "shard_damaged"]


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
