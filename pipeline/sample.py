"""A part's first images, and how many there are in all: a source that ends early, and what it saw."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.read import PartLimits, Source
from pipeline.schema import Part, Piece, Reject, Row
from pipeline.storage import Entry

WARM_IMAGES = 8  # of a part, before a sample begins
LEAST_IMAGES = 2  # the distance between two says how many bytes of a shard one takes


class Sample:
    """A job's source that ends each part early: when its share of the time is up, but not within a batch; or, where a
    batch takes longer than that, after as many images as fit. It counts what it gave."""

    def __init__(self, source: Source, parts: Sequence[Part], batch_size: int) -> None:
        self.source, self.originals, self.batch_size = source, {part.index: part for part in parts}, batch_size
        self.most, self.slice_s, self.began = WARM_IMAGES, math.inf, 0.0
        self.seen: dict[int, Seen] = {}

    def begin(self, seconds: float, images_per_s: float) -> None:
        self.slice_s, self.began, self.seen = seconds / len(self.originals), time.monotonic(), {}
        fit = max(LEAST_IMAGES, int(self.slice_s * images_per_s))
        self.most = fit if fit < self.batch_size else sys.maxsize

    @property
    def parts(self) -> list[Part]:
        """Without their number of rows: whoever reads them would miss those that are left out."""
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
        stop_at = self.began + self.slice_s * len(self.seen)
        for item in self.source.read(self.originals[part.index]):
            between = seen.rows and seen.rows % self.batch_size == 0
            if seen.rows == self.most or (between and time.monotonic() > stop_at):
                return
            seen.add(item)
            yield item
        seen.is_whole = True


@dataclass
class Seen:
    """What was read of one part, and where in its first shard."""

    rows: int = 0
    image_bytes: int = 0
    is_whole: bool = False
    shard: str = ""
    offsets: list[int] = field(default_factory=list)  # of its first shard: the first and the last

    def add(self, item: Row | Reject) -> None:
        self.rows += 1
        self.image_bytes += len(item.image) if isinstance(item, Row) else 0
        self.shard = self.shard or item.shard
        if item.offset is not None and item.shard == self.shard:
            self.offsets = [*self.offsets[:1], item.offset, self.rows]

    def rows_of(self, part: Part) -> float:
        """How many the whole part has. One that was read to its end knows; of another the distance between members says
        how many bytes a row takes, or else the images' own bytes, which leaves out what lies beside them."""
        if self.is_whole:
            return self.rows
        if len(self.offsets) == 3 and self.offsets[1] > self.offsets[0]:
            row_bytes = (self.offsets[1] - self.offsets[0]) / (self.offsets[2] - 1)
        else:
            row_bytes = max(self.image_bytes / max(self.rows, 1), 1.0)
        return max(self.rows, part.size_bytes / row_bytes)


def _uncounted(part: Part) -> Part:
    return Part(part.index, tuple(Piece(p.uri, p.size_bytes, p.etag, p.start, p.stop) for p in part.pieces))


def spread(parts: Sequence[Part], most: int) -> list[Part]:
    """At most so many of the parts, evenly over the plan: the middle one of each stretch."""
    count = min(most, len(parts))
    return [parts[(2 * i + 1) * len(parts) // (2 * count)] for i in range(count)]


def count_rows(parts: Sequence[Part], seen: Mapping[int, Seen]) -> tuple[int, bool]:
    """All images of the input, and whether some are estimated: by the bytes of parts that nobody has counted."""
    known = sum(part.rows for part in parts if part.rows is not None)
    uncounted = [part for part in parts if part.rows is None]
    looked_at = [
        part for part in uncounted if part.index in seen and (seen[part.index].rows or seen[part.index].is_whole)
    ]
    read_whole = {part.index: seen[part.index].rows for part in looked_at if seen[part.index].is_whole}
    if len(read_whole) == len(uncounted):
        return known + sum(read_whole.values()), False
    if looked_at:
        looked_at_bytes = sum(part.size_bytes for part in looked_at)
        per_row = looked_at_bytes / max(sum(seen[part.index].rows_of(part) for part in looked_at), 1.0)
    else:  # all of the sample was counted when the job was planned: the others are taken to be alike
        per_row = sum(part.size_bytes for part in parts if part.rows is not None) / max(known, 1)
    left = sum(part.size_bytes for part in uncounted if part.index not in read_whole)
    return known + sum(read_whole.values()) + round(left / max(per_row, 1.0)), True
