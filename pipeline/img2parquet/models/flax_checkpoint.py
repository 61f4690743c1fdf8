"""Read a Flax checkpoint (`flax_model.msgpack`) as tensors with torch's names and layouts. No code is run.

* The file is one msgpack map of maps whose leaves are arrays: extension 1 holds (shape, dtype name, bytes). Arrays
  above 1 GiB are maps of flat pieces. This is the format of flax.serialization; the rest of msgpack
  is not read.
* The file is memory-mapped, so listing it reads no array; depth, lengths and sizes are checked first.
* Names are joined by dots. A `kernel` becomes a `weight`, transposed from (I, O) to (O, I) for a linear layer and from
  (H, W, I, O) to (O, I, H, W) for a convolution; a norm's `scale` becomes a `weight`.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from img2parquet.errors import CheckpointError
from img2parquet.models.wrong_files import nested_tables, refuse_stand_in, training_checkpoint

SUFFIX = ".msgpack"
MAX_DEPTH = 32
MAX_VALUES = 1_000_000  # a large model has a few thousand arrays
MAX_LIST = 64  # only shapes are lists
NDARRAY = 1  # flax's extension type; 2 is a complex number, 3 a numpy scalar
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "V2": torch.bfloat16,  # numpy's name for an unknown two-byte type, which old versions wrote
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class FlaxArray:
    """An array of the file that has not been read. `pieces`: its bytes, in order, as slices of the memory map."""

    name: str  # as torch would call it
    flax_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[memoryview, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of Flax in the order of torch."""
        rank = len(self.flax_shape)
        if self.name.endswith(".weight") and rank >= 2:
            return (rank - 1, rank - 2, *range(rank - 2))
        return tuple(range(rank))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.flax_shape[axis] for axis in self.order)

    def tensor(self) -> Tensor:
        data = bytearray(b"".join(self.pieces))
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.flax_shape).permute(self.order).contiguous()


def read_flax(path: Path) -> list[FlaxArray]:
    """List a file's arrays without reading them. Raises CheckpointError if it is not a complete Flax checkpoint."""
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path}: not readable: {error}") from None
    try:
        reader = Reader(view)
        content = reader.value()
        if reader.at != len(view):
            raise NotFlax(f"{len(view) - reader.at} bytes follow its end")
        if not isinstance(content, dict):
            raise NotFlax("it holds no map")
        if any(not isinstance(value, dict | Leaf) for value in content.values()) and nested_tables(content):
            raise training_checkpoint(path, nested_tables(content))
        return list(_arrays(content, ()))
    except NotFlax as error:
        refuse_stand_in(path)
        hint = "it may be truncated: download it again"
        raise CheckpointError(f"{path}: not a whole Flax checkpoint: {error}", hint=hint) from None


class NotFlax(Exception):
    """Describes what is wrong with a file, without the file's name."""


def _arrays(content: Mapping[str, Any], place: tuple[str, ...]) -> Iterator[FlaxArray]:
    for key, value in content.items():
        here = (*place, *key.split("/"))
        if isinstance(value, dict) and value.get(CHUNKED):
            yield _joined(value, here)
        elif isinstance(value, dict):
            yield from _arrays(value, here)
        elif isinstance(value, Leaf):
            yield _array(here, value.shape, value.dtype, (value.data,))
        else:
            raise NotFlax(f"`{'.'.join(here)}` is {type(value).__name__}, not an array")


def _joined(value: Mapping[str, Any], place: tuple[str, ...]) -> FlaxArray:
    """Join an array that was split into flat pieces: `shape` and `chunks` are maps from "0", "1", ..."""
    name = ".".join(place)
    shape, chunks = _in_order(value.get("shape"), name), _in_order(value.get("chunks"), name)
    if not chunks or not all(isinstance(chunk, Leaf) and chunk.dtype == chunks[0].dtype for chunk in chunks):
        raise NotFlax(f"`{name}` is in pieces that are not arrays of one type")
    return _array(place, tuple(shape), chunks[0].dtype, tuple(chunk.data for chunk in chunks))


def _in_order(value: Any, name: str) -> list[Any]:
    if not isinstance(value, dict) or sorted(value) != sorted(map(str, range(len(value)))):
        raise NotFlax(f"`{name}` is in pieces without their order")
    return [value[str(k)] for k in range(len(value))]


def _array(place: tuple[str, ...], shape: tuple[Any, ...], dtype: str, pieces: tuple[memoryview, ...]) -> FlaxArray:
    name = ".".join(place)
    if dtype not in DTYPES:
        raise NotFlax(f"`{name}` is of type {dtype}")
    if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape):
        raise NotFlax(f"`{name}` has the shape {shape}")
    found, wanted = sum(len(piece) for piece in pieces), math.prod(shape) * DTYPES[dtype].itemsize
    if found != wanted:
        raise NotFlax(f"`{name}` has {found} bytes, not the {wanted} of {dtype} {shape}")
    if place[-1] == "kernel" or place[-1] == "scale":
        name = ".".join((*place[:-1], "weight"))
    return FlaxArray(name, shape, DTYPES[dtype], pieces)


@dataclass(frozen=True)
class Leaf:
    """An array as the file has it, msgpack extension 1."""

    shape: tuple[Any, ...]
    dtype: str
    data: memoryview


class Reader:
    """Reads msgpack values one after the other, without copying memory."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.at, self.values = view, 0, 0

    def value(self, depth: int = 0) -> Any:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise NotFlax(f"it is nested more than {MAX_DEPTH} deep, or has more than {MAX_VALUES:,} values")
        kind = self._take(1)[0]
        if kind <= 0x7F:
            return kind
        if kind >= 0xE0:
            return kind - 256
        if kind <= 0x8F:
            return self._map(kind & 0x0F, depth)
        if kind <= 0x9F:
            return self._list(kind & 0x0F, depth)
        if kind <= 0xBF:
            return self._text(kind & 0x1F)
        return self._other(kind, depth)

    def _other(self, kind: int, depth: int) -> Any:
        if kind in CONSTANTS:
            return CONSTANTS[kind]
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind in FIXED_EXTENSIONS:
            return self._extension(FIXED_EXTENSIONS[kind], depth)
        if kind not in SIZED:
            raise NotFlax(f"byte {self.at - 1} is {kind:#x}, which begins no value")
        what, width = SIZED[kind]
        size = int.from_bytes(self._take(width), "big")
        if what == "bytes":
            return self._take(size)
        if what == "text":
            return self._text(size)
        if what == "extension":
            return self._extension(size, depth)
        return self._map(size, depth) if what == "map" else self._list(size, depth)

    def _take(self, size: int) -> memoryview:
        if size > len(self.view) - self.at:
            raise NotFlax(f"it ends at byte {len(self.view)}, in the middle of a value")
        taken = self.view[self.at : self.at + size]
        self.at += size
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, size: int) -> str:
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError:
            raise NotFlax(f"the text before byte {self.at} is not UTF-8") from None

    def _list(self, count: int, depth: int) -> list[Any]:
        self._refuse_more_than_fit(count)
        if count > MAX_LIST:
            raise NotFlax(f"a list of {count} before byte {self.at} is no shape")
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        self._refuse_more_than_fit(2 * count)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise NotFlax(f"a map has the key {key!r:.60}" + (" twice" if isinstance(key, str) else ""))
            found[key] = self.value(depth + 1)
        return found

    def _refuse_more_than_fit(self, count: int) -> None:
        if count > len(self.view) - self.at:  # each takes a byte at least
            raise NotFlax(f"{count} values are said to follow byte {self.at} of {len(self.view)}")

    def _extension(self, size: int, depth: int) -> Leaf:
        code = struct.unpack(">b", self._take(1))[0]
        inner = Reader(self._take(size))
        if code != NDARRAY:
            raise NotFlax(f"an extension of type {code} before byte {self.at} is no array")
        content = inner.value(depth + 1)
        if not isinstance(content, list) or len(content) != 3:
            raise NotFlax(f"the array before byte {self.at} is not (shape, type, bytes)")
        shape, dtype, data = content
        dtype = str(dtype, "ascii", "replace") if isinstance(dtype, memoryview) else dtype
        if not isinstance(shape, list) or not isinstance(dtype, str) or not isinstance(data, memoryview):
            raise NotFlax(f"the array before byte {self.at} is not (shape, type, bytes)")
        return Leaf(tuple(shape), dtype, data)


CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
SIZED = {  # first byte -> what follows a length of so many bytes
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
