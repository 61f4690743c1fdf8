"""Write TIFFs of any layout from the samples themselves, so that the pixels a decoder must give are known."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BYTE, ASCII, SHORT, LONG, IFD = 1, 2, 3, 4, 13
_SIZES = {BYTE: 1, ASCII: 1, SHORT: 2, LONG: 4, IFD: 4}
_CODES = {SHORT: "H", LONG: "I", IFD: "I"}
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
Tags = Mapping[int, tuple[int, Sequence[int] | bytes] | None]


def tiff(
    samples_HWC: npt.NDArray[Any],
    photometric: int | None,
    *,
    order: str = "<",
    planar: bool = False,
    tile: tuple[int, int] | None = None,
    rows_per_strip: int = 10,
    compression: int = 1,
    bits: int | None = None,
    fill_order: int = 1,
    tags: Tags | None = None,
    second: bytes | None = None,
) -> bytes:
    """Return a TIFF of the samples.

    order: `<` or `>`. tile: its height and width, instead of strips. compression: 1 none, 8 deflate.
    bits: per sample, below 8 or 12; else the array's type tells. tags: further tags, or None to leave one out.
    second: a directory's entries, built by `directory`, that follows as the next page."""
    height, width, count = samples_HWC.shape
    depth = bits or samples_HWC.dtype.itemsize * 8
    planes = [samples_HWC[:, :, [band]] for band in range(count)] if planar else [samples_HWC]
    block_HW = tile or (rows_per_strip, width)
    blocks = [pack(block, order, depth) for each in planes for block in _cut(each, *block_HW, bool(tile))]
    if compression == 8:
        blocks = [zlib.compress(block) for block in blocks]
    if fill_order == 2:
        blocks = [block.translate(_MIRRORED) for block in blocks]
    starts = [8 + sum(len(each) + len(each) % 2 for each in blocks[:at]) for at in range(len(blocks))]
    body = b"".join(each + b"\0" * (len(each) % 2) for each in blocks)
    format_ = {"u": 1, "i": 2, "f": 3}[samples_HWC.dtype.kind]
    layout: dict[int, tuple[int, Sequence[int] | bytes] | None] = {
        256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [depth] * count), 259: (SHORT, [compression]),
        262: None if photometric is None else (SHORT, [photometric]), 266: (SHORT, [fill_order]),
        277: (SHORT, [count]), 284: (SHORT, [2 if planar else 1]),
        **({339: (SHORT, [format_] * count)} if format_ != 1 else {}),
        **({322: (LONG, [tile[1]]), 323: (LONG, [tile[0]]), 324: (LONG, starts), 325: (LONG, [*map(len, blocks)])}
           if tile else {273: (LONG, starts), 278: (LONG, [rows_per_strip]), 279: (LONG, [*map(len, blocks)])}),
        **(tags or {}),
    }  # fmt: skip
    at = 8 + len(body)
    first = directory({tag: value for tag, value in layout.items() if value}, order, at, more=second is not None)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", at) + body + first + (second or b"")


def directory(tags: Mapping[int, tuple[int, Sequence[int] | bytes]], order: str, at: int, more: bool = False) -> bytes:
    """Return a directory that stands at byte `at`, with its values behind it; with `more` the next follows at once."""
    entries, values = b"", b""
    end = at + 2 + 12 * len(tags) + 4
    for tag, (kind, content) in sorted(tags.items()):
        data = content if isinstance(content, bytes) else struct.pack(f"{order}{len(content)}{_CODES[kind]}", *content)
        entries += struct.pack(order + "HHI", tag, kind, len(data) // _SIZES[kind])
        if len(data) <= 4:
            entries += data.ljust(4, b"\0")
        else:
            entries += struct.pack(order + "I", end + len(values))
            values += data + b"\0" * (len(data) % 2)
    following = struct.pack(order + "I", end + len(values) if more else 0)
    return struct.pack(order + "H", len(tags)) + entries + following + values


def pack(block_HWC: npt.NDArray[Any], order: str, bits: int) -> bytes:
    """Return a strip's or tile's bytes; rows of less than 8 or of 12 bits begin at a whole byte."""
    if bits in (8, 16, 32):
        packed = block_HWC.astype(block_HWC.dtype.newbyteorder(order)).tobytes()
    else:
        rows = block_HWC.reshape(block_HWC.shape[0], -1)
        digits = rows[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=rows.dtype) & 1
        packed = np.packbits(digits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()
    return packed


def _cut(plane_HWC: npt.NDArray[Any], height: int, width: int, whole: bool) -> Iterator[npt.NDArray[Any]]:
    """Yield the blocks, row by row; a tile at the edge is filled up, a strip is not."""
    for top in range(0, plane_HWC.shape[0], height):
        for left in range(0, plane_HWC.shape[1], width):
            block = plane_HWC[top : top + height, left : left + width]
            missing = [(0, height - block.shape[0]), (0, width - block.shape[1]), (0, 0)]
            yield np.pad(block, missing, mode="edge") if whole else block
