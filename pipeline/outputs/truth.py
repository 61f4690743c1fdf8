"""A value of a passthrough column to what a loss compares with; PartFailed, naming column and key, where it is none.

Shapes: K classes, N patches, M masked patches, V vocabulary, H W a map.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import PartFailed, nearest

IGNORED = -100  # a class id or code that counts for nothing, as in torch's cross entropy
MAX_MAP_PIXELS = 1 << 26
FEW_NAMES = 20  # so many are listed in an error
PNG_START = b"\x89PNG\r\n\x1a\n"
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where a truth was found, for errors."""

    column: str
    key: str

    def wrong(self, what: str, *, known: Sequence[str] = (), hint: str = "") -> PartFailed:
        return PartFailed(f"column `{self.column}` of `{self.key}`: {what}", known=known, hint=hint)


def class_id(value: Any, names: Sequence[str], num_labels: int, place: Place) -> int | None:
    """An id or a name to an id; None for the id that is ignored."""
    if isinstance(value, str):
        return _id_of_name(value, names, place)
    if isinstance(value, bool) or not isinstance(value, int):
        what = f"`{value!r:.60}` is neither a class id nor a class name"
        raise place.wrong(what, hint=f"`keep: [{place.column}:int64]` converts numbers")
    if value != IGNORED and not 0 <= value < num_labels:
        raise place.wrong(f"class {value} is not among the model's classes 0 to {num_labels - 1}")
    return None if value == IGNORED else value


def _id_of_name(name: str, names: Sequence[str], place: Place) -> int:
    ids = [i for i, known in enumerate(names) if known == name]
    if len(ids) == 1:
        return ids[0]
    if ids:
        raise place.wrong(f"`{name}` names the classes {', '.join(map(str, ids))}", hint="give class ids")
    hint = nearest(name, names) or "give a class id, or a name as the checkpoint's `id2label` has it"
    if name.strip().lstrip("-").isdigit():
        hint = f"this is text: `keep: [{place.column}:int64]` makes it a class id"
    raise place.wrong(f"`{name:.60}` is no class of this model", known=names[:FEW_NAMES], hint=hint)


def numbers(value: Any, num_labels: int, are_shares: bool, place: Place) -> list[float]:
    """A number for each class: from 0 to 1 where `are_shares`, else any."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    wanted = f"{num_labels} number{'s' if num_labels > 1 else ''}" + (" from 0 to 1, one for each class" * are_shares)
    if len(values) != num_labels:
        raise place.wrong(f"`{value!r:.60}` is not {wanted}")
    if not all(_is_number(v) and (not are_shares or 0 <= v <= 1) for v in values):
        raise place.wrong(f"`{value!r:.60}` is not {wanted}", hint="leave the value null where nothing is known")
    return [float(v) for v in values]


def codes(value: Any, mask_N: npt.NDArray[np.bool_], vocabulary: int, place: Place) -> Int64:
    """Codes of every patch, or of the masked ones, to those of the masked ones, (M,)."""
    N, M = len(mask_N), int(mask_N.sum())
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []
    if not isinstance(value, Sequence) or len(given) not in (N, M) or not all(type(code) is int for code in given):
        raise place.wrong(f"`{value!r:.60}` is not a list of {N} codes (every patch) or {M} (the masked ones)")
    beyond = [code for code in given if code != IGNORED and not 0 <= code < vocabulary]
    if beyond:
        raise place.wrong(f"code {beyond[0]} is not in the vocabulary, 0 to {vocabulary - 1}")
    codes_N = np.array(given, np.int64)
    return codes_N[mask_N] if len(given) == N else codes_N


def class_map(value: Any, num_labels: int, ignored: int, reduces: bool, place: Place) -> Int64:
    """A PNG's bytes to class ids, (H, W). `reduces`: 0 becomes 255, which is to be ignored, the others one less."""
    ids_HW = _read_png(value, place).astype(np.int64)
    if reduces:
        ids_HW = np.where((ids_HW == 0) | (ids_HW == 255), 255, ids_HW - 1)
    beyond = (ids_HW != ignored) & (ids_HW >= num_labels)
    if beyond.any():
        what = f"the map has class {ids_HW[beyond][0]}, but the model's are 0 to {num_labels - 1} (ignored: {ignored})"
        raise place.wrong(what, hint="`reduce_labels: true` takes class 0 for background" if not reduces else "")
    return ids_HW


def _read_png(value: Any, place: Place) -> npt.NDArray[Any]:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes | bytearray | memoryview) or bytes(data[:8]) != PNG_START:
        raise place.wrong("this is not a PNG of class ids", hint="keep a binary column that holds PNG files")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return _ids_of(image, _depth_of(data), place)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise place.wrong(f"the PNG cannot be read: {error}") from None


def _ids_of(image: Image.Image, depth: int, place: Place) -> npt.NDArray[Any]:
    if image.width * image.height > MAX_MAP_PIXELS:
        raise place.wrong(f"a map of {image.width} x {image.height} is past {MAX_MAP_PIXELS} pixels")
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        what = f"a PNG of mode {image.mode} holds colours, not class ids"
        raise place.wrong(what, hint="write ids as a greyscale or palette PNG")
    ids_HW = np.asarray(image)
    # Pillow spreads two and four bits of grey over 0 to 255
    return ids_HW // (255 // (2**depth - 1)) if image.mode == "L" and depth < 8 else ids_HW


def _depth_of(png: Any) -> int:
    """Bits of one sample, from the header."""
    return int(png[24]) if len(png) > 24 else 8


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
