"""Encode the rows and rejects of one part as one Parquet file per model.

* The bytes depend on the part and the run identity alone, never on time, host, runner or worker count.
* The footer holds a SHA-256 of the whole file, computed with zeros in its place, so that any changed byte is found.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.batch import Embedded
from img2parquet.schema import Part, Reject

ROW_GROUP_ROWS = 4096
DIGEST_KEY = b"img2parquet.zz_file"  # sorts last, after all metadata that users can influence


@dataclass
class PartBuffer:
    """Collect the batches of one part, which arrive in any order and perhaps more than once."""

    part: Part
    batches: dict[int, Embedded] = field(default_factory=dict)
    batches_due: int | None = None

    def add(self, embedded: Embedded, batch_size: int) -> None:
        if embedded.rows_in is not None:
            self.batches_due = max(1, -(-embedded.rows_in // batch_size))
        self.batches.setdefault(embedded.k, embedded)

    @property
    def is_whole(self) -> bool:
        return self.batches_due is not None and len(self.batches) == self.batches_due

    def in_order(self) -> list[Embedded]:
        return [self.batches[k] for k in sorted(self.batches)]


@dataclass(frozen=True)
class EncodedPart:
    data: bytes
    rows_in: int
    rows: int
    rejects: tuple[Reject, ...]


def encode_part(
    part: Part,
    model: str,
    identity: str,
    batches: Iterable[Embedded],
    about: Mapping[str, Any],
    *,
    generation: int = 0,
    superseded: Sequence[Reject] = (),
) -> EncodedPart:
    """Encode one part's file for one model.

    about: the run identity in full, for the footer. generation: above 0 for a retry's file, whose footer also lists the
    rejects that it supersedes; they are its rows in."""
    batches = list(batches)
    table = pa.concat_tables([batch.tables[model] for batch in batches])
    rejects = tuple(sorted((r for batch in batches for r in batch.rejects[model]), key=lambda reject: reject.row))
    rows_in = next(batch.rows_in for batch in batches if batch.rows_in is not None)
    assert rows_in == table.num_rows + len(rejects), (
        f"part {part.index}: {rows_in} in, {table.num_rows} + {len(rejects)}"
    )
    metadata = {
        "img2parquet.identity": identity,
        "img2parquet.model": model,
        "img2parquet.about": json.dumps(about, sort_keys=True),
        "img2parquet.part": json.dumps(
            {"index": part.index, "pieces": [asdict(p) for p in part.pieces]}, sort_keys=True
        ),
        "img2parquet.rows_in": str(rows_in),
        "img2parquet.rejects": _pack(rejects),
    }
    if generation:
        metadata |= {"img2parquet.generation": str(generation), "img2parquet.superseded": _pack(superseded)}
    return EncodedPart(_seal(_encode(table, metadata)), rows_in, table.num_rows, rejects)


def is_intact(data: bytes) -> bool:
    """Return whether a part file is byte for byte as it was written."""
    position = data.rfind(DIGEST_KEY)
    start = data.find(b"sha256:", position) + 7
    if position < 0 or start < 7:
        return False
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    return hashlib.sha256(blank).hexdigest().encode() == data[start : start + 64]


def _seal(data: bytes) -> bytes:
    position = data.rindex(DIGEST_KEY)
    start = data.index(b"sha256:" + b"0" * 64, position) + 7
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + 64 :]


def _pack(rejects: Iterable[Reject]) -> str:
    text = json.dumps([reject.to_dict() for reject in rejects], sort_keys=True)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def _encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    schema = table.schema
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=[f.name for f in schema if pa.types.is_string(f.type) and f.name != "key"],
        write_statistics=[f.name for f in schema if not pa.types.is_nested(f.type)],
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        writer.add_key_value_metadata({**metadata, DIGEST_KEY.decode(): "sha256:" + "0" * 64})
    return bytes(sink.getvalue())
