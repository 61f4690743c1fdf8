"""One part's rows cut into batches, and what a batch is between the steps of a worker.

    Batch      source rows [kB, (k+1)B) of one part: compressed images
    Prepared   the same rows decoded and cropped, for each geometry that the job's models ask for
    Embedded   for each model its result rows and its rejects
    Failed     a part that cannot be done now; the others go on

A batch is an atom: runners move whole batches, so results do not depend on how an engine splits its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import PartFailed, StorageError
from pipeline.job import JobSpec
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


@dataclass(frozen=True)
class Batch:
    part_index: int
    k: int
    rows: tuple[Row, ...]
    rejects: tuple[Reject, ...] = ()
    rows_in: int | None = None  # of the whole part; None unless this is its last batch


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
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Embedded:
    part_index: int
    k: int
    tables: Mapping[str, pa.Table]
    rejects: Mapping[str, tuple[Reject, ...]]
    rows_in: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Source rows that this batch accounts for."""
        name = next(iter(self.tables))
        return int(self.tables[name].num_rows) + len(self.rejects[name])


@dataclass(frozen=True)
class Failed:
    part_index: int
    message: str


def cut(source: Source, part: Part, batch_size: int, most_rows: int = 1 << 62) -> Iterator[Batch | Failed]:
    """A part's batches, in order; one empty batch for a part without rows. A part that fails ends in Failed."""
    rows: list[Row] = []
    rejects: list[Reject] = []
    count = 0
    try:
        for item in read_part(source, part):
            if count and count % batch_size == 0:
                yield Batch(part.index, count // batch_size - 1, tuple(rows), tuple(rejects))
                rows, rejects = [], []
            assert item.row == count, f"{type(source).__name__} numbered row {count} as {item.row}"
            if isinstance(item, Row):
                rows.append(item)
            else:
                rejects.append(item)
            count += 1
            if count > most_rows:
                raise _too_many(part, most_rows)
        _check_count(part, count)
    except (PartFailed, StorageError) as error:
        yield Failed(part.index, str(error))
        return
    yield Batch(part.index, max(count - 1, 0) // batch_size, tuple(rows), tuple(rejects), rows_in=count)


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
