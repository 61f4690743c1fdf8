"""Group the members of a tar into samples, and a sample into the rows and faults of its part.

* A sample is a run of neighbouring members with one key: the path up to the first dot of the file name.
* Hidden members (`._x.jpg`, `.DS_Store`) do not belong to samples, and members without an extension only if they start
  like an image; `Sampler.skipped` counts the others.
* The rows of a sample follow from headers alone, so that planning counts what reading will yield.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from img2parquet.read.passthrough import Passthrough, convert_all, to_valid_text
from img2parquet.read.settings import IMAGE_EXTENSIONS
from img2parquet.read.tar import Damage, Member, has_no_extension
from img2parquet.schema import Reject, Row

IMAGE_START = re.compile(  # of images whose names do not tell; BMP with the size of its second header
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|\xff\x0a|\0\0\0\x0c(JXL |jP  )"
    rb"|....ftyp(avif|avis|hei[cfmsx]|hev[cmsx]|mif1|msf1)|BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    re.DOTALL,
)
SIDECARS = ("json", "txt", "cls")
MAX_SIDECAR_BYTES = 16 << 20


@dataclass(frozen=True)
class Sampler:
    """Make samples and rows. `image` lists the extensions of images (empty: all known), `kept` the columns to keep."""

    image: tuple[str, ...]
    kept: tuple[Passthrough, ...]
    max_member_bytes: int
    skipped: Counter[str] = field(default_factory=Counter, compare=False)  # members outside of samples, by their kind

    def is_wanted(self, name: str, size_bytes: int, start: bytes) -> bool:
        suffix = split_name(name)[1]
        is_sidecar = bool(self.kept) and last_extension(suffix) in SIDECARS
        return self.is_image(suffix, start) or (is_sidecar and size_bytes <= MAX_SIDECAR_BYTES)

    def is_image(self, suffix: str, start: bytes) -> bool:
        if self.image:
            return suffix in self.image
        return last_extension(suffix) in IMAGE_EXTENSIONS if suffix else IMAGE_START.match(start) is not None

    def samples(self, items: Iterable[Member | Damage]) -> Iterator[TarSample]:
        """Yield neighbouring members with one key as a sample, and each damage alone.

        A sample next to a damage is marked `beside_damage`."""
        sample = TarSample()
        for item in items:
            if isinstance(item, Damage):
                sample.beside_damage = True
                yield from sample.finished()
                yield TarSample(split_name(item.name)[0], damage=item)
                sample = TarSample(beside_damage=True)
                continue
            key, suffix = split_name(item.name)
            if item.kind == "other" or not (suffix or self.is_image(suffix, item.start)):
                if not item.name.endswith("/"):
                    self.skipped[_kind_of_skipped(item)] += 1
                continue
            if sample.members and (key != sample.key or sample.held_bytes > 2 * self.max_member_bytes):
                yield sample
                sample = TarSample(
                    continues=key == sample.key
                )  # an endless sample is cut, so that memory stays bounded
            is_held = item.size_bytes <= self.max_member_bytes and self.is_wanted(
                item.name, item.size_bytes, item.start
            )
            sample.add(key, suffix, item, item.size_bytes if is_held else 0)
        yield from sample.finished()

    def items(self, sample: TarSample) -> list[Image | Damage | Fault]:
        """Return what a sample adds to the part, without its bodies: its images, or one fault, or nothing."""
        if sample.damage is not None:
            return [sample.damage]
        images = [(suffix, member) for suffix, member in sample.members if self.is_image(suffix, member.start)]
        if images:
            several = sample.continues or len({suffix for suffix, _ in images}) > 1
            return [self._image(f"{sample.key}.{s}" if several and s else sample.key, s, m) for s, m in images]
        suffixes = [suffix for suffix, _ in sample.members]
        only_sidecars = all(last_extension(suffix) in SIDECARS for suffix in suffixes)
        if sample.beside_damage or (only_sidecars and not self.kept):
            return []
        message = (
            f"no image beside {', '.join(f'`.{suffix}`' for suffix in suffixes[:5])} (looked for "
            f"{', '.join(self.image) or 'any image extension'}); the members of a sample must be neighbours"
        )
        return [Fault("not_an_image", message, sample.key, sample.members[0][1].offset)]

    def to_row(self, item: Image | Damage | Fault, sample: TarSample, shard: str, row: int) -> Row | Reject:
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
class TarSample:
    """A run of members with one key, as (suffix, member), or one damage."""

    key: str = ""
    members: list[tuple[str, Member]] = field(default_factory=list)
    held_bytes: int = 0
    damage: Damage | None = None
    beside_damage: bool = False  # members that are missing may have been lost there
    continues: bool = False

    def add(self, key: str, suffix: str, member: Member, held_bytes: int) -> None:
        self.key = key
        self.members.append((suffix, member))
        self.held_bytes += held_bytes + len(member.name)

    def finished(self) -> Iterator[TarSample]:
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
    kept: tuple[Passthrough, ...], sample: TarSample, image_suffix: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the passthrough columns of one image, and warnings about what could not be read or converted."""
    texts, unreadable = _sidecar_texts(sample, image_suffix)
    fields: dict[str, Any] = {}
    if "json" in texts and any(column.name not in SIDECARS for column in kept):
        try:
            fields = _object(texts["json"])
        except (ValueError, RecursionError):
            unreadable = (*unreadable, "json_unreadable")
    columns, remarks = convert_all(kept, fields | {name: _text(body) for name, body in texts.items()})
    escaped = [f"{c.name}_not_utf8" for c in kept if c.name in texts and not _is_text(texts[c.name])]
    return columns, (*unreadable, *remarks, *escaped)


def _object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for any other value: dict() would also take an array of pairs."""
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return fields


def _text(body: bytes) -> str:
    """Decode a sidecar, by its byte order mark if it has one; bytes that are not UTF-8 become escapes."""
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return to_valid_text(body.decode("utf-16", "backslashreplace"))
    return to_valid_text(body.removeprefix(codecs.BOM_UTF8))


def _is_text(body: bytes) -> bool:
    try:
        body.decode("utf-16" if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _sidecar_texts(sample: TarSample, image_suffix: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the bytes of the sidecars by kind; for `x.2.jpg`, `x.2.json` takes precedence over `x.json`."""
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
    """Split `a/b.c.jpg` into `a/b` and `c.jpg`; a hidden member or one without extension has no suffix."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem else (name, "")


def _kind_of_skipped(member: Member) -> str:
    if member.kind == "other":
        return "neither files nor links"
    return "without an extension" if has_no_extension(member.name) else "hidden"


def last_extension(suffix: str) -> str:
    return suffix.rpartition(".")[2]
