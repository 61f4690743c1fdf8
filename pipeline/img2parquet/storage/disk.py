"""Store files on a disk; a synced temporary file is linked to its final name, so that it appears whole and durable.

* `os.link` is atomic and fails where the name exists, which a rename does not.
* Temporary files of killed writers are never listed; `sweep` removes them.
* What cannot be read (a dangling link, a pipe, a folder of another user) ends a listing, unless its caller counts it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from img2parquet.errors import AccessDenied, AlreadyExists, NotFound, OutcomeUnknown, StorageError
from img2parquet.storage.backend import Entry, Skip, changed, clip
from img2parquet.storage.write_hooks import reached

TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]{32}")
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
RENAME_NOREPLACE, AT_FDCWD = 1, -100


class DiskBackend:
    def stat(self, uri: str) -> Entry:
        with _errors(uri):
            status = Path(uri).stat()
            _check_is_file(uri, status)
            return _entry(uri, status)

    def exists(self, uri: str) -> bool:
        with _errors(uri):
            return Path(uri).is_file()

    def scan(self, prefix: str, *, deep: bool, skip: Skip | None = None) -> Iterator[Entry]:
        folder, _, stem = prefix.rpartition("/")
        yield from _walk(folder + "/", stem, deep, (), skip)

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
            _check_is_file(uri, Path(uri).stat())  # first: a pipe would wait for its writer
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
        """Remove temporary files that are older than this, and return their number."""
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


def _check_is_file(path: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise NotFound(f"{path}: a pipe, a socket or a device, not a file")


def _walk(folder: str, stem: str, deep: bool, above: tuple[tuple[int, int], ...], skip: Skip | None) -> Iterator[Entry]:
    """List files below `folder` whose first name begins with `stem`. Follows links to folders, but not in circles."""
    try:
        with _errors(folder.rstrip("/") or "/"):
            status = Path(folder).stat()
            items = list(os.scandir(folder))
    except NotFound:
        return
    except AccessDenied:
        if skip is None or not above:
            raise
        skip(folder, "folders that may not be read")
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for item in items:
        if not item.name.startswith(stem) or TEMPORARY.fullmatch(item.name):
            continue
        is_folder = _is_folder(item)
        if is_folder and deep:
            yield from _walk(f"{item.path}/", "", deep, (*above, here), skip)
        elif not is_folder and (entry := _file(item, skip)) is not None:
            yield entry


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _file(item: os.DirEntry[str], skip: Skip | None) -> Entry | None:
    """Return the entry of a file, None for what is skipped or was deleted after it had been listed."""
    try:
        with _errors(item.path):
            status = item.stat()
    except StorageError as error:
        if isinstance(error, NotFound) and not item.is_symlink():
            return None
        if skip is None and isinstance(error, NotFound):
            raise StorageError(f"{item.path} is a link to a file that does not exist") from None
        if skip is None:
            raise
        skip(item.path, "links to files that do not exist")
        return None
    if skip is None:
        return _entry(item.path, status)
    if not stat.S_ISREG(status.st_mode):
        skip(item.path, "pipes, sockets or devices")
    elif not os.access(item.path, os.R_OK):
        skip(item.path, "files that may not be read")
    else:
        return _entry(item.path, status)
    return None


def _make_folders(folder: Path) -> list[Path]:
    """Create missing folders, and return them."""
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
    """Rename without replacing, for filesystems without hard links (FAT, some FUSE and container mounts)."""
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
    """Raise our errors in place of the operating system's."""
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
            f"{path}: permission denied", hint="check the owner and mode of the file and its folders"
        ) from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
