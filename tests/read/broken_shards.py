"""Broken and odd shards, made on the spot, each with its outcome: keys in order, rejects by reason, or an error.

`BROKEN_SHARDS` is plain data: other tests may put the files anywhere (`put`) and run a whole job over them.
Images are real JPEGs, so that a run's decoder has nothing to say about them.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from img2parquet.errors import InputError
from img2parquet.storage import Store, join

BLOCK = 512


@dataclass(frozen=True)
class BrokenShard:
    """Files by name, the settings that read them, and the outcome. `says` must occur in a reject's or error's text."""

    name: str
    files: Mapping[str, bytes]
    settings: Mapping[str, Any]
    keys: tuple[str, ...] = ()
    rejects: Mapping[str, int] = field(default_factory=dict)
    error: type[Exception] | None = None
    says: str = ""


def put(shard: BrokenShard, root: str) -> dict[str, Any]:
    """Writes a shard's files below `root` (a folder or an s3:// prefix); the job file's `input:` that reads them."""
    for name, data in shard.files.items():
        Store().create(join(root, name), data)
    return {**shard.settings, "uris": [join(root, name) for name in shard.settings["uris"]]}


@lru_cache
def jpeg(number: int) -> bytes:
    """A small photo-like JPEG, another for each number."""
    image = Image.effect_noise((24, 16), 40 + number).convert("RGB")
    image.paste((number * 11 % 256, number * 29 % 256, 128), (0, 0, 8, 8))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return sink.getvalue()


def tar(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def images(count: int = 4) -> list[tuple[str, bytes]]:
    return [(f"{i:03}.jpg", jpeg(i)) for i in range(count)]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KEYS = ("000", "001", "002", "003")
PLAIN = tar(images())


def header_at(data: bytes, index: int) -> int:
    """Where the header of the member with this number lies."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()[index].offset


def body_at(data: bytes, index: int) -> int:
    return header_at(data, index) + BLOCK


def end_of_members(data: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        last = archive.getmembers()[-1]
        return last.offset_data + -(-last.size // BLOCK) * BLOCK


def overwrite(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def with_header(data: bytes, index: int, change: Callable[[bytes], bytes]) -> bytes:
    """The header of one member changed, and its checksum made right again."""
    at = header_at(data, index)
    return overwrite(data, at, with_checksum(change(data[at : at + BLOCK])))


def with_size(size: bytes) -> Callable[[bytes], bytes]:
    return lambda header: overwrite(header, 124, size)


def special(name: str, type_: bytes, target: str = "") -> bytes:
    """One entry without a body: a link, a folder, a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return info.tobuf(tarfile.USTAR_FORMAT)


def joined(*parts: bytes) -> bytes:
    return b"".join(part[: end_of_members(part)] if len(part) > BLOCK else part for part in parts) + bytes(2 * BLOCK)


def _tar(name: str, data: bytes, file: str = "a.tar", **outcome: Any) -> BrokenShard:
    settings = {"kind": "webdataset", "uris": [file], **outcome.pop("settings", {})}
    return BrokenShard(name, {file: data}, settings, **outcome)


def _damaged(name: str, data: bytes, *keys: str, **outcome: Any) -> BrokenShard:
    return _tar(name, data, keys=keys, rejects={"shard_damaged": 1}, **outcome)


LONG = "folder-" * 20 + "/" + "name-" * 40
SECOND = header_at(PLAIN, 1)
GZIPPED = gzip.compress(PLAIN, mtime=0)
INTERLEAVED = tar([*images(2), ("000.json", b'{"label": 1}'), ("001.json", b'{"label": 2}')])
SIDECARS = tar(
    [("a.jpg", jpeg(0)), ("a.json", b'{"label": "x'), ("a.cls", b"seven"), ("b.cls", b"1"), ("b.jpg", jpeg(1))]
)

TARS = (
    _tar("whole", PLAIN, keys=KEYS),
    _damaged("cut inside a body", PLAIN[: body_at(PLAIN, 2) + 100], *KEYS[:2], says="`002.jpg`"),
    _tar("cut at a header", PLAIN[: header_at(PLAIN, 2)], keys=KEYS[:2]),
    _damaged("cut inside a header", PLAIN[: header_at(PLAIN, 2) + 100], *KEYS[:2], says="100 bytes"),
    _tar("no end blocks", PLAIN[: end_of_members(PLAIN)], keys=KEYS),
    _tar("one end block", PLAIN[: end_of_members(PLAIN) + BLOCK], keys=KEYS),
    _damaged("header zeroed", overwrite(PLAIN, SECOND, bytes(BLOCK)), "000", "002", "003", says=f"byte {SECOND}"),
    _damaged(
        "header and body zeroed", overwrite(PLAIN, SECOND, bytes(header_at(PLAIN, 2) - SECOND)), "000", "002", "003"
    ),
    _damaged("checksum bad", overwrite(PLAIN, SECOND + 150, b"1"), "000", "002", "003", says="checksum"),
    _damaged("header full of noise", overwrite(PLAIN, SECOND, b"\xa5" * BLOCK), "000", "002", "003"),
    _damaged("size beyond the file", with_header(PLAIN, 1, with_size(b"77777777777\0")), "000", "002", "003"),
    _damaged(
        "size of 2**80", with_header(PLAIN, 1, with_size(b"\x80" + bytes([0, 1]) + bytes(9))), "000", "002", "003"
    ),
    _damaged("size swallows a member", with_header(PLAIN, 1, with_size(b"%011o\0" % 2048)), "000", "002", "003"),
    _damaged("size negative", with_header(PLAIN, 1, with_size(b"\xff" * 12)), "000", "002", "003"),
    _damaged("size is text", with_header(PLAIN, 1, with_size(b"many bytes!\0")), "000", "002", "003"),
    _tar("body zeroed", overwrite(PLAIN, body_at(PLAIN, 1), bytes(100)), keys=KEYS),
    _damaged("a stretch lost", PLAIN[: SECOND + 100] + PLAIN[SECOND + 300 :], "000", "002", "003"),
    _damaged("garbage after the end", PLAIN + b"log line\n" * 100, *KEYS, says="end-of-archive"),
    _damaged("two tars joined", tar(images(2)) + tar([("z.jpg", jpeg(9))]), "000", "001", "z", says="joined"),
    _damaged("zero-length file", b"", says="no bytes"),
    _tar("no members", bytes(10 * 1024)),
    _damaged("text named .tar", b"<html>404 Not Found</html>\n" * 40, says="<html>"),
    _damaged("zstd named .tar", b"\x28\xb5\x2f\xfd" + b"x" * 2000, says="zstd"),
    _tar("GNU long names", tar([(f"{LONG}.jpg", jpeg(1)), *images(1)], tarfile.GNU_FORMAT), keys=(LONG, "000")),
    _tar("pax long names", tar([(f"{LONG}.jpg", jpeg(1)), *images(1)], tarfile.PAX_FORMAT), keys=(LONG, "000")),
    _tar(
        "base-256 size",
        with_header(PLAIN, 1, lambda h: overwrite(h, 124, b"\x80" + len(jpeg(1)).to_bytes(11, "big"))),
        keys=KEYS,
    ),
    _tar(
        "links, folders, devices",
        joined(
            special("d.jpg/", b"5"),
            special("p.jpg", b"6"),
            special("s.jpg", b"2", "x"),
            special("h.jpg", b"1", "x"),
            PLAIN,
        ),
        keys=KEYS,
        rejects={"unsupported": 2},
    ),
    _tar(
        "names not in UTF-8",
        with_header(
            with_header(PLAIN, 0, lambda h: overwrite(h, 0, b"\xe9.jpg\0\0")),
            1,
            lambda h: overwrite(h, 0, b"\xe8.jpg\0\0"),
        ),
        keys=("\\xe9", "\\xe8", "002", "003"),
    ),
    _tar(
        "hostile names",
        tar(
            [
                ("../../etc/passwd.jpg", jpeg(0)),
                ("/etc/shadow.png", jpeg(1)),
                ("a\nb.jpg", jpeg(2)),
                ("$(reboot).jpg", jpeg(3)),
            ]
        ),
        keys=("../../etc/passwd", "/etc/shadow", "a\nb", "$(reboot)"),
    ),
    _tar("duplicate keys", tar([*images(2), *images(1)]), keys=("000", "001"), rejects={"duplicate_key": 1}),
    _tar("hidden files", tar([("._000.jpg", b"\0\5\x16\7"), (".DS_Store", b"x"), *images(1)]), keys=("000",)),
    _tar("names without extensions", tar([("n/4f1c", jpeg(0)), ("n/9be0", jpeg(1))]), keys=("n/4f1c", "n/9be0")),
    _damaged("a git-lfs pointer named .tar", LFS_POINTER, says="git lfs pull"),
    _tar("no images", tar([("a.wav", b"RIFF"), ("b.wav", b"RIFF")]), rejects={"not_an_image": 2}),
    _tar("several images", tar([("a.jpg", jpeg(0)), ("a.mask.png", jpeg(1))]), keys=("a.jpg", "a.mask.png")),
    _tar(
        "member too large",
        PLAIN,
        settings={"max_member_bytes": 100},
        rejects={"unsupported": 4},
        says="max_member_bytes",
    ),
    _tar(
        "sidecars away from their images",
        INTERLEAVED,
        settings={"keep": ["label"]},
        keys=("000", "001"),
        rejects={"not_an_image": 2},
        says="neighbours",
    ),
    _tar("sidecars that nobody asked for", INTERLEAVED, keys=("000", "001")),
    _tar("sidecars broken", SIDECARS, settings={"keep": ["label", "cls"]}, keys=("a", "b")),
    _tar("gzip", GZIPPED, "a.tar.gz", keys=KEYS),
    _tar("gzip without its name", GZIPPED, keys=KEYS),
    _tar("gzip in two members", gzip.compress(PLAIN[:3000]) + gzip.compress(PLAIN[3000:]), "a.tgz", keys=KEYS),
    _tar(
        "gzip cut",
        GZIPPED[: len(GZIPPED) // 2],
        "a.tar.gz",
        keys=KEYS[:1],
        rejects={"shard_damaged": 1},
        says="ends early",
    ),
    _tar(
        "gzip with a bad checksum",
        overwrite(GZIPPED, len(GZIPPED) - 8, b"oops"),
        "a.tar.gz",
        keys=KEYS,
        rejects={"shard_damaged": 1},
        says="checksum",
    ),
    _tar("gzip of text", gzip.compress(b"hello " * 500), "a.tar.gz", rejects={"shard_damaged": 1}, says="hello"),
    _tar("gzip header only", b"\x1f\x8b\x08", "a.tar.gz", rejects={"shard_damaged": 1}, says="header"),
)


def parquet(columns: Mapping[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="none", **options)
    return sink.getvalue()


def _parquet(name: str, files: Mapping[str, bytes], **outcome: Any) -> BrokenShard:
    settings = {"kind": "parquet", "uris": list(files), "key": "id", **outcome.pop("settings", {})}
    return BrokenShard(name, files, settings, **outcome)


FOUR = {"image": [jpeg(i) for i in range(4)], "id": list(KEYS)}
WHOLE = parquet(FOUR, row_group_size=2)
FLIPPED = overwrite(WHOLE, 4, b"\xff" * 24)  # the first page's header

PARQUETS = (
    _parquet("parquet", {"a.parquet": WHOLE}, keys=KEYS),
    _parquet("parquet truncated", {"a.parquet": WHOLE[:-20]}, error=InputError, says="a.parquet"),
    _parquet("parquet empty file", {"a.parquet": b""}, error=InputError, says="a.parquet"),
    _parquet(
        "parquet without rows",
        {"a.parquet": parquet({"image": pa.array([], pa.binary()), "id": pa.array([], pa.string())})},
        error=InputError,
        says="no rows",
    ),
    _parquet(
        "parquet null bytes",
        {"a.parquet": parquet({**FOUR, "image": [jpeg(0), None, b"", jpeg(3)]})},
        keys=("000", "002", "003"),
        rejects={"empty": 1},
    ),
    _parquet(
        "parquet null key",
        {"a.parquet": parquet({**FOUR, "id": ["000", None, "002", ""]})},
        keys=("000", "002"),
        rejects={"no_key": 2},
    ),
    _parquet(
        "parquet duplicate key",
        {"a.parquet": parquet({**FOUR, "id": ["x", "x", "y", "x"]})},
        keys=("x", "y"),
        rejects={"duplicate_key": 2},
    ),
    _parquet("parquet page damaged", {"a.parquet": FLIPPED}, keys=KEYS[2:], rejects={"shard_damaged": 2}),
    _parquet(
        "parquet no image column", {"a.parquet": parquet({"id": ["a"], "img": [b"x"]})}, error=InputError, says="`img`"
    ),
    _parquet("parquet no key", {"a.parquet": WHOLE}, settings={"key": None}, error=InputError, says="input.key"),
    _parquet(
        "parquet of text",
        {"a.parquet": parquet({"id": ["a"], "image": ["http://x"]})},
        error=InputError,
        says="kind: table",
    ),
    _parquet(
        "parquet types differ",
        {"a.parquet": parquet({**FOUR, "n": [1] * 4}), "b.parquet": parquet({**FOUR, "n": ["1"] * 4})},
        settings={"keep": ["n"]},
        error=InputError,
        says="b.parquet",
    ),
)


def _list(name: str, file: str, data: bytes, **outcome: Any) -> BrokenShard:
    files = {file: data, "img/0.jpg": jpeg(0), "img/1.jpg": jpeg(1)}
    return BrokenShard(name, files, {"kind": "table", "uris": [file], **outcome.pop("settings", {})}, **outcome)


BOTH = ("img/0.jpg", "img/1.jpg")

LISTS = (
    _list("csv", "a.csv", b"uri\nimg/0.jpg\nimg/1.jpg\n", keys=BOTH),
    _list(
        "csv with BOM, CRLF and quotes",
        "a.csv",
        b'\xef\xbb\xbfuri,note\r\n"img/0.jpg","a\r\nb, c"\r\nimg/1.jpg,\r\n',
        keys=BOTH,
    ),
    _list("csv without the column", "a.csv", b"url\nimg/0.jpg\n", error=InputError, says="did you mean `url`"),
    _list("csv with only a header", "a.csv", b"uri\n", error=InputError, says="no rows"),
    _list("csv empty", "a.csv", b"", error=InputError, says="empty"),
    _list(
        "csv ragged", "a.csv", b"uri,n\nimg/0.jpg,1\nimg/1.jpg\nimg/1.jpg,2\n", keys=BOTH, rejects={"shard_damaged": 1}
    ),
    _list(
        "csv quote left open",
        "a.csv",
        b'uri,note\nimg/0.jpg,"a\nimg/1.jpg,b\nimg/9.jpg,"c\n',
        keys=BOTH,
        rejects={"not_found": 1},
    ),
    _list(
        "csv with a cell too large",
        "a.csv",
        b'uri\nimg/0.jpg\n"img/1.jpg\n' + b"x" * 200_000,
        keys=BOTH[:1],
        rejects={"not_found": 1, "shard_damaged": 1},
        says="field larger",
    ),
    _list(
        "csv with a BOM and a quoted header",
        "a.csv",
        b'\xef\xbb\xbf"uri","n"\r\n"img/0.jpg","1"\r\n"img/1.jpg","2"\r\n',
        keys=BOTH,
    ),
    _list("csv in UTF-16", "a.csv", "uri\nimg/0.jpg\n".encode("utf-16"), error=InputError, says="iconv"),
    _list("csv in UTF-16 without a BOM", "a.csv", "uri\n".encode("utf-16-be"), error=InputError, says="UTF-16"),
    _list("csv compressed", "a.csv", gzip.compress(b"uri\nimg/0.jpg\n"), error=InputError, says="gzip -d"),
    _list(
        "csv without a header", "a.csv", b"img/0.jpg,a\nimg/1.jpg,b\n", error=InputError, says="first line looks like"
    ),
    _list("csv that is a git-lfs pointer", "a.csv", LFS_POINTER, error=InputError, says="git lfs pull"),
    _list(
        "list names what is not there",
        "a.csv",
        b"uri\nimg/0.jpg\nimg/9.jpg\n../../../x.jpg\n",
        keys=BOTH[:1],
        rejects={"not_found": 2},
    ),
    _list(
        "list with odd names",
        "a.csv",
        b"uri,n\n,1\nimg/0.jpg\0,2\nnosuch://x/y,3\nimg,4\n" + b"y" * 300 + b",5\n",
        rejects={"not_found": 4, "unsupported": 1},
    ),
    _list("tsv", "a.tsv", b"uri\tn\nimg/0.jpg\t1\n", keys=BOTH[:1]),
    _list("jsonl with a BOM", "a.jsonl", b'\xef\xbb\xbf{"uri": "img/0.jpg"}', keys=BOTH[:1]),
    _list("json array", "a.jsonl", b'[\n {"uri": "img/0.jpg"}\n]', error=InputError, says="jq"),
    _list("jsonl", "a.jsonl", b'{"uri": "img/0.jpg"}\n\n{"uri": "img/1.jpg", "more": 1}', keys=BOTH),
    _list(
        "jsonl broken line",
        "a.jsonl",
        b'{"uri": "img/0.jpg"}\n{"uri": \n[1]\n{}\n{"uri": "img/1.jpg"}\n',
        keys=BOTH,
        rejects={"shard_damaged": 2, "not_found": 1},
    ),
    _list(
        "jsonl without the column", "a.jsonl", b'{"url": "img/0.jpg"}\n', error=InputError, says="did you mean `url`"
    ),
    _list(
        "parquet list",
        "a.parquet",
        parquet({"uri": ["img/0.jpg", None, "img/1.jpg"]}),
        keys=BOTH,
        rejects={"not_found": 1},
    ),
    _list(
        "parquet list without the column",
        "a.parquet",
        parquet({"url": ["x"]}),
        error=InputError,
        says="did you mean `url`",
    ),
    _list("list of an unknown format", "a.xlsx", b"PK", error=InputError, says=".jsonl"),
    _list(
        "listed image too large",
        "a.csv",
        b"uri\nimg/0.jpg\n",
        settings={"max_image_bytes": 100},
        rejects={"unsupported": 1},
    ),
    _list(
        "list with a null key",
        "a.csv",
        b"uri,id\nimg/0.jpg,a\nimg/1.jpg,\n",
        settings={"key": "id"},
        keys=("a",),
        rejects={"no_key": 1},
    ),
)

FOLDERS = (
    BrokenShard(
        "folder with other files",
        {"f/a/0.jpg": jpeg(0), "f/a/notes.txt": b"x", "f/.git/1.jpg": jpeg(1), "f/._0.jpg": b"x", "f/B.JPG": jpeg(2)},
        {"kind": "folder", "uris": ["f"]},
        keys=("B.JPG", "a/0.jpg"),
    ),
    BrokenShard(
        "folder of tars", {"f/a.tar": PLAIN}, {"kind": "folder", "uris": ["f"]}, error=InputError, says="webdataset"
    ),
)

BROKEN_SHARDS = (*TARS, *PARQUETS, *LISTS, *FOLDERS)
