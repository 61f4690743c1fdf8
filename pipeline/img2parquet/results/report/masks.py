"""Turn masks of class ids (PNG or COCO run lengths) into arrays, coloured PNG overlays and a legend."""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from img2parquet.outputs.class_names import distinct_names
from img2parquet.results.evaluation.scorers import read_mask

# Okabe and Ito's colours and similar ones: most people can tell them apart, on light and dark pages
COLOURS = (
    "#4477aa", "#ee9944", "#228855", "#cc5566", "#aa66bb", "#66b8dd", "#b8a030", "#885533", "#d888b8", "#3a9e9e",
    "#7fb069", "#d1603d",
)  # fmt: skip


def colour(index: int) -> str:
    """Return a class's colour, the same everywhere on the page; beyond the table, hues by the golden angle."""
    if index < len(COLOURS):
        return COLOURS[index]
    red, green, blue = colorsys.hls_to_rgb(index * 0.618033988749895 % 1, 0.42 + 0.14 * (index % 3), 0.5)
    return f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}"


def ids(value: Any) -> npt.NDArray[np.int64] | None:
    """Read a mask, also one that `datasets` stored, as (H, W) class ids, -1 for no class; None if it is not one."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    try:
        return read_mask(value, nowhere=-1)
    except ValueError:
        return None


def coloured(ids_HW: npt.NDArray[np.int64], longer_px: int) -> bytes:
    """Draw class ids as a small palette PNG; pixels without a class are transparent."""
    height, width = ids_HW.shape
    scale = min(1.0, longer_px / max(height, width))
    rows = np.linspace(0, height - 1, max(1, round(height * scale))).round().astype(int)
    columns = np.linspace(0, width - 1, max(1, round(width * scale))).round().astype(int)
    small = ids_HW[rows][:, columns]
    classes, inverse = np.unique(small, return_inverse=True)
    rgba = np.array([[*_rgb(colour(int(k))), 255 if k >= 0 else 0] for k in classes], np.uint8)
    sink = io.BytesIO()
    Image.fromarray(rgba[inverse.reshape(small.shape)]).quantize(min(256, max(2, len(classes) + 1))).save(sink, "PNG")
    return sink.getvalue()


def class_names(field: pa.Field, config: Mapping[str, Any]) -> dict[int, str]:
    """Return distinct class names by id, from the field's metadata or else the checkpoint's `id2label`."""
    metadata = field.metadata or {}
    try:
        if b"labels" in metadata:
            return dict(enumerate(distinct_names(list(map(str, json.loads(metadata[b"labels"]))))))
        names = {int(i): str(name) for i, name in dict(config.get("id2label") or {}).items()}
    except (ValueError, TypeError):
        return {}
    return dict(enumerate(distinct_names([names.get(i, "") for i in range(max(names, default=-1) + 1)])))


def _rgb(code: str) -> tuple[int, int, int]:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)
