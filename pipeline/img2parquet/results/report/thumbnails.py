"""Fetch the images that a page shows, and reduce each once; the page refers to them by number."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from img2parquet.errors import InputError
from img2parquet.images.thumbnails import LARGE_PX, SMALL_PX, Thumb, thumb
from img2parquet.results.report.row_sample import RowSample
from img2parquet.results.report.run_summary import RunSummary
from img2parquet.results.source_images import Place, find, find_rejects, open_source

DECODERS = 2


@dataclass
class Thumbnails:
    """Thumbnails by number: `data` holds WebP or PNG files."""

    data: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height
    at: dict[Place, int] = field(default_factory=dict)
    of_rejects: dict[int, int] = field(default_factory=dict)  # by place in the summary's rejects
    missing: int = 0

    def add(self, data: bytes, size: tuple[int, int]) -> int:
        self.data.append(data)
        self.sizes.append(size)
        return len(self.data) - 1

    def number(self, place: Place) -> int | None:
        return self.at.get(place)

    def uris(self) -> list[str]:
        return [f"data:{_type(data)};base64,{base64.b64encode(data).decode()}" for data in self.data]


def gather(summary: RunSummary, samples: Iterable[RowSample], large: set[Place]) -> Thumbnails:
    """Make small thumbnails of all sampled rows, large ones of those in a gallery, and thumbnails of the rejects whose
    bytes decode far enough. Without the source shards there are none, and a note says so."""
    pictures = Thumbnails()
    if summary.plan is None:
        return pictures
    try:
        source = open_source(summary.record, summary.output.store.options)
    except InputError as error:
        summary.note(f"{error.message[0].upper()}{error.message[1:]}.")
        return pictures
    parts, wanted = {part.index: part for part in summary.plan.parts}, _wanted(samples)

    def small(found: tuple[Place, bytes]) -> tuple[Place, Thumb | None]:
        place, image = found
        return place, thumb(image, LARGE_PX if place in large else SMALL_PX, salvage=True)

    with ThreadPoolExecutor(DECODERS, thread_name_prefix="thumbs") as pool:
        for place, made in pool.map(small, find(source, parts, wanted, summary.note)):
            if made is not None:
                pictures.at[place] = pictures.add(made.data, (made.width, made.height))
    for i, image in find_rejects(source, parts, summary.rejects, summary.note):
        made = thumb(image, LARGE_PX, salvage=True)
        if made is not None:
            pictures.of_rejects[i] = pictures.add(made.data, (made.width, made.height))
    pictures.missing = sum(map(len, wanted.values())) - len(pictures.at)
    if pictures.missing:
        summary.note(f"{pictures.missing:,} of {pictures.missing + len(pictures.at):,} sampled rows have no thumbnail.")
    return pictures


def _wanted(samples: Iterable[RowSample]) -> Mapping[int, set[Place]]:
    wanted: dict[int, set[Place]] = {}
    for sample in samples:
        rows = zip(sample.parts.tolist(), sample.texts("shard"), sample.texts("key"), strict=False)
        for part, shard, key in rows:
            if part >= 0:
                wanted.setdefault(part, set()).add((shard, key))
    return wanted


def _type(data: bytes) -> str:
    return "image/png" if data.startswith(b"\x89PNG") else "image/webp"
