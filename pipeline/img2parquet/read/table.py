"""Read the images that a list of URIs (CSV, TSV, JSONL or Parquet) names, in parallel and in the list's order.

* A text list is cut at byte offsets between records, which planning finds by reading the list once: a part reads the
  header and its own slice, not the list from the start.
* The list is pinned by its etag; the objects that it names are not, and one that does not exist is a reject.
* `linked_images.py` says what a list may name. Secrets in a URI (a signature, a login) are used and not written down.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from img2parquet.errors import InputError
from img2parquet.read import PartLimits
from img2parquet.read.linked_images import JUDGED_ALONE, MAX_NAME_BYTES, LinkedImages, address_of
from img2parquet.read.part_packing import pack
from img2parquet.read.passthrough import convert_all, to_valid_text
from img2parquet.read.settings import SourceSettings, input_exists, part_fails
from img2parquet.read.uri_lists import Broken, CsvList, JsonList, List, ParquetList, TextList
from img2parquet.schema import Part, Piece, Reject, Row
from img2parquet.storage import Entry, name_of, redact
from img2parquet.storage.backend import scheme_of
from img2parquet.storage.parallel import fetch_in_order

PROBED_ROWS = 10_000  # of each list, asked when none of the first rows can be read

FORMATS: Mapping[str, List] = {
    "csv": CsvList(","), "tsv": CsvList("\t"), "txt": TextList(), "jsonl": JsonList(), "ndjson": JsonList(),
    "parquet": ParquetList(),
}  # fmt: skip


class Table(SourceSettings):
    """Lists that name images by their URIs."""

    kind: Literal["table"] = Field(default="table", description="Lists of URIs: CSV, TSV, text, JSONL or Parquet")
    format: Literal["csv", "tsv", "txt", "jsonl", "parquet"] | None = Field(
        default=None, description="The lists' format (`txt`: one URI a line); default: told by their extension"
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
        """Yield parts of at most `limits.rows` rows; image sizes are unknown. Raises InputError, StorageError."""
        with input_exists():
            parts = pack(self._pieces(limits, known), replace(limits, size_bytes=1 << 62))
            first = next(parts, None)
            if first is None and known:
                return
            if first is None:
                raise InputError(f"{', '.join(map(redact, self.names))}: the lists hold no rows")
            yield from itertools.chain([first], parts)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Yield every listed image of a part in order.

        Raises PartFailed if the store fails or the list changed, JobFailed if nothing that it names can be read."""
        wanted, images = part.wanted_rows, LinkedImages(self.store, self.max_image_bytes)
        records = ((row, record) for row, record in enumerate(self._records(part)) if row in wanted)
        fetched = fetch_in_order(records, lambda item: item[1].broken or images.fetch(item[1].uri), self.threads)
        for (row, record), image in images.checked(fetched, partial(self._others, part)):
            if isinstance(image, Broken):
                yield Reject(row, record.key, record.shard, "read", image.reason, image.message)
            else:
                yield Row(row, record.key, record.shard, image, record.columns, warnings=record.remarks)

    def passthrough(self) -> pa.Schema:
        return self._passthrough

    @cached_property
    def _passthrough(self) -> pa.Schema:
        # cached on the instance and pickled with it, so that a worker need not open a list for each batch
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

    @property
    def _names(self) -> list[str]:
        return [self.uri, *([self.key] if self.key else [])]

    def _needed(self) -> list[str]:
        return [*self._names, *(column.name for column in self.kept)]

    def _pieces(self, limits: PartLimits, known: Container[Entry]) -> Iterator[Piece]:
        first = None
        for entry in self._entries():
            is_known = entry in known
            if is_known and first:
                continue  # one of them is enough to know the types
            first = first or entry
            fields = self._format(entry.uri).fields(self.store, entry, self.kept)
            if fields != list(self.passthrough()):
                raise InputError(
                    f"{redact(first.uri)} and {redact(entry.uri)} do not have the same types: "
                    f"{_listing(self.passthrough())} and {_listing(fields)}",
                    hint="set the types explicitly: `keep: [name:type]`",
                )
            if not is_known:
                yield from self._format(entry.uri).pieces(self.store, entry, self._needed(), limits)

    def _records(self, part: Part) -> Iterator[Record]:
        default = None if isinstance(self._format(part.pieces[0].uri), ParquetList) else "string"
        for piece in part.pieces:
            with part_fails(piece.uri):
                for where, values in self._format(piece.uri).read(self.store, piece, self._names, self.kept):
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
        address = address_of(to_valid_text(uri.strip()), shard, self.storage_options)
        key, broken = to_valid_text(name_of(str(key))), address if isinstance(address, Broken) else None
        return Record(key, shard, "" if isinstance(address, Broken) else address, broken, columns, remarks)

    def _others(self, part: Part) -> Iterator[str]:
        """Yield URIs that the lists of a part name, from their first rows."""
        for uri in dict.fromkeys(piece.uri for piece in part.pieces):
            entry = self.store.stat(uri)
            whole = Piece(uri, entry.size_bytes, entry.etag, 0, None)
            for record in itertools.islice(self._records(Part(0, (whole,))), PROBED_ROWS):
                if record.uri and scheme_of(record.uri) in JUDGED_ALONE:
                    yield record.uri


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a list: the URI of its image, or why it has none."""

    key: str
    shard: str
    uri: str
    broken: Broken | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def _listing(fields: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in fields)
