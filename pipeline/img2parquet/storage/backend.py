"""Define the protocol of a storage backend, its entries, and functions on URIs as text."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit

from img2parquet.errors import StorageError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
LITERAL_QUERY = {"file", "s3", "s3a", "gs", "gcs", "memory"}  # here `?` is a letter like any other
CONTAINER_BEFORE_AT = {"abfs", "abfss", "wasb", "wasbs"}  # abfs://container@account.dfs.core.windows.net/


Skip = Callable[[str, str], None]  # path, kind


@dataclass(frozen=True, slots=True)
class Entry:
    uri: str
    size_bytes: int
    etag: str


class Backend(Protocol):
    """One kind of store. URIs are absolute here; `Store` documents what each method promises."""

    def stat(self, uri: str) -> Entry: ...

    def exists(self, uri: str) -> bool: ...

    def scan(self, prefix: str, *, deep: bool, skip: Skip | None = None) -> Iterator[Entry]:
        """List files whose URI begins with `prefix`, lazily, in any order; unless `deep`, those of its folder only.

        skip: called with the path and the kind of each thing that cannot be read; None where it should be an error."""

    def read(self, uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes: ...

    def open(self, uri: str, expect: Entry | None) -> BinaryIO: ...

    def create(self, uri: str, data: bytes) -> None: ...

    def delete(self, uri: str) -> None: ...

    def sweep(self, folder: str, older_than_s: float) -> int: ...


def scheme_of(uri: str) -> str:
    """Return the scheme in lower case: `s3` for `s3://b/k`, empty for a path."""
    match = SCHEME.match(uri)
    return match[1].lower() if match else ""


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def redact(uri: str) -> str:
    """Make a URI printable: drop user, password and query, where signed URLs carry their secret."""
    scheme = scheme_of(uri)
    if not scheme:
        return uri
    head, _, tail = uri.partition("://")
    if scheme not in LITERAL_QUERY:
        tail = re.split(r"[?#]", tail, maxsplit=1)[0]
    authority, slash, path = tail.partition("/")
    if scheme not in CONTAINER_BEFORE_AT:
        authority = authority.rpartition("@")[2]
    return f"{head}://{authority}{slash}{path}"


def redact_text(text: str) -> str:
    """Redact every URL in a driver's message, and the query of a path that a server has repeated."""
    text = re.sub(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>)\]]+", lambda match: _redact_url(match[0]), text)
    return re.sub(r"[?&][\w.%~-]+=[^\s'\"<>)\]]*", "", text)


def _redact_url(url: str) -> str:
    return redact(url) if scheme_of(url) not in LITERAL_QUERY else redact(url).partition("?")[0]


def hush(*drivers: str) -> None:
    """Keep drivers' debug lines, which hold signed requests, out of the log, unless the driver's own level is set."""
    for name in drivers:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)


def changed(expect: Entry, size_bytes: int, etag: str) -> StorageError:
    now = f"{size_bytes} bytes, etag `{etag}`" if etag else "another etag"
    was = f"{expect.size_bytes} bytes, etag `{expect.etag}`"
    return StorageError(
        f"{redact(expect.uri)} changed since it was planned: was {was}, now {now}",
        hint="objects must not be replaced while a job runs; start a new output for the new input",
    )


def clip(size_bytes: int, start: int, stop: int | None) -> tuple[int, int]:
    """Cut [start, stop) at `size_bytes`, as a slice does."""
    stop = size_bytes if stop is None else min(stop, size_bytes)
    return min(start, stop), stop


def host_of(url: str) -> str:
    """Return scheme, host and port: `https://host:1` for `https://user:pw@host:1/x?y`."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
