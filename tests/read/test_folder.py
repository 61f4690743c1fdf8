"""Loose files to rows: roots, keys, classes, and what is left out."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.read import PartLimits
from pipeline.read.fetch import fetch_in_order
from pipeline.read.folder import Folder
from pipeline.schema import Part, Row


def rows_of(*uris: object, keep: tuple[str, ...] = ()) -> list[Row]:
    source = Folder(uris=tuple(map(str, uris)), keep=keep)
    parts = [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits()))]
    return [row for part in parts for row in source.read(part) if isinstance(row, Row)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("cat/1.jpg", "cat/deep/2.JPG", "dog/1.png", "3.webp", "dog/list.txt", ".cache/4.jpg", "cat/._1.jpg"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_bytes(name.encode())
    return tmp_path / "t"


def test_keys_are_relative_to_the_root_and_the_first_folder_is_the_class(tree: Path) -> None:
    rows = rows_of(tree, keep=("class",))
    assert [(row.key, row.passthrough["class"]) for row in rows] == [
        ("3.webp", None), ("cat/1.jpg", "cat"), ("cat/deep/2.JPG", "cat"), ("dog/1.png", "dog"),
    ]  # fmt: skip
    assert {row.shard for row in rows} == {str(tree)}
    assert all(bytes(row.image).decode() == row.key for row in rows)


@pytest.mark.parametrize(
    ("pattern", "root", "keys"),
    [
        ("t/*/*.jpg", "t", ["cat/1.jpg"]),
        ("t/**/*.JPG", "t", ["cat/deep/2.JPG"]),
        ("t/cat/*.jpg", "t/cat", ["1.jpg"]),
        ("t/{cat,dog}", "t/cat", ["1.jpg", "deep/2.JPG", "1.png"]),
        ("t/cat/1.jpg", "t/cat", ["1.jpg"]),
        ("t/cat/", "t/cat", ["1.jpg", "deep/2.JPG"]),
        ("t/d*/1.???", "t", ["dog/1.png"]),
    ],
)
def test_roots(tree: Path, pattern: str, root: str, keys: list[str]) -> None:
    rows = rows_of(tree.parent / pattern if not pattern.endswith("/") else f"{tree.parent}/{pattern}")
    assert [row.key for row in rows] == keys
    assert rows[0].shard == str(tree.parent / root)


def test_a_file_below_two_roots_is_read_once_under_the_nearer(tree: Path) -> None:
    rows = rows_of(tree, tree / "cat")
    assert [(row.shard == str(tree), row.key) for row in rows] == [
        (True, "3.webp"), (False, "1.jpg"), (False, "deep/2.JPG"), (True, "dog/1.png"),
    ]  # fmt: skip


def test_other_files_are_counted_in_the_log(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        rows_of(tree)
    assert "3 files" in caplog.text and "1 with .txt" in caplog.text


def test_a_folder_without_images_says_what_it_has(tree: Path) -> None:
    with pytest.raises(InputError, match=r"1 with \.txt"):
        rows_of(tree / "dog" / "*.txt")
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        rows_of(tree / "empty")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (row,) = rows_of(tmp_path)
    assert row.key.encode() and row.image == b"x"


def test_only_class_can_be_kept() -> None:
    with pytest.raises(ValidationError, match="knows only `class`"):
        Folder(uris=("a",), keep=("label",))


def test_fetching_keeps_order_and_bounds_what_waits() -> None:
    started: list[int] = []
    gate = threading.Event()

    def fetch(item: int) -> int:
        started.append(item)
        if item == 0:
            gate.wait(5)
        return item * 10

    results = fetch_in_order(range(100), fetch, threads=4)
    timer = threading.Timer(0.1, gate.set)
    timer.start()
    assert next(results) == (0, 0)
    assert max(started) <= 8, "at most 2 x threads are under way"
    assert list(results) == [(i, i * 10) for i in range(1, 100)]


def test_few_large_files_are_under_way() -> None:
    started: list[int] = []
    results = fetch_in_order(range(5), started.append, threads=4, size_of=lambda item: 200 << 20)
    assert next(results)[0] == 0
    assert started == [0], "two of them would be more than IN_FLIGHT_BYTES"
    assert [item for item, _ in results] == [1, 2, 3, 4]


def test_fetching_stops_at_the_first_failure() -> None:
    def fetch(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    got: list[int] = []
    with pytest.raises(ValueError, match="three"):
        got.extend(item for item, _ in fetch_in_order(range(10), fetch, threads=2))
