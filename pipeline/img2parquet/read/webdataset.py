"""Read tar shards (plain or gzipped) into rows: an image with the sidecar members that share its name.

* `tar_samples.py` defines what a sample is and which of its members is the image; `tar.py` reads damaged tars too.
* Names are data: `../../x.jpg` and `/etc/x.jpg` are keys like any other, and nothing touches the file system.
* Every fault is a reject: a damaged range, a sample without an image, an image that is only a link.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import pyarrow as pa
from pydantic import Field, field_validator

from img2parquet.read import PartLimits
from img2parquet.read.byte_source import ByteSource, ChunkBytes, RangedBytes
from img2parquet.read.gzip_stream import MAGIC as GZIP_MAGIC
from img2parquet.read.gzip_stream import GzipBytes
from img2parquet.read.part_packing import pack
from img2parquet.read.passthrough import Passthrough
from img2parquet.read.prefetch import Prefetcher
from img2parquet.read.settings import (
    SourceSettings,
    entry_of_slice,
    entry_of_whole,
    input_exists,
    part_fails,
)
from img2parquet.read.tar import Archive
from img2parquet.read.tar_samples import Sampler, split_name
from img2parquet.schema import Part, Piece, Reject, Row, Wanted
from img2parquet.storage import Entry, Store, redact

log = logging.getLogger(__name__)

TYPICAL_IMAGE_BYTES = 64 << 10  # small on purpose: a part of unopened tars should not exceed the limit on rows
WALKS_AT_ONCE = 8


class WebDataset(SourceSettings):
    """Tar files of images, with sidecar members as passthrough columns."""

    kind: Literal["webdataset"] = Field(default="webdataset", description="Tar shards in the webdataset layout")
    keep: tuple[str, ...] = Field(
        default=(),
        description="Passthrough columns: `txt`, `cls` (int64), `json` (its raw text), or any field of the .json "
        "sidecar; `name:type` with string, int64, float64 or bool",
    )
    image: tuple[str, ...] = Field(
        default=(),
        description="Extensions, after the first dot, that are the image: [jpg] takes `x.jpg` and not `x.mask.png`. "
        "Default: every known image extension; a sample with several gives a row for each, keyed `<key>.<extension>`",
    )
    shards_per_part: int | None = Field(
        default=None, ge=1, description="Group exactly so many tars into a part; default: as many as the limits allow"
    )
    split_above_bytes: int = Field(
        default=1 << 30,
        ge=1,
        description="Plain tars above this size are split into several parts; their headers are read when the job "
        "is planned. Smaller ones, and gzipped ones, are never opened before they are read",
    )
    max_member_bytes: int = Field(
        default=256 << 20, ge=1, description="A member larger than this is rejected without being held in memory"
    )

    @field_validator("image")
    @classmethod
    def _lower(cls, image: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(extension.lower().lstrip(".") for extension in image)

    @field_validator("keep")
    @classmethod
    def _json_is_text(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for entry in keep:
            if entry.startswith("json:") and entry != "json:string":
                raise ValueError(f"keep has `{entry}`: the whole sidecar is text; name one of its fields instead")
        return keep

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        """Group small tars by their bytes, and split large ones. Raises InputError, StorageError."""
        with input_exists():
            found = sorted(self.store.expand(self.names), key=lambda entry: entry.uri)
        entries = [entry for entry in found if entry not in known]
        by_bytes = replace(limits, size_bytes=min(limits.size_bytes, limits.rows * TYPICAL_IMAGE_BYTES))
        for is_large, run in itertools.groupby(entries, self._is_split):
            if is_large:
                yield from self._split_all(run, limits)
            elif self.shards_per_part is None:
                yield from pack(map(_whole, run), by_bytes)
            else:
                yield from _chunks(map(_whole, run), self.shards_per_part)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Yield every image and every fault of a part, in the order of the bytes. Raises PartFailed."""
        if part.only is not None:
            for piece in part.pieces:
                with part_fails(piece.uri):
                    yield from self._read_some(piece, [w for w in part.only if _is_in(w, piece)])
            return
        rows = itertools.count()
        with closing(Prefetcher(self.store, part.pieces)) as ahead:
            for i, piece in enumerate(part.pieces):
                with part_fails(piece.uri):
                    yield from self._read_piece(ahead, i, rows)

    def passthrough(self) -> pa.Schema:
        return pa.schema([_typed(column).field() for column in self.kept])

    def _read_piece(self, ahead: Prefetcher, i: int, rows: Iterator[int]) -> Iterator[Row | Reject]:
        piece = ahead.pieces[i]
        source, is_tail = _open(ahead, i)
        sampler, is_damaged = self._sampler(), False
        archive = Archive(source, sampler.is_wanted, self.max_member_bytes)
        count = 0
        for sample in sampler.samples(archive):
            is_damaged = is_damaged or sample.damage is not None
            for item in sampler.items(sample):
                count += 1
                yield sampler.to_row(item, sample, piece.uri, next(rows))
        if sampler.skipped:
            skipped = ", ".join(f"{number} {kind}" for kind, number in sampler.skipped.most_common())
            level = logging.INFO if count else logging.WARNING
            log.log(level, "%s: skipped members that are not images: %s", redact(piece.uri), skipped)
        if is_tail and not archive.has_end_marker and not is_damaged:
            log.warning("%s ends without its end-of-archive marker; all its members were read", redact(piece.uri))

    def _read_some(self, piece: Piece, wanted: Sequence[Wanted]) -> Iterator[Row | Reject]:
        """Yield the rows that start at the offsets of the wanted ones; a tar without any is not opened."""
        left = deque((one.offset or 0, one.row) for one in wanted)
        sampler, archives = self._sampler(), self._archives(piece, {split_name(one.key)[0] for one in wanted})
        while left and (archive := next(archives, None)) is not None:
            for sample in sampler.samples(archive):
                if isinstance(archive.wanted, _Near) and (sample.damage or sample.beside_damage):
                    break  # reading everything may not find this sample at all
                for item in sampler.items(sample):
                    if left and item.offset == left[0][0]:
                        yield sampler.to_row(item, sample, piece.uri, left.popleft()[1])
                if not left or sample.offset > left[0][0]:  # all are found, or one was missed
                    break

    def _archives(self, piece: Piece, keys: Collection[str]) -> Iterator[Archive]:
        """Yield the tar with the bodies of these samples only, by ranges unless it is compressed, then with all bodies.

        Only reading the bodies finds a member that claims the bytes of those behind it."""
        is_wanted = self._sampler().is_wanted
        source = _open_ranges(self.store, piece)
        if source is not None:
            yield Archive(source, _Near(keys, is_wanted), self.max_member_bytes)
        with closing(Prefetcher(self.store, [piece])) as ahead:
            yield Archive(_open(ahead, 0)[0], is_wanted, self.max_member_bytes)

    def _sampler(self) -> Sampler:
        return Sampler(self.image, tuple(map(_typed, self.kept)), self.max_member_bytes)

    def _split_all(self, entries: Iterable[Entry], limits: PartLimits) -> Iterator[tuple[Piece, ...]]:
        with ThreadPoolExecutor(WALKS_AT_ONCE, thread_name_prefix="walk") as pool:
            for pieces in pool.map(partial(self._split, limits=limits), entries):
                for piece in pieces:
                    yield (piece,)

    def _is_split(self, entry: Entry) -> bool:
        return entry.size_bytes > self.split_above_bytes and not entry.uri.lower().endswith((".gz", ".tgz"))

    def _split(self, entry: Entry, limits: PartLimits) -> list[Piece]:
        """Split a large tar between samples by a walk over its headers."""
        source = RangedBytes(self.store, entry)
        if source.take(2) == GZIP_MAGIC:
            return [_whole(entry)]
        source.unread(b"12")
        sampler = self._sampler()
        archive = Archive(source, sampler.is_wanted, self.max_member_bytes, bodies=False)
        cuts = list(_cut(sampler, archive, entry.size_bytes, limits))
        if archive.global_records.keys() & {"path", "size"}:
            return [_whole(entry)]  # a global header applies to all that follows, and a slice would miss it
        return [Piece(entry.uri, stop - start, entry.etag, start, stop, rows) for start, stop, rows in cuts]


@dataclass
class _Near:
    """Want the members of these samples and the one behind each, since damage there is a warning on the sample."""

    keys: Collection[str]
    is_wanted: Callable[[str, int, bytes], bool]
    was_near: bool = False

    def __call__(self, name: str, size_bytes: int, start: bytes) -> bool:
        was_near, self.was_near = self.was_near, split_name(name)[0] in self.keys
        return (was_near or self.was_near) and self.is_wanted(name, size_bytes, start)


def _typed(column: Passthrough) -> Passthrough:
    return Passthrough(column.name, column.type_name or ("int64" if column.name == "cls" else "string"))


def _whole(entry: Entry) -> Piece:
    return Piece(entry.uri, entry.size_bytes, entry.etag)


def _chunks(pieces: Iterable[Piece], count: int) -> Iterator[tuple[Piece, ...]]:
    iterator = iter(pieces)
    while chunk := tuple(itertools.islice(iterator, count)):
        yield chunk


def _open(ahead: Prefetcher, i: int) -> tuple[ByteSource, bool]:
    """Return a piece's bytes, decompressed if they start like gzip, and whether they reach the end of the file."""
    piece, chunks = ahead.pieces[i], ahead.chunks(i)
    if piece.stop is not None:
        return ChunkBytes(chunks, piece.start, piece.stop), piece.stop == ahead.entry(i).size_bytes
    first = next(chunks, b"") or ahead.store.read(
        piece.uri, expect=entry_of_whole(piece)
    )  # an empty file may have grown
    chunks = itertools.chain([first], chunks)
    if first.startswith(GZIP_MAGIC):
        return GzipBytes(chunks), True
    return ChunkBytes(chunks, 0, piece.size_bytes), True


def _open_ranges(store: Store, piece: Piece) -> RangedBytes | None:
    """Return a piece's bytes by ranged reads, or None if they are compressed."""
    entry = entry_of_whole(piece) if piece.stop is None else entry_of_slice(store, piece, piece.stop)
    source = RangedBytes(store, entry)
    is_compressed = source.take(2) == GZIP_MAGIC
    source.position, source.size_bytes = piece.start, entry.size_bytes if piece.stop is None else piece.stop
    return None if is_compressed else source


def _is_in(wanted: Wanted, piece: Piece) -> bool:
    offset = wanted.offset or 0
    return wanted.shard == piece.uri and piece.start <= offset and (piece.stop is None or offset < piece.stop)


def _cut(
    sampler: Sampler, archive: Archive, size_bytes: int, limits: PartLimits
) -> Iterator[tuple[int, int, int | None]]:
    """Yield (start, stop, rows) of runs of whole samples within the limits; rows is None if a run has damage."""
    start, rows, damaged = 0, 0, False
    iterator = sampler.samples(archive)
    sample = next(iterator, None)
    while sample is not None:
        following = next(iterator, None)
        added, stop = len(sampler.items(sample)), following.offset if following else size_bytes
        # samples next to damage stay in its run, so that they are counted as they will be read
        may_cut = sample.damage is None and not sample.beside_damage and not sample.continues
        if may_cut and rows and (rows + added > limits.rows or stop - start > limits.size_bytes):
            yield start, sample.offset, None if damaged else rows
            start, rows, damaged = sample.offset, 0, False
        rows, damaged = rows + added, damaged or sample.damage is not None
        sample = following
    yield start, size_bytes, None if damaged else rows
