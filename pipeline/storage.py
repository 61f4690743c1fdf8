"""URIs in, bytes out: list, read, create once, delete, on anything that fsspec knows.

Contract (being implemented; signatures are fixed):
* a plain path and `file://` are the same store; every Entry carries a full URI for remote stores and an absolute
  path for local files, so that a part's id does not depend on the folder a command was started in;
* `etag` is the store's ETag without quotes, or `mtime_ns-size` on a disk;
* nothing is ever overwritten: `create` is the only way to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class Entry:
    uri: str
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class Store:
    """Access to every URI scheme, with the options that its filesystems take (never credentials: those come from
    the environment's provider chain on each worker)."""

    options: Mapping[str, object] = field(default_factory=dict)

    def expand(self, uris: Sequence[str]) -> list[Entry]:
        """Braces (`{000..127}`, `{a,b}`) and globs to the files they name, sorted by URI, each once.
        Raises InputError for a pattern or name that matches nothing; AccessDenied, StorageError."""
        raise NotImplementedError

    def stat(self, uri: str) -> Entry:
        """Raises NotFound, AccessDenied, StorageError."""
        raise NotImplementedError

    def list_files(self, uri: str) -> list[Entry]:
        """Every file below a folder, sorted by URI; [] where there is no such folder. One listing, no HEADs."""
        raise NotImplementedError

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None) -> bytes:
        """Bytes [start, stop). With `expect`, an object whose size or etag differs raises StorageError; a body
        shorter than asked is never returned as whole."""
        raise NotImplementedError

    def stream(
        self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None, chunk_bytes: int = 8 << 20
    ) -> Iterator[bytes]:
        """`read` in chunks, each checked; memory is bounded by `chunk_bytes`."""
        raise NotImplementedError

    def open(self, uri: str, *, expect: Entry | None = None) -> BinaryIO:
        """A seekable file for pyarrow.parquet. Raises NotFound, AccessDenied, StorageError."""
        raise NotImplementedError

    def create(self, uri: str, data: bytes) -> None:
        """Create an object that is not there yet, in one atomic step, durable when this returns.
        Raises AlreadyExists (412), AccessDenied, StorageError (definitely not created), OutcomeUnknown."""
        raise NotImplementedError

    def delete(self, uri: str) -> None:
        raise NotImplementedError

    def creates_exclusively(self, folder_uri: str) -> bool:
        """Whether this store honours If-None-Match: creates a probe object twice and looks at the second answer."""
        raise NotImplementedError


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def redact(uri: str) -> str:
    """A URI that may be printed: without user, password or query (signed URLs carry their secret there)."""
    raise NotImplementedError
