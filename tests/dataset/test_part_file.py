"""The batches of a part become one file whose bytes depend on nothing but the part and the run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.batch import Embedded
from img2parquet.dataset import part_file
from img2parquet.dataset.footer import parse_footer
from img2parquet.dataset.part_file import EncodedPart, PartBuffer, encode_part, is_intact
from img2parquet.schema import Part, Piece, Reject

PART = Part(3, (Piece("/shards/3.tar", 1, "etag"),))
BATCH_ROWS, ROWS = 4, 11
REJECTED = {1: "z", 6: "m", 7: "a"}  # rows and keys: in another order by key than by row


def batch(k: int) -> Embedded:
    rows = range(k * BATCH_ROWS, min((k + 1) * BATCH_ROWS, ROWS))
    kept = [row for row in rows if row not in REJECTED]
    table = pa.table({"key": [f"key {row}" for row in kept], "value": pa.array(kept, pa.int32())})
    rejects = [Reject(row, REJECTED[row], "/shards/3.tar", "decode", "empty", "") for row in rows if row in REJECTED]
    last = rows.stop == ROWS
    return Embedded(PART.index, k, {"m": table}, {"m": tuple(reversed(rejects))}, ROWS if last else None)


def buffered(order: Iterable[int]) -> PartBuffer:
    buffer = PartBuffer(PART)
    for k in order:
        buffer.add(batch(k), BATCH_ROWS)
    return buffer


def encoded(buffer: PartBuffer, about: dict[str, object] | None = None) -> EncodedPart:
    return encode_part(PART, "m", "identity", buffer.in_order(), about or {"dtype": "float32", "seed": 1})


@pytest.mark.parametrize("order", [*permutations(range(3)), (0, 2, 0, 1, 2)], ids=str)
def test_batches_may_arrive_in_any_order_and_more_than_once(order: tuple[int, ...]) -> None:
    part = encoded(buffered(order))
    table = pq.read_table(pa.BufferReader(part.data))
    assert table.column("value").to_pylist() == [row for row in range(ROWS) if row not in REJECTED]
    assert [reject.row for reject in part.rejects] == sorted(REJECTED)
    assert part.data == encoded(buffered(range(3))).data
    assert (part.rows_in, part.rows) == (ROWS, ROWS - len(REJECTED))


def test_a_part_is_whole_once_every_batch_is_there() -> None:
    for missing in range(3):
        buffer = buffered(k for k in range(3) if k != missing)
        assert not buffer.is_whole
        buffer.add(batch(missing), BATCH_ROWS)
        assert buffer.is_whole
    first = PartBuffer(PART)
    first.add(batch(0), BATCH_ROWS)
    first.add(batch(0), BATCH_ROWS)
    assert not first.is_whole


@pytest.mark.parametrize("rows_in, due", [(0, 1), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_last_batch_tells_how_many_there_are(rows_in: int, due: int) -> None:
    buffer = PartBuffer(PART)
    buffer.add(Embedded(PART.index, due - 1, {}, {}, rows_in), BATCH_ROWS)
    assert buffer.batches_due == due


def test_the_order_of_a_mapping_changes_no_byte() -> None:
    there, back = {"dtype": "float32", "seed": 1}, {"seed": 1, "dtype": "float32"}
    assert encoded(buffered(range(3)), there).data == encoded(buffered(range(3)), back).data


def test_the_footer_counts_rows_and_lists_rejects() -> None:
    footer = parse_footer(pq.read_metadata(pa.BufferReader(encoded(buffered(range(3))).data)))
    assert (footer.part_index, footer.rows_in, footer.rows, footer.generation) == (3, ROWS, ROWS - len(REJECTED), 0)
    assert [(reject["row"], reject["key"]) for reject in footer.rejects] == list(REJECTED.items())


def test_every_changed_byte_and_every_cut_is_found() -> None:
    data = encoded(buffered(range(3))).data
    assert is_intact(data)
    for place in range(len(data)):
        assert not is_intact(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]), place
    assert not is_intact(data[:-1]) and not is_intact(data + b"\0") and not is_intact(b"")


def test_pages_have_checksums_and_columns_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_file, "ROW_GROUP_ROWS", 5)
    data = encoded(buffered(range(3))).data
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [5, 3]
    column = file.metadata.row_group(0).column(1)
    assert column.compression == "ZSTD" and (column.statistics.min, column.statistics.max) == (0, 5)
    damaged = bytearray(data)
    damaged[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(pa.BufferReader(bytes(damaged)), page_checksum_verification=True).read()
