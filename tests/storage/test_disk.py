"""What only a disk does: links, killed writers, full disks, filesystems without hard links."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from img2parquet.errors import AccessDenied, AlreadyExists, InputError, NotFound, OutcomeUnknown, StorageError
from img2parquet.storage import Store, disk

store = Store()


def fail_with(number: int):  # type: ignore[no-untyped-def]
    def raising(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return raising


def test_a_killed_create_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from img2parquet.storage import Store\n"
        "os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store().create(sys.argv[1], b'x' * 1000)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [1000]
    assert store.list_files(str(tmp_path)) == [] and not store.exists(str(tmp_path / "a"))
    assert store.sweep(str(tmp_path), older_than_s=3600) == 0  # it may belong to a create that is under way
    store.create(str(tmp_path / "a"), b"y")
    assert store.sweep(str(tmp_path), older_than_s=0) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_full_disk_is_told_and_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, step, fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left") as told:
        store.create(str(tmp_path / "a"), b"x")
    assert type(told.value) is StorageError  # not OutcomeUnknown: it is certain that nothing was created
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_folder_could_not_be_synced_is_perhaps_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_sync_folder", fail_with(errno.EIO))
    with pytest.raises(OutcomeUnknown, match="perhaps not durable"):
        store.create(str(tmp_path / "a"), b"x")


def test_data_folder_and_new_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.create(str(tmp_path / "b" / "c" / "a"), b"x")
    assert disk.TEMPORARY.fullmatch(Path(synced[0]).name)
    assert sorted(synced[1:]) == [str(tmp_path), str(tmp_path / "b"), str(tmp_path / "b" / "c")]


@pytest.mark.parametrize("number", sorted(disk.NO_HARD_LINKS))
def test_without_hard_links_an_exclusive_rename_does(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", fail_with(number))
    store.create(str(tmp_path / "a"), b"first")
    with pytest.raises(AlreadyExists):
        store.create(str(tmp_path / "a"), b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_without_either_no_file_is_risked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fail_with(errno.ENOTSUP))
    monkeypatch.setattr(disk, "RENAME_NOREPLACE", 1 << 20)  # a flag that no kernel knows
    with pytest.raises(StorageError, match="neither hard links nor an exclusive rename"):
        store.create(str(tmp_path / "a"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_nfs_made_but_denied_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", link)
    store.create(str(tmp_path / "a"), b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"x")
    (tmp_path / "real" / "circle").symlink_to(tmp_path)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    root = str(tmp_path / "root")
    assert next(entry.uri for entry in store.list_files(root)) == f"{root}/link/a"
    assert len(store.list_files(root)) < 10


def test_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="a link to a file that does not exist"):
        store.list_files(str(tmp_path))


@pytest.mark.parametrize(
    "what, error", [(PermissionError(13, "no"), AccessDenied), (OSError(5, "I/O error"), StorageError)]
)
def test_an_unreadable_folder_is_not_an_empty_one(
    what: OSError, error: type[StorageError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(_: object) -> None:
        raise what

    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(error):
        store.list_files(str(tmp_path))


def test_a_pattern_names_no_file_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A shard that a pattern names is not passed over; what it does not name does not matter."""
    (tmp_path / "a.tar").write_bytes(b"x")
    (tmp_path / ".#x").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert [entry.uri for entry in store.expand([f"{tmp_path}/*.tar"])] == [f"{tmp_path}/a.tar"]
    for make in (lambda path: path.symlink_to("/nowhere"), lambda path: os.mkfifo(path)):
        make(tmp_path / "b.tar")
        for pattern in ("*.tar", "**/*.tar"):
            with pytest.raises(InputError, match=r"b\.tar: one of the (links|pipes)"):
                store.expand([f"{tmp_path}/{pattern}"])
        (tmp_path / "b.tar").unlink()
    assert not caplog.text


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for name in ("pipe", "s"):
            for ask in (store.stat, store.read, store.open):
                with pytest.raises(NotFound, match="not a file"):
                    ask(str(tmp_path / name))


def test_folders_and_files_are_not_mistaken(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"x")
    for ask in (store.stat, store.read, store.open):
        with pytest.raises(NotFound, match="a folder, not a file"):
            ask(str(tmp_path / "sub"))
        with pytest.raises(NotFound):
            ask(str(tmp_path / "a" / "b"))
    with pytest.raises(StorageError):
        store.create(str(tmp_path / "a" / "b"), b"x")
    assert store.list_files(str(tmp_path / "a")) == []


def test_a_long_name_is_created(tmp_path: Path) -> None:
    store.create(str(tmp_path / ("n" * 255)), b"x")
    with pytest.raises(StorageError, match="too long"):
        store.create(str(tmp_path / ("n" * 256)), b"x")
