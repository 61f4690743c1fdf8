"""Read shards into rows. `SOURCES` is the table of input formats.

To add a source:

1. Write a module here with a subclass of `settings.SourceSettings`, a frozen pydantic model. Its fields are what a job
   file may say under `input:`; `kind` is a Literal with the name of the format.
2. Give it the methods of `Source`, below: `plan`, `read` and `passthrough`. `folder.py` is the shortest example.
3. Add a line to `SOURCES`: `"kind": ("module", "Class")`.
4. Add a case to `tests/read/sources.py`; `tests/read/test_conformance.py` then asks it what every source is asked.

A source is pickled to workers, so it holds settings only. Row numbers count everything that a part yields, faults
included, from 0 without gaps. Batches are cut by them, so they must depend on nothing but the part.

The sources, and what they are made of:

    webdataset.py       read tar shards; tar_samples.py groups members into samples, tar.py parses damaged tars too
    folder.py           read image files below a folder or matched by a glob
    parquet.py          read Parquet files with a column of image bytes
    table.py            read lists of URIs (CSV, TSV, text, JSONL, Parquet); uri_lists.py parses the lists
    linked_images.py    fetch the images that a file names by URI; which URIs it may name
    recognize.py        tell what lies at a path, as the commands that need no job file do
    settings.py         define what all sources share: URIs, kept columns, storage options, failures of a part
    passthrough.py      convert the columns that `keep` carries through
    part_packing.py     pack pieces of input into parts
    prefetch.py         request the next chunks of tars before they are needed
    byte_source.py      read bytes in order, from a stream or by ranges; gzip_stream.py decompresses them
    row_groups.py       read rows of Parquet files in bounded memory
    page_size_guard.py  refuse Parquet pages that unpack to far more than their size
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from img2parquet.schema import Part, Piece, Reject, Row
from img2parquet.storage import Entry

SOURCES = {
    "webdataset": ("img2parquet.read.webdataset", "WebDataset"),
    "folder": ("img2parquet.read.folder", "Folder"),
    "parquet": ("img2parquet.read.parquet", "ParquetRows"),
    "table": ("img2parquet.read.table", "Table"),
}


@dataclass(frozen=True)
class PartLimits:
    """The most that one part may hold: rows (of the widest model's result) and bytes of input."""

    rows: int = 16_384
    size_bytes: int = 1 << 30


class Source(Protocol):
    """An input format. `kind` and the fields of the settings are what a job file says under `input:`."""

    @property
    def kind(self) -> str: ...

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """Yield the parts, each as the pieces of input that it covers, in an order that depends on the input alone.

        Skip files that are in `known`, without opening them if possible; then there may be no parts at all. Raises
        InputError for missing or empty input, StorageError when the store does not respond."""

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Yield every row of a part, in order, and a Reject for each fault in the data.

        Rows that `part.only` does not name may be left out, and should be if that saves reading them; the others keep
        their numbers. Raises PartFailed or StorageError when the input changed since it was planned or the store
        fails."""

    def passthrough(self) -> pa.Schema:
        """Return the names and types of the columns in `keep`, which are the same for every part."""


def read_part(source: Source, part: Part) -> Iterator[Row | Reject]:
    """Yield the rows of a part; a row whose shard and key the part already had becomes a reject.

    A key may occur again in another shard, so that rows do not depend on how shards are packed into parts."""
    seen: set[tuple[str, str]] = set()
    for item in _wanted(source, part):
        if isinstance(item, Row) and (item.shard, item.key) in seen:
            message = f"key `{item.key}` appears twice in this part of the shard; the first row was kept"
            yield Reject(item.row, item.key, item.shard, "read", "duplicate_key", message, item.offset)
            continue
        if isinstance(item, Row):
            seen.add((item.shard, item.key))
        yield item


def _wanted(source: Source, part: Part) -> Iterator[Row | Reject]:
    """Yield the rows of a part, or only those that it names."""
    left, wanted = part.rows if part.only is not None else None, part.wanted_rows
    if left == 0:
        return
    for item in source.read(part):
        if left is None:
            yield item
        elif item.row in wanted:
            yield item
            left -= 1
            if not left:
                return
