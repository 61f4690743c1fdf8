"""Read the image files below a folder, or matched by a glob, into rows.

* `key` is the path below the root: the part of the path before the first wildcard, or the folder itself.
* The column `class` is the first folder below the root.
* Only files with image extensions are read. Hidden files and folders (`.git`, `._x.jpg`) and all others are counted in
  the log. What cannot be read (dangling links, pipes, files and folders of other users) is skipped with a warning.
* Brackets and braces in a name are letters if there is nothing that they match as a pattern.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import suppress
from typing import Literal

import pyarrow as pa
from pydantic import Field, field_validator

from img2parquet.errors import InputError, NotFound, StorageError
from img2parquet.read import PartLimits
from img2parquet.read.gzip_stream import unzipped
from img2parquet.read.part_packing import pack
from img2parquet.read.passthrough import convert_all, parse_keep, to_valid_text
from img2parquet.read.settings import IMAGE_EXTENSIONS, SourceSettings, entry_of_whole, input_exists, part_fails
from img2parquet.schema import Part, Piece, Reject, Row
from img2parquet.storage import Entry, Store, redact
from img2parquet.storage.backend import Skip, scheme_of
from img2parquet.storage.parallel import fetch_in_order
from img2parquet.storage.patterns import expand_braces, fixed_prefix, has_magic
from img2parquet.storage.uri_secrets import WEB

log = logging.getLogger(__name__)

MAX_UNZIPPED_BYTES = 256 << 20


class Folder(SourceSettings):
    """Loose image files."""

    kind: Literal["folder"] = Field(default="folder", description="A folder of image files, with all below it")
    uris: tuple[str, ...] = Field(
        min_length=1, description="Folders, read with all that is below them, or globs such as photos/**/*.jpg"
    )
    keep: tuple[str, ...] = Field(
        default=(), description="Passthrough columns: `class`, the name of the first folder below the root"
    )
    threads: int = Field(default=16, ge=1, le=256, description="Files that one reader fetches at a time")

    @field_validator("keep")
    @classmethod
    def _only_class(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for column in parse_keep(keep):
            if column.name != "class":
                raise ValueError(f"keep names `{column.name}`; `kind: folder` has only the column `class`")
        return keep

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """Yield parts with one piece for each image file. Raises InputError, StorageError."""
        roots, skipped = Roots(self.names), dict[str, str]()
        with input_exists():
            entries = {entry.uri: entry for uri in self.names for entry in _files(self.store, uri, skipped)}
        for kind, count in Counter(skipped.values()).items():
            log.warning(
                "skipped %d %s, such as %s", count, kind, next(p for p in sorted(skipped) if skipped[p] == kind)
            )
        images = [entries[uri] for uri in sorted(entries) if _is_image(_path(uri, roots.key_of(uri)))]
        _report_ignored(entries.keys() - {entry.uri for entry in images}, found=bool(images), where=self.names)
        yield from pack((Piece(e.uri, e.size_bytes, e.etag, rows=1) for e in images if e not in known), limits)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Yield every file of a part in order, fetched in parallel. Raises PartFailed if one changed or is gone."""
        roots = Roots(self.names)
        wanted = part.wanted_rows
        files = ((row, piece) for row, piece in enumerate(part.pieces) if row in wanted)
        fetched = fetch_in_order(
            files, lambda file: self._fetch(file[1]), self.threads, lambda file: file[1].size_bytes
        )
        for (row, piece), image in fetched:
            key = roots.key_of(piece.uri)
            folder, slash, _ = key.partition("/")
            columns, remarks = convert_all(self.kept, {"class": folder if slash else None})
            yield Row(row, key, to_valid_text(roots.root_of(piece.uri)), image, columns, warnings=remarks)

    def passthrough(self) -> pa.Schema:
        return pa.schema([column.field() for column in self.kept])

    def _fetch(self, piece: Piece) -> bytes:
        with part_fails(piece.uri):
            return unzipped(self.store.read(piece.uri, expect=entry_of_whole(piece)), MAX_UNZIPPED_BYTES)


class Roots:
    """The folders that keys are relative to, derived from the settings alone, so that workers need not list them."""

    def __init__(self, uris: Sequence[str]) -> None:
        names = [_plain(name) for uri in uris for name in expand_braces(uri)]
        self.folders = {_folder(fixed_prefix(name)) if has_magic(name) else name for name in names}
        # a name with brackets or braces may also be one to the letter: then the files lie below it
        for name in {*names, *map(_plain, uris)}:
            start, *wild = re.split(r"[*?]", name, maxsplit=1)
            self.folders.add(_folder(start) if wild else name)

    def root_of(self, uri: str) -> str:
        """Return the nearest root above a file; if the file itself was named, its own folder."""
        folder = _folder(uri)
        while folder and folder not in self.folders:
            folder = _folder(folder)
        return folder or _folder(uri)

    def key_of(self, uri: str) -> str:
        return to_valid_text(uri[len(self.root_of(uri)) :].removeprefix("/"))


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0]


def _plain(uri: str) -> str:
    return uri.rstrip("/") or "/"


def _files(store: Store, uri: str, skipped: dict[str, str]) -> Sequence[Entry]:
    """Return the files that a glob matches, the files below a folder, or the one file that was named."""
    skip = skipped.__setitem__
    try:
        return [entry for name in expand_braces(uri) for entry in _files_of_one(store, _plain(name), skip)]
    except (InputError, NotFound):
        with suppress(InputError, StorageError):
            return store.list_files(_plain(uri), skip) or store.expand([uri], skip)  # a name to the letter
        raise


def _files_of_one(store: Store, name: str, skip: Skip) -> Sequence[Entry]:
    found = store.expand([name], skip) if has_magic(name) else store.list_files(name, skip)
    return found or [store.stat(name)]


def _path(uri: str, key: str) -> str:
    """Return a file's key without the query of a web address, for its extension."""
    return re.split("[?#]", key, maxsplit=1)[0] if scheme_of(uri) in WEB else key


def _is_image(key: str) -> bool:
    names = key.split("/")
    return not any(name.startswith(".") for name in names) and _extension(key) in IMAGE_EXTENSIONS


def _extension(uri: str) -> str:
    stem, dot, extension = uri.rpartition("/")[2].rpartition(".")
    return extension.lower() if stem and dot else ""


def _report_ignored(ignored: Collection[str], found: bool, where: Sequence[str]) -> None:
    kinds = Counter(f".{_extension(uri)}" if _extension(uri) else "no extension" for uri in ignored)
    counts = ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common(5))
    if not found:
        raise InputError(
            f"no image files in {', '.join(map(redact, where))}" + (f"; other files: {counts}" if counts else ""),
            known=sorted(IMAGE_EXTENSIONS),
            hint="tars are read with `kind: webdataset`, Parquet with `kind: parquet`" if counts else "",
        )
    if ignored:
        log.info("skipped %d files that are not images: %s", len(ignored), counts)
