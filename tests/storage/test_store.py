"""Every kind of store is asked the same questions: a disk, memory://, S3 (moto), gs:// and az:// (the real drivers
before small servers of ours) and, marked `realstore`, Ceph RGW."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from img2parquet.errors import AlreadyExists, InputError, NotFound, StorageError
from img2parquet.storage import Entry, Store, join
from tests.storage.clouds import azure, connection_string, google

DATA = bytes(range(256)) * 40
ODD_NAMES = [
    "a b.tar",
    "model=clip/part-1.parquet",
    "ä+%25&x#1.jpg",
    "q?x=1.jpg",
    "x[1].jpg",
    "{y}.jpg",
    "日本.png",
    "a::b",
]


@pytest.fixture(scope="module")
def clouds() -> Iterator[dict[str, str]]:
    """What gcsfs and adlfs read from the environment."""
    with google() as gs, azure() as az:
        yield {"STORAGE_EMULATOR_HOST": gs.url, "AZURE_STORAGE_CONNECTION_STRING": connection_string(az.url)}


@pytest.fixture(params=["disk", "memory", "s3", "gs", "az", pytest.param("rgw", marks=pytest.mark.realstore)])
def root(request: pytest.FixtureRequest) -> str:
    """An empty folder or prefix."""
    if request.param == "disk":
        return str(request.getfixturevalue("tmp_path") / "root")
    if request.param == "memory":
        return f"memory://test-{uuid.uuid4().hex[:8]}/root"
    if request.param in ("gs", "az"):
        patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        for name, value in request.getfixturevalue("clouds").items():
            patch.setenv(name, value)
        return f"{request.param}://test-{uuid.uuid4().hex[:8]}/root"
    bucket: str = request.getfixturevalue({"s3": "s3_bucket", "rgw": "realstore_bucket"}[request.param])
    return f"{bucket}/root"


store = Store()


def test_what_was_created_is_read_back(root: str) -> None:
    uri = join(root, "sub", "a.bin")
    store.create(uri, DATA)
    assert store.read(uri) == DATA
    entry = store.stat(uri)
    assert (entry.uri, entry.size_bytes) == (uri, len(DATA))
    assert entry.etag and '"' not in entry.etag
    assert store.exists(uri) and not store.exists(join(root, "sub")) and not store.exists(join(root, "b"))


@pytest.mark.parametrize(
    "start, stop", [(0, 10), (5, None), (100, 200), (0, 0), (7, 7), (9000, 1 << 20), (1 << 20, None), (9, 3)]
)
def test_ranges_are_slices(root: str, start: int, stop: int | None) -> None:
    uri = join(root, "a.bin")
    store.create(uri, DATA)
    assert store.read(uri, start, stop) == DATA[start:stop]
    assert store.read(uri, start, stop, expect=store.stat(uri)) == DATA[start:stop]
    assert b"".join(store.stream(uri, start, stop, chunk_bytes=1000)) == DATA[start:stop]


def test_an_empty_file_is_a_file(root: str) -> None:
    uri = join(root, "empty")
    store.create(uri, b"")
    assert store.read(uri) == store.read(uri, 0, 10) == store.read(uri, expect=store.stat(uri)) == b""
    assert list(store.stream(uri)) == []
    assert [entry.size_bytes for entry in store.list_files(root)] == [0]


def test_chunks_of_a_stream_are_bounded(root: str) -> None:
    store.create(join(root, "a"), DATA)
    assert [len(chunk) for chunk in store.stream(join(root, "a"), chunk_bytes=4000)] == [4000, 4000, 2240]


def test_nothing_is_written_over(root: str) -> None:
    uri = join(root, "a")
    store.create(uri, b"first")
    with pytest.raises(AlreadyExists):
        store.create(uri, b"second")
    with pytest.raises(AlreadyExists):
        store.create(uri, b"")  # s3fs' open("xb") empties the object here
    assert store.read(uri) == b"first"
    assert [entry.uri for entry in store.list_files(root)] == [uri]


def test_of_many_creators_one_wins(root: str) -> None:
    if root.startswith("memory:"):
        pytest.skip("fsspec's memory looks first and writes then; it is for one thread")
    gate = threading.Barrier(8)

    def race(uri: str, mine: bytes) -> bytes | None:
        gate.wait()
        try:
            store.create(uri, mine)
        except AlreadyExists:
            return None
        return mine

    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            uri = join(root, f"{number}")
            outcomes = [job.result() for job in as_completed([pool.submit(race, uri, b"%d" % i) for i in range(8)])]
            assert [won for won in outcomes if won is not None] == [store.read(uri)]


def test_this_store_creates_exclusively(root: str) -> None:
    assert store.creates_exclusively(root)
    assert store.list_files(root) == []


def test_a_listing_shows_every_file_below(root: str) -> None:
    assert store.list_files(root) == []
    uris = sorted(join(root, name) for name in ["b", "a/1", "a/2", "a/b/c/d", "z.tar"])
    for uri in uris:
        store.create(uri, uri.encode())
    store.create(root + "-not/this", b"")
    listed = store.list_files(root)
    assert listed == store.list_files(root + "/") == [store.stat(uri) for uri in uris]
    assert [entry.uri for entry in store.list_files(join(root, "a"))] == uris[:3]
    assert store.list_files(join(root, "a/1")) == []


def test_a_listing_is_never_stale(root: str) -> None:
    for number in range(3):
        assert len(store.list_files(root)) == len(store.expand([root + "/*"]) if number else []) == number
        store.create(join(root, f"{number}"), b"x")
    store.delete(join(root, "0"))
    assert [entry.uri for entry in store.list_files(root)] == [join(root, "1"), join(root, "2")]


def test_delete_is_quiet_where_nothing_is(root: str) -> None:
    store.create(join(root, "a"), b"x")
    for _ in range(2):
        store.delete(join(root, "a"))
    assert not store.exists(join(root, "a"))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(root: str, name: str) -> None:
    if "::" in name and root.startswith("memory:"):
        pytest.skip("fsspec's own sign for chained URLs")
    uri = join(root, name)
    store.create(uri, b"x")
    assert store.read(uri) == b"x"
    assert store.list_files(root) == [store.stat(uri)]
    assert store.expand([uri]) == [store.stat(uri)]


@pytest.mark.parametrize("ask", ["stat", "read", "open", "stream"])
def test_a_missing_file_is_not_found(root: str, ask: str) -> None:
    questions: dict[str, Callable[[str], object]] = {
        "stat": store.stat, "read": store.read, "open": store.open, "stream": lambda uri: list(store.stream(uri)),
    }  # fmt: skip
    with pytest.raises(NotFound, match="gone"):
        questions[ask](join(root, "gone"))


def test_a_replaced_file_is_not_read(root: str) -> None:
    uri = join(root, "a")
    store.create(uri, DATA)
    planned = store.stat(uri)
    store.delete(uri)
    store.create(uri, DATA[:-1] + b"!")
    asked: list[Callable[[], object]] = [
        lambda: store.read(uri, expect=planned),
        lambda: store.read(uri, 5, 9, expect=planned),
        lambda: store.open(uri, expect=planned).read(),
        lambda: list(store.stream(uri, expect=planned)),
    ]
    for ask in asked:
        with pytest.raises(StorageError, match="changed since it was planned"):
            ask()


def test_another_size_is_noticed_without_an_etag(root: str) -> None:
    uri = join(root, "a")
    store.create(uri, DATA)
    with pytest.raises(StorageError, match="changed"):
        store.read(uri, expect=replace(store.stat(uri), size_bytes=len(DATA) - 1))


def test_an_open_file_seeks_and_tells(root: str) -> None:
    store.create(join(root, "a"), DATA)
    with store.open(join(root, "a")) as file:
        assert file.seek(-5, io.SEEK_END) == len(DATA) - 5
        assert file.read() == DATA[-5:] and file.read(1) == b""
        file.seek(3)
        assert file.read(4) == DATA[3:7] and file.tell() == 7


def test_parquet_is_read_through_open_and_through_arrow(root: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": range(1000)}), buffer, row_group_size=100)
    for model in ("a", "b"):
        store.create(join(root, f"model={model}", "part-0.parquet"), buffer.getvalue())
    with store.open(join(root, "model=a", "part-0.parquet")) as file:
        assert pq.ParquetFile(file).read_row_group(3)["x"].to_pylist() == list(range(300, 400))
    filesystem, folder = store.arrow_filesystem(root)
    dataset = ds.dataset(folder, filesystem=filesystem, partitioning="hive")
    assert dataset.count_rows(filter=ds.field("model") == "b") == 1000
    assert dataset.to_table(columns=["x", "model"]).num_rows == 2000
    assert pickle.loads(pickle.dumps(dataset)).count_rows() == 2000


def test_names_expand_sorted_and_each_once(root: str) -> None:
    for number in range(12):
        store.create(join(root, f"s-{number:03d}.tar"), b"x")
        store.create(join(root, f"s-{number:03d}.txt"), b"x")
    names = [join(root, f"s-{number:03d}.tar") for number in range(12)]
    assert [e.uri for e in store.expand([root + "/s-{000..011}.tar"])] == names
    assert [e.uri for e in store.expand([root + "/*.tar", root + "/s-{000,003}.tar", names[5]])] == names
    assert [e.uri for e in store.expand([root + "/s-00[1-3].t?r"])] == names[1:4]
    assert store.expand([names[0]]) == [store.stat(names[0])]


@pytest.mark.parametrize(
    "pattern, told",
    [
        ("s-02.tar", "s-02.tar: not found\nhint: did you mean .*s-02.tat"),
        ("s-{01..02}.tar", "s-02.tar: not found\nhint"),
        ("s-{01..30}.tar", "s-02.tar: not found .and 28 more of 30 names"),
        ("*.parquet", "matches no file"),
        ("sub", "it is a folder: name its files, as .*sub/\\*"),
        ("none/*.tar", "matches no file\nhint: there are no files in"),
    ],
)
def test_a_name_without_a_file_is_told_with_its_neighbours(root: str, pattern: str, told: str) -> None:
    for name in ("s-01.tar", "s-02.tat", "sub/x.tar"):
        store.create(join(root, name), b"x")
    with pytest.raises(InputError, match=f"(?s){told}"):
        store.expand([join(root, pattern)])


# in a process of its own: in the tests' one, their servers and what other tests left may hold a lock when it forks
TRAVEL = """
import faulthandler, pickle, sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from img2parquet.storage import Store

store, uri = Store(), sys.argv[1]
data = store.read(uri)  # so that its client is there, and its thread runs, before the fork
tell_if_it_hangs = partial(faulthandler.dump_traceback_later, 120, exit=True)
for method in ("fork", "spawn"):
    with ProcessPoolExecutor(1, get_context(method), tell_if_it_hangs) as pool:
        assert pool.submit(pickle.loads(pickle.dumps(store)).read, uri).result() == data
    assert store.read(uri) == data
sys.stdout.buffer.write(data)
"""


def test_a_store_travels_to_other_processes(root: str) -> None:
    if root.startswith("memory:"):
        pytest.skip("memory does not travel")
    store.create(join(root, "a"), DATA)
    travel = subprocess.run([sys.executable, "-c", TRAVEL, join(root, "a")], capture_output=True, timeout=400)
    assert travel.stdout == DATA, travel.stderr.decode()


def test_many_threads_share_one_client(root: str) -> None:
    store.create(join(root, "a"), DATA)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: store.read(join(root, "a")), range(64))) == {DATA}


def test_sweeping_an_output_harms_nothing(root: str) -> None:
    store.create(join(root, "a"), b"x")
    assert store.sweep(root, older_than_s=0) == 0
    assert store.read(join(root, "a")) == b"x"


def test_an_entry_is_a_plain_record(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    status = (tmp_path / "a").stat()
    assert store.stat(str(tmp_path / "a")) == Entry(str(tmp_path / "a"), 3, f"{status.st_mtime_ns}-3")
