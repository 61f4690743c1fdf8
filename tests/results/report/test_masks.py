"""Masks as they are written, read back; what is none is none; a page with overlays."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from img2parquet.dataset.commit import Output
from img2parquet.outputs.segmentation import coco_runs, png
from img2parquet.results.report import charts, masks
from img2parquet.results.report.page import render
from img2parquet.results.report.row_sample import RowSample, SampleColumns
from img2parquet.results.report.run_summary import RunSummary
from img2parquet.results.report.sections import show


def some_ids(seed: int, height: int = 37, width: int = 23) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 5, (6, 5), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)).astype(np.int64)


@pytest.mark.parametrize("seed", range(6))
def test_both_encodings_come_back_as_they_were(seed: int) -> None:
    ids_HW = some_ids(seed)
    assert np.array_equal(masks.ids(png(ids_HW, 5)), ids_HW)
    assert np.array_equal(masks.ids({"bytes": png(ids_HW, 300)}), ids_HW)
    assert np.array_equal(masks.ids(coco_runs(ids_HW)), ids_HW)
    noise = np.random.default_rng(seed).integers(0, 3, (40, 31))
    assert np.array_equal(masks.ids(coco_runs(noise)), noise)


@pytest.mark.parametrize("value", [None, b"", b"\x89PNG\r\n\x1a\n", [], [{"id": 1}], "mask", 7,
                                   [{"id": 1, "size": [1 << 20, 1 << 20], "counts": "0"}]])  # fmt: skip
def test_what_is_no_mask_is_none(value: object) -> None:
    assert masks.ids(value) is None


def test_colours_are_those_of_the_legend_and_differ() -> None:
    ids_HW = np.repeat(np.arange(4), 50)[None, :].repeat(100, 0)
    with Image.open(io.BytesIO(masks.coloured(ids_HW, 200))) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (100, 200, 3)
    found = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pixels[50, 25::50].tolist()]
    assert found == [masks.colour(k) for k in range(4)]
    assert len({masks.colour(k) for k in range(150)}) > 140


def test_a_page_with_masks_and_their_truth() -> None:
    ids = [some_ids(i) for i in range(5)]
    named = {"labels": json.dumps(["sky", "sea", "<b>sand</b>", "rock", "tree"])}
    schema = pa.schema([pa.field("key", pa.string()), pa.field("mask", pa.binary(), metadata=named),
                        pa.field("truth", pa.binary())])  # fmt: skip
    wrong = [png(np.where(x == 1, 0, x), 5) for x in ids]
    table = pa.table([[f"k{i}" for i in range(5)], wrong, [png(x, 5) for x in ids]], schema=schema)
    summary = RunSummary(Output.at("/nowhere"), "foreign")
    sample = RowSample("m", table, np.full(5, -1), SampleColumns(mask="mask"), 1, 1)
    shown = show(summary, [sample], "truth")
    (section,) = shown.sections
    judged = section.judged["mask"]
    assert {score.id: score.iou for score in judged.classes}[1] == 0
    right = sum(int((x != 1).sum()) for x in ids) / sum(x.size for x in ids)
    assert judged.found.pixel_accuracy == pytest.approx(right)
    assert len(section.overlays) == 5 and sum(share for _, _, share in section.areas) == pytest.approx(1)
    page = render(shown)
    assert "mean IoU" in page and "&lt;b&gt;sand&lt;/b&gt;" in page and "<b>sand</b>" not in page
    assert page.count('class="mask"') == 5


def test_a_confusion_matrix_of_pixels_is_in_percent() -> None:
    small, large = (charts.confusion(["sky", "sea"], np.array([[3, 1], [0, 4]]) * times) for times in (1, 10_000))
    assert ">3</text>" in small and ">4</text>" in small and "30,000 of 40,000" in large
    assert ">75</text>" in large and ">25</text>" in large and ">100</text>" in large and ">0</text>" not in large
