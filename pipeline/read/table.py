"""A list of URIs (CSV, TSV, JSONL or Parquet) to rows: the listed objects, fetched in parallel, in the list's order.

* A text list is cut at byte offsets between records, which planning finds by reading the list once: a part reads its
  own stretch and the header, not the list from the start.
* The list is pinned by its etag; the objects that it names are not, and a name that leads nowhere is a reject.
* Relative names are relative to the list's folder.
* A list is data of others: it may not send us to private addresses, to drivers that the job does not name, or, where it
  came over the web, to files of this machine. What opens a URI (a signature, a login) is used and not written down.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.errors import InputError, NotFound, PrivateAddress
from pipeline.read import PartLimits
from pipeline.read.fetch import fetch_in_order
from pipeline.read.keep import convert_all, to_valid_text
from pipeline.read.lists import Broken, CsvList, JsonList, List, ParquetList
from pipeline.read.pack import pack
from pipeline.read.settings import SourceSettings, input_exists, part_fails
from pipeline.schema import Part, Piece, Reject, Row
from pipeline.storage import Entry, name_of, redact
from pipeline.storage.entry import scheme_of
from pipeline.storage.given import WEB

MAX_NAME_BYTES = 255
ROW_SCHEMES = {"", "file", "local", *WEB, "s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss", "memory"}
LOCAL = {"", "file", "local"}

FORMATS: Mapping[str, List] = {
    "csv": CsvList(","), "tsv": CsvList("\t"), "jsonl": JsonList(), "ndjson": JsonList(), "parquet": ParquetList()
}  # fmt: skip


class Table(SourceSettings):
    """Lists that name images by their URIs."""

    kind: Literal["table"] = Field(default="table", description="Lists of URIs: CSV, TSV, JSONL or Parquet")
    format: Literal["csv", "tsv", "jsonl", "parquet"] | None = Field(
        default=None, description="The lists' format; default: told by their extension"
    )
    uri: str = Field(default="uri", description="The column that names the images; relative to the list's folder")
    key: str | None = Field(default=None, description="The column that names a row; default: the URI as it is written")
    keep: tuple[str, ...] = Field(
        default=(),
        description="Columns to carry through: text unless `name:type` says string, int64, float64 or bool; of a "
        "Parquet list, with its own type",
    )
    threads: int = Field(default=32, ge=1, le=256, description="Images that one reader fetches at a time")
    max_image_bytes: int = Field(
        default=256 << 20, ge=1, description="An object larger than this is rejected without being read whole"
    )

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """Runs of at most `limits.rows` rows; the images' sizes are not known. Raises InputError, StorageError."""
        with input_exists():
            parts = pack(self._pieces(limits, known), replace(limits, size_bytes=1 << 62))
            first = next(parts, None)
            if first is None and known:
                return
            if first is None:
                raise InputError(f"{', '.join(map(redact, self.names))}: the lists hold no rows")
            yield from itertools.chain([first], parts)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Every listed image of a part in order. Raises PartFailed when the store refuses, or the list changed."""
        wanted = part.wanted_rows
        records = ((row, record) for row, record in enumerate(self._records(part)) if row in wanted)
        for (row, record), image in fetch_in_order(records, lambda item: self._fetch(item[1]), self.threads):
            if isinstance(image, Broken):
                yield Reject(row, record.key, record.shard, "read", image.reason, image.message)
            else:
                yield Row(row, record.key, record.shard, image, record.columns, warnings=record.remarks)

    def passthrough(self) -> pa.Schema:
        return self._passthrough

    @cached_property
    def _passthrough(self) -> pa.Schema:
        # kept on the instance and pickled with it: a worker that asks for each batch must not open a list each time
        if all(column.type_name for column in self.kept):
            return pa.schema([column.field() for column in self.kept])
        with input_exists():
            entry = self.store.expand(self.names[:1])[0]
            return pa.schema(self._format(entry.uri).fields(self.store, entry, self.kept))

    def _entries(self) -> list[Entry]:
        return sorted(self.store.expand(self.names), key=lambda entry: entry.uri)

    def _format(self, uri: str) -> List:
        name = self.format or redact(uri).rpartition("/")[2].rpartition(".")[2].lower()
        if name not in FORMATS:
            raise InputError(
                f"{redact(uri)}: not known as a list of URIs by its extension",
                known=[f".{known}" for known in FORMATS],
                hint="set `input.format`; a compressed list must be unpacked first",
            )
        return FORMATS[name]

    def _needed(self) -> list[str]:
        return [self.uri, *([self.key] if self.key else []), *(column.name for column in self.kept)]

    def _pieces(self, limits: PartLimits, known: Container[Entry]) -> Iterator[Piece]:
        first = None
        for entry in self._entries():
            is_known = entry in known
            if is_known and first:
                continue  # one of them tells the types
            first = first or entry
            fields = self._format(entry.uri).fields(self.store, entry, self.kept)
            if fields != list(self.passthrough()):
                raise InputError(
                    f"{redact(first.uri)} and {redact(entry.uri)} do not have the same types: "
                    f"{_listing(self.passthrough())} and {_listing(fields)}",
                    hint="name the types that are wanted: `keep: [name:type]`",
                )
            if not is_known:
                yield from self._format(entry.uri).pieces(self.store, entry, self._needed(), limits)

    def _records(self, part: Part) -> Iterator[Record]:
        default = None if isinstance(self._format(part.pieces[0].uri), ParquetList) else "string"
        for piece in part.pieces:
            with part_fails(piece.uri):
                for where, values in self._format(piece.uri).read(self.store, piece, self._needed()):
                    yield self._record(where, values, piece.uri, default)

    def _record(self, where: str, values: Mapping[str, Any] | Broken, shard: str, default: str | None) -> Record:
        if isinstance(values, Broken):
            return Record(where, shard, "", values)
        uri, key = values.get(self.uri), values.get(self.key or self.uri)
        if not isinstance(uri, str) or not uri.strip():
            key = where if not self.key or key in (None, "") else to_valid_text(str(key))
            return Record(key, shard, "", Broken("not_found", f"column `{self.uri}` names no URI"))
        if not scheme_of(uri) and max(map(len, uri.encode("utf-8", "replace").split(b"/"))) > MAX_NAME_BYTES:
            return Record(where, shard, "", Broken("not_found", f"`{uri[:60]}...` is too long for a file's name"))
        if key is None or key == "":
            return Record(where, shard, "", Broken("no_key", f"column `{self.key}` is null or empty"))
        columns, remarks = convert_all(self.kept, {**values, self.uri: name_of(uri)}, default)
        address = _absolute(to_valid_text(uri.strip()), shard)
        refused = self._refuses(scheme_of(address), shard)
        return Record(to_valid_text(name_of(str(key))), shard, address, refused, columns, remarks)

    def _refuses(self, scheme: str, shard: str) -> Broken | None:
        """Why a list may not name a URI of this scheme."""
        own = scheme_of(shard)
        if scheme in LOCAL and own in WEB:
            return Broken("unsupported", "a list from the web may not name a file of this machine")
        if scheme in ROW_SCHEMES or scheme == own or scheme in self.storage_options:
            return None
        message = f"a list may not ask for the driver `{scheme}://`; where it is wanted, set storage_options"
        return Broken("unsupported", f"{message}: {{{scheme}: {{}}}}")

    def _fetch(self, record: Record) -> bytes | Broken:
        if record.broken:
            return record.broken
        try:
            image = self.store.read(record.uri, 0, self.max_image_bytes + 1)
        except PrivateAddress as error:
            return Broken("unsupported", f"{error.message}; {error.hint}")
        except (NotFound, InputError) as error:
            return Broken("not_found", error.message)
        except ValueError as error:  # a NUL in a file's name
            return Broken("not_found", f"{redact(record.uri)}: {error}")
        except Exception:
            with part_fails(record.uri):
                raise
        if len(image) > self.max_image_bytes:
            return Broken("unsupported", f"more than max_image_bytes: {self.max_image_bytes}")
        return image


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a list: where its image is, or why there is none."""

    key: str
    shard: str
    uri: str
    broken: Broken | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def _absolute(uri: str, list_uri: str) -> str:
    """A name in a list to a URI; one without a scheme is relative to the list's folder."""
    if scheme_of(uri) or uri.startswith("/"):
        return uri
    if scheme_of(list_uri) in WEB:
        list_uri = re.split(r"[?#]", list_uri, maxsplit=1)[0]
    scheme, slashes, path = list_uri.rpartition("://")
    authority, _, path = path.partition("/")
    return scheme + slashes + authority + posixpath.normpath(posixpath.join("/" + posixpath.dirname(path), uri))


def _listing(fields: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in fields)
