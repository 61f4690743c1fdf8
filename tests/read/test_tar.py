"""The tar reader against Python's own on whole archives, and against chance on broken ones."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2parquet.read.byte_source import ChunkBytes, RangedBytes
from img2parquet.read.gzip_stream import GzipBytes
from img2parquet.read.tar import (
    BLOCK,
    MAX_EXTENDED_BYTES,
    Archive,
    Damage,
    Member,
    find_header,
    parse_header,
    parse_number,
    parse_records,
)
from img2parquet.storage import Entry, Store
from tests.read.broken_shards import PLAIN, images, jpeg, overwrite, tar, with_checksum

LIMIT = 1 << 20
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)
NAMES = TEXT.filter(lambda name: not name.endswith("/") and not name.startswith("/") and name.isprintable())


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def members(data: bytes, chunk: int = 1000) -> list[Member | Damage]:
    return list(Archive(ChunkBytes(chunked(data, chunk), 0, len(data)), lambda *_: True, LIMIT))


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
    format=st.sampled_from(FORMATS[1:]),
    chunk=st.integers(1, 4000),
)
def test_whole_archives_read_as_python_reads_them(entries: list[tuple[str, bytes]], format: int, chunk: int) -> None:
    data = tar(entries, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, info.size, info.offset, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    found = members(data, chunk)
    assert all(isinstance(item, Member) for item in found)
    assert [(m.name, m.size_bytes, m.offset, m.body) for m in found if isinstance(m, Member)] == expected


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_in_each_format(format: int) -> None:
    names = ["a" * 90 + "/" + "b" * 90 + ".jpg", "short.jpg"]
    assert [item.name for item in members(tar([(name, b"x") for name in names], format))] == names


def test_pax_headers_speak_for_one_member() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as archive:
        for size in (3, 4):
            info = tarfile.TarInfo("x.jpg")
            info.size, info.pax_headers = size, {"path": f"é{size}.jpg"}
            archive.addfile(info, io.BytesIO(bytes(size)))
    assert [(m.name, len(m.body or b"")) for m in members(sink.getvalue()) if isinstance(m, Member)] == [
        ("é3.jpg", 3),
        ("é4.jpg", 4),
    ]


def test_a_global_pax_header_speaks_for_all_members() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "all.jpg"}) as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    assert [item.name for item in members(sink.getvalue())] == ["all.jpg", "all.jpg"]


@pytest.mark.parametrize("type_", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_the_size_of_what_has_no_body_is_no_length(type_: bytes) -> None:
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size = type_, 700
    names = [item.name.rstrip("/") for item in members(info.tobuf(tarfile.USTAR_FORMAT) + PLAIN)]
    assert names[:2] == ["x.jpg", "000.jpg"]


def test_a_pax_size_overrides_the_header() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 0, {"size": "600"}
        archive.addfile(info)
        sink.write(b"b" * 600 + bytes(424))
        archive.offset += 1024
        archive.addfile(tarfile.TarInfo("z.jpg"))
    assert [(m.name, m.body) for m in members(sink.getvalue()) if isinstance(m, Member)] == [
        ("a.jpg", b"b" * 600),
        ("z.jpg", b""),
    ]


def test_a_broken_extended_header_costs_its_member_and_no_other() -> None:
    long = "n" * 150 + ".jpg"
    data = tar([("a.jpg", b"a"), (long, b"b"), ("c.jpg", b"c")], tarfile.PAX_FORMAT)
    broken = data.replace(b" path=n", b" pa\0h-n")
    names = [item.name for item in members(broken)]
    assert names[0] == "a.jpg" and names[-1] == "c.jpg" and long not in names
    assert [type(item) for item in members(broken)] == [Member, Damage, Member]


@pytest.mark.parametrize("over", [0, 1])
def test_an_extended_header_has_a_largest_size(over: int) -> None:
    size_bytes = MAX_EXTENDED_BYTES + over
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size_bytes
    record = b"%d path=" % size_bytes
    body = record + b"n" * (size_bytes - len(record) - 1) + b"\n" + bytes(-size_bytes % BLOCK)
    first, *others = members(info.tobuf(tarfile.USTAR_FORMAT) + body + tar([("a.jpg", b"a")]))
    if over:
        assert isinstance(first, Damage) and "claims 1048577 bytes" in first.message
        assert [item.name for item in others] == ["a.jpg"]
    else:
        assert isinstance(first, Member) and first.name.startswith("nnn") and first.body == b"a" and not others


def test_old_gnu_sparse_files_are_passed_over_whole() -> None:
    info = tarfile.TarInfo("s.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 700
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    extension = bytes(504) + b"\1" + bytes(7) + bytes(512)
    data = bytes(header) + extension + bytes(1024) + tar([("a.jpg", b"a")])
    assert [(item.name, getattr(item, "kind", "damage")) for item in members(data)] == [
        ("s.jpg", "sparse"),
        ("a.jpg", "file"),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644), (b"   644 \0", 0o644), (b"\0" * 8, 0), (b"\x80" + b"\0" * 6 + b"\7", 7),
        (b"\xff" * 8, None), (b"12x\0\0\0\0\0", None), (b"0000009\0", None), (b"-000001\0", None),
        (b"644\x00777\0", 0o644), (b"644\0 x \0", 0o644),
    ],
)  # fmt: skip
def test_numbers(field: bytes, value: int | None) -> None:
    assert parse_number(field) == value


def test_records() -> None:
    assert parse_records(b"12 path=a=b\n10 x=1234\n") == {"path": b"a=b", "x": b"1234"}
    for broken in (b"12 path=ab\n", b"x path=a\n", b"999 path=a\n", b"0 \n", b"5 abc\n"):
        assert "broken" in parse_records(broken)


def test_checksums_of_old_signed_writers_are_accepted() -> None:
    header = bytearray(tar([("\xe9.jpg", b"x")])[:BLOCK])
    total = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 256
    header[148:156] = b"%06o\0 " % total
    assert parse_header(bytes(header)) is not None
    header[0] ^= 1
    assert parse_header(bytes(header)) is None


def test_an_inner_tar_is_a_body_like_any_other() -> None:
    data = tar([("inner.tar", tar(images())), ("a.jpg", jpeg(0))])
    archive = Archive(ChunkBytes(chunked(data, 700), 0, len(data)), lambda name, *_: name.endswith("jpg"), LIMIT)
    assert [item.name for item in archive] == ["inner.tar", "a.jpg"]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), is_gzip=st.booleans())
def test_fuzz(seed: int, is_gzip: bool) -> None:
    """Whatever is done to an archive: no exception, and every byte is either read or named in a damage."""
    rng = random.Random(seed)
    data = mutate(tar([(f"{i}.jpg", rng.randbytes(rng.randrange(3000))) for i in range(5)], rng.choice(FORMATS)), rng)
    if is_gzip:
        compressed = mutate(gzip.compress(data, 1), rng) if rng.random() < 0.5 else gzip.compress(data, 1)
        source: ChunkBytes = GzipBytes(chunked(compressed, 777))
    else:
        source = ChunkBytes(chunked(data, 777), 0, len(data))
    found = list(itertools.islice(Archive(source, lambda *_: True, LIMIT), 1000))
    assert len(found) < 1000
    at = 0
    if is_gzip and found and isinstance(found[-1], Damage) and not found[-1].size_bytes:
        found.pop()  # only its checksum is wrong
    for item in found:
        assert item.offset == at, "the stretches lie end to end"
        at += item.size_bytes if isinstance(item, Damage) else span(item)
    if not is_gzip:
        assert not data[at:].strip(b"\0"), "what is left is the end marker"


def span(member: Member) -> int:
    """Bytes of a member whose name is short: no extended header stands before it."""
    body = 0 if member.kind in ("link", "other") and member.body is None else member.size_bytes
    return BLOCK + -(-body // BLOCK) * BLOCK


def mutate(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        data = mutate_once(data, rng.randrange(len(data)), rng.choice([1, 2, 12, 100, 512, 700, 2000]), rng) or b"\0"
    return data


def mutate_once(data: bytes, at: int, length: int, rng: random.Random) -> bytes:
    kind = rng.choice(["flip", "zero", "noise", "drop", "insert", "cut", "double", "header", "resize"])
    if kind == "flip":
        return overwrite(data, at, bytes([data[at] ^ (1 << rng.randrange(8))]))
    if kind == "header":
        return overwrite(data, at // BLOCK * BLOCK + rng.randrange(BLOCK), rng.randbytes(3))[: len(data)]
    if kind == "resize" and (start := find_header(data[at:])) is not None:
        header = overwrite(
            data[at + start :][:BLOCK], 124, b"%011o\0" % rng.choice([0, 512, 1024, 2048, length, 1 << 32])
        )
        return overwrite(data, at + start, with_checksum(header))
    if kind in ("zero", "noise"):
        return overwrite(data, at, bytes(length) if kind == "zero" else rng.randbytes(length))[: len(data)]
    if kind == "insert":
        return data[:at] + rng.randbytes(length) + data[at:]
    return (
        data[:at] + data[{"drop": at + length, "resize": at, "cut": len(data), "double": max(0, at - length)}[kind] :]
    )


def test_a_header_is_found_across_window_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2parquet.read.tar.WINDOW_BYTES", 1024)
    for gap in range(3000, 3600, 37):
        data = b"\xa5" * gap + tar([("a.jpg", b"a")])
        found = members(data)
        assert [type(item) for item in found] == [Damage, Member] and found[0].size_bytes == gap


def test_find_header_wants_a_checksum() -> None:
    data = tar([("a.jpg", b"a")])
    assert find_header(b"ustar" * 300 + data) == 1500
    assert find_header(b"x" * 3 + data, aligned=True) is None
    assert find_header(overwrite(data, 0, b"b")) is None


def test_a_gzip_bomb_is_read_in_bounded_memory() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    source = GzipBytes(chunked(bomb, 1000))
    taken = 0
    while piece := source.take(1 << 16):
        taken += len(piece)
        assert len(source.chunk) <= 2 << 20
    assert taken == 50 << 20 and not source.fault


def test_gzip_headers_with_every_field() -> None:
    plain = b"text" * 100
    deflated = zlib.compress(plain, wbits=-15)
    trailer = zlib.crc32(plain).to_bytes(4, "little") + len(plain).to_bytes(4, "little")
    header = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\3\0abc" + b"name\0" + b"comment\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    source = GzipBytes(chunked(header + deflated + trailer + bytes(1000), 7))
    assert source.take(10_000) == plain and not source.fault


def test_headers_alone_are_read_from_large_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar([(f"{i}.jpg", bytes(3 << 20)) for i in range(4)] + [(f"s{i}.jpg", b"x") for i in range(2000)]))
    asked: list[int] = []

    class Counting(Store):
        def read(self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None) -> bytes:
            asked.append((stop or 0) - start)
            return super().read(uri, start, stop, expect=expect)

    source = RangedBytes(Counting(), Store().stat(str(path)))
    found = list(Archive(source, lambda *_: True, LIMIT, bodies=False))
    assert len(found) == 2004 and all(isinstance(item, Member) for item in found)
    assert sum(asked) < 4 << 20, "the large bodies were not read"
    assert len(asked) < 30, "the small ones did not cost a request each"
