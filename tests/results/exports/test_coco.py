"""COCO and panoptic COCO, read by pycocotools and by the panoptic format's own rule, against the Parquet's masks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import img2parquet
from img2parquet.errors import InputError, UserError
from img2parquet.outputs.segmentation import coco_counts, coco_runs
from img2parquet.results.exports.masks import class_map
from img2parquet.results.exports.polygons import polygons
from tests.results.exports.conftest import HOSTILE


def stored_map(row: dict[str, Any]) -> np.ndarray:
    """What the Parquet holds, read without our decoder: PIL for a PNG, pycocotools for run lengths."""
    if isinstance(row.get("mask"), bytes):
        return np.asarray(Image.open(io.BytesIO(row["mask"])))
    from pycocotools import mask as coco_mask

    runs = row["regions"]
    ids_hw = np.zeros(runs[0]["size"], np.int64)
    for run in runs:
        ids_hw[coco_mask.decode({"size": run["size"], "counts": run["counts"].encode()}) == 1] = run["id"]
    image = Image.fromarray(ids_hw.astype(np.uint8))
    return np.asarray(image.resize((row["width"], row["height"]), Image.Resampling.NEAREST))


@pytest.mark.parametrize(("model", "masks"), [("masks", None), ("masks", "polygons"), ("small-masks", "rle")])
def test_pycocotools_reads_the_masks(
    out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path, model: str, masks: Any
) -> None:
    done = img2parquet.export(out, "coco", str(tmp_path / "coco.json"), model=model, masks=masks)
    assert (done.rows, done.parts, done.notes) == (len(HOSTILE), 3, ())
    coco = COCO(str(tmp_path / "coco.json"))
    assert sorted(coco.getCatIds()) == list(range(1, 9))
    assert coco.loadCats([1])[0]["name"] == "brick"
    assert [image["key"] for image in coco.imgs.values()] == HOSTILE
    for image, row in zip(coco.imgs.values(), rows[model], strict=True):
        assert (image["file_name"], image["width"], image["height"]) == (row["key"], row["width"], row["height"])
        whole = np.full((row["height"], row["width"]), -1)
        for one in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            region = coco.annToMask(one) == 1
            assert (whole[region] == -1).all()  # no pixel has two classes
            whole[region] = one["category_id"] - 1
            ys, xs = np.nonzero(region)
            box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert one["area"] == region.sum()
            assert one["bbox"] == box
        np.testing.assert_array_equal(whole, stored_map(row))


def test_evaluation_of_the_export_against_itself_is_perfect(out: str, tmp_path: Path) -> None:
    """What COCO's own evaluation makes of it: loads as truth and as results, and agrees with itself."""
    from pycocotools.cocoeval import COCOeval

    img2parquet.export(out, "coco", str(tmp_path / "coco.json"), model="masks")
    truth = COCO(str(tmp_path / "coco.json"))
    found = truth.loadRes([{**one, "score": 1.0} for one in truth.anns.values()])
    scores = COCOeval(truth, found, "segm")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0)


def test_panoptic_is_stuff_and_its_pixels_are_the_masks(
    out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    img2parquet.export(out, "coco-panoptic", str(tmp_path / "p"), model="masks", images="{key}.jpg")
    said = json.loads((tmp_path / "p" / "panoptic.json").read_text())
    assert {category["isthing"] for category in said["categories"]} == {0}
    assert [image["file_name"] for image in said["images"]] == [f"{key}.jpg" for key in HOSTILE]
    assert len(list((tmp_path / "p" / "panoptic").iterdir())) == len(HOSTILE)
    for one, row in zip(said["annotations"], rows["masks"], strict=True):
        rgb = np.asarray(Image.open(tmp_path / "p" / "panoptic" / one["file_name"])).astype(np.int64)
        segments_HW = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]  # panopticapi's rgb2id
        assert {s["id"] for s in one["segments_info"]} == set(np.unique(segments_HW).tolist())
        for segment in one["segments_info"]:
            assert segment["area"] == (segments_HW == segment["id"]).sum()
        np.testing.assert_array_equal(segments_HW - 1, stored_map(row))


@pytest.mark.parametrize("seed", range(30))
def test_polygons_fill_to_the_region(seed: int) -> None:
    """Holes, holes in holes, pixels that touch by a corner: pycocotools and PIL's even-odd filling give them back."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 14, 2)
    region = rng.random((h, w)) < rng.choice([0.2, 0.5, 0.8, 1.0])
    if seed == 0:  # rings within rings
        y, x = np.mgrid[:21, :21]
        region = np.maximum(abs(y - 10), abs(x - 10)) % 3 != 1
        h, w = region.shape
    found = polygons(region)
    assert all(len(polygon) >= 8 for polygon in found)
    crossings = sum((crossings_right_of_centres(p, h, w) for p in found), np.zeros((h, w), np.int64))
    np.testing.assert_array_equal(crossings % 2 == 1, region)
    if region.any():
        merged = coco_mask.merge(coco_mask.frPyObjects([[float(v) for v in p] for p in found], int(h), int(w)))
        np.testing.assert_array_equal(coco_mask.decode(merged) == 1, region)


def crossings_right_of_centres(polygon: list[int], h: int, w: int) -> np.ndarray:
    """How often a ray to the right from each pixel's centre crosses the polygon: a filler of our own."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    counts = np.zeros((h, w), np.int64)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if x0 == x1:
            counts[min(y0, y1) : max(y0, y1), :x0] += 1
        else:
            assert y0 == y1
    return counts


def test_run_lengths_are_read_back() -> None:
    rng = np.random.default_rng(5)
    for shape in [(1, 1), (3, 50), (200, 7), (64, 64)]:
        ids = rng.integers(0, 3, shape)
        for run in coco_runs(ids):
            counts = coco_counts(run["counts"])
            flat = np.repeat(np.arange(len(counts)) % 2, counts)
            expected = (ids.T.reshape(-1) == run["id"]).astype(int)
            np.testing.assert_array_equal(flat, expected[: len(flat)])
            assert not expected[len(flat) :].any()
        np.testing.assert_array_equal(class_map(coco_runs(ids), *shape), ids)


def test_rows_without_masks_are_refused_before_anything_is_written(out: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`coco` needs a mask; model `photos` has: key string.*labels list"):
        img2parquet.export(out, "coco", str(tmp_path / "deep" / "coco.json"), model="photos")
    assert not (tmp_path / "deep").exists()


def test_an_option_of_another_format_is_refused(out: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`csv` does not use --masks"):
        img2parquet.export(out, "csv", str(tmp_path / "x.csv"), model="masks", masks="polygons")
