"""What a store tells of a file, what every kind of store must answer, and URIs as text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit

from pipeline.errors import StorageError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
LITERAL_QUERY = {"file", "s3", "s3a", "gs", "gcs", "memory"}  # here `?` is a letter like any other
CONTAINER_BEFORE_AT = {"abfs", "abfss", "wasb", "wasbs"}  # abfs://container@account.dfs.core.windows.net/


@dataclass(frozen=True, slots=True)
class Entry:
    uri: str
    size_bytes: int
    etag: str


class Backend(Protocol):
    """One kind of store. URIs are absolute here; `Store` documents what each method promises."""

    def stat(self, uri: str) -> Entry: ...

    def exists(self, uri: str) -> bool: ...

    def scan(self, prefix: str, *, deep: bool) -> Iterator[Entry]:
        """Files whose URI begins with `prefix`, in any order, lazily; unless `deep`, those in its folder only."""

    def read(self, uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes: ...

    def open(self, uri: str, expect: Entry | None) -> BinaryIO: ...

    def create(self, uri: str, data: bytes) -> None: ...

    def delete(self, uri: str) -> None: ...

    def sweep(self, folder: str, older_than_s: float) -> int: ...


def scheme_of(uri: str) -> str:
    """`s3://b/k` -> `s3`, `/a/b` -> ``."""
    match = SCHEME.match(uri)
    return match[1].lower() if match else ""


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def redact(uri: str) -> str:
    """A URI that may be printed: without user, password or query (signed URLs carry their secret there)."""
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
    """The same for every URL inside a driver's message, and for the query of a path that a server has repeated."""
    text = re.sub(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>)\]]+", lambda match: _redact_url(match[0]), text)
    return re.sub(r"[?&][\w.%~-]+=[^\s'\"<>)\]]*", "", text)


def _redact_url(url: str) -> str:
    return redact(url) if scheme_of(url) not in LITERAL_QUERY else redact(url).partition("?")[0]


def hush(*drivers: str) -> None:
    """Keep a driver's debug lines, which hold signed requests, out of a log that asks for everything; who sets the
    driver's own level gets them."""
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
    """[start, stop) as a slice of `size_bytes` bytes."""
    stop = size_bytes if stop is None else min(stop, size_bytes)
    return min(start, stop), stop


def host_of(url: str) -> str:
    """`https://user:pw@host:1/x?y` -> `https://host:1`."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
