"""Write a mask of class ids per row, as PNG or COCO run lengths, and the number of pixels of each class.

Shapes: B batch, K classes, h w the head's map, H W the mask, N its pixels, R runs of equal pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pydantic import Field, field_validator

from img2parquet.errors import InputError
from img2parquet.models import Card
from img2parquet.outputs import (
    BatchRows,
    ColumnName,
    OutputSettings,
    not_finite_error,
    require_class_names,
    require_feature,
)
from img2parquet.outputs.resize_maps import require_whole_image, upsample_in_chunks

if TYPE_CHECKING:
    from torch import Tensor

Ids = npt.NDArray[np.integer[Any]]

# planned size of a mask at the source's size: label maps of photographs take 5 to 10 kB per megapixel. A part with
# larger masks becomes larger than planned, and is still one object
SOURCE_MASK_BYTES = {"png": 64 << 10, "rle": 128 << 10}
MAX_PIXELS = 1 << 26  # of a mask of a fixed size
RUNS = pa.struct(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("size", pa.list_(pa.int32(), 2), nullable=False),
        pa.field("counts", pa.string(), nullable=False),
    ]
)
RLE = pa.list_(pa.field("element", RUNS, nullable=False))


class Segmentation(OutputSettings):
    """Write a mask and a histogram: (B, K, h, w) -> class ids (H, W) in `mask`, K pixel counts in `mask_histogram`.

    The mask equals the reference's `post_process_semantic_segmentation`: scores are resized bilinearly to a target size
    of any value, then the best class is taken, and the lower id of equal ones. Class names are in the fields'
    metadata."""

    kind: Literal["segmentation"] = "segmentation"
    name: ColumnName = Field(default="mask", description="Column name, and prefix of the histogram's column name.")
    encoding: Literal["png", "rle"] = Field(
        default="png",
        description="`png`: a greyscale image of class ids (16 bits where there are more than 256 classes); `rle`: "
        "COCO's compressed run lengths, one entry for each class in the image.",
    )
    size: Literal["source", "model"] | int | tuple[int, int] = Field(
        default="source",
        description="`source`: the size of the source image; `model`: the size of the model's output, not resized; "
        "or one side, or [height, width], in pixels, of every mask. Only `source` refuses a model that sees a crop, "
        "whose masks do not cover the whole image.",
    )
    histogram: bool = Field(default=True, description="Write the number of pixels of each class.")

    @field_validator("size", mode="before")
    @classmethod
    def _known_size(cls, size: Any) -> Any:
        sides = size if isinstance(size, list | tuple) else (size, size)
        whole = len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
        if size not in ("source", "model") and not whole:
            raise ValueError(f"`{size}` is no size: write `source`, `model`, one side, or [height, width], in pixels")
        if whole and sides[0] * sides[1] > MAX_PIXELS:
            raise ValueError(f"a mask of {sides[0]} x {sides[1]} has more than {MAX_PIXELS:,} pixels")
        return size

    def target_HW(self, source_HW: tuple[int, int], model_HW: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of one image's mask."""
        if isinstance(self.size, str):
            return source_HW if self.size == "source" else model_HW
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def column_names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_histogram") if self.histogram else (self.name,)

    def wants(self, card: Card) -> frozenset[str]:
        require_feature(card, "segmentation", wanted_by="output `segmentation`")
        require_class_names(card, wanted_by="output `segmentation`")
        if self.size == "source":
            require_whole_image(card, "output `segmentation`", "use `size: model` or a size in pixels, or a checkpoint")
        return frozenset(["segmentation"])

    def fields(self, card: Card) -> list[pa.Field]:
        K = card.gives["segmentation"][0]
        named = {"labels": json.dumps(class_names(card), ensure_ascii=False)}
        mask = pa.field(self.name, pa.binary() if self.encoding == "png" else RLE, nullable=False, metadata=named)
        counts = pa.field(f"{self.name}_histogram", pa.list_(pa.int32(), K), nullable=False, metadata=named)
        return [mask, counts] if self.histogram else [mask]

    def bytes_per_row(self, card: Card) -> int:
        """Return an exact bound; at the source's size, which is not known yet, a usual value."""
        K, *model_hw = card.gives["segmentation"]
        h, w = self.target_HW((0, 0), (model_hw[0], model_hw[1]))
        worst = {"png": h * (1 + _depth(K) * w) + h * w // 1000 + 200, "rle": 12 * h * w + 40 * min(K, h * w) + 40}
        mask = SOURCE_MASK_BYTES[self.encoding] if self.size == "source" else worst[self.encoding]
        return mask + (5 * K + 16 if self.histogram else 0)

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        scores_BKhw, K = features["segmentation"].detach().float(), card.gives["segmentation"][0]
        self._refuse_not_finite(scores_BKhw)
        encoded, counts = [], []
        for ids_HW in self._masks(scores_BKhw, rows):
            encoded.append(png(ids_HW, K) if self.encoding == "png" else coco_runs(ids_HW))
            counts.append(np.bincount(ids_HW.reshape(-1), minlength=K).astype(np.int32))
        types = [field.type for field in self.fields(card)]
        arrays = [pa.array(encoded, types[0])]
        if self.histogram:
            flat = np.concatenate(counts) if counts else np.empty(0, np.int32)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), type=types[1]))
        return arrays

    def _masks(self, scores_BKhw: Tensor, rows: BatchRows) -> Iterator[Ids]:
        for scores_Khw, size_HW in zip(scores_BKhw, rows.sizes_HW, strict=True):
            h, w = scores_Khw.shape[1:]
            ids_HW: Ids = best_classes(scores_Khw, self.target_HW(size_HW, (h, w))).cpu().numpy()
            yield ids_HW

    def _refuse_not_finite(self, scores_BKhw: Tensor) -> None:
        finite_B = scores_BKhw.isfinite().flatten(1).all(1).tolist()
        bad = [row for row, finite in enumerate(finite_B) if not finite]
        if bad:
            raise not_finite_error(self.name, bad, "float32")


def class_masks(scores_BKhw: Tensor, target_sizes: Sequence[tuple[int, int]] | None = None) -> list[Ids]:
    """Turn the feature `segmentation` of a model into masks of class ids, (H, W) for each image.

    target_sizes: height and width of each mask, as of the reference's `post_process_semantic_segmentation`; without
    them masks have the size of the scores. Raises InputError when there is not one size for each image."""
    if target_sizes is None:
        target_sizes = [(scores_BKhw.shape[2], scores_BKhw.shape[3])] * len(scores_BKhw)
    sizes_HW = [tuple(map(int, size)) for size in target_sizes]
    if len(sizes_HW) != len(scores_BKhw) or any(len(size) != 2 or min(size) < 1 for size in sizes_HW):
        message = f"target_sizes: {sizes_HW} are not a height and a width for each of {len(scores_BKhw)} images"
        raise InputError(message, hint="for example [(480, 640)] for one image")
    pairs = zip(scores_BKhw.detach().float(), sizes_HW, strict=True)
    return [best_classes(scores_Khw, (size[0], size[1])).cpu().numpy() for scores_Khw, size in pairs]


def best_classes(scores_Khw: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """Resize scores and take the best class of each pixel: (K, h, w) -> (H, W) uint8 or int16, on the same device.

    This is done a few classes at a time, with the same result as for all at once."""
    import torch

    kind = torch.uint8 if len(scores_Khw) <= 256 else torch.int16
    if tuple(scores_Khw.shape[1:]) == tuple(size_HW):
        return scores_Khw.argmax(0).to(kind)
    best_HW = torch.full(size_HW, float("-inf"), device=scores_Khw.device)
    ids_HW = torch.zeros(size_HW, dtype=kind, device=scores_Khw.device)
    for first, some_kHW in upsample_in_chunks(scores_Khw, size_HW):
        values_HW, places_HW = some_kHW.max(0)
        better_HW = values_HW > best_HW
        ids_HW = torch.where(better_HW, (places_HW + first).to(kind), ids_HW)
        best_HW = torch.where(better_HW, values_HW, best_HW)
    return ids_HW


def png(ids_HW: Ids, num_classes: int) -> bytes:
    """Encode class ids as a greyscale PNG, with 16 bits for more than 256 classes."""
    kind = np.uint8 if _depth(num_classes) == 1 else np.uint16
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ids_HW.astype(kind))).save(sink, "PNG")
    return sink.getvalue()


def coco_runs(ids_HW: Ids) -> list[dict[str, Any]]:
    """Encode each class in the mask as COCO's compressed run lengths, ordered by id. COCO scans columns first."""
    height, width = ids_HW.shape
    flat_N = np.ascontiguousarray(ids_HW.T).reshape(-1)
    starts_R = np.concatenate([[0], np.flatnonzero(np.diff(flat_N)) + 1])
    stops_R = np.append(starts_R[1:], flat_N.size)
    classes_R = flat_N[starts_R]
    runs = []
    for k in np.unique(classes_R):
        edges = np.stack([starts_R[classes_R == k], stops_R[classes_R == k]], axis=1).reshape(-1)
        counts = np.diff(edges, prepend=0, append=flat_N.size)
        if counts[-1] == 0:  # the mask ends in this class
            counts = counts[:-1]
        runs.append({"id": int(k), "size": [height, width], "counts": coco_string(counts)})
    return runs


def coco_string(counts: npt.NDArray[np.integer[Any]]) -> str:
    """Encode run lengths as COCO's text.

    From the fourth on, each is stored as the difference to the one two before it, in groups of five bits from the
    lowest, each with a bit that says whether more follow, plus 48."""
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    text = bytearray()
    for value in values.tolist():
        more = True
        while more:
            low = value & 31
            value >>= 5
            more = value != (-1 if low & 16 else 0)
            text.append(48 + low + 32 * more)
    return text.decode("ascii")


def coco_counts(text: str) -> npt.NDArray[np.int64]:
    """Decode COCO's text to run lengths: the inverse of `coco_string`."""
    counts: list[int] = []
    value = shift = 0
    for letter in text.encode("ascii"):
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return np.array(counts, np.int64)


def class_ids(runs: Sequence[Mapping[str, Any]], nowhere: int = -1) -> npt.NDArray[np.int64]:
    """Decode run lengths of each class to (H, W): the inverse of `coco_runs`. nowhere: the id of pixels of no class."""
    height, width = runs[0]["size"]
    flat_N = np.full(height * width, nowhere, np.int64)
    for run in runs:
        edges = np.cumsum(coco_counts(run["counts"]))
        for start, stop in zip(edges[0::2], edges[1::2], strict=False):
            flat_N[start:stop] = run["id"]
    return flat_N.reshape(width, height).T


def class_names(card: Card) -> tuple[str, ...]:
    """Return names by class id; a checkpoint without names gets the reference's `LABEL_<id>`."""
    return card.labels or tuple(f"LABEL_{i}" for i in range(card.gives["segmentation"][0]))


def _depth(num_classes: int) -> int:
    return 1 if num_classes <= 256 else 2
