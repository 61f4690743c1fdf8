"""Split a part's rows into batches, and define what a batch becomes in each step of a worker.

    Batch      source rows [kB, (k+1)B) of one part: compressed images
    Prepared   the same rows decoded and cropped, once for each geometry that the job's models need
    Embedded   the result rows and rejects of each model
    Failed     a part that cannot be done now; other parts continue

Batches are indivisible: runners move whole batches, so results do not depend on how an engine splits its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.errors import PartFailed, StorageError
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.job import JobSpec
from img2parquet.models import Card
from img2parquet.models.prompts import ClassWeights
from img2parquet.read import Source, read_part
from img2parquet.schema import Part, Reject, Row
from img2parquet.telemetry.logs import LogAs
from img2parquet.telemetry.stage_timing import StageTime, retried


@dataclass(frozen=True)
class Work:
    """The settings of a worker, with every `auto` resolved; pickled once for each worker."""

    job: JobSpec
    cards: Mapping[str, Card]
    dtype: str
    device: str
    batch_size: int
    threads: int
    most_rows: int = 1 << 62  # limit for a part whose rows only reading can count
    class_weights: Mapping[str, ClassWeights] = field(default_factory=dict)  # of models whose classes are prompts
    log_as: LogAs = field(default_factory=LogAs)


@dataclass(frozen=True)
class Batch:
    """The compressed images of one batch, and the rows that could not be read. `k` is its number in the part."""

    part_index: int
    k: int
    rows: tuple[Row, ...]
    rejects: tuple[Reject, ...] = ()
    rows_in: int | None = None  # of the whole part; None unless this is its last batch
    spent: Mapping[str, StageTime] = field(default_factory=dict, compare=False)  # by stage, here and below


@dataclass(frozen=True)
class Crops:
    """The crops of a batch for one geometry: the rows it could use, their uint8 pixels, and rejects for the others."""

    kept: tuple[int, ...]  # indices into Prepared.rows
    pixels_BHWC: npt.NDArray[np.uint8]
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A decoded and cropped batch."""

    part_index: int
    k: int
    rows: tuple[Row, ...]  # those that could be decoded, with the decoder's warnings and without image bytes
    sizes_HW: tuple[tuple[int, int], ...]
    rejects: tuple[Reject, ...]
    crops: Mapping[PreprocessSettings, Crops]
    rows_in: int | None
    spent: Mapping[str, StageTime]
    waited: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedded:
    """A batch's result tables and rejects, by model name."""

    part_index: int
    k: int
    tables: Mapping[str, pa.Table]
    rejects: Mapping[str, tuple[Reject, ...]]
    rows_in: int | None = None
    spent: Mapping[str, StageTime] = field(default_factory=dict)
    waited: Mapping[str, float] = field(default_factory=dict)  # seconds that workers waited for this batch, by pool

    @property
    def images(self) -> int:
        """The number of source rows that this batch accounts for."""
        name = next(iter(self.tables))
        return int(self.tables[name].num_rows) + len(self.rejects[name])


@dataclass(frozen=True)
class Failed:
    """A part that cannot be done now, and why."""

    part_index: int
    message: str
    spent: Mapping[str, StageTime] = field(default_factory=dict, compare=False)


def split_into_batches(
    source: Source, part: Part, batch_size: int, most_rows: int = 1 << 62
) -> Iterator[Batch | Failed]:
    """Read a part and yield its batches in order; a part without rows yields one empty batch.

    A part that fails, or has more than `most_rows` rows, ends with Failed."""
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
    read = StageTime(read_s, len(rows), sum(len(row.image) for row in rows))
    return Batch(part.index, k, rows, rejects, rows_in, {"read": read, **retried()})


class _Timed:
    """Measure the time that an iterator takes to produce its items, without the time between them."""

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
        """Return the seconds measured since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def _too_many(part: Part, most_rows: int) -> PartFailed:
    uris = ", ".join(piece.uri for piece in part.pieces[:2])
    return PartFailed(
        f"part {part.index} ({uris}): more than {most_rows:,} rows, too many for one result file",
        hint="start a new output with `input.shards_per_part: 1`, or, to split uncompressed tars, with "
        "`input.split_above_bytes` set to a fraction of their size; recompress a compressed tar as several",
    )


def _check_count(part: Part, count: int) -> None:
    if part.rows is not None and part.rows != count:
        raise PartFailed(
            f"part {part.index}: {count} rows were read where the plan has {part.rows}",
            hint="the input changed after the job was planned: start a new output",
        )
