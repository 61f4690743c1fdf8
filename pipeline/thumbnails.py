"""Rows of an output to small pictures, fetched from the source shards by key.

* Bounded: of each shard only what comes before the last wanted image is read, in all MOST_BYTES and MOST_SECONDS; what
  is not had by then has no thumbnail. A shard that is gone, or changed, has none either.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby

from PIL import Image

from pipeline.decode import DecodePolicy, decode
from pipeline.embed_image import recorded_job
from pipeline.embeddings import Found, Vectors, part_index
from pipeline.errors import Img2ParquetError
from pipeline.job import JobSpec
from pipeline.read import read_part
from pipeline.schema import Bad, Part, Piece, Pixels, Row
from pipeline.storage import Store

MOST_BYTES = 512 << 20  # of images that are read on the way to those that are wanted
MOST_SECONDS = 60.0
SIDE = 224


def for_sheet(vectors: Vectors, rows: Iterable[Found]) -> dict[tuple[str, str], bytes]:
    """Thumbnails of rows of an output; none where its record, or its list of images, is gone."""
    try:
        job = recorded_job(vectors.output.run_record(), vectors.output.uri)
    except Img2ParquetError:
        return {}
    return thumbnails(job, {part.index: part for part in vectors.plan.parts}, rows)


def of_file(store: Store, uri: str) -> bytes | None:
    """A thumbnail of one image file, or None."""
    pixels = decode(store.read(uri), DecodePolicy())
    return None if isinstance(pixels, Bad) else _jpeg(pixels)


def thumbnails(job: JobSpec, parts: Mapping[int, Part], rows: Iterable[Found]) -> dict[tuple[str, str], bytes]:
    """(shard, key) -> a JPEG whose longer side has SIDE pixels at most; of those that could be had."""
    found: dict[tuple[str, str], bytes] = {}
    allowance = _Allowance()
    in_order = sorted(rows, key=lambda row: (row.part, row.shard))
    for (part, shard), group in groupby(in_order, key=lambda row: (row.part, row.shard)):
        keys = {row.key for row in group}
        # a source that is gone, changed or refused leaves a sheet without these pictures
        with suppress(Img2ParquetError, OSError):
            for row in _rows(job, _narrowed(parts[part_index(part)], shard, keys), keys, allowance):
                picture = _small(row, job)
                if picture:
                    found[shard, row.key] = picture
    return found


class _Allowance:
    def __init__(self) -> None:
        self.bytes_left, self.until = MOST_BYTES, time.monotonic() + MOST_SECONDS

    def takes(self, size_bytes: int) -> bool:
        self.bytes_left -= size_bytes
        return self.bytes_left > 0 and time.monotonic() < self.until


def _rows(job: JobSpec, part: Part, keys: set[str], allowance: _Allowance) -> Iterator[Row]:
    missing = set(keys)
    for item in read_part(job.input, part):
        if isinstance(item, Row):
            if item.key in missing:
                missing.discard(item.key)
                yield item
            if not missing or not allowance.takes(len(item.image)):
                return


def _narrowed(part: Part, shard: str, keys: set[str]) -> Part:
    """Only the pieces that may hold these keys: those of the shard, or of a folder the files so named."""
    of_shard = [piece for piece in part.pieces if piece.uri == shard]
    named = [piece for piece in part.pieces if any(_is_named(piece, shard, key) for key in keys)]
    chosen = tuple(of_shard or named)
    return Part(part.index, chosen) if chosen else part


def _is_named(piece: Piece, shard: str, key: str) -> bool:
    return piece.uri == f"{shard.rstrip('/')}/{key}"


def _small(row: Row, job: JobSpec) -> bytes | None:
    pixels = decode(row.image, job.decode.policy())
    return None if isinstance(pixels, Bad) else _jpeg(pixels)


def _jpeg(pixels: Pixels) -> bytes:
    image = Image.fromarray(pixels.rgb_HWC)
    image.thumbnail((SIDE, SIDE))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return sink.getvalue()
