"""URIs in, bytes out: list, read, create once, delete, on anything that fsspec knows.

| file | URIs |
|---|---|
| `disk.py` | paths and `file://` |
| `s3.py` | `s3://`, through s3fs |
| `remote.py` | every other scheme with an fsspec driver |
| `web.py` | the client behind http(s): where it goes, how much it takes |
| `given.py` | logins and signatures in URIs, and the names without them |
| `arrow.py` | a listing as a pyarrow filesystem |
| `faults.py`, `retries.py` | which failures deserve another try; how many there were |
| `steps.py` | what a test may listen to |

* A plain path and `file://` are the same store. Every Entry carries a full URI for remote stores and an absolute path
  for local files, so that a part's id does not depend on the folder a command was started in.
* `etag` is the store's ETag without quotes, or `mtime_ns-size` on a disk.
* Nothing is ever overwritten: `create` is the only way to write.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import groupby, islice
from typing import Any, BinaryIO

from pipeline.errors import AccessDenied, AlreadyExists, InputError, NotFound, OutcomeUnknown, nearest
from pipeline.storage.disk import Disk
from pipeline.storage.entry import Backend, Entry, join, redact, scheme_of
from pipeline.storage.given import WEB, Given, holds_secret, name_of, names_in
from pipeline.storage.patterns import count_limit, expand_braces, fixed_prefix, glob_regex, has_magic
from pipeline.storage.remote import Remote, is_web
from pipeline.storage.s3 import S3
from pipeline.storage.s3_client import S3Options
from pipeline.storage.steps import reached

__all__ = ["Entry", "Store", "holds_secret", "join", "name_of", "names_in", "redact", "resolve"]

S3_OPTIONS = {option.name: type(option.default) for option in fields(S3Options)}
CREDENTIALS = {"key", "secret", "token", "password", "username", "access_key", "secret_key", "aws_access_key_id"}
FEW_NAMES = 8  # up to so many names of one folder are looked up one by one
CHAINED = re.compile(r"^\w+::\w+://|://.*::\w+://")  # fsspec's zip://a.jpg::s3://b/k.zip
LOOKUPS = 16  # at the same time
ALLOW_PRIVATE = "allow_private_addresses"


@dataclass(frozen=True)
class Store:
    """Access to every URI scheme. Options of S3 are `endpoint_url`, `profile`, `role_arn`, `region`, `anon`,
    `requester_pays` and the other fields of S3Options; those of another driver are a mapping under its scheme:
    `{"gs": {"project": "x"}}`.
    Never credentials: those come from the environment's provider chain on each worker.

    `given`: what a job's own URIs hold beyond their names. URIs are names then, and what else is asked for was named
    by others: it may not lie behind private addresses, unless `{"http": {"allow_private_addresses": true}}`. Without
    it every URI is the caller's own. Redirects to another origin may never lead there."""

    options: Mapping[str, object] = field(default_factory=dict)
    given: Given | None = None

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            if isinstance(value, Mapping) and name not in ("s3", *S3_OPTIONS):
                if not isinstance(value.get(ALLOW_PRIVATE, False), bool):
                    raise InputError(f"storage option `{name}.{ALLOW_PRIVATE}`: say true or false")
                continue  # another driver's
            if name not in S3_OPTIONS:
                raise _unknown_option(name)
            wanted = S3_OPTIONS[name]
            if not isinstance(value, (int, float) if wanted is float else wanted):
                raise InputError(f"storage option `{name}`: not of type {wanted.__name__}: `{value}`")
        _check_who_asks(self.options)

    def expand(self, uris: Sequence[str]) -> list[Entry]:
        """Braces (`{000..127}`, `{a,b}`) and globs to the files they name, sorted by URI, each once.
        Raises InputError for a pattern or name that matches nothing; AccessDenied, StorageError."""
        found: dict[str, Entry] = {}
        for uri in uris:
            names = [resolve(name) for name in count_limit(redact(uri), expand_braces(uri))]
            plain = [name for name in names if is_web(name) or not has_magic(name)]
            found.update({entry.uri: entry for entry in self._named(plain)})
            for pattern in sorted(set(names) - set(plain)):
                found.update({entry.uri: entry for entry in self._matching(pattern)})
        return [found[uri] for uri in sorted(found)]

    def stat(self, uri: str) -> Entry:
        """Raises NotFound, AccessDenied, StorageError."""
        uri = resolve(uri)
        return self._backend(uri).stat(uri)

    def exists(self, uri: str) -> bool:
        """One look at one file; a folder is none. Raises AccessDenied, StorageError."""
        uri = resolve(uri)
        return self._backend(uri).exists(uri)

    def list_files(self, uri: str) -> list[Entry]:
        """Every file below a folder, sorted by URI; [] where there is no such folder, NotFound where there is no such
        bucket. One listing, no HEADs."""
        return sorted(self.scan(uri), key=lambda entry: entry.uri)

    def scan(self, uri: str) -> Iterator[Entry]:
        """The same in any order, while it comes: of very many, nobody need hold all."""
        folder = resolve(uri).rstrip("/") + "/"
        return self._backend(folder).scan(folder, deep=True)

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None) -> bytes:
        """Bytes [start, stop), cut at the file's end as a slice is. With `expect`, an object whose size or etag differs
        raises StorageError; a body shorter than the store's or the plan's size is never returned as whole."""
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
        """`read` in chunks, each checked against the same version of the object. Of a remote store the next chunk is
        fetched while the caller works on one, so two are held at a time."""
        entry = expect or self.stat(uri)
        end = entry.size_bytes if stop is None else min(stop, entry.size_bytes)
        starts = range(start, end, chunk_bytes)

        def chunk(at: int) -> bytes:
            return self.read(entry.uri, at, min(at + chunk_bytes, end), expect=entry)

        yield from map(chunk, starts) if len(starts) < 2 or not scheme_of(entry.uri) else _ahead(chunk, starts)

    def open(self, uri: str, *, expect: Entry | None = None) -> BinaryIO:
        """A seekable file for pyarrow.parquet, pinned to one version. Raises NotFound, AccessDenied, StorageError."""
        uri = resolve(uri)
        return self._backend(uri).open(uri, expect)

    def arrow_filesystem(self, uri: str) -> tuple[Any, str]:
        """A pyarrow filesystem that reads what a folder holds now, and the folder's path on it. One listing."""
        from pipeline.storage.arrow import local_filesystem, snapshot

        folder = resolve(uri).rstrip("/")
        if not scheme_of(folder):
            return local_filesystem(), folder
        return snapshot(self.list_files(folder), self.open), folder.partition("://")[2]

    def create(self, uri: str, data: bytes) -> None:
        """Create an object that is not there yet, in one atomic step, durable when this returns.
        Raises AlreadyExists (412), AccessDenied, StorageError (definitely not created), OutcomeUnknown."""
        uri = resolve(uri)
        reached("asked", uri)
        self._backend(uri).create(uri, data)
        reached("done", uri)

    def delete(self, uri: str) -> None:
        """Quiet where there is nothing."""
        uri = resolve(uri)
        self._backend(uri).delete(uri)

    def creates_exclusively(self, folder_uri: str) -> bool:
        """Whether this store honours If-None-Match: creates a probe object twice and looks at the second answer."""
        probe = join(resolve(folder_uri), f"_probe-{uuid.uuid4().hex}")
        try:
            return [self._creates(probe), self._creates(probe)][1] == "exists"
        finally:
            with suppress(AccessDenied):  # a probe that may not be deleted is better than no job
                self.delete(probe)

    def sweep(self, folder_uri: str, older_than_s: float = 24 * 3600) -> int:
        """Remove what killed creates left on a disk; how many files. Nothing to do on an object store."""
        folder = resolve(folder_uri)
        return self._backend(folder).sweep(folder, older_than_s)

    def _creates(self, uri: str, attempts: int = 4) -> str:
        try:
            self.create(uri, b"img2parquet asks whether this store creates an object only once")
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
            return Disk()
        if scheme == "s3":
            chosen: dict[str, Any] = {name: self.options[name] for name in S3_OPTIONS if name in self.options}
            return S3(S3Options(**chosen))
        options: Any = self.options.get(scheme, {})
        if scheme not in WEB:
            return Remote(scheme, options, self.given)
        own = {name: value for name, value in options.items() if name != ALLOW_PRIVATE}
        return Remote(scheme, own, self.given, self._allows_private)

    @property
    def _allows_private(self) -> bool:
        """For both schemes, where one says so: redirects go from one to the other."""
        said: list[Any] = [self.options.get(scheme, {}) for scheme in WEB]
        return any(options.get(ALLOW_PRIVATE) is True for options in said)

    def _named(self, names: Sequence[str]) -> Iterator[Entry]:
        """The entries of plain names: one listing for many names of a folder, a look at each for a few."""
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
        """Those of `wanted` that one listing shows, without reading on through a folder of a million others."""
        names = set(wanted)
        entries = self._backend(wanted[0]).scan(_common_start(wanted), deep=False)
        return {entry.uri: entry for entry in islice(entries, 10_000 + 10 * len(names)) if entry.uri in names}

    def _found(self, name: str) -> Entry | None:
        try:
            return self._backend(name).stat(name)
        except NotFound:
            return None

    def _matching(self, pattern: str) -> list[Entry]:
        prefix = fixed_prefix(pattern)
        rest = pattern[len(prefix) :]
        deep, regex = "/" in rest or "**" in rest, glob_regex(pattern)
        found = [entry for entry in self._backend(pattern).scan(prefix, deep=deep) if regex.fullmatch(entry.uri)]
        if found:
            return found
        with suppress(NotFound, InputError):
            return [self._backend(pattern).stat(pattern)]  # a name that holds `[` or `?` itself
        raise self._missing(pattern, f"{redact(pattern)}: matches no file")

    def _missing(self, name: str, message: str) -> InputError:
        """With the nearest of the names that do exist in the folder."""
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


def _ahead(read: Callable[[int], bytes], starts: Sequence[int]) -> Iterator[bytes]:
    """What `read` makes of each start, one ahead of the caller."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, starts[0])
        for start in starts[1:]:
            chunk, coming = coming.result(), pool.submit(read, start)
            yield chunk
        yield coming.result()


def resolve(uri: str) -> str:
    """The one spelling of a URI: an absolute path for a local file, `s3://` for its aliases."""
    scheme = scheme_of(uri)
    if CHAINED.search(uri):
        raise InputError(f"{redact(uri)}: chained URLs are not read", hint="unpack the archive first")
    if scheme in ("", "file", "local"):
        return _absolute(uri.partition("://")[2] if scheme else uri)
    rest = uri.partition("://")[2]
    if scheme in ("s3", "s3a", "s3n"):
        if "@" in rest.partition("/")[0]:
            raise InputError(
                f"{redact(uri)}: a URI must not carry credentials", hint="set AWS_PROFILE or the AWS_* keys"
            )
        return f"s3://{rest}"
    return f"{scheme}://{rest}"


def _absolute(path: str) -> str:
    if not path:
        raise InputError("an empty path names nothing")
    slash = "/" if path.endswith("/") else ""
    # not Path.resolve, which would follow links and so change with the machine
    return os.path.abspath(path).rstrip("/") + slash or "/"  # noqa: PTH100


def _common_start(names: Sequence[str]) -> str:
    """`a/x01`, `a/x02` -> `a/x0`; within the folder that they share."""
    return os.path.commonprefix(names)  # noqa: RUF071 - letters, not folders, are what a listing begins with


def _files_there(folder: str, siblings: Sequence[str]) -> str:
    if not siblings:
        return f"there are no files in {redact(folder)}"
    return f"{redact(folder)} holds {', '.join(redact(uri[len(folder) :]) for uri in siblings[:3])} ..."


def _check_who_asks(options: Mapping[str, object]) -> None:
    """Raises InputError where the options of S3 name two who ask, or a role that is none."""
    role = str(options.get("role_arn", ""))
    if role and not re.fullmatch(r"arn:[\w-]+:iam::\d*:role/.+", role):
        raise InputError(f"storage option `role_arn`: `{role}`; expected arn:aws:iam::123456789012:role/name")
    if options.get("external_id") and not role:
        raise InputError("storage option `external_id` without `role_arn`: it is part of asking for a role")
    named = next((name for name in ("role_arn", "profile") if options.get(name)), "")
    if options.get("anon") and named:
        raise InputError(f"storage options `anon` and `{named}`: a bucket is asked by nobody, or by somebody")


def _unknown_option(name: str) -> InputError:
    if name in CREDENTIALS:
        return InputError(
            f"storage option `{name}`: credentials are not options", hint="set AWS_PROFILE or the AWS_* keys"
        )
    return InputError(f"unknown storage option `{name}`", known=sorted(S3_OPTIONS), hint=nearest(name, S3_OPTIONS))
