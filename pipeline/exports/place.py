"""A finished file or folder to its destination, whole or not at all, on a disk or in a store.

* On a disk: made beside the destination under a name that no reader lists, then named without replacing anything.
* In a store: made on a local disk, then created object by object, the file that readers open first as the last one.
* A folder holds `_export.json`; `force` replaces no folder without it, so that a slip of the pen deletes no data.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

from pipeline.errors import AccessDenied, AlreadyExists, InputError, StorageError, UserError
from pipeline.storage import Store, join, redact, resolve

MARK = "_export.json"
MOST_OBJECT_BYTES = 1 << 30  # an object is created from memory, in one conditional request


@dataclass
class Workspace:
    """Where a format writes: `path` is the file, or the folder, to be."""

    path: Path
    spool: Path
    replaced: dict[str, int] = field(default_factory=dict)

    def file(self, name: str = "") -> BinaryIO:
        path = self.path / name if name else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")

    def text(self, name: str = "") -> TextIO:
        """UTF-8, with line ends as they are written."""
        path = self.path / name if name else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("x", encoding="utf-8", newline="")

    def scratch(self) -> TextIO:
        """A text file for what stands further down in the result; it is thrown away."""
        return tempfile.TemporaryFile("w+", encoding="utf-8", newline="", dir=self.spool)

    def plain(self, text: str, held: str) -> str:
        """Text without characters that a format (XML, Postgres) cannot hold: shown by their picture, and counted."""
        shown = "".join(PICTURES[held].get(letter, letter) for letter in text) if not text.isprintable() else text
        return self.counted(text, shown, held)

    def counted(self, text: str, shown: str, held: str) -> str:
        self.replaced[held] = self.replaced.get(held, 0) + (shown != text)
        return shown

    def notes(self) -> Iterator[str]:
        for held, count in self.replaced.items():
            if count:
                yield f"values with control characters that {held} cannot hold: {count}; written as their pictures (␀)"


CONTROLS = {chr(code): chr(0x2400 + code) for code in range(32)}
PICTURES = {
    "XML": {c: p for c, p in CONTROLS.items() if c not in "\t\n\r"} | {"\ufffe": "\ufffd", "\uffff": "\ufffd"},
    "Postgres": {"\0": CONTROLS["\0"]},
}


@dataclass(frozen=True)
class Place:
    uri: str
    shape: Literal["file", "folder"]
    store: Store
    force: bool

    @classmethod
    def at(cls, uri: str, shape: Literal["file", "folder"], store: Store, force: bool) -> Place:
        if shape == "file" and uri.endswith("/"):
            raise UserError(f"{redact(uri)}: this format is one file, not a folder", hint="name the file")
        return cls(resolve(uri).rstrip("/"), shape, store, force)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def check(self, output_uri: str) -> None:
        """Raises UserError for a place inside the output, AlreadyExists for one that is taken."""
        if f"{self.uri}/".startswith(f"{output_uri}/") or f"{output_uri}/".startswith(f"{self.uri}/"):
            raise UserError(
                f"{redact(self.uri)}: inside of the output, or around it; readers of the output would find it there",
                hint="name a place beside it",
            )
        if self._is_taken():
            if not self.force:
                raise AlreadyExists(f"{redact(self.uri)} exists", hint="--force replaces an earlier export")
            self._check_replaceable()

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """A fresh place to write to, which is gone afterwards."""
        parent = Path(self.uri).parent if self.is_local else None
        try:
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            name = f".{Path(self.uri).name[:100]}.tmp-{uuid.uuid4().hex}" if parent else ""
            folder = parent / name if parent else Path(tempfile.mkdtemp(prefix="img2parquet-export-"))
            folder.mkdir(exist_ok=True)
        except PermissionError:
            raise AccessDenied(f"{self.uri}: permission denied", hint="name a place that you may write to") from None
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
        """Give what was made its name. Raises AlreadyExists where somebody was faster."""
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
                    os.link(work.path, final)  # unlike a rename, it replaces nothing
                except FileExistsError:
                    raise AlreadyExists(f"{self.uri} exists", hint="--force replaces an earlier export") from None
        else:
            old = work.spool / "old"
            if self.force and final.exists():
                final.rename(old)
            if final.exists():
                raise AlreadyExists(f"{self.uri} exists", hint="--force replaces an earlier export")
            work.path.rename(final)  # fails on a folder that holds anything
        _sync(final.parent)

    def _put_in_store(self, work: Workspace, last: str) -> None:
        files = [work.path] if self.shape == "file" else sorted(p for p in work.path.rglob("*") if p.is_file())
        large = [path for path in files if path.stat().st_size > MOST_OBJECT_BYTES]
        if large:
            raise StorageError(
                f"{redact(self.uri)}: one object would have {large[0].stat().st_size:,} bytes, more than one request "
                f"takes ({MOST_OBJECT_BYTES:,})",
                hint="export to a disk, and copy it with the store's own tool",
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
                raise InputError(f"{self.uri} is a folder; this format is one file", hint="name another place")
            return
        mark = join(self.uri, MARK)
        if not self.store.exists(mark):
            raise UserError(
                f"{redact(self.uri)} is no earlier export: it has no {MARK}",
                hint="--force replaces exports only; remove it yourself, or name another place",
            )


def _sync(path: Path) -> None:
    """A crash after this leaves what was there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
