"""Read what a part file says about itself: the metadata in its Parquet footer."""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.listing import parse_name
from img2parquet.dataset.part_file import DIGEST_KEY
from img2parquet.dataset.plan import Plan
from img2parquet.errors import StorageError
from img2parquet.storage import Entry, Store

FOOTER_TYPE = np.dtype([("id", "u8"), ("rows_in", "i8"), ("rows", "i8"), ("digest", "u1", (32,))])


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata of a part file."""

    identity: str
    part_index: int
    rows_in: int
    rows: int
    packed_rejects: str
    digest: bytes = b""  # SHA-256 of the file, computed with zeros in its place
    generation: int = 0  # above 0: of a retry
    packed_superseded: str = ""

    @property
    def rejects(self) -> tuple[dict[str, Any], ...]:
        """The rejects, unpacked on each access since a driver may hold very many footers."""
        return () if self.rows_in == self.rows else _unpacked(self.packed_rejects)

    @property
    def superseded(self) -> tuple[dict[str, Any], ...]:
        """The rejects of earlier files of the part that a retry's file replaces; they are its rows in."""
        return _unpacked(self.packed_superseded) if self.packed_superseded else ()


class Footers(Mapping[str, Footer]):
    """Footers of one plan's files by name; 1e5 of them take some megabytes. Not safe for concurrent `add`."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.columns = plan, dict[str, Any]()  # an array of FOOTER_TYPE by model, in the order of the parts
        self.texts: dict[str, tuple[str, str]] = {}  # packed rejects and superseded, where there are any
        self.none_packed, self.generation, self.count = "", 0, 0

    def add(self, name: str, footer: Footer) -> None:
        model, index, id = parse_name(name) or ("", 0, "0")
        if model not in self.columns:
            self.columns[model] = np.zeros(len(self.plan.parts), FOOTER_TYPE)
        digest = np.frombuffer(footer.digest, np.uint8)
        self.columns[model][self.plan.by_index.place(index)] = (int(id, 16), footer.rows_in, footer.rows, digest)
        if footer.rows_in == footer.rows and not footer.packed_superseded:
            self.none_packed = footer.packed_rejects
        else:
            self.texts[name] = (footer.packed_rejects, footer.packed_superseded)
        self.generation, self.count = footer.generation, self.count + 1

    def __getitem__(self, name: str) -> Footer:
        model, index, id = parse_name(name) or ("", 0, "0")
        if model not in self.columns or ("-retry" in name) != bool(self.generation):
            raise KeyError(name)
        found, rows_in, rows, digest = self.columns[model][self.plan.by_index.place(index)]
        if int(found) != int(id, 16) or not digest.any():
            raise KeyError(name)
        packed, superseded = self.texts.get(name, (self.none_packed, ""))
        identity = self.plan.identity(model)
        return Footer(identity, index, int(rows_in), int(rows), packed, digest.tobytes(), self.generation, superseded)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.plan.names_by_part() if name in self)

    def __len__(self) -> int:
        return self.count


def read_footer(store: Store, entry: Entry) -> Footer:
    """Read a part file's footer from its last bytes. Raises StorageError when the file is incomplete or damaged."""
    tail_bytes = min(entry.size_bytes, 64 << 10)
    data = store.read(entry.uri, entry.size_bytes - tail_bytes, entry.size_bytes)
    if data[-4:] != b"PAR1" or len(data) < 12:
        raise StorageError(f"{entry.uri}: not a whole Parquet file")
    needed = int.from_bytes(data[-8:-4], "little") + 8
    if needed > entry.size_bytes:
        raise StorageError(f"{entry.uri}: not a whole Parquet file")
    if needed > tail_bytes:
        data = store.read(entry.uri, entry.size_bytes - needed, entry.size_bytes)
    try:
        footer = parse_footer(pq.read_metadata(pa.BufferReader(data)))
        _ = footer.rejects, footer.superseded  # unpacked here so that damage is reported with the file's name
        return footer
    except (pa.ArrowException, KeyError, ValueError, zlib.error) as error:
        raise StorageError(f"{entry.uri}: its footer cannot be read: {error}") from None


def parse_footer(metadata: pq.FileMetaData) -> Footer:
    values = metadata.metadata
    return Footer(
        identity=sys.intern(values[b"img2parquet.identity"].decode()),  # one string per model, not per part
        part_index=json.loads(values[b"img2parquet.part"])["index"],
        rows_in=int(values[b"img2parquet.rows_in"]),
        rows=metadata.num_rows,
        packed_rejects=values[b"img2parquet.rejects"].decode(),
        digest=bytes.fromhex(values[DIGEST_KEY].decode().removeprefix("sha256:")),
        generation=int(values.get(b"img2parquet.generation", b"0")),
        packed_superseded=values.get(b"img2parquet.superseded", b"").decode(),
    )


def _unpacked(packed: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(zlib.decompress(base64.b64decode(packed))))
