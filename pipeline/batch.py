"""One part's rows cut into batches, and what a batch is between the steps of a worker.

    Batch      source rows [kB, (k+1)B) of one part: compressed images
    Prepared   the same rows decoded and cropped, for each geometry that the job's models ask for
    Embedded   for each model its result rows and its rejects
    Failed     a part that cannot be done now; the others go on

A batch is an atom: runners move whole batches, so results do not depend on how an engine splits its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import PartFailed, StorageError
from pipeline.job import JobSpec
from pipeline.logs import LogAs
from pipeline.meter import Spent, retried
from pipeline.models import Card
from pipeline.preprocess import PreprocessSettings
from pipeline.read import Source, read_part
from pipeline.schema import Part, Reject, Row


@dataclass(frozen=True)
class Work:
    """Everything a worker needs, resolved: pickled once to each."""

    job: JobSpec
    cards: Mapping[str, Card]
    dtype: str
    device: str
    batch_size: int
    threads: int
    most_rows: int = 1 << 62  # of one part, where only reading can count them
    log_as: LogAs = field(default_factory=LogAs)


@dataclass(frozen=True)
class Batch:
    part_index: int
    k: int
    rows: tuple[Row, ...]
    rejects: tuple[Reject, ...] = ()
    rows_in: int | None = None  # of the whole part; None unless this is its last batch
    spent: Mapping[str, Spent] = field(default_factory=dict, compare=False)  # by stage, as in what it becomes


@dataclass(frozen=True)
class Crops:
    """What one geometry made of a batch: the rows it could use, their uint8 pixels, and rejects for the others."""

    kept: tuple[int, ...]  # indices into Prepared.rows
    pixels_BHWC: npt.NDArray[np.uint8]
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True)
class Prepared:
    part_index: int
    k: int
    rows: tuple[Row, ...]  # those that decoded, with decode's warnings, without their image
    sizes_HW: tuple[tuple[int, int], ...]
    rejects: tuple[Reject, ...]
    crops: Mapping[PreprocessSettings, Crops]
    rows_in: int | None
    spent: Mapping[str, Spent]
    waited: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedded:
    part_index: int
    k: int
    tables: Mapping[str, pa.Table]
    rejects: Mapping[str, tuple[Reject, ...]]
    rows_in: int | None = None
    spent: Mapping[str, Spent] = field(default_factory=dict)
    waited: Mapping[str, float] = field(default_factory=dict)  # seconds that workers waited for this batch, by pool

    @property
    def images(self) -> int:
        """Source rows that this batch accounts for."""
        name = next(iter(self.tables))
        return int(self.tables[name].num_rows) + len(self.rejects[name])


@dataclass(frozen=True)
class Failed:
    part_index: int
    message: str
    spent: Mapping[str, Spent] = field(default_factory=dict, compare=False)


class WorkersLost(Exception):
    """Raised by a runner's stream whose workers died, or hang, more often than it can replace them. What it has not
    given may be asked of it again, `careful`: there, each step has a process of its own that an image may kill."""


def cut(source: Source, part: Part, batch_size: int, most_rows: int = 1 << 62) -> Iterator[Batch | Failed]:
    """A part's batches, in order; one empty batch for a part without rows. A part that fails ends in Failed."""
    items = _Timed(read_part(source, part))
    pending: list[Row | Reject] = []
    count = 0
    try:
        for item in items:
            if count and count % batch_size == 0:
                yield _batch(part, count // batch_size - 1, pending, items.lap())
                pending = []
            assert part.only or item.row == count, f"{type(source).__name__} numbered row {count} as {item.row}"
            pending.append(item)
            count += 1
            if count > most_rows:
                raise _too_many(part, most_rows)
        _check_count(part, count)
    except (PartFailed, StorageError) as error:
        yield Failed(part.index, str(error), retried())
        return
    yield _batch(part, max(count - 1, 0) // batch_size, pending, items.lap(), rows_in=count)


def _batch(part: Part, k: int, items: list[Row | Reject], read_s: float, rows_in: int | None = None) -> Batch:
    rows = tuple(item for item in items if isinstance(item, Row))
    rejects = tuple(item for item in items if isinstance(item, Reject))
    read = Spent(read_s, len(rows), sum(len(row.image) for row in rows))
    return Batch(part.index, k, rows, rejects, rows_in, {"read": read, **retried()})


class _Timed:
    """An iterator that knows how long it took to give its items, without what was done between them."""

    def __init__(self, items: Iterator[Row | Reject]) -> None:
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Row | Reject]:
        return self

    def __next__(self) -> Row | Reject:
        started = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - started

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def _too_many(part: Part, most_rows: int) -> PartFailed:
    uris = ", ".join(piece.uri for piece in part.pieces[:2])
    return PartFailed(
        f"part {part.index} ({uris}): more than {most_rows:,} rows, too many for one result file",
        hint="a plain tar can be cut when the job is planned: set input.split_above_bytes to a fraction of its size, "
        "or input.shards_per_part to 1; a compressed one cannot: recompress it as several",
    )


def _check_count(part: Part, count: int) -> None:
    if part.rows is not None and part.rows != count:
        raise PartFailed(
            f"part {part.index}: {count} rows were read where the plan has {part.rows}",
            hint="the input changed after it was planned: start a new output",
        )
