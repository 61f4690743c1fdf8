"""Parse and check values of a ground-truth column: class ids, numbers, codes of patches, or maps of class ids.

A value that cannot be understood raises PartFailed with its column and key.

Shapes: K classes, N patches, M masked patches, V vocabulary, H W a map.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from img2parquet.errors import PartFailed, nearest
from img2parquet.outputs.class_names import distinct_names

IGNORED = -100  # a class id or code that is left out of the loss, as in torch's cross entropy
MAX_MAP_PIXELS = 1 << 26
MAX_LISTED_NAMES = 20  # in an error
PNG_START = b"\x89PNG\r\n\x1a\n"
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """The column and row key of one ground-truth value, for errors."""

    column: str
    key: str

    def error(self, message: str, *, known: Sequence[str] = (), hint: str = "") -> PartFailed:
        """Make the error for this value."""
        return PartFailed(f"column `{self.column}` of `{self.key}`: {message}", known=known, hint=hint)


def class_id(value: Any, names: Sequence[str], num_labels: int, cell: Cell) -> int | None:
    """Return the class id for an id or a class name, also one as `distinct_names` writes it; None for the ignored id.

    Raises PartFailed when the model has no such class."""
    if isinstance(value, str):
        return _id_of_name(value, names, cell)
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"`{value!r:.60}` is neither a class id nor a class name"
        raise cell.error(message, hint=f"`keep: [{cell.column}:int64]` converts numbers")
    if value != IGNORED and not 0 <= value < num_labels:
        raise cell.error(f"class {value} is not among the model's classes 0 to {num_labels - 1}")
    return None if value == IGNORED else value


def _id_of_name(name: str, names: Sequence[str], cell: Cell) -> int:
    ids = [i for i, known in enumerate(names) if known == name]
    ids = ids or [i for i, known in enumerate(distinct_names(names)) if known == name]
    if len(ids) == 1:
        return ids[0]
    if ids:
        message = f"`{name}` is the name of several classes: {', '.join(map(str, ids))}"
        raise cell.error(message, hint=f"use class ids instead of names, or write `{name} ({ids[0]})`")
    hint = nearest(name, names) or "use a class id, or a name from the checkpoint's `id2label`"
    if name.strip().lstrip("-").isdigit():
        hint = f"this is text: `keep: [{cell.column}:int64]` converts it to a class id"
    raise cell.error(f"`{name:.60}` is not a class of this model", known=names[:MAX_LISTED_NAMES], hint=hint)


def numbers(value: Any, num_labels: int, are_shares: bool, cell: Cell) -> list[float]:
    """Return a number for each class: from 0 to 1 if `are_shares`, else any finite number.

    Raises PartFailed when the count or a value does not fit."""
    values = [parsed(one) for one in _listed(parsed(value))]
    wanted = f"{num_labels} number{'s' if num_labels > 1 else ''}" + (" from 0 to 1, one for each class" * are_shares)
    if len(values) != num_labels:
        raise cell.error(f"`{value!r:.60}` is not {wanted}")
    if not all(_is_number(v) and (not are_shares or 0 <= v <= 1) for v in values):
        raise cell.error(f"`{value!r:.60}` is not {wanted}", hint="use null for a row without ground truth")
    return [float(v) for v in values]


def class_shares(value: Any, names: Sequence[str], num_labels: int, cell: Cell) -> list[float]:
    """Return a share from 0 to 1 for each class, from such numbers or from the names of the classes that are true.

    Ids of classes are refused, since 0 and 1 are shares too. Raises PartFailed for anything else."""
    values = _listed(value if value in names else parsed(value))
    if names and all(isinstance(one, str) for one in values):
        ids = class_ids_of(values, names, num_labels, cell)
        return [float(id in ids) for id in range(num_labels)]
    return numbers([float(one) if isinstance(one, bool) else one for one in values], num_labels, True, cell)


def class_ids_of(value: Any, names: Sequence[str], num_labels: int, cell: Cell) -> frozenset[int]:
    """Return the classes that are true of a row, from a class id or name, a list of them, or a share for each class.

    A list of `num_labels` numbers from 0 to 1 has a share for each class, and those of at least 0.5 are true. Raises
    PartFailed when the model has no such class, or a list has one twice."""
    values = _listed(value if isinstance(value, str) and value in names else parsed(value))
    shares = [float(v) if isinstance(v, bool) else v for v in values]
    if len(shares) == num_labels and all(_is_number(v) and 0 <= v <= 1 for v in shares):
        return frozenset(id for id, share in enumerate(shares) if share >= 0.5)
    found = [class_id(v, names, num_labels, cell) for v in values if v is not None]
    ids = frozenset(id for id in found if id is not None)
    if len(ids) < sum(id is not None for id in found):
        hint = f"use class ids or names, each once, or {num_labels} numbers from 0 to 1"
        raise cell.error(f"`{value!r:.60}` has a class twice", hint=hint)
    return ids


def parsed(value: Any) -> Any:
    """Read text that is a JSON list, number or boolean: a kept column is text unless the job gave it a type."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, list | int | float) else value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]


def codes(value: Any, mask_N: npt.NDArray[np.bool_], vocabulary: int, cell: Cell) -> Int64:
    """Return the codes of the masked patches, (M,), from a list with those or with the codes of all N patches.

    Raises PartFailed for another number of codes, or a code that is not in the vocabulary."""
    N, M = len(mask_N), int(mask_N.sum())
    given = parsed(value)
    if not isinstance(given, list | tuple) or len(given) not in (N, M) or not all(type(code) is int for code in given):
        raise cell.error(f"`{value!r:.60}` is not a list of {N} codes (every patch) or {M} (the masked ones)")
    beyond = [code for code in given if code != IGNORED and not 0 <= code < vocabulary]
    if beyond:
        raise cell.error(f"code {beyond[0]} is not in the vocabulary, 0 to {vocabulary - 1}")
    codes_N = np.array(given, np.int64)
    return codes_N[mask_N] if len(given) == N else codes_N


def class_map(value: Any, num_labels: int, ignored: int, reduces: bool, cell: Cell) -> Int64:
    """Read class ids from a PNG's bytes, or take an array of them: (H, W).

    reduces: 0 becomes 255, which is ignored, and other ids shift by -1.

    Raises PartFailed when it is not a PNG of the model's class ids."""
    is_map = isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "iu" and value.size
    ids_HW = (value if is_map else _read_png(value, cell)).astype(np.int64)
    if reduces:
        ids_HW = np.where((ids_HW == 0) | (ids_HW == 255), 255, ids_HW - 1)
    beyond = (ids_HW != ignored) & (ids_HW >= num_labels)
    if beyond.any():
        message = f"the map has class {ids_HW[beyond][0]}, but the model has 0 to {num_labels - 1} (ignored: {ignored})"
        raise cell.error(message, hint="`reduce_labels: true` treats class 0 as background" if not reduces else "")
    return ids_HW


def _read_png(value: Any, cell: Cell) -> npt.NDArray[Any]:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes | bytearray | memoryview) or bytes(data[:8]) != PNG_START:
        raise cell.error("this is not a PNG of class ids", hint="use a binary column that holds PNG files")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return _ids_of(image, _depth_of(data), cell)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise cell.error(f"the PNG cannot be read: {error}") from None


def _ids_of(image: Image.Image, depth: int, cell: Cell) -> npt.NDArray[Any]:
    if image.width * image.height > MAX_MAP_PIXELS:
        message = f"a map of {image.width} x {image.height} has more than {MAX_MAP_PIXELS} pixels"
        raise cell.error(message, hint="write a smaller map: it may have any size")
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        message = f"a PNG of mode {image.mode} holds colours, not class ids"
        raise cell.error(message, hint="write ids as a greyscale or palette PNG")
    ids_HW = np.asarray(image)
    # Pillow scales grey of two and four bits to 0 to 255
    return ids_HW // (255 // (2**depth - 1)) if image.mode == "L" and depth < 8 else ids_HW


def _depth_of(png: Any) -> int:
    """Read the bits per sample from the PNG's header."""
    return int(png[24]) if len(png) > 24 else 8


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
