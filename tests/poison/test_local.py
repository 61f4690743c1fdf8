"""The local runner below its supervisor: poison of every kind is isolated, and the job ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.poison.bed import (
    PER_SHARD,
    make_shards,
    rejected,
    run,
    run_undisturbed,
    same_files,
)
from tests.small import make_checkpoint

pytestmark = pytest.mark.slow
DIED, LATE = "worker_died", "timed_out"
CASES = {
    "segv": {(1, 4): "decode-segv"},
    "abort": {(1, 4): "decode-abort"},
    "kill": {(1, 4): "decode-kill"},
    "endless": {(1, 4): "decode-spin"},
    "endless, holding Python's lock": {(1, 4): "decode-hold"},
    "three in a batch": {(1, 1): "decode-segv", (1, 2): "decode-abort", (1, 5): "decode-kill"},
    "first and last row": {(0, 0): "decode-segv", (2, PER_SHARD - 1): "decode-abort"},
    "a batch's embedding": {(1, 4): "embed-segv", (1, 5): "embed-abort"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("poison", CASES.values(), ids=CASES.keys())
def test_the_culprits_are_rejected_and_nothing_else_changes(
    poison: dict[tuple[int, int], str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "in", poison)
    run_undisturbed(tmp_path, checkpoint, monkeypatch)
    ran = run(tmp_path, checkpoint, "out", "local")
    assert ran.code == 0, ran.said
    expected = [
        (f"{shard:03d}/{n:04d}-{what}", what.split("-")[0], LATE if what.endswith(("spin", "hold")) else DIED)
        for (shard, n), what in poison.items()
    ]
    assert rejected(tmp_path, "out") == sorted(expected)
    same_files(tmp_path, "out", "quiet")
    assert 1 <= ran.deaths <= 3, ran.said
    # in the driver once, then twice apart; batches that share a death with another are tried once more
    assert 3 * len(poison) <= ran.attempts <= 12 * len(poison)
