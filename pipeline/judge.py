"""A batch of truths and what a model wrote -> counts: of labels, masks and masked patches.

Shapes: B rows, K classes, k best of them, H W a map, N patches, M masked patches.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline.outputs.segmentation import class_ids
from pipeline.outputs.truth import IGNORED, Place, class_id, class_map

BINS = 15
MOST_PIXELS = 64_000_000  # of a mask
KINDS = {"labels": "labels", "logits": "labels", "segmentation": "mask", "visual_tokens": "visual_tokens"}
PREFERENCE = ("logits", "labels", "segmentation", "visual_tokens")  # logits hold every class
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """One output of one model, and how its classes are called."""

    model: str
    column: str
    kind: str  # labels | mask | visual_tokens
    preference: int
    names: tuple[str, ...]
    ignored: int
    reduces_labels: bool

    @classmethod
    def of(cls, model: str, identity: Mapping[str, Any]) -> Iterator[Task]:
        """What of a model's outputs can be judged, by its run identity."""
        config = identity.get("config", {})
        labels = config.get("id2label") or {}
        names = tuple(str(labels[id]) for id in sorted(labels, key=int))
        for output in identity.get("outputs", ()):
            if output["kind"] in KINDS and output.get("head", "default") == "default":
                yield cls(
                    model=model,
                    column=output.get("name", output["kind"]),
                    kind=KINDS[output["kind"]],
                    preference=PREFERENCE.index(output["kind"]),
                    names=names,
                    ignored=int(config.get("semantic_loss_ignore_index", 255)),
                    reduces_labels=bool(identity.get("reduces_labels", False)),
                )

    def name_of(self, id: int) -> str:
        return self.names[id] if 0 <= id < len(self.names) else str(id)


class Judge(Protocol):
    """Counts while batches go by. `bins`: (BINS, 3) of rows, sum of confidence and hits by the highest score."""

    confusion: Counter[tuple[int, int]]
    bins: npt.NDArray[np.float64]
    counted: int
    top1: int
    top5: int
    has_top5: bool
    resized: int

    def __init__(self, task: Task, truth: str) -> None: ...

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        """Raises PartFailed for a truth that cannot be understood."""


class _Counting:
    def __init__(self, task: Task, truth: str) -> None:
        self.task, self.truth = task, truth
        self.confusion: Counter[tuple[int, int]] = Counter()
        self.bins = np.zeros((BINS, 3))
        self.counted = self.top1 = self.top5 = self.resized = 0
        self.has_top5 = True


class LabelJudge(_Counting):
    """Truths are class ids or names. A row without any class (all below a threshold) counts as wrong, as class -1."""

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        is_logits = pa.types.is_fixed_size_list(said.type)
        rows = _of_logits(said) if is_logits else _of_labels(said)
        for key, truth, (ids, scores) in zip(keys, truths.to_pylist(), rows, strict=True):
            K = said.type.list_size if is_logits else len(self.task.names) or 1 << 30
            true = class_id(self._plain(truth), self.task.names, K, Place(self.truth, key))
            if true is not None:
                self._count(true, ids, scores, K)

    def _plain(self, truth: Any) -> Any:
        """A kept column is text unless the job gave it a type: digits are an id where they are no class's name."""
        is_id = isinstance(truth, str) and truth not in self.task.names and truth.strip().isdigit()
        return int(truth) if is_id else truth

    def _count(self, true: int, ids: Sequence[int], scores: Sequence[float], K: int) -> None:
        best = ids[0] if ids else -1
        self.counted += 1
        self.confusion[true, best] += 1
        self.top1 += best == true
        self.top5 += true in ids[:5]
        # five of them, or all that there are; a truth among fewer is found all the same
        self.has_top5 = self.has_top5 and (len(ids) >= min(5, K) or true in ids)
        if ids:
            self.bins[_bin(scores[0])] += (1, scores[0], best == true)


class MaskJudge(_Counting):
    """Truths are PNGs of class ids. A mask of another size is made as large as its truth, by the nearest pixel."""

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        K = len(self.task.names) or 1 << 16
        for key, truth, mask in zip(keys, truths.to_pylist(), said.to_pylist(), strict=True):
            true_HW = class_map(truth, K, self.task.ignored, self.task.reduces_labels, Place(self.truth, key))
            said_HW = read_mask(mask)
            if said_HW.shape != true_HW.shape:
                self.resized += 1
                said_HW = _as_large(said_HW, true_HW.shape)
            counts = true_HW != self.task.ignored
            self._count(true_HW[counts], said_HW[counts])

    def _count(self, true_N: Ints, said_N: Ints) -> None:
        width = int(max(true_N.max(initial=0), said_N.max(initial=0))) + 1
        pairs, numbers = np.unique(true_N * width + said_N, return_counts=True)
        for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            self.confusion[pair // width, pair % width] += number
        self.counted += len(true_N)
        self.top1 += int((true_N == said_N).sum())


class TokenJudge(_Counting):
    """Truths are lists of codes, for every patch or for the masked ones. No confusion: a vocabulary is large."""

    def add(self, keys: Sequence[str], truths: pa.Array, said: pa.Array) -> None:
        for key, truth, patches in zip(keys, truths.to_pylist(), said.to_pylist(), strict=True):
            places = [patch["patch"] for patch in patches]
            for code, patch in zip(self._codes(truth, places, key), patches, strict=True):
                if code != IGNORED:
                    self._count(code, patch)

    def _codes(self, truth: Any, places: Sequence[int], key: str) -> list[int]:
        """Those of the patches that were predicted."""
        place = Place(self.truth, key)
        if not isinstance(truth, list) or not all(type(code) is int for code in truth):
            raise place.wrong(f"`{truth!r:.60}` is not a list of codes")
        if len(truth) == len(places):
            return truth
        if not places or max(places) >= len(truth):
            raise place.wrong(
                f"{len(truth)} codes, where {len(places)} patches were masked, up to {max(places, default=0)}"
            )
        return [truth[at] for at in places]

    def _count(self, code: int, patch: Mapping[str, Any]) -> None:
        codes, right = patch["codes"], patch["codes"][0] == code
        self.counted += 1
        self.top1 += right
        self.top5 += code in codes[:5]
        self.has_top5 = self.has_top5 and (len(codes) >= 5 or code in codes)
        self.bins[_bin(patch["scores"][0])] += (1, patch["scores"][0], right)


JUDGES: Mapping[str, type[Judge]] = {"labels": LabelJudge, "mask": MaskJudge, "visual_tokens": TokenJudge}


def _of_labels(said: pa.Array) -> Iterator[tuple[list[int], list[float]]]:
    for row in said.to_pylist():
        yield [label["id"] for label in row], [label["score"] for label in row]


def _of_logits(said: pa.Array) -> Iterator[tuple[list[int], list[float]]]:
    """The five best of each row and their softmax scores; of equal ones the lower id is first."""
    logits_BK = said.flatten().to_numpy(zero_copy_only=False).reshape(len(said), said.type.list_size).astype(np.float64)
    for logits_K in logits_BK:
        ids = np.argsort(-logits_K, kind="stable")[:5]
        exp_K = np.exp(logits_K - logits_K.max())
        yield ids.tolist(), (exp_K[ids] / exp_K.sum()).tolist()


def read_mask(value: Any, nowhere: int = 0) -> Ints:
    """A PNG of class ids, or COCO run lengths of each class, to ids (H, W). `nowhere`: of pixels that no run covers.

    Raises ValueError for what is no mask, or is past MOST_PIXELS."""
    try:
        if isinstance(value, bytes):
            with Image.open(io.BytesIO(value), formats=["PNG"]) as image:
                _check_size(image.height, image.width)
                if image.mode not in ("L", "P", "1", "I", "I;16"):
                    raise ValueError(f"a PNG of mode {image.mode} holds colours, not class ids")
                ids_HW: Ints = np.asarray(image).astype(np.int64)
                return ids_HW
        if not value:
            raise ValueError("no run lengths")
        _check_size(*value[0]["size"])
        return np.ascontiguousarray(class_ids(value, nowhere))
    except (OSError, SyntaxError, LookupError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"this is no mask: {error}") from None


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MOST_PIXELS:
        raise ValueError(f"a mask of {width} x {height} pixels")


def _as_large(ids_HW: Ints, shape: tuple[int, ...]) -> Ints:
    rows = (np.arange(shape[0]) + 0.5) * ids_HW.shape[0] / shape[0]
    columns = (np.arange(shape[1]) + 0.5) * ids_HW.shape[1] / shape[1]
    large_HW: Ints = ids_HW[rows.astype(int)][:, columns.astype(int)]
    return large_HW


def _bin(score: float) -> int:
    """Of BINS of equal width, each without its lower edge."""
    return min(BINS - 1, max(0, int(np.ceil(score * BINS)) - 1))
