"""Check that a part's rows are split into batches by their number in the part, whatever was rejected."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pytest

from img2parquet.batch import Batch, Failed, split_into_batches
from img2parquet.errors import PartFailed, StorageError
from img2parquet.read import PartLimits
from img2parquet.schema import Part, Piece, Reject, Row

PART = Part(3, (Piece("a.tar", 1, "e"),))


@dataclass(frozen=True)
class Listed:
    """A source with a row for each of `keys`. A key that begins with `!` is a reject; `raises` ends the part."""

    keys: tuple[str, ...]
    raises: Exception | None = None
    kind: str = "listed"

    def plan(self, limits: PartLimits) -> Iterator[tuple[Piece, ...]]:
        yield PART.pieces

    def passthrough(self) -> pa.Schema:
        return pa.schema([])

    def read(self, part: Part) -> Iterator[Row | Reject]:
        for number, key in enumerate(self.keys):
            if key.startswith("!"):
                yield Reject(number, key, "a.tar", "read", "shard_damaged", "damaged")
            else:
                yield Row(number, key, "a.tar", b"image")
        if self.raises:
            raise self.raises


def cut_all(*keys: str, size: int = 3, raises: Exception | None = None) -> list[Batch | Failed]:
    return list(split_into_batches(Listed(keys, raises), PART, size))


def shape(batches: list[Batch | Failed]) -> list[tuple[int, list[int], list[int], int | None]]:
    return [
        (b.k, [r.row for r in b.rows], [r.row for r in b.rejects], b.rows_in) for b in batches if isinstance(b, Batch)
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", [(0, [], [], 0)]),
        ("a", [(0, [0], [], 1)]),
        ("abc", [(0, [0, 1, 2], [], 3)]),
        ("abcd", [(0, [0, 1, 2], [], None), (1, [3], [], 4)]),
        ("abcdef", [(0, [0, 1, 2], [], None), (1, [3, 4, 5], [], 6)]),
    ],
)
def test_batch_k_is_its_source_rows(keys: str, expected: list[object]) -> None:
    assert shape(cut_all(*keys)) == expected


def test_a_reject_leaves_a_hole_and_shifts_nothing() -> None:
    assert shape(cut_all("a", "!1", "b", "!2", "!3", "!4", "c")) == [
        (0, [0, 2], [1], None),
        (1, [], [3, 4, 5], None),
        (2, [6], [], 7),
    ]


def test_a_second_row_with_a_key_is_a_reject() -> None:
    (batch,) = cut_all("a", "b", "a")
    assert isinstance(batch, Batch)
    assert [(r.row, r.reason) for r in batch.rejects] == [(2, "duplicate_key")]


@pytest.mark.parametrize("error", [PartFailed("its shard changed"), StorageError("503")])
def test_a_part_that_fails_ends_in_failed_and_never_has_a_last_batch(error: Exception) -> None:
    *batches, last = cut_all("a", "b", "c", "d", raises=error)
    assert last == Failed(3, str(error))
    assert all(isinstance(b, Batch) and b.rows_in is None for b in batches)


def test_a_count_that_differs_from_the_plan_fails_the_part() -> None:
    planned = Part(0, (Piece("a.tar", 1, "e", rows=5),))
    last = list(split_into_batches(Listed(("a", "b")), planned, 3))[-1]
    assert isinstance(last, Failed)
    assert "2 rows were read where the plan has 5" in last.message


def test_too_many_rows_for_one_file_fail_the_part_with_what_to_do() -> None:
    last = list(split_into_batches(Listed(tuple("abcdef")), PART, 2, most_rows=4))[-1]
    assert isinstance(last, Failed)
    assert "split_above_bytes" in last.message


def test_batches_travel() -> None:
    batches = cut_all("a", "!b", "c", "d")
    assert pickle.loads(pickle.dumps(batches)) == batches
