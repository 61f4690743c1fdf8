"""The local runner under its supervisor isolates poison of every kind, and the job ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.crash_isolation.bed import (
    PER_SHARD,
    expected,
    limit_s,
    make_shards,
    read_fault,
    rejected,
    run,
    run_beside_undisturbed,
    started,
)

pytestmark = pytest.mark.slow
CASES = {
    "segv": {(1, 4): "decode-segv"},
    "abort": {(1, 4): "decode-abort"},
    "kill": {(1, 4): "decode-kill"},
    "endless": {(1, 4): "decode-spin"},
    "endless, holding Python's lock": {(1, 4): "decode-hold"},
    "three in a batch": {(1, 1): "decode-segv", (1, 2): "decode-abort", (1, 5): "decode-kill"},
    "first and last row": {(0, 0): "decode-segv", (2, PER_SHARD - 1): "decode-abort"},
    "a batch's embedding": {(1, 4): "embed-segv", (1, 5): "embed-abort"},
    "a whole shard": {(1, n): "decode-segv" for n in range(PER_SHARD)},
}


@pytest.mark.parametrize("poison", CASES.values(), ids=CASES.keys())
def test_the_culprits_are_rejected_and_nothing_else_changes(
    poison: dict[tuple[int, int], str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run_beside_undisturbed(tmp_path, checkpoint, monkeypatch, "local", poison)
    assert rejected(tmp_path, "out") == expected(poison)
    assert 1 <= ran.deaths <= 4, ran.said
    # once in the driver, then twice in isolation; a batch that is embedded is halved down to the row
    assert 3 <= ran.attempts <= ran.deaths + 5 * len(poison)


def test_a_shard_that_kills_its_reader_is_read_as_far_as_it_goes(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, fault = {(1, 7): "read-segv"}, read_fault(1, 7, "SIGSEGV")
    ran = run_beside_undisturbed(tmp_path, checkpoint, monkeypatch, "local", poison, POISON_READ=fault)
    assert rejected(tmp_path, "out") == [("row 7", "read", "worker_died")]
    assert (ran.deaths, ran.attempts) == (1, 3)


def test_a_row_that_kills_once_is_innocent(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run_beside_undisturbed(tmp_path, checkpoint, monkeypatch, "local", {(1, 4): "decode-once"})
    assert (ran.deaths, ran.attempts) == (1, 1), ran.said
    assert rejected(tmp_path, "out") == []


def test_without_isolation_the_driver_dies_again_and_again(tmp_path: Path, checkpoint: Path) -> None:
    poison = {(1, 4): "decode-segv"}
    make_shards(tmp_path / "in", poison)
    ran = run(tmp_path, checkpoint, "out", "local", poison, POISON_WITHOUT="isolation")
    assert ran.code == 1 and "error: the driver died 5 times" in ran.said
    assert ran.attempts == 5


def test_without_the_watch_an_endless_image_is_endless(tmp_path: Path, checkpoint: Path) -> None:
    poison = {(1, 4): "decode-spin"}
    make_shards(tmp_path / "in", poison)
    with started(tmp_path, checkpoint, "out", "local", poison, POISON_WITHOUT="watch") as process:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out-marks").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(5 * limit_s(poison))
        assert process.poll() is None and len(list((tmp_path / "out-marks").iterdir())) == 1
