"""The Ray runner: poison kills an actor or a read task once, then only processes apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.poison.bed import PER_SHARD, expected, make_shards, rejected, run, run_undisturbed, same_files, told_of_read
from tests.small import make_checkpoint

pytestmark = pytest.mark.slow
CASES = {  # half a minute each; the local runner has every kind alone
    "segv": {(1, 4): "decode-segv"},
    "endless, holding Python's lock": {(1, 4): "decode-hold"},
    "three in a batch": {(1, 1): "decode-segv", (1, 2): "decode-abort", (1, 5): "decode-kill"},
    "first and last row": {(0, 0): "decode-segv", (2, PER_SHARD - 1): "decode-abort"},
    "a batch's embedding": {(1, 4): "embed-segv"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("poison", CASES.values(), ids=CASES.keys())
def test_the_culprits_are_rejected_and_nothing_else_changes(
    poison: dict[tuple[int, int], str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "in", poison)
    run_undisturbed(tmp_path, checkpoint, monkeypatch, poison)
    ran = run(tmp_path, checkpoint, "out", "ray", poison)
    assert ran.code == 0, ran.said
    assert rejected(tmp_path, "out") == expected(poison)
    same_files(tmp_path, "out", "quiet")
    # an actor once, then twice apart; embedding: the batch, its halves, then the row
    assert 3 <= ran.attempts <= 6 * len(poison)


def test_a_shard_that_kills_its_reader_is_read_as_far_as_it_goes(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = {(1, 7): "read-segv"}
    make_shards(tmp_path / "in", poison)
    run_undisturbed(tmp_path, checkpoint, monkeypatch, poison, POISON_READ=told_of_read(1, 7, "SIGSEGV"))
    ran = run(tmp_path, checkpoint, "out", "ray", poison)
    assert ran.code == 0, ran.said
    assert rejected(tmp_path, "out") == [("row 7", "read", "worker_died")]
    same_files(tmp_path, "out", "quiet")
    assert ran.attempts == 3  # its task, then twice apart
