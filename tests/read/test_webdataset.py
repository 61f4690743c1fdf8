"""Tars to rows: sidecars, splitting at plan time, grouping, and what a sample is."""

from __future__ import annotations

import json
import logging
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2parquet.read import PartLimits, read_part
from img2parquet.read.tar import Member
from img2parquet.read.tar_samples import Sampler
from img2parquet.read.webdataset import WebDataset
from img2parquet.schema import Part, Reject, Row
from tests.read.broken_shards import PLAIN, end_of_members, images, jpeg, overwrite, tar
from tests.read.test_tar import mutate


def source_of(tmp_path: Path, data: bytes, name: str = "a.tar", **options: Any) -> WebDataset:
    (tmp_path / name).write_bytes(data)
    return WebDataset(uris=(str(tmp_path / name),), **options)


def read_all(source: WebDataset, limits: PartLimits = PartLimits()) -> list[list[Row | Reject]]:  # noqa: B008
    return [list(read_part(source, Part(i, pieces))) for i, pieces in enumerate(source.plan(limits))]


def rows_of(tmp_path: Path, members: list[tuple[str, bytes]], **options: Any) -> list[Row]:
    (items,) = read_all(source_of(tmp_path, tar(members, tarfile.GNU_FORMAT), **options))
    assert all(isinstance(item, Row) for item in items)
    return [item for item in items if isinstance(item, Row)]


def test_sidecars_become_columns(tmp_path: Path) -> None:
    text = json.dumps({"label": "cat", "score": "0.5", "n": 3, "big": 2**70, "nested": {"a": [1]}, "ok": True})
    members = [("x.jpg", b"i"), ("x.json", text.encode()), ("x.txt", b"a caption\n"), ("x.cls", b"7\n")]
    keep = ["label", "score:float64", "n:int64", "big:int64", "nested", "ok:bool", "ok2:bool", "txt", "cls", "json"]
    (row,) = rows_of(tmp_path, members, keep=keep)
    assert row.passthrough == {
        "label": "cat", "score": 0.5, "n": 3, "big": None, "nested": '{"a": [1]}', "ok": True, "ok2": None,
        "txt": "a caption\n", "cls": 7, "json": text,
    }  # fmt: skip
    assert row.warnings == ("big_not_int64",)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[1]",
        b'[["label", 1]]',
        b'["ab"]',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"7",
        b"",
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_sidecar_that_is_no_object_is_a_remark(tmp_path: Path, text: bytes) -> None:
    (row,) = rows_of(tmp_path, [("x.jpg", b"i"), ("x.json", text)], keep=["label"])
    assert row.passthrough == {"label": None} and row.warnings == ("json_unreadable",)


def test_surrogates_and_foreign_bytes_become_text_that_arrow_takes(tmp_path: Path) -> None:
    members = [("x.jpg", b"i"), ("x.json", b'{"a": "\\ud800 x"}'), ("x.txt", b"caf\xe9")]
    (row,) = rows_of(tmp_path, members, keep=["a", "txt"])
    assert row.passthrough == {"a": "\\ud800 x", "txt": "caf\\xe9"}
    assert row.warnings == ("txt_not_utf8",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_tells_a_sidecars_encoding(tmp_path: Path, encoding: str) -> None:
    members = [("x.jpg", b"i"), ("x.txt", "café".encode(encoding)), ("x.json", '{"a": "é"}'.encode(encoding))]
    (row,) = rows_of(tmp_path, members, keep=["a", "txt"])
    assert (row.passthrough, row.warnings) == ({"a": "é", "txt": "café"}, ())


def test_a_byte_order_mark_is_no_part_of_a_sidecar(tmp_path: Path) -> None:
    members = [
        (f"x.{kind}", b"\xef\xbb\xbf" + text) for kind, text in (("txt", b"a"), ("cls", b"7"), ("json", b'{"n": 1}'))
    ]
    (row,) = rows_of(tmp_path, [("x.jpg", b"i"), *members], keep=["txt", "cls", "json", "n:int64"])
    assert row.passthrough == {"txt": "a", "cls": 7, "json": '{"n": 1}', "n": 1} and row.warnings == ()


def test_the_key_is_the_path_up_to_the_first_dot(tmp_path: Path) -> None:
    names = ["a/b.c/d.e.jpg", "./x.jpg", "d/.hidden.jpg", "README", "UP.JPEG", "a/b.c/d2.webp"]
    assert [row.key for row in rows_of(tmp_path, [(name, b"i") for name in names])] == [
        "a/b.c/d",
        "./x",
        "UP",
        "a/b.c/d2",
    ]


NAMELESS = {  # images by how they start
    "jpeg": jpeg(1), "png": b"\x89PNG\r\n\x1a\n....", "gif": b"GIF89a..", "webp": b"RIFF....WEBPVP8 ",
    "tiff": b"II*\0....", "avif": b"\0\0\0\x1cftypavif....", "heic": b"\0\0\0\x18ftypheic....",
    "bmp": b"BM" + bytes(12) + b"\x28\0\0\0",
}  # fmt: skip


@pytest.mark.parametrize("split", [1, 1 << 30])
def test_an_image_without_an_extension_is_a_row_and_other_such_members_are_counted(
    tmp_path: Path, split: int, caplog: pytest.LogCaptureFixture
) -> None:
    others = [("n/README", b"RIFF is no image"), ("n/empty", b""), ("n/._x", jpeg(1)), ("n/BM", b"BM, a text")]
    members = [(f"n/{name}", data) for name, data in NAMELESS.items()]
    source = source_of(tmp_path, tar([*members, *others, ("n/z.jpg", b"z")]), split_above_bytes=split)
    with caplog.at_level(logging.INFO):
        rows = [item for items in read_all(source, PartLimits(rows=2)) for item in items]
    assert [(row.key, row.image) for row in rows if isinstance(row, Row)] == [*members, ("n/z", b"z")]
    assert len(rows) == len(members) + 1
    assert "3 without an extension" in caplog.text and "1 hidden" in caplog.text


def test_an_image_without_an_extension_has_sidecars(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [("4f1c", jpeg(1)), ("4f1c.json", b'{"label": "cat"}')], keep=["label"])
    assert (row.key, row.passthrough, row.image) == ("4f1c", {"label": "cat"}, jpeg(1))


def test_image_extensions_exclude_members_without_one(tmp_path: Path) -> None:
    assert [row.key for row in rows_of(tmp_path, [("4f1c", jpeg(1)), ("a.jpg", b"a")], image=["jpg"])] == ["a"]


def test_several_images_take_their_own_sidecar_first(tmp_path: Path) -> None:
    members = [("p.1.jpg", b"1"), ("p.1.json", b'{"n": 1}'), ("p.2.jpg", b"2"), ("p.json", b'{"n": 9}')]
    rows = rows_of(tmp_path, members, keep=["n:int64"])
    assert [(row.key, row.passthrough["n"]) for row in rows] == [("p.1.jpg", 1), ("p.2.jpg", 9)]


def test_image_chooses_among_several(tmp_path: Path) -> None:
    members = [("p.jpg", b"1"), ("p.mask.png", b"2"), ("q.jpg", b"3"), ("q.mask.png", b"4")]
    assert [(row.key, row.image) for row in rows_of(tmp_path, members, image=["jpg"])] == [("p", b"1"), ("q", b"3")]
    assert [(row.key, row.image) for row in rows_of(tmp_path, members, image=[".mask.PNG"])] == [
        ("p", b"2"),
        ("q", b"4"),
    ]


def test_an_endless_sample_is_not_held_whole(tmp_path: Path) -> None:
    members = [(f"p.{i:03}.jpg", bytes([i]) * 100) for i in range(49)]
    rows = rows_of(tmp_path, members, max_member_bytes=200)
    assert [(row.key, row.image) for row in rows] == members
    sampler = Sampler((), (), max_member_bytes=200)
    samples = list(sampler.samples(Member(name, "file", len(data), 0, data) for name, data in members))
    assert max(len(sample.members) for sample in samples) == 4 and len(samples[-1].members) == 1


def test_rows_beside_damage_say_so(tmp_path: Path) -> None:
    data = tar([m for i in range(3) for m in ((f"{i}.jpg", b"i"), (f"{i}.txt", b"t"))])
    (items,) = read_all(source_of(tmp_path, overwrite(data, 5 * 512 + 512 + 100, b"\xff"), keep=["txt"]))
    assert [(type(i).__name__, i.key, getattr(i, "warnings", None)) for i in items] == [
        ("Row", "0", ()), ("Row", "1", ("beside_damage",)), ("Reject", "", None), ("Row", "2", ("beside_damage",)),
    ]  # fmt: skip


def test_an_image_lost_to_damage_is_one_fault_not_two(tmp_path: Path) -> None:
    data = tar([m for i in range(3) for m in ((f"{i}.jpg", b"i"), (f"{i}.txt", b"t"))])
    (items,) = read_all(source_of(tmp_path, overwrite(data, 2048 + 100, b"\xff"), keep=["txt"]))
    assert [(type(item).__name__, item.key) for item in items] == [("Row", "0"), ("Reject", ""), ("Row", "2")]


def test_damage_says_where_and_how_much(tmp_path: Path) -> None:
    (items,) = read_all(source_of(tmp_path, PLAIN[: end_of_members(PLAIN)] + b"x" * 1000))
    reject = items[-1]
    assert isinstance(reject, Reject) and reject.offset == end_of_members(PLAIN)
    assert f"1000 bytes, from byte {reject.offset} to {reject.offset + 1000}, were not read" in reject.message


def test_a_missing_end_marker_is_told_in_the_log_with_the_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_all(source_of(tmp_path, PLAIN))
        assert not caplog.text
        read_all(source_of(tmp_path, PLAIN[: end_of_members(PLAIN)], "b.tar"))
    assert "b.tar" in caplog.text and "end-of-archive" in caplog.text


SAMPLES = st.lists(st.tuples(st.integers(0, 1200), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES, rows=st.integers(1, 5), size_bytes=st.integers(1, 9000))
def test_a_split_tar_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[int, bool, int]], rows: int, size_bytes: int
) -> None:
    """The parts hold what they promise, lie end to end, and together give what the whole gives."""
    members = [
        (f"{'n' * (i * 20)}{i:02}.{extension}", bytes(size))
        for i, (size, has_image, texts) in enumerate(samples)
        for extension in (*(["jpg"] if has_image else []), *["cls", "txt", "npy"][:texts])
    ]
    folder = tmp_path_factory.mktemp("split")
    data = tar(members, tarfile.PAX_FORMAT)
    (whole,) = read_all(source_of(folder, data, keep=["cls"]))
    source = source_of(folder, data, "b.tar", keep=["cls"], split_above_bytes=1)
    parts = [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(rows, size_bytes)))]
    pieces = [part.pieces[0] for part in parts]
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == len(data) == sum(piece.size_bytes for piece in pieces)
    read = [list(source.read(part)) for part in parts]
    assert [part.rows for part in parts] == [len(items) for items in read]
    assert all(len(items) <= rows for items in read)
    assert [(i.key, i.offset) for items in read for i in items] == [(i.key, i.offset) for i in whole]


def test_a_large_damaged_tar_is_split_and_nothing_is_lost(tmp_path: Path) -> None:
    data = tar([(f"{i:03}.jpg", jpeg(i)) for i in range(30)])
    broken = overwrite(data, len(data) // 3 // 512 * 512, bytes(700))
    (whole,) = read_all(source_of(tmp_path, broken))
    source = source_of(tmp_path, broken, "b.tar", split_above_bytes=1)
    parts = [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(rows=4)))]
    items = [item for part in parts for item in source.read(part)]
    assert [(type(i), i.key) for i in items] == [(type(i), i.key) for i in whole]
    assert sum(part.rows is None for part in parts) == 1 < len(parts)


def test_a_large_gzipped_tar_is_not_split(tmp_path: Path) -> None:
    import gzip

    for name in ("a.tar.gz", "b.tar"):
        source = source_of(tmp_path, gzip.compress(PLAIN), name, split_above_bytes=1)
        assert [len(items) for items in read_all(source, PartLimits(rows=1))] == [4]


def test_a_large_tar_with_a_global_header_that_matters_is_not_split(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for records, count in (({"comment": "x"}, 4), ({"size": "0"}, 1)):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=records) as archive:
            for i in range(4):
                archive.addfile(tarfile.TarInfo(f"{i}.jpg"))
        assert len(read_all(WebDataset(uris=(str(path),), split_above_bytes=1), PartLimits(rows=1))) == count


def test_small_tars_are_grouped_without_being_opened(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.tar").write_bytes(b"no tar, " * 1000)
    source = WebDataset(uris=(str(tmp_path / "*.tar"),))
    assert [len(part) for part in source.plan(PartLimits(size_bytes=25_000))] == [3, 3, 3, 1]
    assert [len(part) for part in source.plan(PartLimits(rows=1))] == [8, 2]
    by_count = WebDataset(uris=source.uris, shards_per_part=4)
    assert [len(part) for part in by_count.plan(PartLimits(rows=1))] == [4, 4, 2]


def test_a_shard_named_twice_is_read_once(tmp_path: Path) -> None:
    source = source_of(tmp_path, tar(images()))
    twice = WebDataset(uris=(*source.uris, str(tmp_path / "*.tar")))
    assert list(twice.plan(PartLimits())) == list(source.plan(PartLimits()))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_fuzz_split(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Whatever is done to a tar: each part yields the rows that were planned, and splitting loses no image."""
    rng = random.Random(seed)
    names = [f"{i}.{extension}" for i in range(8) for extension in ("jpg", "json")]
    data = mutate(tar([(name, rng.randbytes(rng.randrange(2000))) for name in names]), rng)
    folder = tmp_path_factory.mktemp("fuzz")
    unsplit = source_of(folder, data)
    whole = [item for i, pieces in enumerate(unsplit.plan(PartLimits())) for item in unsplit.read(Part(i, pieces))]
    source = source_of(folder, data, "b.tar", split_above_bytes=1)
    parts = [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(rows=2)))]
    read = [list(source.read(part)) for part in parts]
    assert all(part.rows in (None, len(items)) for part, items in zip(parts, read, strict=True))
    assert all([item.row for item in items] == list(range(len(items))) for items in read)
    rows = [(i.key, i.image) for items in read for i in items if isinstance(i, Row)]
    assert rows == [(i.key, i.image) for i in whole if isinstance(i, Row)]
