"""Our own parsers and encoders, each as a function of any bytes that raises where something does not hold.

They are called by atheris (`guided.py`), by hypothesis and by seeded mutations (`test_fuzz.py`); `SEEDS` are where each
begins.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import yaml

from img2parquet.errors import CheckpointError, JobError
from img2parquet.images.headers import (
    ImageRejected,
    check_container,
    check_size,
    read_jpeg_header,
    sniff,
)
from img2parquet.images.jpeg_repair import without_harmless_defects
from img2parquet.images.orientation import read_orientation
from img2parquet.images.png_chunks import read_png
from img2parquet.images.tiff import check_first_page
from img2parquet.job import JobSpec, load_job
from img2parquet.models.checkpoint import FileWeights, weight_files
from img2parquet.outputs.segmentation import coco_runs, png
from img2parquet.read.byte_source import ChunkBytes, RangedBytes
from img2parquet.read.gzip_stream import GzipBytes
from img2parquet.read.page_size_guard import GuardedFile
from img2parquet.read.passthrough import Passthrough
from img2parquet.read.tar import BLOCK, Archive, Damage, Member
from img2parquet.read.tar_samples import Sampler
from img2parquet.schema import Reason
from img2parquet.storage import Entry
from tests.read.broken_shards import GZIPPED, PLAIN, SIDECARS, jpeg, parquet

LIMIT = 1 << 16  # of one body
REASONS = set(get_args(Reason))


def chunked(data: bytes, size: int = 700) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def tar_file(data: bytes) -> None:
    """Members and damages lie end to end, whatever the chunks; a walk over headers alone counts the same."""
    found = list(Archive(ChunkBytes(chunked(data), 0, len(data)), lambda *_: True, LIMIT))
    whole = list(Archive(ChunkBytes(iter([data] if data else []), 0, len(data)), lambda *_: True, LIMIT))
    assert found == whole, "another result for other chunks"
    at = 0
    for item in found:
        assert item.offset >= at, f"{item} begins before {at}"
        if isinstance(item, Damage):
            assert item.offset + item.size_bytes <= len(data)
            assert item.message
            at = item.offset + item.size_bytes
        else:
            at = item.offset + BLOCK
            assert item.body is None or len(item.body) == item.size_bytes
    assert len(found) <= 2 + len(data) // BLOCK * 2
    _samples(data, found)


def _samples(data: bytes, found: list[Member | Damage]) -> None:
    """What a walk without bodies counts is what is read, where nothing is damaged."""
    sampler = Sampler((), (Passthrough("label", "int64"), Passthrough("txt", "string")), LIMIT)
    items = [(s, item) for s in sampler.samples(found) for item in sampler.items(s)]
    for row, (sample, item) in enumerate(items):
        assert sampler.to_row(item, sample, "a.tar", row).row == row
    walk = Archive(_ranged(data), sampler.is_wanted, LIMIT, bodies=False)
    walked = list(sampler.samples(walk))
    if not any(s.damage for s in walked) and not any(s.damage for s, _ in items):
        assert sum(len(sampler.items(s)) for s in walked) == len(items)


class _Bytes:
    """A store of one object."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, uri: str, start: int = 0, stop: int | None = None, expect: object = None) -> bytes:
        return self.data[start:stop]


def _ranged(data: bytes) -> RangedBytes:
    return RangedBytes(_Bytes(data), Entry("a.tar", len(data), ""))  # type: ignore[arg-type]


def gzip_stream(data: bytes) -> None:
    """What zlib's own gzip reader takes is read the same, without a fault; and no fault means that it takes it."""
    ours = GzipBytes(chunked(data))
    inflated = ours.take(1 << 22)
    if len(inflated) == 1 << 22:
        return
    theirs = _by_zlib(data)
    if theirs is None:
        assert ours.fault, f"read {len(inflated)} bytes of what zlib refuses"
    else:
        assert not ours.fault, f"{ours.fault}, where zlib reads {len(theirs)} bytes"
        assert inflated == theirs


def _by_zlib(data: bytes) -> bytes | None:
    """Members in a row, zeros after them; None for anything else."""
    sink = b""
    while True:
        reader = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            sink += reader.decompress(data, 1 << 22)
        except zlib.error:
            return None
        if not reader.eof:
            return None
        data = reader.unused_data.lstrip(b"\0")
        if not data:
            return sink


def image_header(data: bytes) -> None:
    """A format, or a refusal with a reason that is known."""
    view = memoryview(data)
    try:
        kind = sniff(view)
        if kind == "JPEG":
            header = read_jpeg_header(view)
            check_size(header.width, header.height, 1 << 40)
            assert 1 <= header.orientation <= 8 and header.width > 0 and header.height > 0
            assert len(without_harmless_defects(data, header.sequential, 0)) <= len(data) + 2
        else:
            check_container(kind, view, 1 << 40)
        if kind == "PNG":
            assert len(read_png(view).file) <= len(data)
        if kind == "TIFF":
            check_first_page(view)
    except ImageRejected as refusal:
        assert refusal.reason in REASONS and refusal.message
    assert 1 <= read_orientation(data, data) <= 8


def job_file(data: bytes) -> None:
    """A job, or a JobError that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_bytes(data)
        try:
            job = load_job(path)
        except JobError as error:
            assert error.message
            return
        # what was understood says the same again
        again = JobSpec.model_validate(job.model_dump(mode="json"))
        assert again.model_dump(mode="json") == job.model_dump(mode="json")


def checkpoint_index(data: bytes) -> None:
    """Files in the checkpoint's own folder, or a CheckpointError."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        folder.mkdir()
        (Path(parent) / "secret").write_bytes(b"x")
        (folder / "a.safetensors").write_bytes(TENSORS)
        (folder / "model.safetensors.index.json").write_bytes(data)
        try:
            files = weight_files(folder).files
        except CheckpointError as error:
            assert error.message
            return
        assert files and all(path.parent == folder and path.is_file() for path in files)


def safetensors(data: bytes) -> None:
    """Names and a hash, or a CheckpointError."""
    from img2parquet.models import levit

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        try:
            names = FileWeights(Path(folder), (path,)).names(levit)  # type: ignore[arg-type]
        except CheckpointError as error:
            assert error.message
            return
        assert all(isinstance(name, str) for name in names)


def masks(data: bytes) -> None:
    """A mask of class ids through COCO's run lengths and PNG, each read back by a decoder of other hands."""
    if len(data) < 3:
        return
    height, classes = 1 + data[0] % 40, 1 + data[1] % 9
    flat = np.repeat(np.frombuffer(data[2:], np.uint8), 1 + data[0] // 40)[: 40 * 400] % classes
    height = min(height, flat.size)
    ids_HW = flat[: flat.size // height * height].reshape(height, -1)
    covered = np.zeros(ids_HW.shape, int)
    for run in coco_runs(ids_HW):
        mask = from_coco(run["counts"], *run["size"])
        assert np.array_equal(mask, ids_HW == run["id"])
        covered += mask
    assert (covered == 1).all()
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(ids_HW, classes)))), ids_HW)


def from_coco(text: str, height: int, width: int) -> npt.NDArray[np.bool_]:
    """As COCO's own `rleFrString` and `rleDecode` do it, in plain Python."""
    counts: list[int] = []
    at = 0
    while at < len(text):
        value = shift = 0
        while True:
            code = ord(text[at]) - 48
            value |= (code & 0x1F) << (5 * shift)
            at, shift = at + 1, shift + 1
            if not code & 0x20:
                break
        if code & 0x10:
            value |= -1 << (5 * shift)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    assert min(counts) >= 0 and sum(counts) == height * width
    cells = itertools.chain.from_iterable([i % 2 == 1] * count for i, count in enumerate(counts))
    return np.fromiter(cells, bool, height * width).reshape(width, height).T


def parquet_pages(data: bytes) -> None:
    """The guard's own reading of a footer and of page headers: numbers, or a ValueError."""
    guard = GuardedFile(io.BytesIO(data))
    try:
        guard.watch(0, [0, 1, 2])
        for start in sorted(guard.pages):
            guard.seek(start)
            guard.read(1000)
    except ValueError as error:
        assert str(error)


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(64)
TENSORS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(4)
JOB = {
    "input": {"kind": "webdataset", "uris": ["s3://b/{000..003}.tar"], "keep": ["label", "id:int64"]},
    "models": [{"model": "facebook/levit-256", "outputs": [{"kind": "embedding"}, {"kind": "labels", "top_k": 5}]}],
    "output": {"uri": "out/x", "rows_per_part": 100},
    "decode": {"exif": "apply", "max_pixels": 1000},
    "resources": {"workers": "auto", "batch_size": 8},
}
INDEX = json.dumps({"metadata": {"total_size": 4}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}).encode()
EXTRAS = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x03\0abc" + b"name\0" + b"comment\0"
WITH_HEADER = EXTRAS + (zlib.crc32(EXTRAS) & 0xFFFF).to_bytes(2, "little") + gzip.compress(b"a" * 100, mtime=0)[10:]
ROWS = {"image": [jpeg(0), jpeg(1)], "id": ["a", "b"]}

Parser = Callable[[bytes], None]
PARSERS: dict[str, tuple[Parser, tuple[bytes, ...]]] = {
    "tar": (tar_file, (PLAIN, SIDECARS)),
    "gzip": (gzip_stream, (GZIPPED, gzip.compress(b"a" * 100, mtime=0) * 2 + bytes(20), WITH_HEADER)),
    "headers": (image_header, tuple(jpeg(i) for i in range(2))),
    "job": (job_file, (yaml.safe_dump(JOB).encode(), json.dumps(JOB).encode())),
    "index": (checkpoint_index, (INDEX,)),
    "safetensors": (safetensors, (TENSORS,)),
    "masks": (masks, (bytes(range(256)), bytes(100), b"\x0a\x03" + b"\1\1\1\2\2\0" * 40)),
    "pages": (parquet_pages, (parquet(ROWS), parquet(ROWS, data_page_version="2.0", use_dictionary=False))),
}  # fmt: skip
