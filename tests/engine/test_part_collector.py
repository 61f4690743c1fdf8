"""Batches become complete parts, whichever of several streams delivers them, and however often."""

from __future__ import annotations

import time

import pytest

from img2parquet.batch import Embedded, Failed
from img2parquet.engine.part_collector import PartCollector
from img2parquet.schema import Part

PARTS = {index: Part(index, ()) for index in range(4)}
BATCH_ROWS, ROWS = 2, 5  # three batches in each part


def collector() -> PartCollector:
    return PartCollector(PARTS, [0, 1, 2], BATCH_ROWS)


def batch(index: int, k: int) -> Embedded:
    return Embedded(index, k, {}, {}, ROWS if k == 2 else None)


def complete(parts: PartCollector, index: int) -> None:
    for k in (2, 0, 1):
        assert parts.add(batch(index, k))
    buffer = parts.take_complete(index)
    assert buffer is not None and [one.k for one in buffer.in_order()] == [0, 1, 2] and buffer.part == PARTS[index]


def test_a_part_is_handed_over_once_with_its_batches_in_order() -> None:
    parts = collector()
    assert parts.add(batch(0, 2)) and parts.take_complete(0) is None
    assert not parts.add(batch(0, 2))  # once more
    assert parts.started() == {0}
    assert parts.add(batch(0, 0)) and parts.take_complete(0) is None
    assert parts.add(batch(0, 1))
    buffer = parts.take_complete(0)
    assert buffer is not None and [one.k for one in buffer.in_order()] == [0, 1, 2]
    assert not any(parts.add(batch(0, k)) for k in range(3))
    assert parts.started() == set() and parts.unfinished() == [1, 2]


def test_a_complete_part_does_not_fail_any_more_and_a_failed_one_is_not_completed() -> None:
    parts = collector()
    complete(parts, 0)
    parts.fail(Failed(0, "the second stream lost its input"))
    assert parts.failed == {}
    parts.add(batch(1, 0))
    parts.fail(Failed(1, "gone"))
    assert parts.failed == {1: "gone"} and parts.started() == set()
    assert not parts.add(batch(1, 1)) and parts.started() == set()
    assert parts.unfinished() == [2]


def test_an_unfinished_part_is_described_by_its_first_missing_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    parts = collector()
    now[0] += 7
    untouched = parts.describe(1)
    assert (untouched.index, untouched.batches, untouched.missing_k, untouched.since_s) == (1, 0, 0, 7)
    for k in (2, 0):
        parts.add(batch(1, k))
    now[0] += 3
    begun = parts.describe(1)
    assert (begun.index, begun.batches, begun.missing_k, begun.since_s) == (1, 2, 1, 3)
    assert parts.last_batch_at == 107
