"""Reading ahead: what is asked for, how much of it at a time, and that a changed or short object is still found."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.errors import PartFailed, StorageError
from img2parquet.read import prefetch, read_part
from img2parquet.read.parquet import ParquetRows
from img2parquet.read.prefetch import Prefetcher
from img2parquet.schema import Part, Piece, Row
from img2parquet.storage import Entry, Store, ranged_file
from img2parquet.storage.ranged_file import RangedFile, announce

KIB = 1 << 10


class SlowStore(Store):
    """Files of a disk as if they lay elsewhere: each read waits until `gate` opens, and the most at a time is known."""

    def __init__(self, gate: Callable[[int], None] = lambda start: None) -> None:
        super().__init__()
        self.__dict__.update(gate=gate, now=0, most=0, reads=[], lock=threading.Lock())

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None) -> bytes:
        with self.lock:  # type: ignore[attr-defined]
            self.__dict__["now"] += 1
            self.__dict__["most"] = max(self.most, self.now)  # type: ignore[attr-defined]
            self.reads.append((uri, start, stop))  # type: ignore[attr-defined]
        try:
            self.gate(start)  # type: ignore[attr-defined]
            return super().read(uri, start, stop, expect=expect)
        finally:
            with self.lock:  # type: ignore[attr-defined]
                self.__dict__["now"] -= 1


def files(folder: Path, *sizes: int) -> list[Piece]:
    pieces = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.bin"
        path.write_bytes(bytes((number * 31 + i) % 251 for i in range(size)))
        entry = Store().stat(str(path))
        pieces.append(Piece(entry.uri, entry.size_bytes, entry.etag))
    return pieces


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CHUNK_BYTES", 10 * KIB)
    monkeypatch.setattr(prefetch, "IN_FLIGHT_BYTES", 40 * KIB)
    monkeypatch.setattr(prefetch, "LOCAL_REQUESTS", 16)  # as for a remote store


def test_chunks_come_in_order_whatever_file_they_are_of(tmp_path: Path, small_chunks: None) -> None:
    pieces = files(tmp_path, 25 * KIB, 0, 1, 10 * KIB)
    found = Prefetcher(Store(), pieces)
    for i, piece in enumerate(pieces):
        assert b"".join(found.chunks(i)) == Path(piece.uri).read_bytes()
    found.close()


def test_no_more_than_so_much_is_under_way(tmp_path: Path, small_chunks: None) -> None:
    store = SlowStore(lambda start: time.sleep(0.01))
    found = Prefetcher(store, files(tmp_path, 200 * KIB))
    taken = found.chunks(0)
    next(taken)
    time.sleep(0.2)  # for whatever would be asked for beyond the bound
    assert len(store.reads) <= 1 + 4  # type: ignore[attr-defined]
    assert len(b"".join(taken)) == 190 * KIB
    assert 2 <= store.most <= 4  # type: ignore[attr-defined]


def test_the_next_shard_is_asked_for_before_this_one_ends(tmp_path: Path, small_chunks: None) -> None:
    second = threading.Event()
    pieces = files(tmp_path, 10 * KIB, 10 * KIB)
    store = SlowStore()
    store.__dict__["gate"] = lambda start: second.set() if store.reads[-1][0] == pieces[1].uri else None  # type: ignore[attr-defined]
    found = Prefetcher(store, pieces)
    next(found.chunks(0))
    assert second.wait(10)  # nobody has asked for piece 1 yet


def test_a_shard_that_is_left_early_does_not_hold_up_the_next(tmp_path: Path, small_chunks: None) -> None:
    pieces = files(tmp_path, 100 * KIB, 20 * KIB)
    found = Prefetcher(Store(), pieces)
    next(found.chunks(0))
    assert b"".join(found.chunks(1)) == Path(pieces[1].uri).read_bytes()


@pytest.mark.parametrize("changed", ["another", "shorter"])
def test_a_changed_file_fails_where_its_chunk_would_have_come(changed: str, tmp_path: Path, small_chunks: None) -> None:
    pieces = files(tmp_path, 10 * KIB, 20 * KIB)
    Path(pieces[1].uri).write_bytes(b"x" * (20 if changed == "another" else 5) * KIB)
    found = Prefetcher(Store(), pieces)
    assert len(b"".join(found.chunks(0))) == 10 * KIB
    with pytest.raises(StorageError, match="changed since it was planned"):
        list(found.chunks(1))


def test_a_slice_is_held_against_its_file(tmp_path: Path, small_chunks: None) -> None:
    (whole,) = files(tmp_path, 50 * KIB)
    piece = Piece(whole.uri, 20 * KIB, whole.etag, 15 * KIB, 35 * KIB)
    found = Prefetcher(Store(), [piece])
    assert b"".join(found.chunks(0)) == Path(whole.uri).read_bytes()[15 * KIB : 35 * KIB]
    assert found.entry(0).size_bytes == 50 * KIB
    with pytest.raises(PartFailed, match="changed since the plan"):
        list(Prefetcher(Store(), [Piece(whole.uri, 20 * KIB, "other", 0, 20 * KIB)]).chunks(0))


# ---- files that are told what will be read -----------------------------------------------------------------------


def opened(folder: Path, data: bytes, store: Store) -> io.BufferedReader:
    path = folder / "a.bin"
    path.write_bytes(data)

    def read(uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes:
        return store.read(uri, start, stop, expect=expect)

    return io.BufferedReader(RangedFile(read, store.stat(str(path))), 4 * KIB)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_file, "BLOCK_BYTES", 10 * KIB)
    monkeypatch.setattr(ranged_file, "LEAST_BLOCK_BYTES", 10 * KIB)


DATA = bytes(i * i % 253 for i in range(200 * KIB))


def test_what_was_announced_is_the_same_bytes(tmp_path: Path, small_blocks: None) -> None:
    file = opened(tmp_path, DATA, Store())
    announce(file, [[(0, 55 * KIB), (100 * KIB, 130 * KIB)], [(60 * KIB, 61 * KIB), (1 << 40, 1 << 41), (-5, 3)]])
    for start, size in (
        (0, 3),
        (1, 60 * KIB),
        (60 * KIB, 500),
        (99 * KIB, 40 * KIB),
        (50 * KIB, 9),
        (0, 1),
        (190 * KIB, 99 * KIB),
    ):
        file.seek(start)
        assert file.read(size) == DATA[start : start + size]
    file.close()


def test_some_blocks_of_a_track_are_under_way_and_each_is_read_once(tmp_path: Path, small_blocks: None) -> None:
    store = SlowStore(lambda start: time.sleep(0.01))
    file = opened(tmp_path, DATA, store)
    announce(file, [[(0, 100 * KIB)], [(100 * KIB, 200 * KIB)]])
    for at in range(0, 100 * KIB, 4 * KIB):  # as two columns are read, side by side
        for column in (0, 100 * KIB):
            file.seek(column + at)
            assert file.read(4 * KIB) == DATA[column + at :][: 4 * KIB]
    starts = [start for _, start, _ in store.reads]  # type: ignore[attr-defined]
    assert sorted(starts) == list(range(0, 200 * KIB, 10 * KIB))
    assert store.most > 1  # type: ignore[attr-defined]


def test_a_file_that_changes_is_found_while_it_is_read(tmp_path: Path, small_blocks: None) -> None:
    file = opened(tmp_path, DATA, Store())
    announce(file, [[(0, len(DATA))]])
    assert file.read(1 * KIB) == DATA[: 1 * KIB]
    (tmp_path / "a.bin").write_bytes(DATA[::-1])
    with pytest.raises(StorageError, match="changed since it was planned"):
        file.seek(150 * KIB)
        file.read(1 * KIB)


def test_a_footer_may_claim_anything(tmp_path: Path) -> None:
    file = opened(tmp_path, DATA, Store())
    announce(file, [[(0, 1 << 60)] * 10_000, []])
    assert file.read() == DATA


def test_a_disks_file_needs_to_be_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with Store().open(str(tmp_path / "a")) as file:
        announce(file, [[(0, 1)]])
        assert file.read() == b"x"


def test_parquet_from_a_store_is_read_in_few_requests(s3_bucket: str) -> None:
    """A request for each block of a track, not one for each MiB; the rows are the same."""
    rows = {"key": [f"{i:03d}" for i in range(120)], "image": [bytes([i]) * 100 * KIB for i in range(120)]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer, row_group_size=40, compression="none", use_dictionary=False)
    Store().create(f"{s3_bucket}/a.parquet", buffer.getvalue())
    source = ParquetRows(uris=(f"{s3_bucket}/a.parquet",), key="key")
    entry = Store().stat(f"{s3_bucket}/a.parquet")
    part = Part(0, (Piece(entry.uri, entry.size_bytes, entry.etag, 10, 110, 100),))
    found = [row for row in read_part(source, part) if isinstance(row, Row)]
    assert [row.key for row in found] == rows["key"][10:110]
    assert [row.image for row in found] == rows["image"][10:110]
