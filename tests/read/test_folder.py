"""Loose files to rows: roots, keys, classes, and what is left out."""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from img2parquet.errors import AccessDenied, InputError
from img2parquet.read import PartLimits
from img2parquet.read.folder import Folder
from img2parquet.schema import Part, Row
from img2parquet.storage import Store
from img2parquet.storage.parallel import fetch_in_order


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


@pytest.mark.parametrize("pattern", ["t", "t/**/*", "t/*.jpg"])
def test_what_cannot_be_read_is_skipped_and_counted(
    tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "t"
    (root / "lost+found").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "secret.jpg", "lost+found/c.jpg"):
        (root / name).write_bytes(b"x")
    for name in ("x.jpg", ".#0.jpg", "README.txt"):
        (root / name).symlink_to("/nowhere/at.all")
    (root / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    deny(monkeypatch, str(root / "lost+found"), str(root / "secret.jpg"))
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(root)  # the path of a socket may have 107 bytes
        listener.bind("socket.jpg")
        rows = rows_of(tmp_path / pattern)
    assert [(row.key, row.shard) for row in rows] == [("a.jpg", str(root)), ("b.jpg", str(root))]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    links = {"t": 4, "t/**/*": 3, "t/*.jpg": 2}[pattern]
    said = {
        f"skipped {links} links to files that do not exist",
        "skipped 2 pipes",
        "skipped 1 files that may not be read",
    }
    said |= set() if pattern == "t/*.jpg" else {"skipped 1 folders that may not be read"}
    assert len(warnings) == len(said)
    assert all(any(warning.startswith(start) for warning in warnings) for start in said)


def deny(monkeypatch: pytest.MonkeyPatch, folder: str, file: str) -> None:
    """Take the right to read a folder and a file away, also from root."""
    scandir, access = os.scandir, os.access

    def scan(path: str) -> Any:
        if str(path).rstrip("/") == folder:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "access", lambda path, mode: path != file and access(path, mode))


def test_a_root_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, str(tmp_path), "")
    with pytest.raises(AccessDenied, match=str(tmp_path)):
        rows_of(tmp_path)


@pytest.mark.parametrize("folder", ["photos [2020]", "{a,b}", "x{1..3}[ab]", "what?", "[x", "{1,2}/[y]"])
@pytest.mark.parametrize("rest", ["", "/", "/*", "/**/*.jpg", "/c/1.jpg"])
def test_brackets_and_braces_may_be_letters(output_root: str, folder: str, rest: str) -> None:
    for name in ("0.jpg", "c/1.jpg"):
        Store().create(f"{output_root}/{folder}/{name}", name.encode())
    Store().create(f"{output_root}/other/2.jpg", b"x")
    rows = rows_of(f"{output_root}/{folder}{rest}", keep=("class",))
    names = {"/*": ["0.jpg"], "/c/1.jpg": ["c/1.jpg"]}.get(rest, ["0.jpg", "c/1.jpg"])
    assert [bytes(row.image).decode() for row in rows] == names
    if rest != "/c/1.jpg" and "?" not in folder:
        assert [(row.key, row.shard) for row in rows] == [(name, f"{output_root}/{folder}") for name in names]
    Folder(uris=(f"{output_root}/{folder}",))


def test_a_pattern_that_matches_is_no_name(tmp_path: Path) -> None:
    for name in ("p1/a.jpg", "p[12]/b.jpg", "q/c.jpg", "{q}/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [row.key for row in rows_of(tmp_path / "p[12]/*")] == ["p1/a.jpg"]


def test_keys_of_objects_are_kept_to_the_letter(s3_bucket: str) -> None:
    for name in ("x//a.jpg", "x/a.jpg", "/a.jpg"):
        Store().create(f"{s3_bucket}/f/{name}", name.encode())
    assert [(row.key, bytes(row.image).decode()) for row in rows_of(f"{s3_bucket}/f")] == [
        ("/a.jpg", "/a.jpg"), ("x//a.jpg", "x//a.jpg"), ("x/a.jpg", "x/a.jpg"),
    ]  # fmt: skip


def test_only_class_can_be_kept() -> None:
    with pytest.raises(ValidationError, match="only the column `class`"):
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


def test_escapes_of_file_uris(tmp_path: Path) -> None:
    for name in ("a b/é.jpg", "p%20q/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    for uri in ((tmp_path / "a b").as_uri(), f"file://{tmp_path}/a b", f"file://localhost{tmp_path}/a%20b"):
        assert [row.key for row in rows_of(uri)] == ["é.jpg"]
    for uri in ((tmp_path / "p%20q").as_uri(), f"file://{tmp_path}/p%20q", f"{tmp_path}/p%20q"):
        assert [row.key for row in rows_of(uri)] == ["1.jpg"]
    with pytest.raises(InputError, match="a%20b: not found"):
        rows_of(f"{tmp_path}/a%20b")
