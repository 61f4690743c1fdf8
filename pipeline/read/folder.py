"""A tree, or a glob, of loose image files to rows; the first folder below the root as the class.

* `key` is the path below the root: what lies before the first wildcard, or the folder itself.
* Only image extensions are read; hidden files and folders (`.git`, `._x.jpg`) and all else are counted in the log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Container, Iterator, Sequence
from typing import Literal

import pyarrow as pa
from pydantic import Field, field_validator

from pipeline.errors import InputError
from pipeline.read import PartLimits
from pipeline.read.fetch import fetch_in_order
from pipeline.read.keep import convert_all, parse_keep, to_valid_text
from pipeline.read.pack import pack
from pipeline.read.settings import IMAGE_EXTENSIONS, SourceSettings, entry_of_whole, input_exists, part_fails
from pipeline.schema import Part, Piece, Reject, Row
from pipeline.storage import Entry, Store, redact
from pipeline.storage.patterns import expand_braces, fixed_prefix, has_magic

log = logging.getLogger(__name__)


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
                raise ValueError(f"keep names `{column.name}`; a folder knows only `class`")
        return keep

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """One piece per image file. Raises InputError, StorageError."""
        roots = Roots(self.names)
        with input_exists():
            entries = {entry.uri: entry for name in roots.names for entry in _files(self.store, name)}
        images = [entries[uri] for uri in sorted(entries) if _is_image(roots.key_of(uri))]
        _tell_ignored(entries.keys() - {entry.uri for entry in images}, found=bool(images), where=self.names)
        yield from pack((Piece(e.uri, e.size_bytes, e.etag, rows=1) for e in images if e not in known), limits)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Every file of a part in order, fetched in parallel. Raises PartFailed for one that changed or is gone."""
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
            return self.store.read(piece.uri, expect=entry_of_whole(piece))


class Roots:
    """The folders that keys are relative to, told from the settings alone: a worker lists nothing."""

    def __init__(self, uris: Sequence[str]) -> None:
        self.names = [name.rstrip("/") or "/" for uri in uris for name in expand_braces(uri)]
        self.folders = {_folder(fixed_prefix(name)) if has_magic(name) else name for name in self.names}

    def root_of(self, uri: str) -> str:
        """The nearest root above a file; its own folder where it was named itself."""
        folder = _folder(uri)
        while folder and folder not in self.folders:
            folder = _folder(folder)
        return folder or _folder(uri)

    def key_of(self, uri: str) -> str:
        return to_valid_text(uri[len(self.root_of(uri)) :].lstrip("/"))


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0]


def _files(store: Store, name: str) -> Sequence[Entry]:
    """What a glob matches, what lies below a folder, or the one file that was named."""
    found = store.expand([name]) if has_magic(name) else store.list_files(name)
    return found or [store.stat(name)]


def _is_image(key: str) -> bool:
    names = key.split("/")
    return not any(name.startswith(".") for name in names) and _extension(key) in IMAGE_EXTENSIONS


def _extension(uri: str) -> str:
    stem, dot, extension = uri.rpartition("/")[2].rpartition(".")
    return extension.lower() if stem and dot else ""


def _tell_ignored(ignored: Collection[str], found: bool, where: Sequence[str]) -> None:
    kinds = Counter(f".{_extension(uri)}" if _extension(uri) else "no extension" for uri in ignored)
    counts = ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common(5))
    if not found:
        raise InputError(
            f"no image files in {', '.join(map(redact, where))}" + (f"; other files: {counts}" if counts else ""),
            known=sorted(IMAGE_EXTENSIONS),
            hint="tars are read with `kind: webdataset`, Parquet with `kind: parquet`" if counts else "",
        )
    if ignored:
        log.info("%d files that are no images were left out: %s", len(ignored), counts)
