"""Define the records that travel between the steps, and the columns that every result row has.

Piece, Part          the plan: which rows of which files, fixed once; Wanted: the rows of a part that are retried
Row | Reject         from reading: an image's bytes with its key, or the reason why there is none
Pixels | Rejection   from decoding: RGB pixels, or the reason why there are none
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
    "wrong_size",  # does not come out at the one size that the model takes, without a resize or crop to it
    "unsupported",  # an image of a kind that is not decoded here (12-bit JPEG, HEIC, float TIFF)
    "no_key",  # the key column is null or empty in this row
    "duplicate_key",  # an earlier row of the part has the same key
    "not_found",  # a table refers to an object that does not exist
    "refused",  # a web server (or the file's mode) does not let us read what a table refers to
    "unreachable",  # a web server that a table refers to does not answer, or fails each time
    "shard_damaged",  # bytes of a shard that could not be read as rows
    "not_finite",  # the model's values for the image are NaN, infinite or too large for the column's type
    "worker_died",  # the decoder or the model killed its process
    "timed_out",  # decoding or embedding took longer than allowed, twice
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
    """A run of consecutive rows in one file.

    `start` and `stop` are in the source's own unit: bytes of a tar, rows of a Parquet file or list; (0, None) is the
    whole file. `rows` is None where only reading can count them."""

    uri: str
    size_bytes: int
    etag: str
    start: int = 0
    stop: int | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """One source row of a part to be read again, with the position that its reject recorded."""

    row: int
    key: str
    shard: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The unit of work, commit and retry: a deterministic set of pieces. For a retry, `only` lists rows of them."""

    index: int
    pieces: tuple[Piece, ...]
    only: tuple[Wanted, ...] | None = None

    @property
    def rows(self) -> int | None:
        """The number of rows to read; None where only reading can count them."""
        if self.only is not None:
            return len(self.only)
        counts = [piece.rows for piece in self.pieces]
        return None if any(count is None for count in counts) else sum(count or 0 for count in counts)

    @property
    def wanted_rows(self) -> Collection[int]:
        """The numbers of the rows to read. It may contain numbers that the part does not have."""
        return range(1 << 62) if self.only is None else frozenset(wanted.row for wanted in self.only)

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def covers(self) -> str:
        """A hash of what the part covers: files, sizes, etags and ranges, but not its index."""
        covered = [[p.uri, p.size_bytes, p.etag, p.start, p.stop] for p in self.pieces]
        return hashlib.sha256(json.dumps(covered).encode()).hexdigest()

    def id(self, identity: str) -> str:
        """Return the part's id for one model: 16 hex digits over what it covers and the model's run identity."""
        return part_id(identity, self.covers)


def part_id(identity: str, covers: str) -> str:
    """Return the first 16 hex digits of a hash over a run identity and `Part.covers`."""
    return hashlib.sha256(f"{identity}/{covers}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Row:
    """One image as stored in its shard. `row` counts the part's source rows from 0, including rejected ones.

    `passthrough` has the values of the kept columns: Python's, or Arrow arrays of one value."""

    row: int
    key: str
    shard: str
    image: bytes | memoryview
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    offset: int | None = None
    warnings: tuple[str, ...] = ()  # remarks of the reader, such as `label_not_int64`


@dataclass(frozen=True, slots=True)
class Reject:
    """A row, or a stretch of a shard, that could not be used. It is counted and written to the rejects."""

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
    """A decoded, upright image: uint8 RGB (height, width, 3). `warnings` are remarks on how it was decoded.

    `preprocess: fast` may decode it `shrunk` times smaller; this includes a last row or column that the source fills
    only in part. `source_HW` is then the size of the source. `height` and `width` are always those of the source.
    `rgba_HWC` keeps the transparency of an image that has any, for models that read it."""

    rgb_HWC: npt.NDArray[np.uint8]
    warnings: tuple[str, ...] = ()
    shrunk: int = 1
    source_HW: tuple[int, int] | None = None
    rgba_HWC: npt.NDArray[np.uint8] | None = None

    @property
    def height(self) -> int:
        """The height of the source in pixels."""
        return self.source_HW[0] if self.source_HW else int(self.rgb_HWC.shape[0])

    @property
    def width(self) -> int:
        """The width of the source in pixels."""
        return self.source_HW[1] if self.source_HW else int(self.rgb_HWC.shape[1])


@dataclass(frozen=True, slots=True)
class Rejection:
    """The reason why an image could not be used."""

    reason: Reason
    message: str
