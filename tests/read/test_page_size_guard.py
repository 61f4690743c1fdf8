"""Parquet pages that claim more than they are cost their rows and no memory; what writers make comes through."""

from __future__ import annotations

import io
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.read import PartLimits
from img2parquet.read import page_size_guard as pages_module
from img2parquet.read.page_size_guard import GuardedFile, OversizedPage, _chunks
from img2parquet.read.parquet import ParquetRows
from img2parquet.read.row_groups import open_parquet, read_rows
from img2parquet.schema import Part, Reject, Row

MIB = 1 << 20
PEAK = """
import resource, sys
from img2parquet.read import PartLimits
from img2parquet.read.parquet import ParquetRows
from img2parquet.schema import Part
def peak_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak_mb()
source = ParquetRows(uris=(sys.argv[1],), key="id")
kinds = [type(i).__name__ + " " + getattr(i, "message", "") for n, p in enumerate(source.plan(PartLimits()))
         for i in source.read(Part(n, p))]
print(len(kinds), len(set(kinds)), kinds[0])
print("grew", peak_mb() - before)
"""


def read(path: Path, **settings: Any) -> list[Row | Reject]:
    source = ParquetRows(uris=(str(path),), **{"key": "id", **settings})
    return [item for i, pieces in enumerate(source.plan(PartLimits())) for item in source.read(Part(i, pieces))]


def in_a_child(path: Path) -> tuple[str, int]:
    ran = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said, grew = ran.stdout.rsplit("grew ", 1)
    return said, int(grew)


def test_a_small_file_with_one_page_of_400_mb_costs_its_rows_and_no_memory(tmp_path: Path) -> None:
    images = pa.array([bytes(4 * MIB)] * 100, pa.large_binary())
    table = pa.table({"id": [str(i) for i in range(100)], "image": images})
    how: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, tmp_path / "a.parquet", data_page_size=1 << 30, **how)
    assert (tmp_path / "a.parquet").stat().st_size < 2 * MIB
    said, grew = in_a_child(tmp_path / "a.parquet")
    assert said.startswith("100 1 Reject") and "unpacks from" in said, said
    assert grew < 100


def test_one_value_that_a_thousand_rows_point_at_is_given_a_few_rows_at_a_time(tmp_path: Path) -> None:
    value = os.urandom(6 * MIB)
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array([value]))
    table = pa.table({"id": [str(i) for i in range(1000)], "image": image})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 7 * MIB
    source = ParquetRows(uris=(str(tmp_path / "a.parquet"),), key="id")
    (pieces,) = source.plan(PartLimits())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 0
    for item in source.read(Part(0, pieces)):
        assert isinstance(item, Row) and item.image == value
        count += 1
    assert count == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kB; 6 GB otherwise


WAYS: dict[str, dict[str, Any]] = {
    "as pyarrow does": {},
    "no dictionary": {"use_dictionary": False},
    "pages of version 2": {"data_page_version": "2.0", "compression": "zstd"},
    "small pages": {"data_page_size": 2000, "write_batch_size": 3, "compression": "gzip"},
    "with an index": {"write_page_index": True, "data_page_size": 2000, "write_batch_size": 3},
    "checksums": {"write_page_checksum": True},
    "not compressed": {"compression": "none"},
    "delta lengths": {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
    "large statistics": {"use_dictionary": False, "write_batch_size": 2, "data_page_size": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("header_bytes", [16, 64 << 10])
def test_pages_of_every_kind_are_checked_and_come_through(
    tmp_path: Path, way: str, header_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard's pages end where pyarrow's chunks end, also where headers lie across the borders of reads."""
    monkeypatch.setattr(pages_module, "HEADER_BYTES", header_bytes)
    monkeypatch.setattr("img2parquet.read.row_groups.BUFFER_BYTES", 1000)
    rng = random.Random(way)
    image = [{"bytes": rng.randbytes(rng.choice([10, 900, 20_000])), "path": f"{i}.jpg"} for i in range(300)]
    label = pa.array([[i] * (i % 3) for i in range(300)])
    pq.write_table(pa.table({"image": image, "label": label}), tmp_path / "a.parquet", row_group_size=70, **WAYS[way])
    items = read(tmp_path / "a.parquet", key=None, keep=("label",))
    assert [item.image for item in items if isinstance(item, Row)] == [value["bytes"] for value in image]
    with (tmp_path / "a.parquet").open("rb") as file:
        parquet = open_parquet(file, "a.parquet")
        for _ in read_rows(parquet, 0, 70, ["image", "label"]):
            pass
        assert sorted(parquet.guard.pages) == sorted(parquet.guard.pages.values()), "every page of the group was seen"
        _agree(parquet)


def _agree(parquet: Any) -> None:
    """Our reading of the footer and pyarrow's."""
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    for ours, theirs in zip(_chunks(parquet.guard.file), groups, strict=True):
        for i, chunk in enumerate(ours):
            column = theirs.column(i)
            start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            assert chunk == (start, start + column.total_compressed_size)


def header(unpacked: int, packed: int) -> bytes:
    """A data page's: fields 1 to 3 as zigzag varints, and no more."""

    def varint(value: int) -> bytes:
        value = (value << 1) ^ (value >> 63)
        sink = bytearray()
        while value >= 0x80:
            sink.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*sink, value])

    return b"\x15" + varint(0) + b"\x15" + varint(unpacked) + b"\x15" + varint(packed) + b"\0"


@pytest.mark.parametrize(
    ("unpacked", "packed", "fits"),
    [
        (64 * MIB, 10, True),
        (64 * MIB + 1, MIB, False),
        (64 * MIB + 1, 2 * MIB, True),
        (1 << 30, 1 << 30, True),
        ((1 << 30) + 1, 1 << 30, False),
        (-1, 10, False),
        (10, -1, False),
    ],
)
def test_what_a_page_may_claim(unpacked: int, packed: int, fits: bool) -> None:
    guard = GuardedFile(io.BytesIO(header(unpacked, packed) + bytes(100)))
    guard.pages = {0: 1}
    if fits:
        assert len(guard.read(60)) == 60
    else:
        with pytest.raises(OversizedPage, match="byte 0"):
            guard.read(60)


def test_padding_behind_the_last_page_is_no_page() -> None:
    guard = GuardedFile(io.BytesIO(header(5, 10) + bytes(100)))
    guard.pages = {0: 50}
    assert len(guard.read(60)) == 60
