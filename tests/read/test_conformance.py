"""The same questions for every input format in SOURCES, on a disk and on S3. A new format is asked as soon as it is
in the table (and in `sources.INPUTS`)."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from img2parquet.errors import InputError, NotFound, PartFailed, StorageError
from img2parquet.read import SOURCES, PartLimits, Source, read_part
from img2parquet.read.passthrough import column_of
from img2parquet.schema import Part, Reject, Row, Wanted
from img2parquet.storage import Store, join
from tests.read.broken_shards import jpeg
from tests.read.sources import INPUTS, ROWS, make_source, put_input

FEW = PartLimits(rows=4)
EMPTY = {"webdataset": "0.tar", "folder": "f/readme.txt", "parquet": "0.parquet", "table": "0.csv"}


@pytest.fixture(params=SOURCES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(kind: str, output_root: str) -> Source:
    return make_source(put_input(kind, output_root))


def plan(source: Source, limits: PartLimits = FEW) -> list[Part]:
    return [Part(index, pieces) for index, pieces in enumerate(source.plan(limits))]


def read(source: Source, parts: list[Part]) -> list[Row | Reject]:
    return [item for part in parts for item in read_part(source, part)]


def replace(uri: str, data: bytes | None) -> None:
    """What others may do to the input while a job runs; our own store never overwrites."""
    Store().delete(uri)
    if data is not None:
        Store().create(uri, data)


def test_every_image_once_with_its_bytes(source: Source) -> None:
    rows = read(source, plan(source))
    assert all(isinstance(row, Row) for row in rows)
    assert {bytes(row.image) for row in rows if isinstance(row, Row)} == {jpeg(i) for i in range(ROWS)}
    assert len({(row.shard, row.key) for row in rows}) == len(rows) == ROWS


def test_rows_are_numbered_from_0_and_reading_again_gives_the_same(source: Source) -> None:
    for part in plan(source):
        items = list(source.read(part))
        assert [item.row for item in items] == list(range(len(items)))
        assert items == list(source.read(part))
        assert part.rows in (None, len(items))


def some(part: Part, items: list[Row | Reject]) -> Part:
    """The part with these rows alone."""
    return replace_fields(part, only=tuple(Wanted(item.row, item.key, item.shard, item.offset) for item in items))


def test_some_rows_of_a_part_are_those_of_the_whole(source: Source) -> None:
    for part in plan(source, PartLimits()):
        items = list(read_part(source, part))
        for wanted in ([], items[:1], items[-1:], items[1::3], items):
            assert list(read_part(source, some(part, wanted))) == wanted


def test_what_is_read_of_some_rows_does_not_grow_with_the_others(
    kind: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder and a list the other images are not fetched, of shards not those without a wanted row."""
    (part,) = plan(source, PartLimits())
    items = list(read_part(source, part))
    seen: list[str] = []
    for method in ("read", "stream", "open"):
        real = getattr(Store, method)
        monkeypatch.setattr(
            Store,
            method,
            lambda self, uri, *rest, real=real, **named: seen.append(uri) or real(self, uri, *rest, **named),
        )
    list(read_part(source, some(part, items[-1:])))
    images = [uri for uri in seen if uri.endswith(".jpg")]
    assert len(images) == (1 if kind in ("folder", "table") else 0)
    assert not any(uri.endswith(("0.tar", "0.parquet")) for uri in seen)


def test_rows_do_not_depend_on_how_shards_are_packed(kind: str, output_root: str) -> None:
    """Two shards may have the same keys: (shard, key) names a row."""
    settings = [put_input(kind, join(output_root, name)) for name in "ab"]
    source = make_source({**settings[0], "uris": [uri for one in settings for uri in one["uris"]]})
    packed = [
        [(type(item), item.shard, item.key) for item in read(source, plan(source, limits))]
        for limits in (PartLimits(), FEW, PartLimits(rows=1))
    ]
    assert packed[0] == packed[1] == packed[2]
    assert {kind for kind, _, _ in packed[0]} == {Row} and len(packed[0]) == 2 * ROWS


def test_plan_does_not_depend_on_the_order_of_listing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plan(source)
    for method in ("expand", "list_files"):
        listed = getattr(Store, method)
        monkeypatch.setattr(Store, method, lambda self, uris, *more, listed=listed: listed(self, uris, *more)[::-1])
    assert plan(source) == expected == plan(source)


def test_parts_respect_the_limit_on_rows(kind: str, source: Source) -> None:
    parts = plan(source)
    if kind == "webdataset":  # small tars are not opened: five images each, taken whole
        parts = plan(make_source({**source.model_dump(), "split_above_bytes": 1}))  # type: ignore[attr-defined]
    assert all(part.rows is not None and 0 < part.rows <= FEW.rows for part in parts)
    assert sum(part.rows or 0 for part in parts) == ROWS
    assert len(read(source, parts)) == ROWS


def test_parts_respect_the_limit_on_bytes(kind: str, source: Source) -> None:
    if kind == "table":
        pytest.skip("the sizes of listed objects are not known when a job is planned")
    few_bytes = PartLimits(size_bytes=2 * len(jpeg(0)))
    assert len(plan(source, few_bytes)) > len(plan(source, PartLimits())) == 1
    assert len(read(source, plan(source, few_bytes))) == ROWS


def test_kept_columns_have_the_types_that_passthrough_says(source: Source) -> None:
    schema = source.passthrough()
    assert schema.names and all(field.nullable for field in schema)
    rows = [row for row in read(source, plan(source)) if isinstance(row, Row)]
    table = pa.table({f.name: column_of([r.passthrough[f.name] for r in rows], f.type) for f in schema}, schema=schema)
    assert table.num_rows == ROWS and table.column(0).null_count == 0
    assert not any(row.warnings for row in rows)


def test_without_keep_there_are_no_columns(kind: str, source: Source) -> None:
    settings = {**source.model_dump(), "keep": []}  # type: ignore[attr-defined]
    plain = make_source(settings)
    assert plain.passthrough() == pa.schema([])
    assert all(row.passthrough == {} for row in read(plain, plan(plain)) if isinstance(row, Row))


def test_pickles_to_a_worker(source: Source) -> None:
    source.passthrough()
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and copy.passthrough() == source.passthrough()
    assert plan(copy) == plan(source)


def test_settings_survive_json(source: Source) -> None:
    settings = json.loads(json.dumps(source.model_dump(mode="json")))  # type: ignore[attr-defined]
    assert make_source(settings) == source


def test_what_is_not_there_is_an_input_error(kind: str, output_root: str) -> None:
    put_input(kind, join(output_root, "there"))
    for uri in ("nowhere.tar", "nowhere/*.tar", "there/nothing-{0..3}.parquet"):
        with pytest.raises(InputError, match=r"nowhere|nothing"):
            plan(make_source({"kind": kind, "uris": [join(output_root, uri)], **_key(kind)}))


def test_a_bucket_that_is_not_there_is_an_input_error(kind: str, s3_endpoint: str) -> None:
    for uri in ("s3://no-such-bucket-1/a.tar", "s3://no-such-bucket-1/*.csv"):
        with pytest.raises(InputError):
            plan(make_source({"kind": kind, "uris": [uri], **_key(kind)}))


def test_empty_input_is_an_error_or_a_reject(kind: str, output_root: str) -> None:
    Store().create(join(output_root, EMPTY[kind]), b"")
    uri = join(output_root, EMPTY[kind] if kind != "folder" else "f")
    source = make_source({"kind": kind, "uris": [uri], **_key(kind)})
    if kind == "webdataset":  # which is not opened when the job is planned
        assert [item.reason for item in read(source, plan(source)) if isinstance(item, Reject)] == ["shard_damaged"]
    else:
        with pytest.raises(InputError, match=output_root.rpartition("/")[2]):
            plan(source)


@pytest.mark.parametrize("change", ["other bytes", "shorter", "longer", "deleted"])
def test_input_that_changed_since_the_plan_fails_the_part(change: str, source: Source) -> None:
    part = plan(source)[-1]
    uri = part.pieces[-1].uri
    data = Store().read(uri)
    new = {"other bytes": bytes([data[0] ^ 1]) + data[1:], "shorter": data[:-9], "longer": data + b"x", "deleted": None}
    replace(uri, new[change])
    with pytest.raises(PartFailed) as failed:
        list(source.read(part))
    assert uri in str(failed.value) and failed.value.hint


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": ["a:float"]}, "unknown type `float`.*float64"),
        ({"keep": ["class", "class"]}, "twice"),
        ({"keep": [""]}, "expected `name`"),
        ({"uris": []}, "at least 1"),
        ({"uris": [" "]}, "a URI is empty"),
        ({"storage_options": {"secret": "x"}}, "environment"),
        ({"storage_options": {"gs": {"client": {"session_token": "x"}}}}, "session_token"),
        ({"uriss": ["a"]}, "uriss"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_source({"kind": kind, "uris": ["a"], **settings})


def test_every_field_is_described(kind: str) -> None:
    schema = type(make_source({"kind": kind, "uris": ["a"]})).model_json_schema()  # type: ignore[attr-defined]
    assert all(field.get("description") for field in schema["properties"].values())


def test_relative_paths_are_made_absolute(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = put_input(kind, str(tmp_path / "in"))
    relative = {**settings, "uris": [uri.removeprefix(f"{tmp_path}/") for uri in settings["uris"]]}
    monkeypatch.chdir(tmp_path)
    source = make_source(relative)
    monkeypatch.chdir("/")
    assert plan(source) == plan(make_source(settings))
    assert read(source, plan(source)) == read(source, plan(make_source(settings)))


def test_every_source_has_input_for_these_tests() -> None:
    assert INPUTS.keys() == SOURCES.keys()


def _key(kind: str) -> dict[str, str]:
    return {"key": "id"} if kind == "parquet" else {}


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        (StorageError("connection reset by peer", hint="this may pass"), "this may pass"),
        (StorageError("access denied", hint="log in again"), "log in again"),
        (StorageError("an odd answer"), ""),
        (NotFound("no such object"), "restore the input"),
    ],
)
def test_only_input_that_is_gone_is_to_be_restored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: StorageError, hint: str
) -> None:
    """The hint of a part that fails fits the fault: nothing was taken away by a fault of the network."""
    source = make_source(put_input(kind, str(tmp_path)))
    (part, *_) = plan(source)

    def fail(*_: object, **__: object) -> None:
        raise fault

    for name in ("read", "open", "stat"):
        monkeypatch.setattr(Store, name, fail)
    with pytest.raises(PartFailed) as failed:
        list(source.read(part))
    assert hint in failed.value.hint and bool(hint) == bool(failed.value.hint)
