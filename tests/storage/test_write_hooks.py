"""The steps of a create are told in their order, and each stands for what lies there then."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from img2parquet.errors import StorageError
from img2parquet.storage import Store, join
from img2parquet.storage.write_hooks import STEPS, listening


def test_each_step_is_told_in_order(output_root: str) -> None:
    told: list[tuple[str, str]] = []
    with listening(lambda step, uri: told.append((step, uri))):
        Store().create(join(output_root, "a"), b"x")
    Store().create(join(output_root, "b"), b"x")  # nobody listens any more
    remote = output_root.startswith("s3://")
    steps = [step for step in STEPS if step in ("asked", "done") or (step == "answered") == remote]
    assert told == [(step, join(output_root, "a")) for step in steps]


def test_what_lies_there_at_each_step(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[bool, int]]] = {}

    def look(step: str, uri: str) -> None:
        seen[step] = sorted((path.name == "a", path.stat().st_size) for path in tmp_path.iterdir())

    with listening(look):
        Store().create(str(tmp_path / "a"), b"12345")
    assert seen["asked"] == [] and seen["opened"] == [(False, 0)]
    assert seen["written"] == seen["synced"] == [(False, 5)]
    assert seen["named"] == [(False, 5), (True, 5)]
    assert seen["cleared"] == seen["done"] == [(True, 5)]


@pytest.mark.parametrize("step", ["opened", "written"])
def test_a_full_disk_leaves_nothing(step: str, tmp_path: Path) -> None:
    def full(now: str, uri: str) -> None:
        if now == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    with listening(full), pytest.raises(StorageError, match="No space left"):
        Store().create(str(tmp_path / "a"), b"12345")
    assert list(tmp_path.iterdir()) == []
