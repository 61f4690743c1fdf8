"""What travels between the steps: the records, and the columns of a result row with who adds them.

Piece -> Part            plan: which rows of which files, fixed once; Wanted: a few of them, for a retry
Row | Reject             read: an image's bytes with its key, or why there is none
Pixels | Bad             decode: RGB pixels, or why there are none
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Reason = Literal[
    "empty",  # zero bytes
    "not_an_image",  # HTML, text, an unknown format
    "truncated",  # ends before its last row
    "corrupt_data",  # damaged inside
    "too_many_pixels",  # the header says more than `max_pixels`
    "aspect_ratio",  # the resized image would be too large
    "unsupported",  # an image, of a kind that we do not decode (12-bit JPEG, HEIC, float TIFF)
    "no_key",  # the column that names the row is null or empty there
    "duplicate_key",  # a second row with a key that its part already has
    "not_found",  # a table names an object that is not there
    "shard_damaged",  # bytes of a shard that could not be read as rows
    "worker_died",  # the decoder or model took its process with it
    "timed_out",
]

REASONS: tuple[str, ...] = get_args(Reason)

RESERVED_COLUMNS = {
    "key": (pa.string(), "read: the source's own name for the row (tar member stem, relative path, named column)"),
    "shard": (pa.string(), "read: URI of the tar, Parquet file or list, or of the folder's root"),
    "width": (pa.int32(), "decode: pixels of the upright source image"),
    "height": (pa.int32(), "decode: pixels of the upright source image"),
    "warnings": (pa.list_(pa.string()), "decode: remarks on an accepted image (16bit_scaled, animated, salvaged)"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rows in one file. `start`/`stop` are in the source's own unit: bytes of a tar, rows of a Parquet
    file or list; (0, None) is the whole file. `rows` is None where only reading can tell."""

    uri: str
    size_bytes: int
    etag: str
    start: int = 0
    stop: int | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """One source row of a part, and where its reject says that it lies."""

    row: int
    key: str
    shard: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The unit of work, commit and retry: a deterministic set of pieces; of a retry, some rows of them, in order."""

    index: int
    pieces: tuple[Piece, ...]
    only: tuple[Wanted, ...] | None = None

    @property
    def rows(self) -> int | None:
        if self.only is not None:
            return len(self.only)
        counts = [piece.rows for piece in self.pieces]
        return None if any(count is None for count in counts) else sum(count or 0 for count in counts)

    @property
    def wanted_rows(self) -> Collection[int]:
        """Numbers of the rows that are to be read, among others perhaps."""
        return range(1 << 62) if self.only is None else frozenset(wanted.row for wanted in self.only)

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def covers(self) -> str:
        """A hash of what the part covers: files, sizes, etags and ranges; never its rank."""
        covered = [[p.uri, p.size_bytes, p.etag, p.start, p.stop] for p in self.pieces]
        return hashlib.sha256(json.dumps(covered).encode()).hexdigest()

    def id(self, identity: str) -> str:
        """16 hex digits over what the part covers and the run identity of one model."""
        return part_id(identity, self.covers)


def part_id(identity: str, covers: str) -> str:
    return hashlib.sha256(f"{identity}/{covers}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Row:
    """One image as it lies in its shard. `row` counts the part's source rows from 0 and includes faults."""

    row: int
    key: str
    shard: str
    image: bytes | memoryview
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    offset: int | None = None
    warnings: tuple[str, ...] = ()  # remarks of the reader, such as `label_not_int64`


@dataclass(frozen=True, slots=True)
class Reject:
    """A row, or a stretch of a shard, that could not be used: counted, kept, never silent."""

    row: int
    key: str
    shard: str
    stage: Literal["read", "decode", "preprocess", "embed"]
    reason: Reason
    message: str
    offset: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded image: uint8 RGB, (height, width, 3), upright; warnings are remarks on what was done to it.

    Where `preprocess: fast` decoded it `shrunk` times smaller, a last row or column that the source fills in part
    included, `source_HW` is the source's own size; `height` and `width` are the source's always."""

    rgb_HWC: npt.NDArray[np.uint8]
    warnings: tuple[str, ...] = ()
    shrunk: int = 1
    source_HW: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        return self.source_HW[0] if self.source_HW else int(self.rgb_HWC.shape[0])

    @property
    def width(self) -> int:
        return self.source_HW[1] if self.source_HW else int(self.rgb_HWC.shape[1])


@dataclass(frozen=True, slots=True)
class Bad:
    """An image that could not be used, and why."""

    reason: Reason
    message: str
