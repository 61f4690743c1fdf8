"""Put a finished file or folder at its destination, whole or not at all, on a disk or in a store.

* On a disk it is made beside the destination under a hidden name, then renamed without replacing anything.
* For a store it is made on a local disk, then created object by object, ending with the file that readers open first.
* A folder holds `_export.json`, and `force` replaces no folder without it, so that a typing error deletes no data.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

import numpy as np

from img2parquet.errors import AccessDenied, AlreadyExists, InputError, StorageError, UserError
from img2parquet.storage import Store, join, redact, resolve

MARK = "_export.json"
MOST_OBJECT_BYTES = 1 << 30  # an object is created from memory, in one conditional request


@dataclass
class Workspace:
    """Where a format writes: `path` is the future file or folder."""

    path: Path
    spool: Path
    replaced: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    images: array[int] = field(default_factory=lambda: array("q"))  # hashes of their names

    def file(self, name: str = "") -> BinaryIO:
        path = self.path / name if name else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")

    def text(self, name: str = "") -> TextIO:
        """Open a new UTF-8 text file, with line ends as they are written."""
        path = self.path / name if name else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("x", encoding="utf-8", newline="")

    def scratch(self) -> TextIO:
        """Open a temporary text file, for text that comes later in the result."""
        return tempfile.TemporaryFile("w+", encoding="utf-8", newline="", dir=self.spool)

    def plain(self, text: str, held: str) -> str:
        """Replace characters that a format (XML, Postgres) cannot hold by their pictures, and count such texts."""
        shown = "".join(PICTURES[held].get(letter, letter) for letter in text) if not text.isprintable() else text
        return self.counted(text, shown, held)

    def counted(self, text: str, shown: str, held: str) -> str:
        self.replaced[held] = self.replaced.get(held, 0) + (shown != text)
        return shown

    def image(self, name: str) -> str:
        """Record an image's name, and return it. Some tools treat images with equal names as one image."""
        self.images.append(hash(name))
        return name

    def note(self, text: str) -> None:
        """Remember a remark that the user should read."""
        self.said.append(text)

    def notes(self) -> Iterator[str]:
        yield from self.said
        if repeated := len(self.images) - len(np.unique(np.array(self.images, np.int64))):
            hint = "add {shard} to --images to make names unique"
            yield f"images whose name another image has, so that tools may confuse them: {repeated}; {hint}"
        for held, count in self.replaced.items():
            if count:
                yield f"values with control characters that {held} cannot hold: {count}; written as their pictures (␀)"


CONTROLS = {chr(code): chr(0x2400 + code) for code in range(32)}
PICTURES = {
    "XML": {c: p for c, p in CONTROLS.items() if c not in "\t\n\r"} | {"\ufffe": "\ufffd", "\uffff": "\ufffd"},
    "Postgres": {"\0": CONTROLS["\0"]},
}


@dataclass(frozen=True)
class Destination:
    """A path or URI for one file or folder."""

    uri: str
    shape: Literal["file", "folder"]
    store: Store
    force: bool

    @classmethod
    def at(cls, uri: str, shape: Literal["file", "folder"], store: Store, force: bool) -> Destination:
        if shape == "file" and uri.endswith("/"):
            raise UserError(f"{redact(uri)}: this format is one file, not a folder", hint="add the file's name")
        return cls(resolve(uri).rstrip("/"), shape, store, force)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def check(self, output_uri: str) -> None:
        """Raise UserError for a place inside the output, AlreadyExists for one that is taken."""
        if f"{self.uri}/".startswith(f"{output_uri}/") or f"{output_uri}/".startswith(f"{self.uri}/"):
            raise UserError(
                f"{redact(self.uri)}: inside or around the output, where readers of the output would find it",
                hint="choose a place beside it",
            )
        if self._is_taken():
            if not self.force:
                raise AlreadyExists(f"{redact(self.uri)} exists", hint="--force replaces an earlier export")
            self._check_replaceable()

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Open a fresh place to write to, which is removed afterwards."""
        parent = Path(self.uri).parent if self.is_local else None
        try:
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            name = f".{Path(self.uri).name[:100]}.tmp-{uuid.uuid4().hex}" if parent else ""
            folder = parent / name if parent else Path(tempfile.mkdtemp(prefix="img2parquet-export-"))
            folder.mkdir(exist_ok=True)
        except PermissionError:
            raise AccessDenied(
                f"{self.uri}: permission denied", hint="choose a place where you have write access"
            ) from None
        except OSError as error:
            raise StorageError(f"{self.uri}: {error.strerror or error}") from None
        try:
            path = folder / "made"
            if self.shape == "folder":
                path.mkdir()
            yield Workspace(path, folder)
        except OSError as error:
            raise StorageError(f"{redact(self.uri)}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, work: Workspace, format: str, last: str) -> None:
        """Give the result its name. Raises AlreadyExists when another writer was first."""
        if self.shape == "folder":
            (work.path / MARK).write_text(json.dumps({"img2parquet": "export", "format": format}) + "\n")
        if self.is_local:
            self._put_on_disk(work)
        else:
            self._put_in_store(work, last)

    def _put_on_disk(self, work: Workspace) -> None:
        final = Path(self.uri)
        for path in [work.path, *work.path.rglob("*")]:
            _sync(path)
        if self.shape == "file":
            if self.force:
                work.path.replace(final)
            else:
                try:
                    os.link(work.path, final)  # unlike a rename, a link replaces nothing
                except FileExistsError:
                    raise AlreadyExists(f"{self.uri} exists", hint="--force replaces an earlier export") from None
        else:
            old = work.spool / "old"
            if self.force and final.exists():
                final.rename(old)
            if final.exists():
                raise AlreadyExists(f"{self.uri} exists", hint="--force replaces an earlier export")
            work.path.rename(final)  # fails on a folder that is not empty
        _sync(final.parent)

    def _put_in_store(self, work: Workspace, last: str) -> None:
        files = [work.path] if self.shape == "file" else sorted(p for p in work.path.rglob("*") if p.is_file())
        large = [path for path in files if path.stat().st_size > MOST_OBJECT_BYTES]
        if large:
            raise StorageError(
                f"{redact(self.uri)}: one object would have {large[0].stat().st_size:,} bytes, more than one request "
                f"can send ({MOST_OBJECT_BYTES:,})",
                hint="export to a disk, then copy it with the store's own tool",
            )
        if self.force:
            for uri in self._objects():
                self.store.delete(uri)
        if self.shape == "file":
            self.store.create(self.uri, work.path.read_bytes())
            return
        for path in sorted(files, key=lambda path: (path.match(last), str(path))):
            self.store.create(join(self.uri, path.relative_to(work.path).as_posix()), path.read_bytes())

    def _is_taken(self) -> bool:
        if self.is_local:
            return os.path.lexists(self.uri)
        return bool(self._objects())

    def _objects(self) -> list[str]:
        if self.shape == "file":
            return [self.uri] if self.store.exists(self.uri) else []
        return [entry.uri for entry in self.store.list_files(self.uri)]

    def _check_replaceable(self) -> None:
        if self.shape == "file":
            if self.is_local and not Path(self.uri).is_file():
                raise InputError(f"{self.uri} is a folder, but this format is one file", hint="choose another place")
            return
        mark = join(self.uri, MARK)
        if not self.store.exists(mark):
            raise UserError(
                f"{redact(self.uri)} is not an earlier export: it has no {MARK}",
                hint="--force replaces exports only; remove it yourself, or choose another place",
            )


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
