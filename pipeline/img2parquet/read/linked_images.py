"""Fetch the images that a list, or a Parquet file, names by URI.

* Relative names are relative to the folder of the file that names them. Keys of object stores are taken to the letter:
  `x//a.jpg` and `x/a.jpg` are two objects.
* The naming file is untrusted data: it may not lead to private addresses, to drivers that the job does not name, or, if
  it came over the web, to files of this machine.
* A web address that is refused, or whose server does not answer, is a reject, and so is a local file that may not be
  read. If none of them can be read, the fault is the network's or the store's, and the job fails.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from img2parquet.errors import AccessDenied, InputError, JobFailed, NotFound, PrivateAddress, Refused, Unreachable
from img2parquet.read.gzip_stream import unzipped
from img2parquet.read.settings import part_fails
from img2parquet.read.uri_lists import Broken
from img2parquet.storage import Store, redact
from img2parquet.storage.backend import scheme_of
from img2parquet.storage.uri_secrets import WEB, origin_of

Item = TypeVar("Item")

MAX_NAME_BYTES = 255
LOCAL = {"", "file", "local"}
ROW_SCHEMES = {*LOCAL, *WEB, "s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss", "memory"}
JUDGED_ALONE = {*LOCAL, *WEB}  # schemes of which one image may be refused while the others can be read
SILENT = {"refused", "unreachable"}
HELD_ROWS = 64  # rows that wait until one of them can be read
PROBES = 16  # other addresses that are asked when none of those rows can
GIVE_UP_AFTER = 8  # requests to a server that has not answered any


def address_of(name: str, naming_uri: str, options: Collection[str]) -> str | Broken:
    """Return the URI that a name in a file means, or why the file may not name it. options: schemes the job names."""
    address = _absolute(name, naming_uri)
    scheme, own = scheme_of(address), scheme_of(naming_uri)
    if not scheme and max(map(len, address.encode("utf-8", "replace").split(b"/"))) > MAX_NAME_BYTES:
        return Broken("not_found", f"`{name[:60]}...` is too long for a file's name")
    if scheme in LOCAL and own in WEB:
        return Broken("unsupported", "a list from the web may not name a file of this machine")
    if scheme in ROW_SCHEMES or scheme == own or scheme in options:
        return address
    message = f"a list may not ask for the driver `{scheme}://`; where it is wanted, set storage_options"
    return Broken("unsupported", f"{message}: {{{scheme}: {{}}}}")


@dataclass
class LinkedImages:
    """Fetch images by URI. Threads may share it."""

    store: Store
    max_bytes: int
    unanswered: Counter[str] = field(default_factory=Counter)  # requests, by web server
    answering: set[str] = field(default_factory=set)  # web servers that have answered
    has_answer: bool = False  # from one of JUDGED_ALONE

    def fetch(self, uri: str) -> bytes | Broken:
        """Return an image's bytes, or why there are none. Raises PartFailed when the store fails."""
        origin = origin_of(uri) if scheme_of(uri) in WEB else ""
        if self.unanswered[origin] >= GIVE_UP_AFTER and origin not in self.answering:
            return Broken("unreachable", f"{redact(uri)}: its server answered none of {GIVE_UP_AFTER} requests")
        found = self._read(uri)
        if _reason(found) == "unreachable":
            self.unanswered[origin] += 1
        else:
            self.answering.add(origin)
        if isinstance(found, Broken):
            return found
        image = unzipped(found, self.max_bytes + 1)
        if len(image) > self.max_bytes:
            return Broken("unsupported", f"more than max_image_bytes: {self.max_bytes}")
        return image

    def checked(
        self, fetched: Iterable[tuple[Item, bytes | Broken]], others: Callable[[], Iterable[str]]
    ) -> Iterator[tuple[Item, bytes | Broken]]:
        """Pass fetched images on, holding them back from the first that is refused until one can be read.

        others: further URIs to ask. Raises JobFailed when none of them can be read."""
        held: list[tuple[Item, bytes | Broken]] = []
        for item, image in fetched:
            held.append((item, image))
            if not self.has_answer and len(held) >= HELD_ROWS:
                self._check_answers(held, others())
            if self.has_answer or not (_reason(image) in SILENT or len(held) > 1):
                yield from held
                held.clear()
        if held:
            self._check_answers(held, others())
            yield from held

    def _read(self, uri: str) -> bytes | Broken:
        is_alone = scheme_of(uri) in JUDGED_ALONE
        try:
            image = self.store.read(uri, 0, self.max_bytes + 1)
            self.has_answer = self.has_answer or is_alone
            return image
        except PrivateAddress as error:
            return Broken("unsupported", f"{error.message}; {error.hint}")
        except NotFound as error:
            self.has_answer = self.has_answer or is_alone
            return Broken("not_found", error.message)
        except InputError as error:
            return Broken("not_found", error.message)
        except ValueError as error:  # a NUL in a file's name
            return Broken("not_found", f"{redact(uri)}: {error}")
        except (AccessDenied, Refused, Unreachable) as error:
            if is_alone:
                return Broken("unreachable" if isinstance(error, Unreachable) else "refused", error.message)
            with part_fails(uri):
                raise
        except Exception:
            with part_fails(uri):
                raise

    def _check_answers(self, held: Iterable[tuple[Item, bytes | Broken]], others: Iterable[str]) -> None:
        """Raise JobFailed when none of the others can be read either."""
        silent = [image.message for _, image in held if isinstance(image, Broken) and image.reason in SILENT]
        by_origin: dict[str, list[str]] = {}
        for uri in others:
            by_origin.setdefault(origin_of(uri), []).append(uri)
        first = [uris[0] for uris in by_origin.values()]
        rest = [uri for uris in by_origin.values() for uri in uris[1:]]
        asked = (first + rest[:: max(1, len(rest) // PROBES)])[:PROBES]
        with ThreadPoolExecutor(PROBES, thread_name_prefix="probe") as pool:
            list(pool.map(self._read, asked))
        if not self.has_answer:
            raise JobFailed(
                f"nothing that the list names can be read: neither {len(silent)} rows in sequence nor {len(asked)} "
                f"others; the first: {silent[0]}",
                hint="check the network, a proxy, and whether a login or new signatures are needed; then run the same "
                "command again",
            )


def _reason(image: bytes | Broken) -> str:
    return image.reason if isinstance(image, Broken) else ""


def _absolute(uri: str, naming_uri: str) -> str:
    """Turn a name into a URI; a name without a scheme is relative to the folder of the file that names it."""
    if scheme_of(uri) or uri.startswith("/"):
        return uri
    if scheme_of(naming_uri) in WEB:
        naming_uri = re.split(r"[?#]", naming_uri, maxsplit=1)[0]
    scheme, slashes, path = naming_uri.rpartition("://")
    authority, _, path = path.partition("/")
    beside = f"/{path}".rpartition("/")[0] + "/" + uri
    return scheme + slashes + authority + _without_dots(beside) if scheme else posixpath.normpath(beside)


def _without_dots(path: str) -> str:
    """Resolve the segments `.` and `..` of a path, and keep its empty ones."""
    kept: list[str] = []
    for segment in path.split("/")[1:]:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept)
