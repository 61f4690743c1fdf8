"""Per-class maps -> one map of class ids a row, as PNG or COCO run lengths, and how many pixels each class has.

Shapes: B batch, K classes, h w the head's map, H W the mask.
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
from pydantic import Field

from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, OutputSettings, not_finite, require
from pipeline.outputs.maps import require_whole_image, upsampled

if TYPE_CHECKING:
    from torch import Tensor

Ids = npt.NDArray[np.integer[Any]]

# one mask at the source's size, for planning: photographs' label maps take 5 to 10 kB a megapixel. A part whose masks
# are larger than this is larger, and still one object
SOURCE_MASK_BYTES = {"png": 64 << 10, "rle": 128 << 10}
RUNS = pa.struct(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("size", pa.list_(pa.int32(), 2), nullable=False),
        pa.field("counts", pa.string(), nullable=False),
    ]
)
RLE = pa.list_(pa.field("element", RUNS, nullable=False))


class Segmentation(OutputSettings):
    """(B, K, h, w) -> a mask (H, W) of class ids in `mask`, and K counts of pixels in `mask_histogram`.

    The mask is the reference's `post_process_semantic_segmentation`: scores are upsampled bilinearly, then the best
    class is taken, the lower id of equal ones. Class names are in the fields' metadata."""

    kind: Literal["segmentation"] = "segmentation"
    name: ColumnName = Field(default="mask", description="The column, and what the histogram's column begins with.")
    encoding: Literal["png", "rle"] = Field(
        default="png",
        description="`png`: a greyscale image of class ids (16 bits where there are more than 256 classes); `rle`: "
        "COCO's compressed run lengths, one entry for each class that is there.",
    )
    size: Literal["source", "model"] = Field(
        default="source",
        description="`source`: as the source image; `model`: as the model's head gives it, not upsampled.",
    )
    histogram: bool = Field(default=True, description="Write how many pixels each class has.")

    def column_names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_histogram") if self.histogram else (self.name,)

    def wants(self, card: Card) -> frozenset[str]:
        require(card, "segmentation", wanted_by="output `segmentation`")
        if self.size == "source":
            require_whole_image(card, "output `segmentation`", "use `size: model`, or a checkpoint")
        return frozenset(["segmentation"])

    def fields(self, card: Card) -> list[pa.Field]:
        K = card.gives["segmentation"][0]
        named = {"labels": json.dumps(class_names(card), ensure_ascii=False)}
        mask = pa.field(self.name, pa.binary() if self.encoding == "png" else RLE, nullable=False, metadata=named)
        counts = pa.field(f"{self.name}_histogram", pa.list_(pa.int32(), K), nullable=False, metadata=named)
        return [mask, counts] if self.histogram else [mask]

    def bytes_per_row(self, card: Card) -> int:
        """Exact bound for the model's size; for the source's, whose size nobody knows yet, what is usual."""
        K, h, w = card.gives["segmentation"]
        worst = {"png": h * (1 + _depth(K) * w) + h * w // 1000 + 200, "rle": 12 * h * w + 40 * min(K, h * w) + 40}
        mask = worst[self.encoding] if self.size == "model" else SOURCE_MASK_BYTES[self.encoding]
        return mask + (5 * K + 16 if self.histogram else 0)

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        scores_BKhw, K = features["segmentation"].detach().float(), card.gives["segmentation"][0]
        self._refuse_not_finite(scores_BKhw, rows)
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
            ids_HW: Ids = best_classes(scores_Khw, size_HW if self.size == "source" else (h, w)).cpu().numpy()
            yield ids_HW

    def _refuse_not_finite(self, scores_BKhw: Tensor, rows: BatchRows) -> None:
        finite_B = scores_BKhw.isfinite().flatten(1).all(1).tolist()
        bad = [key for key, finite in zip(rows.keys, finite_B, strict=True) if not finite]
        if bad:
            raise not_finite(self.name, bad, "float32")


def best_classes(scores_Khw: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """Scores upsampled to a size, and the best class of each pixel, as uint8 or int16, on the scores' device.

    Done a few classes at a time; the result is the same as if all were."""
    import torch

    kind = torch.uint8 if len(scores_Khw) <= 256 else torch.int16
    if tuple(scores_Khw.shape[1:]) == tuple(size_HW):
        return scores_Khw.argmax(0).to(kind)
    best_HW = torch.full(size_HW, float("-inf"), device=scores_Khw.device)
    ids_HW = torch.zeros(size_HW, dtype=kind, device=scores_Khw.device)
    for first, some_kHW in upsampled(scores_Khw, size_HW):
        values_HW, places_HW = some_kHW.max(0)
        better_HW = values_HW > best_HW
        ids_HW = torch.where(better_HW, (places_HW + first).to(kind), ids_HW)
        best_HW = torch.where(better_HW, values_HW, best_HW)
    return ids_HW


def png(ids_HW: Ids, num_classes: int) -> bytes:
    """A greyscale PNG whose values are class ids."""
    kind = np.uint8 if _depth(num_classes) == 1 else np.uint16
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ids_HW.astype(kind))).save(sink, "PNG")
    return sink.getvalue()


def coco_runs(ids_HW: Ids) -> list[dict[str, Any]]:
    """COCO's compressed run lengths of each class that is there, by id; columns first, as COCO has them."""
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
    """COCO's text for run lengths: from the fourth on the difference to the last but one, in groups of five bits from
    the lowest, each with a bit that says whether more follow, plus 48."""
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
    """COCO's text to run lengths: the inverse of `coco_string`."""
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
    """Run lengths of each class to (H, W): the inverse of `coco_runs`. `nowhere`: the id of pixels of no class."""
    height, width = runs[0]["size"]
    flat_N = np.full(height * width, nowhere, np.int64)
    for run in runs:
        edges = np.cumsum(coco_counts(run["counts"]))
        for start, stop in zip(edges[0::2], edges[1::2], strict=False):
            flat_N[start:stop] = run["id"]
    return flat_N.reshape(width, height).T


def class_names(card: Card) -> tuple[str, ...]:
    """Names by class id; a checkpoint that has none gets the reference's `LABEL_<id>`."""
    return card.labels or tuple(f"LABEL_{i}" for i in range(card.gives["segmentation"][0]))


def _depth(num_classes: int) -> int:
    return 1 if num_classes <= 256 else 2
