"""Tar shards (plain or gzipped) to rows: an image with the sidecar members that share its name.

* A sample is a run of neighbouring members with one key: the path up to the first dot of the file name.
* Names are data: `../../x.jpg` and `/etc/x.jpg` are keys like any other, nothing touches the file system.
* Hidden members (`._x.jpg`, `.DS_Store`) and members without an extension are no samples.
* Every fault is a reject of its own: a damaged stretch, a sample without an image, an image that is only a link.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from pipeline.read import PartLimits
from pipeline.read.byte_source import ByteSource, ChunkBytes, RangedBytes
from pipeline.read.fetch import read_ahead
from pipeline.read.gzip import MAGIC as GZIP_MAGIC
from pipeline.read.gzip import GzipBytes
from pipeline.read.keep import Kept, convert_all, to_valid_text
from pipeline.read.pack import pack
from pipeline.read.settings import (
    IMAGE_EXTENSIONS,
    SourceSettings,
    entry_of_slice,
    entry_of_whole,
    input_exists,
    part_fails,
)
from pipeline.read.tar import Archive, Damage, Member
from pipeline.schema import Part, Piece, Reject, Row
from pipeline.storage import Entry, Store, redact

log = logging.getLogger(__name__)

SIDECARS = ("json", "txt", "cls")
MAX_SIDECAR_BYTES = 16 << 20
TYPICAL_IMAGE_BYTES = 64 << 10  # small on purpose: a part of unopened tars should not pass the limit on rows
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

    def plan(self, limits: PartLimits) -> Iterator[tuple[Piece, ...]]:
        """Small tars grouped by their bytes, large ones split. Raises InputError, StorageError."""
        with input_exists():
            entries = sorted(self.store.expand(self.uris), key=lambda entry: entry.uri)
        by_bytes = replace(limits, size_bytes=min(limits.size_bytes, limits.rows * TYPICAL_IMAGE_BYTES))
        for is_large, run in itertools.groupby(entries, self._is_split):
            if is_large:
                yield from self._split_all(run, limits)
            elif self.shards_per_part is None:
                yield from pack(map(_whole, run), by_bytes)
            else:
                yield from _chunks(map(_whole, run), self.shards_per_part)

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Every image of a part, and every fault, in the order of the bytes. Raises PartFailed."""
        rows = itertools.count()
        for piece in part.pieces:
            with part_fails(piece.uri):
                yield from self._read_piece(piece, rows)

    def passthrough(self) -> pa.Schema:
        return pa.schema([_typed(column).field() for column in self.kept])

    def _read_piece(self, piece: Piece, rows: Iterator[int]) -> Iterator[Row | Reject]:
        source, is_tail = _open(self.store, piece)
        archive = Archive(source, self._is_wanted, self.max_member_bytes)
        kept, is_damaged = tuple(_typed(column) for column in self.kept), False
        for sample in self._samples(archive):
            is_damaged = is_damaged or sample.damage is not None
            for item in self._items(sample):
                yield _to_row(item, sample, kept, piece.uri, next(rows))
        if is_tail and not archive.has_end_marker and not is_damaged:
            log.warning("%s ends without its end-of-archive marker; all its members were read", redact(piece.uri))

    def _is_wanted(self, name: str) -> bool:
        suffix = _split_name(name)[1]
        return self._is_image(suffix) or (bool(self.keep) and _last(suffix) in SIDECARS)

    def _is_image(self, suffix: str) -> bool:
        return suffix in self.image if self.image else _last(suffix) in IMAGE_EXTENSIONS

    def _samples(self, items: Iterable[Member | Damage]) -> Iterator[Sample]:
        """Neighbouring members with one key, and each damage alone; a sample beside a damage knows it."""
        sample = Sample()
        for item in items:
            if isinstance(item, Damage):
                sample.beside_damage = True
                yield from sample.finished()
                yield Sample(_split_name(item.name)[0], damage=item)
                sample = Sample(beside_damage=True)
                continue
            key, suffix = _split_name(item.name)
            if item.kind == "other" or not suffix:
                continue
            if sample.members and (key != sample.key or sample.held_bytes > 2 * self.max_member_bytes):
                yield sample
                sample = Sample(continues=key == sample.key)  # an endless sample is cut, so that it is never held whole
            is_held = item.size_bytes <= self.max_member_bytes and self._is_wanted(item.name)
            sample.add(key, suffix, item, item.size_bytes if is_held else 0)
        yield from sample.finished()

    def _items(self, sample: Sample) -> list[Image | Damage | Fault]:
        """What one sample adds to the part: its images, or one fault, or nothing. Looks at no body."""
        if sample.damage is not None:
            return [sample.damage]
        images = [(suffix, member) for suffix, member in sample.members if self._is_image(suffix)]
        if images:
            several = sample.continues or len({suffix for suffix, _ in images}) > 1
            return [self._image(f"{sample.key}.{s}" if several else sample.key, s, m) for s, m in images]
        suffixes = [suffix for suffix, _ in sample.members]
        only_sidecars = all(_last(suffix) in SIDECARS for suffix in suffixes)
        if sample.beside_damage or (only_sidecars and not self.keep):
            return []
        message = (
            f"no image beside {', '.join(f'`.{suffix}`' for suffix in suffixes[:5])} (looked for "
            f"{', '.join(self.image) or 'any image extension'}); the members of a sample must be neighbours"
        )
        return [Fault("not_an_image", message, sample.key, sample.members[0][1].offset)]

    def _image(self, key: str, suffix: str, member: Member) -> Image | Fault:
        if member.kind != "file":
            message = f"member `{member.name}` is a {member.kind}: its bytes are not here"
            return Fault("unsupported", message, key, member.offset)
        if member.size_bytes > self.max_member_bytes:
            size = f"{member.size_bytes} bytes, more than max_member_bytes: {self.max_member_bytes}"
            return Fault("unsupported", f"member `{member.name}` has {size}", key, member.offset)
        return Image(key, suffix, member)

    def _split_all(self, entries: Iterable[Entry], limits: PartLimits) -> Iterator[tuple[Piece, ...]]:
        with ThreadPoolExecutor(WALKS_AT_ONCE, thread_name_prefix="walk") as pool:
            for pieces in pool.map(partial(self._split, limits=limits), entries):
                for piece in pieces:
                    yield (piece,)

    def _is_split(self, entry: Entry) -> bool:
        return entry.size_bytes > self.split_above_bytes and not entry.uri.lower().endswith((".gz", ".tgz"))

    def _split(self, entry: Entry, limits: PartLimits) -> list[Piece]:
        """Cuts a large tar between samples by a walk over its headers."""
        source = RangedBytes(self.store, entry)
        if source.take(2) == GZIP_MAGIC:
            return [_whole(entry)]
        source.unread(b"12")
        archive = Archive(source, self._is_wanted, self.max_member_bytes, bodies=False)
        cuts = list(_cut(self._samples(archive), lambda sample: len(self._items(sample)), entry.size_bytes, limits))
        if archive.global_records.keys() & {"path", "size"}:
            return [_whole(entry)]  # a global header speaks for all that follows: a slice would miss it
        return [Piece(entry.uri, stop - start, entry.etag, start, stop, rows) for start, stop, rows in cuts]


@dataclass(slots=True)
class Sample:
    """A run of members with one key as (suffix, member), or one damage."""

    key: str = ""
    members: list[tuple[str, Member]] = field(default_factory=list)
    held_bytes: int = 0
    damage: Damage | None = None
    beside_damage: bool = False  # what is missing here may have been lost there
    continues: bool = False

    def add(self, key: str, suffix: str, member: Member, held_bytes: int) -> None:
        self.key = key
        self.members.append((suffix, member))
        self.held_bytes += held_bytes + len(member.name)

    def finished(self) -> Iterator[Sample]:
        if self.members:
            yield self

    @property
    def offset(self) -> int:
        return self.damage.offset if self.damage else self.members[0][1].offset


@dataclass(frozen=True, slots=True)
class Image:
    key: str
    suffix: str
    member: Member


@dataclass(frozen=True, slots=True)
class Fault:
    reason: Literal["not_an_image", "unsupported"]
    message: str
    key: str
    offset: int


def _to_row(item: Image | Damage | Fault, sample: Sample, kept: tuple[Kept, ...], shard: str, row: int) -> Row | Reject:
    if isinstance(item, Damage):
        end = item.offset + item.size_bytes
        message = f"{item.message}; {item.size_bytes} bytes, from byte {item.offset} to {end}, were not read"
        return Reject(row, sample.key, shard, "read", "shard_damaged", message, item.offset)
    if isinstance(item, Fault):
        return Reject(row, item.key, shard, "read", item.reason, item.message, item.offset)
    columns, remarks = _sidecar_columns(kept, sample, item.suffix) if kept else ({}, ())
    if sample.beside_damage:
        remarks = (*remarks, "beside_damage")
    return Row(row, item.key, shard, item.member.body or b"", columns, item.member.offset, remarks)


def _sidecar_columns(
    kept: tuple[Kept, ...], sample: Sample, image_suffix: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The passthrough columns of one image, and remarks on what could not be read or converted."""
    texts, unreadable = _sidecar_texts(sample, image_suffix)
    fields: dict[str, Any] = {}
    if "json" in texts and any(column.name not in SIDECARS for column in kept):
        try:
            fields = dict(json.loads(texts["json"]))
        except (ValueError, TypeError, RecursionError):
            unreadable = (*unreadable, "json_unreadable")
    columns, remarks = convert_all(kept, fields | {name: to_valid_text(text) for name, text in texts.items()})
    return columns, (*unreadable, *remarks)


def _sidecar_texts(sample: Sample, image_suffix: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The sidecars' bytes by kind; beside `x.2.jpg` that is `x.2.json` before `x.json`."""
    members = dict(reversed(sample.members))
    stem = image_suffix.rpartition(".")[0]
    texts: dict[str, bytes] = {}
    unreadable: list[str] = []
    for kind in SIDECARS:
        member = members.get(f"{stem}.{kind}", members.get(kind)) if stem else members.get(kind)
        if member is None:
            continue
        if member.body is None or member.size_bytes > MAX_SIDECAR_BYTES:
            unreadable.append(f"{kind}_unreadable")
        else:
            texts[kind] = member.body
    return texts, tuple(unreadable)


def _split_name(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` -> (`a/b`, `c.jpg`); no suffix for a hidden member or one without an extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem else (name, "")


def _last(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _typed(column: Kept) -> Kept:
    return Kept(column.name, column.type_name or ("int64" if column.name == "cls" else "string"))


def _whole(entry: Entry) -> Piece:
    return Piece(entry.uri, entry.size_bytes, entry.etag)


def _chunks(pieces: Iterable[Piece], count: int) -> Iterator[tuple[Piece, ...]]:
    iterator = iter(pieces)
    while chunk := tuple(itertools.islice(iterator, count)):
        yield chunk


def _open(store: Store, piece: Piece) -> tuple[ByteSource, bool]:
    """A piece's bytes, decompressed where they begin as gzip does, and whether they reach the end of the file."""
    if piece.stop is not None:
        entry = entry_of_slice(store, piece, piece.stop)
        chunks = read_ahead(store.stream(piece.uri, piece.start, piece.stop, expect=entry))
        return ChunkBytes(chunks, piece.start, piece.stop), piece.stop == entry.size_bytes
    chunks = read_ahead(store.stream(piece.uri, expect=entry_of_whole(piece)))
    first = next(chunks, b"") or store.read(piece.uri, expect=entry_of_whole(piece))  # an empty file may have grown
    chunks = itertools.chain([first], chunks)
    if first.startswith(GZIP_MAGIC):
        return GzipBytes(chunks), True
    return ChunkBytes(chunks, 0, piece.size_bytes), True


def _cut(
    samples: Iterable[Sample], count_rows: Callable[[Sample], int], size_bytes: int, limits: PartLimits
) -> Iterator[tuple[int, int, int | None]]:
    """(start, stop, rows) of runs of whole samples within the limits; rows is None for a run with damage in it."""
    start, rows, damaged = 0, 0, False
    iterator = iter(samples)
    sample = next(iterator, None)
    while sample is not None:
        following = next(iterator, None)
        added, stop = count_rows(sample), following.offset if following else size_bytes
        # what lies beside damage is counted with it, as it will be when the run is read
        may_cut = sample.damage is None and not sample.beside_damage and not sample.continues
        if may_cut and rows and (rows + added > limits.rows or stop - start > limits.size_bytes):
            yield start, sample.offset, None if damaged else rows
            start, rows, damaged = sample.offset, 0, False
        rows, damaged = rows + added, damaged or sample.damage is not None
        sample = following
    yield start, size_bytes, None if damaged else rows
