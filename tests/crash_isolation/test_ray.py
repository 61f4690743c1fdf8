"""On Ray, poison kills an actor or a read task once, and then only isolated processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash_isolation.bed import PER_SHARD, expected, read_fault, rejected, run_beside_undisturbed

pytestmark = pytest.mark.slow
CASES = {  # half a minute each; the local runner tests every kind on its own
    "endless, holding Python's lock": {(1, 4): "decode-hold"},
    "three in a batch": {(1, 1): "decode-segv", (1, 2): "decode-abort", (1, 5): "decode-kill"},
    "first and last row, a batch's embedding": {
        (0, 0): "decode-segv",
        (1, 4): "embed-segv",
        (2, PER_SHARD - 1): "decode-abort",
    },
}


@pytest.mark.parametrize("poison", CASES.values(), ids=CASES.keys())
def test_the_culprits_are_rejected_and_nothing_else_changes(
    poison: dict[tuple[int, int], str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run_beside_undisturbed(tmp_path, checkpoint, monkeypatch, "ray", poison)
    assert rejected(tmp_path, "out") == expected(poison)
    # once an actor, then twice in isolation; a batch that is embedded is halved down to the row
    assert 3 <= ran.attempts <= 6 * len(poison)


def test_a_shard_that_kills_its_reader_is_read_as_far_as_it_goes(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, fault = {(1, 7): "read-segv"}, read_fault(1, 7, "SIGSEGV")
    ran = run_beside_undisturbed(tmp_path, checkpoint, monkeypatch, "ray", poison, POISON_READ=fault)
    assert rejected(tmp_path, "out") == [("row 7", "read", "worker_died")]
    assert ran.attempts == 3  # its task, then twice in isolation
