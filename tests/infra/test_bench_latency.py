"""The bench of a store that answers late: its server speaks enough of S3, and both ways of reading give every image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from img2parquet.errors import NotFound, StorageError
from img2parquet.job import parse_job
from img2parquet.read import read_part
from img2parquet.schema import Row
from img2parquet.storage import Store
from infra.bench.latency import _document, make_inputs, one_at_a_time, parts_of, places
from infra.bench.static_s3 import BUCKET, serving
from tests.support.small_job import make_shards

LATENCY_S = 0.005


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latency")
    make_shards(path / "tars", shards=3, per_shard=6, broken=False)
    return path


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[str]:
    with serving(folder, LATENCY_S) as url:
        yield url


def test_the_server_is_a_store(folder: Path, endpoint: str) -> None:
    store = Store({"endpoint_url": endpoint})
    (folder / "x.bin").write_bytes(bytes(range(200)))
    uri = f"s3://{BUCKET}/x.bin"
    entry = store.stat(uri)
    started = time.perf_counter()
    assert store.read(uri, 5, 50, expect=entry) == bytes(range(5, 50))
    assert time.perf_counter() - started >= LATENCY_S
    assert entry in store.list_files(f"s3://{BUCKET}/")
    with pytest.raises(NotFound):
        store.stat(f"s3://{BUCKET}/none")
    (folder / "x.bin").write_bytes(b"other")
    with pytest.raises(StorageError, match="changed since it was planned"):
        store.read(uri, 5, 50, expect=entry)
    (folder / "x.bin").unlink()


def test_both_ways_of_reading_give_every_image(folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.bench.latency.shards", lambda *_: [])  # they are there
    count = make_inputs(folder, 3)
    images: dict[str, list[bytes]] = {}
    for name, place in places(folder, endpoint).items():
        source = parse_job(_document(place, folder)).input
        for plain in (False, True):
            if plain:
                with one_at_a_time():
                    rows = [row for part in parts_of(source) for row in read_part(source, part)]
            else:
                rows = [row for part in parts_of(source) for row in read_part(source, part)]
            images[f"{name} {plain}"] = [row.image for row in rows if isinstance(row, Row)]
    assert count == 18 and {len(found) for found in images.values()} == {18}
    assert all(found == images["tars, local False"] for found in images.values())
