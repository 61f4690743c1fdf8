"""Files on a disk: created whole and durable by linking a synced temporary file to its final name.

* `os.link` is atomic and fails where the name exists, which a rename does not.
* A temporary file of a create that was killed is never listed; `sweep` removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import AccessDenied, AlreadyExists, NotFound, OutcomeUnknown, StorageError
from pipeline.storage.entry import Entry, changed, clip
from pipeline.storage.steps import reached

TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]{32}")
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
RENAME_NOREPLACE, AT_FDCWD = 1, -100


class Disk:
    def stat(self, uri: str) -> Entry:
        with _errors(uri):
            entry = _entry(uri, Path(uri).stat())
            if Path(uri).is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
            return entry

    def exists(self, uri: str) -> bool:
        with _errors(uri):
            return Path(uri).is_file()

    def scan(self, prefix: str, *, deep: bool) -> Iterator[Entry]:
        folder, _, stem = prefix.rpartition("/")
        with _errors(folder or "/"):
            yield from _walk(folder + "/", stem, deep, ())

    def read(self, uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes:
        with _errors(uri), self.open(uri, expect) as file:
            start, stop = clip(os.fstat(file.fileno()).st_size, start, stop)
            file.seek(start)
            data = file.read(stop - start)
            if len(data) != stop - start:
                raise StorageError(f"{uri}: only {len(data)} of {stop - start} bytes could be read")
            return data

    def open(self, uri: str, expect: Entry | None) -> BinaryIO:
        with _errors(uri):
            file = Path(uri).open("rb")  # noqa: SIM115 - the caller's to close
        found = _entry(uri, os.fstat(file.fileno()))
        if expect is not None and (found.size_bytes, found.etag) != (expect.size_bytes, expect.etag):
            file.close()
            raise changed(expect, found.size_bytes, found.etag)
        return file

    def create(self, uri: str, data: bytes) -> None:
        final = Path(uri)
        temporary = final.with_name(f".{final.name[:200]}.tmp-{uuid.uuid4().hex}")
        with _errors(uri):
            new_folders = _make_folders(final.parent)
            try:
                _write_synced(temporary, data, uri)
                reached("synced", uri)
                _give_name(temporary, final)
                reached("named", uri)
            finally:
                temporary.unlink(missing_ok=True)
            reached("cleared", uri)
        try:
            for folder in [final.parent, *(made.parent for made in new_folders)]:
                _sync_folder(folder)
        except OSError as error:
            raise OutcomeUnknown(f"{uri}: written, but perhaps not durable ({error.strerror})") from None

    def delete(self, uri: str) -> None:
        with _errors(uri):
            Path(uri).unlink(missing_ok=True)

    def sweep(self, folder: str, older_than_s: float) -> int:
        """Remove temporary files that no create has touched for so long; how many there were."""
        removed = 0
        for parent, _, names in os.walk(folder):
            for name in filter(TEMPORARY.fullmatch, names):
                with suppress(OSError):
                    path = Path(parent, name)
                    if time.time() - path.stat().st_mtime >= older_than_s:
                        path.unlink()
                        removed += 1
        return removed


def _entry(path: str, status: os.stat_result) -> Entry:
    return Entry(path, status.st_size, f"{status.st_mtime_ns}-{status.st_size}")


def _walk(folder: str, stem: str, deep: bool, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Files below `folder` whose first name begins with `stem`. Links to folders are followed, but not in circles."""
    try:
        status = Path(folder).stat()
        items = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for item in items:
        if not item.name.startswith(stem) or TEMPORARY.fullmatch(item.name):
            continue
        if item.is_dir():
            if deep:
                yield from _walk(f"{item.path}/", "", deep, (*above, here))
            continue
        try:
            yield _entry(item.path, item.stat())
        except FileNotFoundError:
            if item.is_symlink():  # anything else was deleted after it had been listed
                raise StorageError(f"{item.path} is a link to a file that does not exist") from None


def _make_folders(folder: Path) -> list[Path]:
    """The folders that had to be made."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
    return missing


def _write_synced(path: Path, data: bytes, uri: str) -> None:
    with path.open("xb") as file:
        reached("opened", uri)
        file.write(data)
        file.flush()
        reached("written", uri)
        os.fsync(file.fileno())


def _give_name(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError:
        # NFS may say so of a link that it made itself, when its first answer was lost
        if temporary.stat().st_nlink < 2:
            raise
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        _rename_exclusively(temporary, final)


def _rename_exclusively(temporary: Path, final: Path) -> None:
    """For filesystems without hard links (FAT, some FUSE and container mounts): Linux's rename that never replaces."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename and rename(AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(final), RENAME_NOREPLACE) == 0:
        return
    if rename and ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, "exists")
    raise StorageError(
        f"{final}: this filesystem has neither hard links nor an exclusive rename, so no file can be created safely",
        hint="write to another disk, or to s3://",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems sync with the file alone
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """What the operating system raises, as ours."""
    try:
        yield
    except FileExistsError:
        raise AlreadyExists(f"{path} exists") from None
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path}: not found") from None
    except IsADirectoryError:
        raise NotFound(f"{path}: a folder, not a file") from None
    except PermissionError:
        raise AccessDenied(
            f"{path}: permission denied", hint="look at the owner and mode of the file and its folders"
        ) from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
