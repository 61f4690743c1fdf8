"""Label Studio, CVAT and FiftyOne: always by their rules, and with `make targets` by the first two's own code."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import img2parquet
from img2parquet.results.exports.label_studio import brush_rle
from tests.results.exports.conftest import HOSTILE
from tests.results.exports.test_coco import stored_map

PICTURED = [key.translate({0: "\u2400", 7: "\u2407", 27: "\u241b"}) for key in HOSTILE]  # XML has no such characters


def module_of(package: str, file: str) -> ModuleType:
    """One file of an installed package, without the package's own imports, of which it has many."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package}: `make targets` installs it"
    path = Path(spec.origin).parent / file
    found = importlib.util.spec_from_file_location(f"_{package}_{path.stem}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def decoded(rle: list[int]) -> np.ndarray:
    """Label Studio's run lengths as its front end reads them, from the description of the format alone."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def read(n: int) -> int:
        nonlocal at
        at += n
        return int(bits[at - n : at], 2)

    count, width = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        is_run, length = read(1), 1 + read(sizes[read(2)])
        values += [read(width)] * length if is_run else [read(width) for _ in range(length)]
    assert len(values) == count
    assert len(bits) - at < 8
    return np.array(values)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 90), (300, 400)])
def test_brush_run_lengths(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    for region in [rng.random(shape) < 0.3, np.ones(shape, bool), np.zeros(shape, bool)]:
        rgba = decoded(brush_rle(region)).reshape(*shape, 4)
        np.testing.assert_array_equal(rgba, np.repeat(region[..., None] * 255, 4, axis=2))


@pytest.mark.targets
def test_label_studio_decodes_our_brushes_itself() -> None:
    brush = module_of("label_studio_sdk", "converter/brush.py")
    region = np.random.default_rng(1).random((37, 53)) < 0.4
    region[5:20] = True
    rgba = brush.decode_rle(brush_rle(region)).reshape(37, 53, 4)
    np.testing.assert_array_equal(rgba[:, :, 3] == 255, region)


def test_label_studio_tasks(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    img2parquet.export(
        out, "label-studio", str(tmp_path / "m"), model="masks", images="https://cdn/{key}.jpg?s={shard}"
    )
    tasks = json.loads((tmp_path / "m" / "tasks-0000.json").read_text())
    assert [task["data"]["key"] for task in tasks] == HOSTILE
    assert tasks[4]["data"]["image"].startswith("https://cdn/../../etc/passwd.jpg?s=/")
    assert "<" not in tasks[3]["data"]["image"] and "{key}" not in tasks[3]["data"]["image"]
    config = ET.parse(tmp_path / "m" / "label_config.xml").getroot()
    offered = {label.get("value") for label in config.iter("Label")}
    for task, row in zip(tasks, rows["masks"], strict=True):
        whole = np.full((row["height"], row["width"]), -1)
        names = ["brick", "grass", "gravel", "coins", "galaxies", "tissue"]
        for result in task["predictions"][0]["result"]:
            assert (result["original_height"], result["original_width"]) == whole.shape
            assert (result["to_name"], result["from_name"], result["type"]) == ("image", "mask", "brushlabels")
            [label] = result["value"]["brushlabels"]
            assert label in offered
            alpha = decoded(result["value"]["rle"]).reshape(*whole.shape, 4)[..., 3]
            if label in names:
                whole[alpha == 255] = names.index(label)
            else:
                whole[alpha == 255] = stored_map(row)[alpha == 255][0]
        np.testing.assert_array_equal(whole, stored_map(row))


def test_label_studio_choices(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    img2parquet.export(out, "label-studio", str(tmp_path / "c"), model="photos")
    tasks = json.loads((tmp_path / "c" / "tasks-0000.json").read_text())
    config = ET.parse(tmp_path / "c" / "label_config.xml").getroot()
    offered = {choice.get("value") for choice in config.iter("Choice")}
    for task, row in zip(tasks, rows["photos"], strict=True):
        [prediction] = task["predictions"]
        [result] = prediction["result"]
        assert prediction["model_version"] == "photos"
        assert result["value"]["choices"] == [row["labels"][0]["name"]]
        assert result["score"] == prediction["score"] == row["labels"][0]["score"]
        assert {label["name"] for label in row["labels"]} <= offered
        assert task["data"]["image"] == row["key"]


def test_cvat_masks(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    done = img2parquet.export(out, "cvat", str(tmp_path / "a.xml"), model="masks", name="</name><x>&\n")
    assert "XML cannot hold: 1" in done.notes[0]
    root = ET.parse(tmp_path / "a.xml").getroot()
    assert root.findtext("version") == "1.1"
    assert root.findtext("meta/task/name") == "</name><x>&\n"
    labels = [label.findtext("name") for label in root.iter("label")]
    assert labels[:3] == ["brick", "grass", "gravel"]
    images = root.findall("image")
    assert [image.get("name") for image in images] == PICTURED
    assert [image.get("id") for image in images] == [str(i) for i in range(len(HOSTILE))]
    for image, row in zip(images, rows["masks"], strict=True):
        whole = np.full((row["height"], row["width"]), -1)
        assert (image.get("width"), image.get("height")) == (str(row["width"]), str(row["height"]))
        for mask in image.findall("mask"):
            counts = [int(count) for count in mask.get("rle", "").split(",")]
            left, top, width, height = (int(mask.get(name, "")) for name in ("left", "top", "width", "height"))
            inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
            whole[top : top + height, left : left + width][inside] = labels.index(mask.get("label"))
        np.testing.assert_array_equal(whole, stored_map(row))


@pytest.mark.targets
def test_cvat_decodes_our_masks_itself(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    masks = module_of("cvat_sdk", "masks.py")
    img2parquet.export(out, "cvat", str(tmp_path / "a.xml"), model="masks")
    for image, row in zip(ET.parse(tmp_path / "a.xml").getroot().findall("image"), rows["masks"], strict=True):
        for mask in image.findall("mask"):
            left, top, width, height = (int(mask.get(name, "")) for name in ("left", "top", "width", "height"))
            points = [*map(int, mask.get("rle", "").split(",")), left, top, left + width - 1, top + height - 1]
            region = masks.decode_mask(points, image_width=row["width"], image_height=row["height"])
            assert len(np.unique(stored_map(row)[region])) == 1
            assert list(points) == list(masks.encode_mask(region))


def test_cvat_tags(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    img2parquet.export(out, "cvat", str(tmp_path / "a.xml"), model="photos")
    root = ET.parse(tmp_path / "a.xml").getroot()
    tags = [image.find("tag") for image in root.findall("image")]
    assert [tag.get("label") for tag in tags if tag is not None] == [r["labels"][0]["name"] for r in rows["photos"]]
    assert {tag.get("label") for tag in tags if tag is not None} == {lb.findtext("name") for lb in root.iter("label")}


def test_fiftyone_samples(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    img2parquet.export(out, "fiftyone", str(tmp_path / "f"), model="photos", images="/data/{key}", name="mine")
    samples = json.loads((tmp_path / "f" / "samples.json").read_text())["samples"]
    metadata = json.loads((tmp_path / "f" / "metadata.json").read_text())
    assert metadata["name"] == "mine" and "version" not in metadata
    for sample, row in zip(samples, rows["photos"], strict=True):
        assert sample["filepath"] == f"/data/{row['key']}"
        assert sample["label"]["label"] == row["labels"][0]["name"]
        found = [(one["label"], one["confidence"]) for one in sample["labels"]["classifications"]]
        assert found == [(label["name"], label["score"]) for label in row["labels"]]
        assert set(sample) - {"_media_type"} == set(metadata["sample_fields"])


def test_fiftyone_masks_and_vectors(out: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    img2parquet.export(out, "fiftyone", str(tmp_path / "m"), model="masks")
    samples = json.loads((tmp_path / "m" / "samples.json").read_text())["samples"]
    targets = json.loads((tmp_path / "m" / "metadata.json").read_text())["info"]["mask_targets"]["mask"]
    assert targets["1"] == "brick"
    for sample, row in zip(samples, rows["masks"], strict=True):
        mask = np.asarray(Image.open(tmp_path / "m" / sample["mask"]["mask_path"]))
        np.testing.assert_array_equal(mask.astype(int) - 1, stored_map(row))
    img2parquet.export(out, "fiftyone", str(tmp_path / "v"), model="vectors", columns=("embedding",))
    samples = json.loads((tmp_path / "v" / "samples.json").read_text())["samples"]
    for sample, row in zip(samples, rows["vectors"], strict=True):
        packed = base64.b64decode(sample["embedding"]["$binary"]["base64"])
        np.testing.assert_array_equal(np.load(io.BytesIO(zlib.decompress(packed))), np.float32(row["embedding"]))
