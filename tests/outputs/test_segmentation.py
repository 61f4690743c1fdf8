"""Check that masks equal the reference's post-processing in every encoding, and are made in bounded memory."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import BeitImageProcessorPil
from transformers.modeling_outputs import SemanticSegmenterOutput

from img2parquet.errors import InputError, OutputUnavailable
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.models import Card
from img2parquet.outputs import BatchRows, resize_maps
from img2parquet.outputs.segmentation import Segmentation, best_classes, class_ids, class_masks, coco_runs, png

SIZES = [(7, 9), (64, 48), (33, 100), (6, 5), (1, 3)]


def card(num_labels: int = 10, labels: tuple[str, ...] = (), **geometry: Any) -> Card:
    settings = replace(PreprocessSettings("exact", 32, 32, "bilinear", None, None), **geometry)
    return Card("tiny", "beit", "fake:", "0", {}, settings, {"segmentation": (num_labels, 6, 5)}, "", labels)


def scores(num_labels: int = 10, count: int = len(SIZES)) -> torch.Tensor:
    return torch.randn(count, num_labels, 6, 5, generator=torch.Generator().manual_seed(0))


def rows() -> BatchRows:
    return BatchRows([f"k{i}" for i in range(len(SIZES))], SIZES)


def written(output: Segmentation, about: Card, scores_BKhw: torch.Tensor) -> list[list[Any]]:
    return [array.to_pylist() for array in output.columns(about, {"segmentation": scores_BKhw}, rows())]


def reference(scores_BKhw: torch.Tensor, sizes: list[tuple[int, int]] | None) -> list[npt.NDArray[np.int64]]:
    output = SemanticSegmenterOutput(logits=scores_BKhw)
    masks = BeitImageProcessorPil().post_process_semantic_segmentation(output, target_sizes=sizes)
    return [mask.numpy() for mask in masks]


@pytest.mark.parametrize("num_labels", [1, 10, 300])
def test_source_masks_equal_the_reference(num_labels: int) -> None:
    expected = reference(scores(num_labels), SIZES)
    masks, counts = written(Segmentation(), card(num_labels), scores(num_labels))
    for data, count, mask in zip(masks, counts, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), mask)
        assert count == np.bincount(mask.reshape(-1), minlength=num_labels).tolist()


def test_model_masks_equal_the_reference_without_target_sizes() -> None:
    (masks,) = written(Segmentation(size="model", histogram=False), card(), scores())
    for data, mask in zip(masks, reference(scores(), None), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), mask)


@pytest.mark.parametrize("score_bytes", [1, 4 * 64 * 48 * 3])
def test_a_few_classes_at_a_time_give_the_same_mask(score_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = best_classes(scores()[0], (64, 48))
    monkeypatch.setattr(resize_maps, "SCORE_BYTES", score_bytes)
    assert torch.equal(best_classes(scores()[0], (64, 48)), whole)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    interpolate = torch.nn.functional.interpolate

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = interpolate(*args, **kwargs)
        seen.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.nn.functional, "interpolate", counted)
    best_classes(scores(40, 1)[0], (700, 900))
    assert len(seen) > 1 and max(seen) <= resize_maps.SCORE_BYTES


def test_the_lower_class_of_equal_scores_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for score_bytes in (1, 1 << 20):
        monkeypatch.setattr(resize_maps, "SCORE_BYTES", score_bytes)
        assert not best_classes(torch.zeros(4, 6, 5), (9, 9)).any()


def test_run_lengths_are_decoded_to_the_mask() -> None:
    masks, _ = written(Segmentation(encoding="rle"), card(), scores())
    for runs, mask in zip(masks, reference(scores(), SIZES), strict=True):
        assert [run["id"] for run in runs] == np.unique(mask).tolist()
        for run in runs:
            assert run["size"] == list(mask.shape)
            assert np.array_equal(decoded(run), mask == run["id"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 1), (100, 90)])
def test_run_lengths_of_noise(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    for run in coco_runs(mask):
        assert np.array_equal(decoded(run), mask == run["id"])
    assert np.array_equal(class_ids(coco_runs(mask)), mask)
    some = [run for run in coco_runs(mask) if run["id"] == mask[0, 0]]
    assert np.array_equal(class_ids(some, nowhere=255), np.where(mask == mask[0, 0], mask, 255))


def test_run_lengths_as_coco_writes_them() -> None:
    # 6 x 4, one square of 2 x 2 from row 1, column 1: counts 7 2 4 2 9, of which the 4th is written as 2 - 2, the 5th
    # as 9 - 4; by hand from the format's definition
    mask = np.zeros((6, 4), np.uint8)
    mask[1:3, 1:3] = 1
    assert coco_runs(mask)[1] == {"id": 1, "size": [6, 4], "counts": "72405"}


def test_more_than_256_classes_take_16_bits() -> None:
    ids = np.array([[0, 299]], np.int16)
    assert np.asarray(Image.open(io.BytesIO(png(ids, 300)))).tolist() == [[0, 299]]
    assert Image.open(io.BytesIO(png(ids.clip(0, 9), 10))).mode == "L"


def test_class_names_are_in_the_fields() -> None:
    names = ("wall", "ключ")
    for field in Segmentation().fields(card(2, names)):
        assert json.loads(field.metadata[b"labels"]) == list(names)
    assert json.loads(Segmentation().fields(card(2))[0].metadata[b"labels"]) == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize(
    "geometry",
    [
        {"resize": "shortest_edge", "crop_height": 32, "crop_width": 32},
        {"resize": "none", "crop_height": 32, "crop_width": 32},
        {"crop_height": 24, "crop_width": 24},
    ],
    ids=str,
)
def test_a_crop_has_no_mask_for_the_whole_source(geometry: dict[str, Any]) -> None:
    about = card(**geometry)
    with pytest.raises(OutputUnavailable, match="sees a crop") as caught:
        Segmentation().wants(about)
    assert "size: model" in caught.value.hint
    assert Segmentation(size="model").wants(about) == Segmentation(size=64).wants(about) == {"segmentation"}


@pytest.mark.parametrize("resize", ["shortest_edge", "none"])
def test_an_image_of_a_stated_size_is_whole(resize: str) -> None:
    assert Segmentation().wants(card(resize=resize, stated_HW=(32, 32))) == {"segmentation"}


@pytest.mark.parametrize("encoding", ["png", "rle"])
@pytest.mark.parametrize(
    ("size", "target_HW"), [(13, (13, 13)), ([9, 40], (9, 40)), ([6, 5], (6, 5)), ([2, 3], (2, 3))]
)
def test_masks_of_a_fixed_size_equal_the_reference(size: Any, target_HW: tuple[int, int], encoding: Any) -> None:
    output = Segmentation(size=size, encoding=encoding)
    masks, counts = written(output, card(), scores())
    for data, count, mask in zip(masks, counts, reference(scores(), [target_HW] * len(SIZES)), strict=True):
        ids_HW = np.asarray(Image.open(io.BytesIO(data))) if encoding == "png" else class_ids(data)
        assert np.array_equal(ids_HW, mask)
        assert count == np.bincount(mask.reshape(-1), minlength=10).tolist()
    assert json.loads(output.model_dump_json())["size"] == size


@pytest.mark.parametrize(
    "sizes", [None, SIZES, [(9, 12)] * 5, torch.tensor([(9, 12)] * 5)], ids=["own", "each", "one", "t"]
)
def test_masks_in_python_equal_the_reference(sizes: Any) -> None:
    expected = reference(scores(300), None if sizes is None else [tuple(map(int, size)) for size in sizes])
    for mask, expected_mask in zip(class_masks(scores(300), sizes), expected, strict=True):
        assert np.array_equal(mask, expected_mask)
    for wrong in ([(4, 4)], [(4, 0)] * 5, [(4,)] * 5):
        with pytest.raises(InputError, match="are not a height and a width for each of 5 images"):
            class_masks(scores(), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["sources", 0, [4], [4, -1], [4, 4, 4], 2.5, True, None], ids=str)
def test_a_size_that_is_none_says_what_to_write(size: Any) -> None:
    with pytest.raises(ValidationError, match=r"is no size: write `source`, `model`, one side, or \[height, width\]"):
        Segmentation(size=size)
    with pytest.raises(ValidationError, match="a mask of 10000 x 10000 has more than 67,108,864 pixels"):
        Segmentation(size=10_000)


def test_worst_masks_of_the_models_size_are_within_the_bound() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 160)).astype(np.uint8)
    about = replace(card(), gives={"segmentation": (256, 160, 160)})
    assert len(png(noise, 256)) <= Segmentation(size="model", histogram=False).bytes_per_row(about)
    runs = sum(len(run["counts"]) + 12 for run in coco_runs(noise))
    assert runs <= Segmentation(size="model", encoding="rle", histogram=False).bytes_per_row(about)
    noise = np.random.default_rng(0).integers(0, 256, (500, 800)).astype(np.uint8)  # zlib adds bytes to each 16 kB
    bound = Segmentation(size="model", histogram=False).bytes_per_row(
        replace(card(), gives={"segmentation": (256, 500, 800)})
    )
    assert len(png(noise, 256)) <= bound <= 1.01 * noise.size


@pytest.mark.parametrize("size", ["model", "source"])
def test_a_histogram_is_planned_for_where_there_is_one(size: Any) -> None:
    planned = [Segmentation(size=size, histogram=histogram).bytes_per_row(card(150)) for histogram in (False, True)]
    assert 4 * 150 < planned[1] - planned[0] < 6 * 150


def decoded(run: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """Decode COCO's text to a mask, written from the definition of the format."""
    counts: list[int] = []
    text, at = run["counts"].encode(), 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            digit = text[at] - 48
            value |= (digit & 31) << shift
            more, at, shift = bool(digit & 32), at + 1, shift + 5
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    height, width = run["size"]
    return flat.reshape(width, height).T
