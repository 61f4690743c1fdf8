"""What claims or becomes more than it is, is stopped before memory is taken for it: peaks are measured in children."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from img2parquet.errors import StorageError
from img2parquet.storage import Store, http_client
from tests.security.servers import Answer, web
from tests.support.small_job import make_checkpoint

MIB = 1 << 20
GIB = 1 << 30
ZEROS = zlib.compress(bytes(GIB), 9)  # a MB that becomes a GB


def chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = ZEROS) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HH", screen, screen) + b"\x80\0\0" + bytes(6)
    return head + b"," + struct.pack("<HHHH", 0, 0, frame, frame) + b"\0\2\2\x4c\1\0;"


def tiff(width: int, height: int, compression: int, strips: int = 1, strip_bytes: int = 100) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 200, 277: 1, 278: height, 279: strip_bytes}
    counts = {273: strips, 279: strips}
    entries = b"".join(struct.pack("<HHII", tag, 4, counts.get(tag, 1), value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + (ZEROS if compression == 8 else bytes(300))


def webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int, frame: int, segments: bytes = b"") -> bytes:
    sof = b"\xff" + bytes([frame]) + b"\0\x11\x08" + struct.pack(">HH", height, width) + b"\3\1\x22\0\2\x11\1\3\x11\1"
    return b"\xff\xd8" + segments + sof + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0" + bytes(100)


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + info + bytes(50)


def lying_avif() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sink, "AVIF")
    data = sink.getvalue()
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]


WIDE = (1 << 24) - 1
IMAGES = {
    "png header": png(65_535, 65_535),
    "png pixels": png(16, 16),
    "png iCCP": png(16, 16, chunk(b"iCCP", b"x\0\0" + ZEROS)),
    "png zTXt": png(16, 16, chunk(b"zTXt", b"x\0\0" + ZEROS)),
    "png iTXt": png(16, 16, chunk(b"iTXt", b"x\0\1\0\0\0" + ZEROS)),
    "png many zTXt": png(16, 16, *repeat(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(MIB))), 300)),
    "gif screen": gif(65_535, 16),
    "gif frame": gif(16, 65_535),
    "webp canvas": webp(b"VP8X" + struct.pack("<I", 10) + bytes(4) + WIDE.to_bytes(3, "little") * 2),
    "webp frame": webp(
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\x0f\0\0" * 2,
        b"VP8L" + struct.pack("<I", 10) + b"\x2f\xff\xff\xff\x0f" + bytes(5),
    ),
    "jpeg header": jpeg(65_535, 65_535, 0xC0),
    "jpeg progressive": jpeg(9_000, 9_900, 0xC2),
    "jpeg segments": jpeg(16, 16, 0xC0, (b"\xff\xe2\xff\xffICC_PROFILE\0\1\1" + bytes(65_519)) * 100),
    "tiff header": tiff(65_000, 65_000, 1),
    "tiff strips": tiff(16, 16, 1, strips=1_000_000_000),
    "tiff strip": tiff(16, 16, 1, strip_bytes=0xFFFFFFF0),
    "tiff deflate": tiff(16, 16, 8, strip_bytes=len(ZEROS)),
    "bmp header": bmp(60_000, 60_000),
    "avif header": lying_avif(),
}  # fmt: skip

PEAK = """
import sys, warnings
warnings.simplefilter("ignore")
{setup}
open("/proc/self/clear_refs", "w").write("5")
def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak_kib()
{work}
print("grew", (peak_kib() - before) // 1024)
"""


def growth_mib(setup: str, work: str, *arguments: str, limit_s: float = 60) -> tuple[int, str]:
    """By how much a child's memory grew at its peak while it did the work, and what it said."""
    code = PEAK.format(setup=setup, work=work)
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=limit_s, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return int(ran.stdout.rsplit("grew ", 1)[1]), ran.stdout


DECODE = """
from pathlib import Path
from PIL import Image
Image.MAX_IMAGE_PIXELS = None  # a program around ours may have done this
from img2parquet.images.decode import DecodePolicy, decode
warm = decode(Path(sys.argv[1]).read_bytes())
images = [(path.name, path.read_bytes()) for path in sorted(Path(sys.argv[2]).iterdir())]
"""


def test_no_image_takes_more_than_its_header_may_say(tmp_path: Path) -> None:
    """max_pixels is 10 million here, 30 MB; text chunks may take Pillow's 64 MiB."""
    (tmp_path / "images").mkdir()
    for name, data in IMAGES.items():
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "warm").write_bytes(png(16, 16))
    work = "for name, image in images: print(name, '|', decode(image, DecodePolicy(max_pixels=10_000_000)))"
    grew, said = growth_mib(DECODE, work, str(tmp_path / "warm"), str(tmp_path / "images"))
    assert grew < 150, said
    assert said.count("|") == len(IMAGES)
    for name in ("png header", "gif screen", "gif frame", "webp canvas", "jpeg header", "tiff header", "bmp header"):
        assert f"{name} | Rejection(reason='too_many_pixels'" in said, said


def header(name: str, size_bytes: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size_bytes, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(mib: int) -> Iterable[bytes]:
    return repeat(bytes(MIB), mib)


def record(number: int) -> bytes:
    text = f"k{number}=".encode() + b"v" * (MIB - 600) + b"\n"
    length = len(text) + 8
    return (str(length).encode() + b" " + text).ljust(MIB, b"\0")


def gzipped(path: Path, pieces: Iterable[bytes]) -> None:
    with gzip.open(path, "wb", 6) as file:
        for piece in pieces:
            file.write(piece)


def sidecars(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield header(f"a.{number}.json", 100 * MIB)
        yield from zeros(100)


SHARDS: dict[str, Callable[[], Iterable[bytes]]] = {
    "a large member": lambda: [header("a.jpg", 300 * MIB), *zeros(300)],
    "zeros": lambda: [header("a.jpg", 0), *zeros(300)],
    "a large name": lambda: [header("x", 300 * MIB, b"x"), *zeros(300)],
    "sidecars": lambda: sidecars(3),
    "global records": lambda: (piece for n in range(300) for piece in (header("g", MIB, b"g"), record(n))),
}
READ = """
from img2parquet.read import PartLimits
from img2parquet.read.{module} import {name} as Source
from img2parquet.schema import Part
source = Source(uris=(sys.argv[1],), {settings})
"""
COUNT = """
for i, pieces in enumerate(source.plan(PartLimits())):
    for item in source.read(Part(i, pieces)):
        print(type(item).__name__, getattr(item, 'reason', ''))
"""


@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_that_grows_a_thousandfold_is_read_in_little_memory(shard: str, tmp_path: Path) -> None:
    gzipped(tmp_path / "a.tar.gz", SHARDS[shard]())
    assert (tmp_path / "a.tar.gz").stat().st_size < 6 * MIB
    setup = READ.format(module="webdataset", name="WebDataset", settings="keep=('json',)")
    grew, _ = growth_mib(setup, COUNT, str(tmp_path / "a.tar.gz"))
    assert grew < 90


def test_a_gzip_name_without_an_end_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (200 * MIB))
    setup = READ.format(module="webdataset", name="WebDataset", settings="")
    grew, said = growth_mib(setup, COUNT, str(tmp_path / "a.tar.gz"), limit_s=20)
    assert "shard_damaged" in said and grew < 120


def test_pages_that_grow_a_thousandfold_are_read_some_at_a_time(tmp_path: Path) -> None:
    """One row group of pages of 8 MiB; larger ones are in `tests/read/test_page_size_guard.py`."""
    images = pa.array([bytes(2 * MIB)] * 300, pa.large_binary())
    table = pa.table({"id": [str(i) for i in range(300)], "image": images})
    how = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_batch_size": 4}
    pq.write_table(table, tmp_path / "a.parquet", **how)
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    setup = READ.format(module="parquet", name="ParquetRows", settings="key='id'")
    grew, said = growth_mib(setup, COUNT, str(tmp_path / "a.parquet"))
    assert said.count("Row") == 300 and grew < 400  # of 600


def sparse(path: Path, head: bytes, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size_bytes)


def deep(folder: Path, name: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))


def as_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sparse(folder / "model.safetensors.index.json", b'{"weight_map":', GIB)


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "header of an exabyte": lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
    "header of a GiB": lambda f: sparse(f / "model.safetensors", struct.pack("<Q", GIB), 2 * GIB),
    "config of a GiB": lambda f: sparse(f / "config.json", b'{"a":"', GIB),
    "preprocessor of a GiB": lambda f: sparse(f / "preprocessor_config.json", b'{"a":"', GIB),
    "index of a GiB": as_index,
    "brackets": lambda f: (f / "config.json").write_text('{"a":' + "[" * MIB),
    "layers": lambda f: deep(f, "depths", [1_000_000_000, 1, 1]),
    "widths": lambda f: deep(f, "hidden_sizes", [2_000_000, 24, 32]),
    "pixels": lambda f: deep(f, "image_size", 1 << 20),
}
LOAD = """
import shutil
from pathlib import Path
import img2parquet
from img2parquet.errors import CheckpointError
img2parquet.load_model(sys.argv[1])
"""
REFUSE = """
for folder in sorted(Path(sys.argv[2]).iterdir()):
    try:
        img2parquet.load_model(str(folder))
    except CheckpointError as error:
        print("refused", folder.name)
"""


def test_a_checkpoint_that_claims_gigabytes_is_refused_in_megabytes(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good")
    for name, poison in CHECKPOINTS.items():
        folder = tmp_path / "bad" / name
        folder.mkdir(parents=True)
        for file in good.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        poison(folder)
    grew, said = growth_mib(LOAD, REFUSE, str(good), str(tmp_path / "bad"))
    assert said.count("refused") == len(CHECKPOINTS), said
    assert grew < 150


def endless() -> Iterator[bytes]:
    return iter(lambda: bytes(MIB), None)


@pytest.mark.parametrize("tells", [True, False])
def test_a_server_that_sends_for_ever_is_heard_no_further_than_asked(tells: bool) -> None:
    """One that told another size before, and one that told none."""
    asked: list[str] = []

    def answer(target: str) -> Answer:
        asked.append(target)
        return Answer(body=bytes(1000)) if tells and len(asked) <= 2 else Answer(chunks=endless)

    with web(answer) as site:
        if tells:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError, match="1001 of 1000 bytes"):
                patch.setattr("img2parquet.storage.retry.time.sleep", lambda seconds: None)
                store = Store()
                store.read(site.url + "/a", expect=store.stat(site.url + "/a"))
        else:
            assert len(Store().read(site.url + "/a", 0, 5 * MIB)) == 5 * MIB


def test_what_a_server_has_compressed_is_expanded_no_further_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MOST_INFLATED_BYTES", 20 * MIB)
    data, inflated = gzip.compress(bytes(50 * MIB)), list[int]()
    unpacked = http_client._unpacked

    async def counted(answer: Any) -> AsyncIterator[bytes]:
        async for chunk in unpacked(answer):
            inflated.append(len(chunk))
            yield chunk

    monkeypatch.setattr(http_client, "_unpacked", counted)
    with web(lambda target: Answer(body=data, headers={"Content-Encoding": "gzip"})) as site:
        assert Store().read(site.url + "/a", 0, 5 * MIB) == bytes(5 * MIB)
        assert sum(inflated) <= 6 * MIB
        with pytest.raises(StorageError, match="unpacks to more than"):
            Store().read(site.url + "/a")
        with pytest.raises(StorageError, match="unpacks to more than"):
            Store().stat(site.url + "/a")
