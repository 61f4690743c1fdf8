"""Class names that are equal, look equal, or are hostile: each class stays one class of its own in every format."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import img2parquet
from img2parquet.outputs.class_names import distinct_names
from img2parquet.outputs.labels import LABELS
from img2parquet.outputs.segmentation import png
from img2parquet.results.exports import EXPORTS
from img2parquet.results.reader import open_results
from tests.support.finished_outputs import make_output

NAMES = [
    "crane", "crane", " crane", "crane (0)", "", " ", "class 4", "a,b\n<c> & \"q\" 'r'", "cr\rlf\r\n", "tab\t", "nul\0",
    "nul\u2400", "a  b", "a b", "zwölf 猫", "x" * 80, "x" * 80, "x" * 79 + "y", "=1+1", "None", "0", "y" * 64, "z" * 65,
]  # fmt: skip
K = len(NAMES)
CVAT_LETTERS = 64


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Row k is class k: its best label, and every pixel of its mask. The next class is the second label."""
    labels = [
        [{"id": k, "name": NAMES[k], "score": 0.75}, {"id": (k + 1) % K, "name": NAMES[(k + 1) % K], "score": 0.25}]
        for k in range(K)
    ]
    mask = pa.field("mask", pa.binary(), metadata={"labels": json.dumps(NAMES)})
    masks = [png(np.full((10, 10), k, np.int64), K) for k in range(K)]
    table = pa.Table.from_arrays(
        [pa.array(labels, LABELS), pa.array(masks)], schema=pa.schema([("labels", LABELS), mask])
    )
    identity = {
        "outputs": [{"kind": "labels", "name": "labels"}, {"kind": "segmentation", "name": "mask"}],
        "config": {"id2label": {str(k): name for k, name in enumerate(NAMES)}},
    }
    return make_output(str(tmp_path_factory.mktemp("names") / "out"), identity, [table.slice(0, 9), table.slice(9)])


def assert_told_apart(names: list[str]) -> None:
    """Also by a tool that strips and joins spaces."""
    assert len({" ".join(name.split()) for name in names}) == K == len(names)
    assert all(name.strip() for name in names)


def test_distinct_names_keep_what_differs_and_add_ids_to_the_rest() -> None:
    assert distinct_names(["cat", "dog"]) == ["cat", "dog"]
    assert distinct_names(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]
    assert distinct_names(["a", "a", "a (0)", ""]) == ["a (0) (0)", "a (1)", "a (0) (2)", "class 3"]
    assert distinct_names(["nul\0", "nul\u2400"]) == ["nul\0 (0)", "nul\u2400 (1)"]
    assert distinct_names([]) == []
    assert_told_apart(distinct_names(NAMES))
    assert distinct_names(distinct_names(NAMES)) == distinct_names(NAMES)


def test_every_format_is_asked() -> None:
    assert set(EXPORTS) == {"coco", "coco-panoptic", "cvat", "label-studio", "fiftyone", *TABLES}


@pytest.mark.parametrize(("to", "file"), [("coco", ""), ("coco-panoptic", "panoptic.json")])
def test_coco(out: str, tmp_path: Path, to: str, file: str) -> None:
    img2parquet.export(out, to, str(tmp_path / "x"))
    found = json.loads((tmp_path / "x" / file).read_text())
    names = {category["id"]: category["name"] for category in found["categories"]}
    assert_told_apart(list(names.values()))
    segments = [a["segments_info"][0] if to == "coco-panoptic" else a for a in found["annotations"]]
    assert [segment["category_id"] for segment in segments] == list(names)


def test_cvat(out: str, tmp_path: Path) -> None:
    done = img2parquet.export(out, "cvat", str(tmp_path / "x.xml"))
    assert any("class names longer than 64 characters, which CVAT cuts off: 4;" in note for note in done.notes)
    root = ET.parse(tmp_path / "x.xml").getroot()
    names = [label.findtext("name") or "" for label in root.iter("label")]
    assert_told_apart(names)
    assert max(map(len, names)) <= CVAT_LETTERS and "y" * 64 in names
    assert {label.findtext("type") for label in root.iter("label")} == {"any"}
    tags = [tag.get("label", "") for tag in root.iter("tag")]
    assert tags == [mask.get("label") for mask in root.iter("mask")]
    assert_told_apart(tags)
    assert set(tags) == set(names)


def test_label_studio(out: str, tmp_path: Path) -> None:
    img2parquet.export(out, "label-studio", str(tmp_path / "x"))
    config = ET.parse(tmp_path / "x/label_config.xml").getroot()
    tasks = json.loads((tmp_path / "x/tasks-0000.json").read_text())
    for kind, tag in (("choices", "Choice"), ("brushlabels", "Label")):
        offered = [one.get("value", "") for one in config.iter(tag)]
        assert_told_apart(offered)
        results = [result["value"] for task in tasks for result in task["predictions"][0]["result"]]
        said = [value[kind][0] for value in results if kind in value]
        assert_told_apart(said)
        assert set(said) == set(offered)


def test_fiftyone(out: str, tmp_path: Path) -> None:
    img2parquet.export(out, "fiftyone", str(tmp_path / "x"))
    samples = json.loads((tmp_path / "x/samples.json").read_text())["samples"]
    targets = json.loads((tmp_path / "x/metadata.json").read_text())["info"]["mask_targets"]["mask"]
    names = [targets[str(k + 1)] for k in range(K)]
    assert_told_apart(names)
    assert [sample["label"]["label"] for sample in samples] == names
    seconds = [sample["labels"]["classifications"][1]["label"] for sample in samples]
    assert seconds == [*names[1:], names[0]]


def read_labels(to: str, path: Path) -> list[list[dict[str, Any]]]:
    if to == "jsonl":
        return [json.loads(line)["labels"] for line in path.read_text().split("\n")[:-1]]
    if to == "csv":
        import duckdb

        return [
            json.loads(text) for (text,) in duckdb.sql(f"select labels from read_csv('{path}', quote='\"')").fetchall()
        ]
    if to == "pgvector":
        lines = (path / "rows.copy").read_text().split("\n")[:-1]
        return [json.loads(re.sub(r"\\\\", r"\\", line.split("\t")[1])) for line in lines]
    if to == "datasets":
        datasets = pytest.importorskip("datasets")
        loaded = datasets.load_dataset(str(path), split="train", cache_dir=str(path.parent / "cache"))
        return list(loaded["labels"])
    lance = pytest.importorskip("lance")
    found: list[list[dict[str, Any]]] = lance.dataset(str(path)).to_table()["labels"].to_pylist()
    return found


TABLES = ("csv", "jsonl", "datasets", "lance", "pgvector", "npy")


@pytest.mark.parametrize(
    "to", [to for to in TABLES if to != "npy"]
)  # which needs vectors, and keeps columns as they are
def test_tables_keep_ids_and_stored_names(out: str, tmp_path: Path, to: str) -> None:
    img2parquet.export(out, to, str(tmp_path / "x"), columns=("labels",))
    stored = open_results(out).to_table()["labels"].to_pylist()
    pictured = [[{**x, "name": x["name"].replace("\0", "\u2400")} for x in row] for row in stored]
    assert read_labels(to, tmp_path / "x") == (pictured if to == "pgvector" else stored)


def test_labels_of_another_writer_may_be_null(tmp_path: Path) -> None:
    rows = [None, [None, {"id": None, "name": "a", "score": 0.5}], [{"id": 1, "name": "b", "score": None}],
            [{"id": 7, "name": "c", "score": 0.5}]]  # fmt: skip
    uri = make_output(str(tmp_path / "out"), {"outputs": []}, [pa.table({"theirs": pa.array(rows, LABELS_OF_OTHERS)})])
    for to in ("cvat", "label-studio", "fiftyone"):
        img2parquet.export(uri, to, str(tmp_path / to))
    samples = json.loads((tmp_path / "fiftyone/samples.json").read_text())["samples"]
    assert [sample["label"] and sample["label"]["label"] for sample in samples] == [None, None, None, "c"]


LABELS_OF_OTHERS = pa.list_(pa.struct([("id", pa.int64()), ("name", pa.string()), ("score", pa.float64())]))


@pytest.mark.parametrize(
    "to", [to for to in EXPORTS if to in ("coco", "coco-panoptic", "cvat", "label-studio", "fiftyone")]
)
def test_images_of_one_name_are_counted(tmp_path: Path, to: str) -> None:
    """Keys are unique in a shard only, and other tools know an image by its name."""
    mask = pa.field("mask", pa.binary(), metadata={"labels": '["a"]'})
    column = pa.array([png(np.zeros((10, 10), np.int64), 1)] * 2)
    tables = [pa.table({"key": ["x", "y"], "mask": column}, schema=pa.schema([("key", pa.string()), mask]))] * 2
    uri = make_output(str(tmp_path / "out"), {"outputs": [{"kind": "segmentation", "name": "mask"}]}, tables)
    done = img2parquet.export(uri, to, str(tmp_path / "x"))
    assert done.rows == 4
    assert [note for note in done.notes if "confuse them: 2; add {shard} to --images" in note]
    assert not img2parquet.export(uri, to, str(tmp_path / "y"), images="{shard}/{key}").notes
