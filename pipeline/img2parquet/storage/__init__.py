"""URIs in, bytes out: list, read, create once, delete, on anything that fsspec knows.

| file | URIs |
|---|---|
| `disk.py` | paths and `file://` |
| `s3.py` | `s3://`, through s3fs |
| `fsspec_backend.py` | every other scheme with an fsspec driver |
| `http_client.py` | the client for http(s): where it may connect, how much it reads |
| `uri_secrets.py` | logins and signatures in URIs, and the names without them |
| `patterns.py` | braces and globs |
| `ranged_file.py` | a seekable file over range requests |
| `stand_ins.py` | files that only stand in for the real ones: git-lfs pointers, web pages |
| `arrow.py` | a listing as a pyarrow filesystem |
| `retry.py`, `retry_counters.py` | which failures are retried; how many there were |
| `write_hooks.py` | the steps of a write, for tests that interrupt it |

* A plain path and `file://` are the same store. Every Entry carries a full URI for remote stores and an absolute path
  for local files, so that a part's id does not depend on the folder a command was started in.
* `etag` is the store's ETag without quotes, or `mtime_ns-size` on a disk.
* Nothing is ever overwritten: `create` is the only way to write.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from img2parquet.errors import AccessDenied, AlreadyExists, InputError, NotFound, OutcomeUnknown, StorageError, nearest
from img2parquet.storage.backend import Backend, Entry, Skip, join, redact, scheme_of
from img2parquet.storage.disk import DiskBackend
from img2parquet.storage.fsspec_backend import FsspecBackend, is_web
from img2parquet.storage.patterns import (
    count_limit,
    expand_braces,
    fixed_prefix,
    glob_regex,
    has_magic,
    literal_readings,
    scan_prefix,
)
from img2parquet.storage.s3 import S3Backend
from img2parquet.storage.s3_client import S3Options
from img2parquet.storage.uri_secrets import WEB, UriSecrets, holds_secret, name_of, names_in
from img2parquet.storage.write_hooks import reached

__all__ = ["Entry", "Store", "holds_secret", "join", "name_of", "names_in", "redact", "resolve"]

log = logging.getLogger(__name__)

S3_OPTIONS = {option.name: type(option.default) for option in fields(S3Options)}
CREDENTIALS = {"key", "secret", "token", "password", "username", "access_key", "secret_key", "aws_access_key_id"}
FEW_NAMES = 8  # up to so many names of one folder are looked up one by one
CHAINED = re.compile(r"^\w+::\w+://|://.*::\w+://")  # fsspec's zip://a.jpg::s3://b/k.zip
LOOKUPS = 16  # at the same time
ALLOW_PRIVATE = "allow_private_addresses"


@dataclass(frozen=True)
class Store:
    """Access files of every URI scheme.

    options: for S3, the fields of S3Options (`endpoint_url`, `profile`, `role_arn`, `region`, `anon`, ...); for another
    driver, a mapping under its scheme: `{"gs": {"project": "x"}}`. Credentials are never options: each worker takes
    them from its environment's provider chain.
    given: the logins and signatures of the job's own URIs. With it, every other URI comes from input data, and may not
    lead to a private address unless `{"http": {"allow_private_addresses": true}}`; without it, every URI is the
    caller's own. A redirect to another origin never leads to a private address."""

    options: Mapping[str, object] = field(default_factory=dict)
    given: UriSecrets | None = None

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            if isinstance(value, Mapping) and name not in ("s3", *S3_OPTIONS):
                if not isinstance(value.get(ALLOW_PRIVATE, False), bool):
                    raise InputError(f"storage option `{name}.{ALLOW_PRIVATE}` must be true or false")
                continue  # another driver's
            if name not in S3_OPTIONS:
                raise _unknown_option(name)
            wanted = S3_OPTIONS[name]
            if not isinstance(value, (int, float) if wanted is float else wanted):
                raise InputError(f"storage option `{name}`: not of type {wanted.__name__}: `{value}`")
        _check_who_asks(self.options)

    def expand(self, uris: Sequence[str], skip: Skip | None = None) -> list[Entry]:
        """Expand braces (`{000..127}`, `{a,b}`) and globs to the files they name, sorted by URI, each once.

        A brace or bracket is a letter where the pattern matches nothing otherwise: `photos [2020]/*`. skip: as for
        `list_files`. Raises InputError for a pattern or name that matches nothing; AccessDenied, StorageError."""
        found: dict[str, Entry] = {}
        for uri in uris:
            found.update({entry.uri: entry for entry in self._expanded(uri, skip)})
        return [found[uri] for uri in sorted(found)]

    def _expanded(self, uri: str, skip: Skip | None) -> list[Entry]:
        try:
            return self._by_patterns(count_limit(redact(uri), expand_braces(uri)), skip)
        except InputError:
            for patterns in literal_readings(uri):
                with suppress(InputError, StorageError):
                    return self._by_patterns(patterns, skip)
            raise

    def _by_patterns(self, patterns: Iterable[str], skip: Skip | None) -> list[Entry]:
        names = [resolve(pattern) for pattern in patterns]
        plain = [name for name in names if is_web(name) or not has_magic(name)]
        found = list(self._named(plain))
        for pattern in sorted(set(names) - set(plain)):
            found += self._matching(pattern, skip)
        return found

    def stat(self, uri: str) -> Entry:
        """Return size and etag of a file. Raises NotFound, AccessDenied, StorageError."""
        uri = resolve(uri)
        return self._backend(uri).stat(uri)

    def exists(self, uri: str) -> bool:
        """Ask whether a file exists; a folder does not count. Raises AccessDenied, StorageError."""
        uri = resolve(uri)
        return self._backend(uri).exists(uri)

    def list_files(self, uri: str, skip: Skip | None = None) -> list[Entry]:
        """List every file below a folder, sorted by URI, without a request per file.

        skip: called with the path and the kind of what cannot be read on a disk (dangling links, pipes, folders of
        other users), which is an error without it. Returns [] for a folder that does not exist; raises NotFound for a
        bucket that does not."""
        return sorted(self.scan(uri, skip), key=lambda entry: entry.uri)

    def scan(self, uri: str, skip: Skip | None = None) -> Iterator[Entry]:
        """List like `list_files`, lazily and in any order, so that millions of entries need not be held."""
        folder = resolve(uri).rstrip("/") + "/"
        return self._backend(folder).scan(folder, deep=True, skip=skip)

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None) -> bytes:
        """Read bytes [start, stop), cut at the end of the file as a slice is.

        With `expect`, raises StorageError when the object's size or etag differs. A body that is shorter than the store
        or the plan says is never returned."""
        assert start >= 0 and (stop is None or stop >= 0), "ranges count from the start"
        uri = resolve(uri)
        return self._backend(uri).read(uri, start, stop, expect)

    def stream(
        self,
        uri: str,
        start: int = 0,
        stop: int | None = None,
        *,
        expect: Entry | None = None,
        chunk_bytes: int = 8 << 20,
    ) -> Iterator[bytes]:
        """Read in chunks, each from the same version of the object.

        The next chunk of a remote store is fetched while the caller works on one, so two are held at a time."""
        entry = expect or self.stat(uri)
        end = entry.size_bytes if stop is None else min(stop, entry.size_bytes)
        starts = range(start, end, chunk_bytes)

        def chunk(at: int) -> bytes:
            return self.read(entry.uri, at, min(at + chunk_bytes, end), expect=entry)

        yield from map(chunk, starts) if len(starts) < 2 or not scheme_of(entry.uri) else _ahead(chunk, starts)

    def open(self, uri: str, *, expect: Entry | None = None) -> BinaryIO:
        """Open a seekable file, pinned to one version. Raises NotFound, AccessDenied, StorageError."""
        uri = resolve(uri)
        return self._backend(uri).open(uri, expect)

    def arrow_filesystem(self, uri: str) -> tuple[Any, str]:
        """Return a read-only pyarrow filesystem over the files a folder holds now, and the folder's path on it."""
        from img2parquet.storage.arrow import local_filesystem, snapshot

        folder = resolve(uri).rstrip("/")
        if not scheme_of(folder):
            return local_filesystem(), folder
        return snapshot(self.list_files(folder), self.open), folder.partition("://")[2]

    def create(self, uri: str, data: bytes) -> None:
        """Create an object in one atomic step, if none has its name; it is durable when this returns.

        Raises AlreadyExists (412), AccessDenied, StorageError (definitely not created), OutcomeUnknown."""
        uri = resolve(uri)
        reached("asked", uri)
        self._backend(uri).create(uri, data)
        reached("done", uri)

    def delete(self, uri: str) -> None:
        """Delete a file, if it exists."""
        uri = resolve(uri)
        self._backend(uri).delete(uri)

    def creates_exclusively(self, folder_uri: str) -> bool:
        """Check that this store honours If-None-Match, by creating a probe object twice."""
        probe = join(resolve(folder_uri), f"_probe-{uuid.uuid4().hex}")
        try:
            return [self._creates(probe), self._creates(probe)][1] == "exists"
        finally:
            with suppress(AccessDenied):  # a probe that may not be deleted is better than no job
                self.delete(probe)

    def sweep(self, folder_uri: str, older_than_s: float = 24 * 3600) -> int:
        """Remove temporary files of killed writers from a disk, and return their number. Object stores have none."""
        folder = resolve(folder_uri)
        return self._backend(folder).sweep(folder, older_than_s)

    def _creates(self, uri: str, attempts: int = 4) -> str:
        try:
            self.create(uri, b"img2parquet checks that this store creates an object only once")
        except AlreadyExists:
            return "exists"
        except OutcomeUnknown:
            if attempts == 1:
                raise
            return self._creates(uri, attempts - 1)
        return "created"

    def _backend(self, uri: str) -> Backend:
        scheme = scheme_of(uri)
        if not scheme:
            return DiskBackend()
        if scheme == "s3":
            chosen: dict[str, Any] = {name: self.options[name] for name in S3_OPTIONS if name in self.options}
            return S3Backend(S3Options(**chosen))
        options: Any = self.options.get(scheme, {})
        if scheme not in WEB:
            return FsspecBackend(scheme, options, self.given)
        own = {name: value for name, value in options.items() if name != ALLOW_PRIVATE}
        return FsspecBackend(scheme, own, self.given, self._allows_private)

    @property
    def _allows_private(self) -> bool:
        """Allow private addresses for http and https when either says so: redirects lead from one to the other."""
        said: list[Any] = [self.options.get(scheme, {}) for scheme in WEB]
        return any(options.get(ALLOW_PRIVATE) is True for options in said)

    def _named(self, names: Sequence[str]) -> Iterator[Entry]:
        """Look up plain names: by one listing for many names of a folder, one by one for a few."""
        for folder, group in groupby(sorted(set(names)), key=lambda name: name.rpartition("/")[0]):
            wanted = list(group)
            listed = (
                self._listed(wanted) if len(wanted) > FEW_NAMES and scheme_of(folder) and not is_web(folder) else {}
            )
            rest = [name for name in wanted if name not in listed]
            with ThreadPoolExecutor(LOOKUPS) as pool:
                entries = dict(zip(rest, pool.map(self._found, rest), strict=True))
            missing = [name for name, entry in entries.items() if entry is None]
            if missing:
                more = f" (and {len(missing) - 1} more of {len(wanted)} names)" if len(missing) > 1 else ""
                raise self._missing(missing[0], f"{redact(missing[0])}: not found{more}")
            yield from listed.values()
            yield from filter(None, entries.values())

    def _listed(self, wanted: Sequence[str]) -> dict[str, Entry]:
        """Find `wanted` in one listing, which is given up in a folder with far more other files."""
        names = set(wanted)
        entries = self._backend(wanted[0]).scan(_common_start(wanted), deep=False)
        return {entry.uri: entry for entry in islice(entries, 10_000 + 10 * len(names)) if entry.uri in names}

    def _found(self, name: str) -> Entry | None:
        try:
            return self._backend(name).stat(name)
        except NotFound:
            return None

    def _matching(self, pattern: str, skip: Skip | None) -> list[Entry]:
        prefix, rest = scan_prefix(pattern)
        deep, regex = "/" in rest or "**" in rest, glob_regex(pattern)
        unusable: list[tuple[str, str]] = []
        entries = self._backend(pattern).scan(prefix, deep=deep, skip=lambda path, kind: unusable.append((path, kind)))
        found = [entry for entry in entries if regex.fullmatch(entry.uri)]
        for path, kind in unusable:
            if path.endswith("/") or regex.fullmatch(path):
                (skip or _refuse_unusable)(path, kind)
        if found:
            return found
        with suppress(NotFound, InputError):
            return [self._backend(pattern).stat(pattern)]  # a name that holds `[` or `?` itself
        raise self._missing(pattern, f"{redact(pattern)}: matches no file")

    def _missing(self, name: str, message: str) -> InputError:
        """Suggest the nearest of the names that exist in the folder."""
        if is_web(name):
            return InputError(message)
        folder = fixed_prefix(name).rpartition("/")[0] + "/"
        with suppress(Exception):
            siblings = [entry.uri for entry in islice(self._backend(name).scan(folder, deep=False), 1000)]
            inside = next(self._backend(name).scan(name.rstrip("/") + "/", deep=True), None)
            hint = (
                f"it is a folder: name its files, as `{redact(join(name, '*'))}`" if inside else nearest(name, siblings)
            )
            return InputError(message, hint=hint or _files_there(folder, siblings))
        return InputError(message)


def _refuse_unusable(path: str, kind: str) -> None:
    """Raise InputError for a file that a pattern names and that cannot be read; only warn of a folder beside it."""
    if not path.endswith("/"):
        raise InputError(f"{path}: one of the {kind}", hint="mend it, remove it, or name the files without it")
    log.warning("%s: one of the %s: skipped, with all that is in it", path, kind)


def _ahead(read: Callable[[int], bytes], starts: Sequence[int]) -> Iterator[bytes]:
    """Call `read` for each start, one ahead of the caller."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, starts[0])
        for start in starts[1:]:
            chunk, coming = coming.result(), pool.submit(read, start)
            yield chunk
        yield coming.result()


def resolve(uri: str) -> str:
    """Normalize a URI: an absolute path for a local file, `s3://` for its aliases."""
    scheme = scheme_of(uri)
    if CHAINED.search(uri):
        raise InputError(f"{redact(uri)}: chained URLs are not read", hint="unpack the archive first")
    if scheme in ("", "file", "local"):
        return _absolute(_path_of(uri) if scheme else uri)
    rest = uri.partition("://")[2]
    if scheme in ("s3", "s3a", "s3n"):
        if "@" in rest.partition("/")[0]:
            raise InputError(
                f"{redact(uri)}: a URI must not carry credentials", hint="set AWS_PROFILE or the AWS_* keys"
            )
        return f"s3://{rest}"
    return f"{scheme}://{rest}"


def _path_of(uri: str) -> str:
    """Return the path of a `file://` URI: without its escapes (`a%20b`), unless a file has them in its name."""
    path = re.sub(r"^localhost(?=/)", "", uri.partition("://")[2])
    unquoted = unquote(path)
    is_escaped = unquoted != path and not Path(path).exists() and Path(unquoted).exists()
    return unquoted if is_escaped else path


def _absolute(path: str) -> str:
    if not path:
        raise InputError("a path is empty")
    slash = "/" if path.endswith("/") else ""
    # not Path.resolve, which would follow links and so change with the machine
    return os.path.abspath(path).rstrip("/") + slash or "/"  # noqa: PTH100


def _common_start(names: Sequence[str]) -> str:
    """Return the longest common start of names in one folder: `a/x0` for `a/x01` and `a/x02`."""
    return os.path.commonprefix(names)  # noqa: RUF071 - letters, not folders, are what a listing begins with


def _files_there(folder: str, siblings: Sequence[str]) -> str:
    if not siblings:
        return f"there are no files in {redact(folder)}"
    return f"{redact(folder)} holds {', '.join(redact(uri[len(folder) :]) for uri in siblings[:3])} ..."


def _check_who_asks(options: Mapping[str, object]) -> None:
    """Raise InputError for S3 options that name two identities, or a malformed role."""
    role = str(options.get("role_arn", ""))
    if role and not re.fullmatch(r"arn:[\w-]+:iam::\d*:role/.+", role):
        raise InputError(f"storage option `role_arn`: `{role}`; expected arn:aws:iam::123456789012:role/name")
    if options.get("external_id") and not role:
        raise InputError("storage option `external_id` needs `role_arn`: it is sent when the role is assumed")
    named = next((name for name in ("role_arn", "profile") if options.get(name)), "")
    if options.get("anon") and named:
        raise InputError(f"storage options `anon` and `{named}`: use one of them: requests are anonymous or signed")


def _unknown_option(name: str) -> InputError:
    if name in CREDENTIALS:
        return InputError(
            f"storage option `{name}`: credentials are not options", hint="set AWS_PROFILE or the AWS_* keys"
        )
    return InputError(f"unknown storage option `{name}`", known=sorted(S3_OPTIONS), hint=nearest(name, S3_OPTIONS))
