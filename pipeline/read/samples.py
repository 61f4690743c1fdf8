"""Members of a tar to samples, and a sample to the rows and faults that it adds to its part.

* A sample is a run of neighbouring members with one key: the path up to the first dot of the file name.
* Hidden members (`._x.jpg`, `.DS_Store`) and members without an extension are no samples.
* Which rows a sample adds is told from headers alone, so that planning counts what reading will yield.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.read.keep import Kept, convert_all, to_valid_text
from pipeline.read.settings import IMAGE_EXTENSIONS
from pipeline.read.tar import Damage, Member
from pipeline.schema import Reject, Row

SIDECARS = ("json", "txt", "cls")
MAX_SIDECAR_BYTES = 16 << 20


@dataclass(frozen=True)
class Sampler:
    """`image` lists the extensions that are images (none: all known), `kept` the passthrough columns."""

    image: tuple[str, ...]
    kept: tuple[Kept, ...]
    max_member_bytes: int

    def is_wanted(self, name: str, size_bytes: int) -> bool:
        suffix = split_name(name)[1]
        is_sidecar = bool(self.kept) and last_extension(suffix) in SIDECARS
        return self.is_image(suffix) or (is_sidecar and size_bytes <= MAX_SIDECAR_BYTES)

    def is_image(self, suffix: str) -> bool:
        return suffix in self.image if self.image else last_extension(suffix) in IMAGE_EXTENSIONS

    def samples(self, items: Iterable[Member | Damage]) -> Iterator[Sample]:
        """Neighbouring members with one key, and each damage alone; a sample beside a damage knows it."""
        sample = Sample()
        for item in items:
            if isinstance(item, Damage):
                sample.beside_damage = True
                yield from sample.finished()
                yield Sample(split_name(item.name)[0], damage=item)
                sample = Sample(beside_damage=True)
                continue
            key, suffix = split_name(item.name)
            if item.kind == "other" or not suffix:
                continue
            if sample.members and (key != sample.key or sample.held_bytes > 2 * self.max_member_bytes):
                yield sample
                sample = Sample(continues=key == sample.key)  # an endless sample is cut, so that it is never held whole
            is_held = item.size_bytes <= self.max_member_bytes and self.is_wanted(item.name, item.size_bytes)
            sample.add(key, suffix, item, item.size_bytes if is_held else 0)
        yield from sample.finished()

    def items(self, sample: Sample) -> list[Image | Damage | Fault]:
        """What one sample adds to the part: its images, or one fault, or nothing. Looks at no body."""
        if sample.damage is not None:
            return [sample.damage]
        images = [(suffix, member) for suffix, member in sample.members if self.is_image(suffix)]
        if images:
            several = sample.continues or len({suffix for suffix, _ in images}) > 1
            return [self._image(f"{sample.key}.{s}" if several else sample.key, s, m) for s, m in images]
        suffixes = [suffix for suffix, _ in sample.members]
        only_sidecars = all(last_extension(suffix) in SIDECARS for suffix in suffixes)
        if sample.beside_damage or (only_sidecars and not self.kept):
            return []
        message = (
            f"no image beside {', '.join(f'`.{suffix}`' for suffix in suffixes[:5])} (looked for "
            f"{', '.join(self.image) or 'any image extension'}); the members of a sample must be neighbours"
        )
        return [Fault("not_an_image", message, sample.key, sample.members[0][1].offset)]

    def to_row(self, item: Image | Damage | Fault, sample: Sample, shard: str, row: int) -> Row | Reject:
        if isinstance(item, Damage):
            end = item.offset + item.size_bytes
            message = f"{item.message}; {item.size_bytes} bytes, from byte {item.offset} to {end}, were not read"
            return Reject(row, sample.key, shard, "read", "shard_damaged", message, item.offset)
        if isinstance(item, Fault):
            return Reject(row, item.key, shard, "read", item.reason, item.message, item.offset)
        columns, remarks = _sidecar_columns(self.kept, sample, item.suffix) if self.kept else ({}, ())
        if sample.beside_damage:
            remarks = (*remarks, "beside_damage")
        return Row(row, item.key, shard, item.member.body or b"", columns, item.member.offset, remarks)

    def _image(self, key: str, suffix: str, member: Member) -> Image | Fault:
        if member.kind != "file":
            message = f"member `{member.name}` is a {member.kind}: its bytes are not here"
            return Fault("unsupported", message, key, member.offset)
        if member.size_bytes > self.max_member_bytes:
            size = f"{member.size_bytes} bytes, more than max_member_bytes: {self.max_member_bytes}"
            return Fault("unsupported", f"member `{member.name}` has {size}", key, member.offset)
        return Image(key, suffix, member)


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

    @property
    def offset(self) -> int:
        return self.member.offset


@dataclass(frozen=True, slots=True)
class Fault:
    reason: Literal["not_an_image", "unsupported"]
    message: str
    key: str
    offset: int


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


def split_name(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` -> (`a/b`, `c.jpg`); no suffix for a hidden member or one without an extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem else (name, "")


def last_extension(suffix: str) -> str:
    return suffix.rpartition(".")[2]
