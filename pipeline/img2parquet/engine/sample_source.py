"""Read only the first images of some parts, and estimate how many images there are in all."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from img2parquet.read import PartLimits, Source
from img2parquet.schema import Part, Piece, Reject, Row
from img2parquet.storage import Entry

WARM_IMAGES = 8  # of each part, to warm up
LEAST_IMAGES = 2  # the distance between two tells how many bytes of a shard one takes


class SampleSource:
    """Wraps a job's source, ends each part early, and counts what it has read.

    A part ends when its share of the time is up, at the end of a batch; or, where a batch takes longer than that, after
    as many images as fit into the time."""

    def __init__(self, source: Source, parts: Sequence[Part], batch_size: int) -> None:
        self.source, self.originals, self.batch_size = source, {part.index: part for part in parts}, batch_size
        self.max_rows, self.share_s, self.started_at = WARM_IMAGES, math.inf, 0.0
        self.seen: dict[int, Seen] = {}

    def start(self, seconds: float, images_per_s: float) -> None:
        self.share_s, self.started_at, self.seen = seconds / len(self.originals), time.monotonic(), {}
        fit = max(LEAST_IMAGES, int(self.share_s * images_per_s))
        self.max_rows = fit if fit < self.batch_size else sys.maxsize

    @property
    def parts(self) -> list[Part]:
        """The parts, without their number of rows: their readers would miss the rows that are left out."""
        return [_uncounted(part) for part in self.originals.values()]

    @property
    def kind(self) -> str:
        return self.source.kind

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        return self.source.plan(limits, known)

    def passthrough(self) -> pa.Schema:
        return self.source.passthrough()

    def read(self, part: Part) -> Iterator[Row | Reject]:
        seen = self.seen[part.index] = Seen()
        stop_at = self.started_at + self.share_s * len(self.seen)
        for item in self.source.read(self.originals[part.index]):
            between = seen.rows and seen.rows % self.batch_size == 0
            if seen.rows == self.max_rows or (between and time.monotonic() > stop_at):
                return
            seen.add(item)
            yield item
        seen.is_whole = True


@dataclass
class Seen:
    """Counts what was read of one part."""

    rows: int = 0
    image_bytes: int = 0
    is_whole: bool = False
    shard: str = ""
    offsets: list[int] = field(default_factory=list)  # in its first shard: of the first and the last row; and the rows

    def add(self, item: Row | Reject) -> None:
        self.rows += 1
        self.image_bytes += len(item.image) if isinstance(item, Row) else 0
        self.shard = self.shard or item.shard
        if item.offset is not None and item.shard == self.shard:
            self.offsets = [*self.offsets[:1], item.offset, self.rows]

    def rows_of(self, part: Part) -> float:
        """Return how many rows the part has: exactly where it was read to its end, else estimated from its bytes.

        The bytes of a row come from the distance between tar members, or else from the images' own bytes, which leaves
        out whatever is stored beside them."""
        if self.is_whole:
            return self.rows
        if len(self.offsets) == 3 and self.offsets[1] > self.offsets[0]:
            row_bytes = (self.offsets[1] - self.offsets[0]) / (self.offsets[2] - 1)
        else:
            row_bytes = max(self.image_bytes / max(self.rows, 1), 1.0)
        return max(self.rows, part.size_bytes / row_bytes)


def _uncounted(part: Part) -> Part:
    return Part(part.index, tuple(Piece(p.uri, p.size_bytes, p.etag, p.start, p.stop) for p in part.pieces))


def spread(parts: Sequence[Part], limit: int) -> list[Part]:
    """Choose at most that many parts, evenly over the plan: the middle one of each stretch."""
    count = min(limit, len(parts))
    return [parts[(2 * i + 1) * len(parts) // (2 * count)] for i in range(count)]


def count_rows(parts: Sequence[Part], seen: Mapping[int, Seen]) -> tuple[int, bool]:
    """Return the images of the whole input, and whether some of them are estimated from the bytes of their parts."""
    known = sum(part.rows for part in parts if part.rows is not None)
    uncounted = [part for part in parts if part.rows is None]
    sampled = [
        part for part in uncounted if part.index in seen and (seen[part.index].rows or seen[part.index].is_whole)
    ]
    read_fully = {part.index: seen[part.index].rows for part in sampled if seen[part.index].is_whole}
    if len(read_fully) == len(uncounted):
        return known + sum(read_fully.values()), False
    if sampled:
        sampled_bytes = sum(part.size_bytes for part in sampled)
        per_row = sampled_bytes / max(sum(seen[part.index].rows_of(part) for part in sampled), 1.0)
    else:  # planning had counted all of the sample: assume that the other parts are alike
        per_row = sum(part.size_bytes for part in parts if part.rows is not None) / max(known, 1)
    left = sum(part.size_bytes for part in uncounted if part.index not in read_fully)
    return known + sum(read_fully.values()) + round(left / max(per_row, 1.0)), True
