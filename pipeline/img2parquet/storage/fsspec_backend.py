"""Read and write through fsspec: http, gs, az, hf, hdfs, sftp, memory and every other scheme with a driver.

* Reading works with any driver. The bytes are counted, since fsspec's http accepts a whole body in answer to a range
  where the server ignores ranges.
* Writing works where the driver uploads an object whole or not at all (`WHOLE_PUT`), if nothing has its name: Google's
  `ifGenerationMatch=0`, Azure's `If-None-Match: *`. Other drivers would show half a file, or overwrite one.
* Not every store gives an etag; then only the size is compared with the plan.
* URIs are names here (`uri_secrets.py`): logins and signatures are added where a driver is called, and nowhere else.
* http goes through a client of our own (`http_client.py`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, BinaryIO, NoReturn, TypeVar

from img2parquet.errors import (
    AccessDenied,
    AlreadyExists,
    InputError,
    MissingDependency,
    NotFound,
    OutcomeUnknown,
    StorageError,
    nearest,
)
from img2parquet.storage.backend import Entry, Skip, changed, clip, hush, redact, scheme_of
from img2parquet.storage.ranged_file import FILE_BUFFER_BYTES, RangedFile
from img2parquet.storage.retry import Fault, RetryBudget, ShortBody, call_with_retries, error_of
from img2parquet.storage.uri_secrets import WEB, UriSecrets

T = TypeVar("T")

GOOGLE, AZURE = ("gs", "gcs"), ("az", "abfs", "abfss")
WHOLE_PUT = ("memory", *GOOGLE, *AZURE)
HUB = ("huggingface_hub", "httpx")
EXTRAS = {**dict.fromkeys(GOOGLE, "gs"), **dict.fromkeys(AZURE, "az"), "hf": "hub"}  # our extras that install a driver
MOST_UNSIZED_BYTES = 64 << 20  # of a file that is fetched whole to learn its size
ONE_REQUEST_BYTES = 1 << 31  # gcsfs cuts an upload into several requests from 50 MiB on unless told otherwise
ETAGS = (
    "ETag",
    "etag",
    "md5Hash",
    "checksum",
    "generation",
    "mtime",
    "modified",
    "created",
    "updated",
    "LastModified",
    "blob_id",
)
SIGN_AGAIN = "get a new URL or login, then run the same command again: what is done stays, and parts keep their ids"
_FILESYSTEMS: dict[tuple[object, ...], Any] = {}


@dataclass(frozen=True)
class FsspecBackend:
    """given: logins and signatures of the user's own URIs; None when every URI is the user's own."""

    scheme: str
    options: Mapping[str, object] = field(default_factory=dict)
    given: UriSecrets | None = None
    allow_private: bool = False

    def stat(self, uri: str) -> Entry:
        info = self._info(uri)
        if info.get("type") == "directory":
            raise NotFound(f"{redact(uri)}: a folder, not a file")
        entry = _entry(uri, info)
        if info.get("size") is not None:
            return entry
        size_bytes = len(self.read(uri, 0, MOST_UNSIZED_BYTES + 1, None))  # in chunks, or compressed on the way
        if size_bytes > MOST_UNSIZED_BYTES:
            raise StorageError(f"{redact(uri)}: the server does not tell the file's size")
        return replace(entry, size_bytes=size_bytes)

    def exists(self, uri: str) -> bool:
        try:
            return bool(self._info(uri).get("type") != "directory")
        except NotFound:
            return False

    def scan(self, prefix: str, *, deep: bool, skip: Skip | None = None) -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0] + "/"
        root = self._path(folder)
        found: Any = self._do(
            folder,
            lambda filesystem: filesystem.find(root, maxdepth=None if deep else 1, detail=True),
            lambda fault: {} if fault.status == 404 else self._refuse(fault, folder),
        )
        if not isinstance(found, dict):
            return  # adlfs gives a list where nothing lies below, or the name is a file's
        for name, info in found.items():
            uri = folder + name[len(root.rstrip("/")) :].removeprefix("/")
            # fsspec's find shows a file as what lies below itself
            if info.get("type") != "directory" and uri.startswith(prefix) and uri != folder and not name.endswith("/"):
                yield _entry(uri, info)

    def read(self, uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes:
        size_bytes = None if start == 0 and stop is None and expect is None else self._size_bytes(uri, expect)
        path = self._path(uri)
        if size_bytes is None:  # all of it, or a server that tells no size: then a part can only be cut from the whole
            return self._do(uri, lambda filesystem: self._bytes(filesystem, path, None, stop))[start:stop]
        first, last = clip(size_bytes, start, stop)
        if first == last:
            return b""
        whole = last - first == size_bytes
        span = None if whole else (first, last)

        def fetch(filesystem: Any) -> bytes:
            data = self._bytes(filesystem, path, span, size_bytes + 1)
            if len(data) == last - first:
                return data
            if len(data) == size_bytes:
                return data[first:last]
            raise ShortBody(f"{len(data)} of {last - first} bytes arrived")

        return self._do(uri, fetch)

    def open(self, uri: str, expect: Entry | None) -> BinaryIO:
        return io.BufferedReader(RangedFile(self.read, expect or self.stat(uri)), FILE_BUFFER_BYTES)

    def create(self, uri: str, data: bytes) -> None:
        check_writable(uri)
        how: dict[str, object] = {"mode": "create"}
        if self.scheme in GOOGLE:
            how["chunksize"] = ONE_REQUEST_BYTES
        self._do(
            uri,
            lambda filesystem: filesystem.pipe_file(self._path(uri), data, **how),
            lambda fault: self._not_created(fault, uri),
            again=lambda fault: fault.is_undone,
        )

    def delete(self, uri: str) -> None:
        self._do(
            uri,
            lambda filesystem: filesystem.rm_file(self._path(uri)),
            lambda fault: None if fault.status == 404 else self._refuse(fault, uri),
        )

    def sweep(self, folder: str, older_than_s: float) -> int:
        return 0

    def _bytes(self, filesystem: Any, path: str, span: tuple[int, int] | None, most_bytes: int | None) -> bytes:
        """Fetch a range, or all. most_bytes: how much to hold when a server sends more than it announced."""
        if self.scheme in WEB:
            from img2parquet.storage import http_client

            return http_client.fetch(filesystem, path, span, most_bytes)
        return bytes(filesystem.cat_file(path, **({"start": span[0], "end": span[1]} if span else {})))

    def _size_bytes(self, uri: str, expect: Entry | None) -> int | None:
        """Return the size of the file as it is now. Raises StorageError when it is not as expected."""
        info = self._info(uri)
        if expect is not None:
            found = _entry(uri, info)
            if info.get("size") is None:
                found = replace(found, size_bytes=expect.size_bytes)
            if found.size_bytes != expect.size_bytes or found.etag != expect.etag:
                raise changed(expect, found.size_bytes, found.etag)
        return info.get("size")

    def _info(self, uri: str) -> Mapping[str, Any]:
        info: Mapping[str, Any] = self._do(uri, lambda filesystem: filesystem.info(self._path(uri)))
        return info

    def _do(
        self,
        uri: str,
        action: Callable[[Any], T],
        otherwise: Callable[[Fault], T] | None = None,
        again: Callable[[Fault], bool] = lambda fault: not fault.is_final,
    ) -> T:
        filesystem = self._filesystem(uri)

        def attempt() -> T:
            filesystem.invalidate_cache()
            return action(filesystem)

        return call_with_retries(
            attempt, otherwise or (lambda fault: self._refuse(fault, uri)), RetryBudget(), again=again
        )

    def _filesystem(self, uri: str) -> Any:
        known = _driver(self.scheme)
        told = known._get_kwargs_from_urls(self._address(uri))
        origins = self.given.origins if self.given else None
        settings = {**told, **self.options}
        key = (os.getpid(), self.scheme, repr(sorted(settings.items())), origins, self.allow_private)
        if key not in _FILESYSTEMS:
            _FILESYSTEMS[key] = self._make_filesystem(settings, origins)
        return _FILESYSTEMS[key]

    def _make_filesystem(self, settings: dict[str, object], origins: frozenset[str] | None) -> Any:
        import fsspec

        hush("fsspec", "aiohttp", "urllib3", "gcsfs", "adlfs", "azure", "google", "paramiko", "webhdfs", *HUB)
        if self.scheme in GOOGLE and settings.pop("anon", False):
            settings["token"] = "anon"  # gcsfs's name for `anon`
        if self.scheme not in WEB:
            return fsspec.filesystem(self.scheme, **settings)
        from img2parquet.storage import http_client

        return http_client.filesystem(self.scheme, http_client.Reach(origins, self.allow_private), settings)

    def _path(self, uri: str) -> str:
        path = str(_driver(self.scheme)._strip_protocol(self._address(uri)))
        if self.scheme not in WEB:
            return path
        from img2parquet.storage import http_client

        return http_client.as_written(path)

    def _address(self, uri: str) -> str:
        return self.given.address_of(uri) if self.given else uri

    def _refuse(self, fault: Fault, uri: str) -> NoReturn:
        error = error_of(fault, uri)
        if fault.is_denied and self.scheme in WEB:
            raise AccessDenied(error.message, hint=SIGN_AGAIN)
        raise error

    def _not_created(self, fault: Fault, uri: str) -> NoReturn:
        if fault.status == 412:
            raise AlreadyExists(f"{redact(uri)} exists")
        if fault.is_final:
            self._refuse(fault, uri)
        raise OutcomeUnknown(error_of(fault, uri).message + "; whether it was created is not known")


def check_writable(uri: str) -> None:
    """Raise InputError for a store that is read-only, or whose writes would show half a part."""
    scheme = scheme_of(uri)
    if scheme in ("", "s3", *WHOLE_PUT):
        return
    why = "is read-only here" if scheme in (*WEB, "hf") else "cannot be written to in one atomic step"
    raise InputError(
        f"{redact(uri)}: {scheme}:// {why}, so it can be an input, not an output",
        known=("a folder", "s3://", *(f"{scheme}://" for scheme in WHOLE_PUT if scheme != "memory")),
    )


def _entry(uri: str, info: Mapping[str, Any]) -> Entry:
    version = next((info[name] for name in ETAGS if info.get(name)), "")
    # a listing and a look may give the same moment as a number and as a datetime
    etag = str(version.timestamp() if isinstance(version, datetime) else version)
    return Entry(uri, int(info.get("size") or 0), etag.removeprefix("W/").strip('"'))


def _driver(scheme: str) -> Any:
    """Return fsspec's class for a scheme. Raises InputError, MissingDependency."""
    from fsspec.registry import get_filesystem_class, known_implementations

    try:
        return get_filesystem_class(scheme)
    except ValueError:
        known = sorted(known_implementations)
        raise InputError(f"unknown scheme `{scheme}://`", known=known, hint=nearest(scheme, known)) from None
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0]
        hint = f"pip install {package}" if package != "fsspec" else f"pip install 'fsspec[{scheme}]'"
        if scheme in EXTRAS:
            hint = f"pip install 'img2parquet[{EXTRAS[scheme]}]'"
        raise MissingDependency(f"`{scheme}://` needs a driver that is not installed ({error})", hint=hint) from None


def is_web(uri: str) -> bool:
    return scheme_of(uri) in WEB
