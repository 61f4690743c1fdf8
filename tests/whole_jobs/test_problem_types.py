"""Scores of classification heads are what config.json's `problem_type` says, in columns, evaluation and exports."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as reference
from sklearn import metrics
from transformers.pipelines.image_classification import ImageClassificationPipeline

import img2parquet
from img2parquet.models import ModelSpec, load_model
from img2parquet.outputs import BatchRows
from img2parquet.outputs.labels import Labels
from img2parquet.outputs.score_function import score_function
from tests.models import oracle
from tests.support.finished_outputs import make_output, rows_of
from tests.support.small_job import GOOD, job_dict

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {**SIZES, "image_size": 32, "patch_size": 8}
HEADS = {
    "levit": (
        reference.LevitForImageClassificationWithTeacher,
        reference.LevitConfig,
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]},
    ),
    "beit": (reference.BeitForImageClassification, reference.BeitConfig, VIT),
    "bit": (
        reference.BitForImageClassification,
        reference.BitConfig,
        {"embedding_size": 16, "hidden_sizes": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "num_groups": 4},
    ),
    "vit_msn": (reference.ViTMSNForImageClassification, reference.ViTMSNConfig, VIT),
    "vit": (reference.ViTForImageClassification, reference.ViTConfig, VIT),
    "dinov2": (reference.Dinov2ForImageClassification, reference.Dinov2Config, VIT),
    "transformers:convnext": (
        reference.ConvNextForImageClassification,
        reference.ConvNextConfig,
        {"hidden_sizes": [16, 16, 24, 24], "depths": [1, 1, 1, 1]},
    ),
}  # fmt: skip
PROBLEMS: list[tuple[str | None, int]] = [
    (None, 4), (None, 1), ("single_label_classification", 3),
    ("multi_label_classification", 4), ("regression", 1), ("regression", 3),
]  # fmt: skip
LABELS: dict[str, Any] = {"top_k": 5}
GEOMETRY = {
    "size": {"height": 32, "width": 32}, "do_resize": True, "do_rescale": True, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
}  # fmt: skip


def save(family: str, folder: Path, problem: str | None, names: list[str], seed: int = 3, **more: Any) -> Any:
    """Save a small classifier of a family for 32 pixels (LeViT: 64), and return the reference's model."""
    architecture, config_class, sizes = HEADS[family]
    named = {"id2label": dict(enumerate(names)), "label2id": {name: id for id, name in enumerate(names)}}
    model = architecture(config_class(**{**sizes, **more}, **named, problem_type=problem))
    oracle.saved(model, folder, seed)
    side = {"size": {"shortest_edge": 64}, "crop_size": 64} if family == "levit" else {}
    processor = {"levit": "LevitImageProcessor", "bit": "BitImageProcessor"}.get(family, "ViTImageProcessor")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**GEOMETRY, **side, "image_processor_type": processor})
    )
    return model


def spec(family: str, folder: Path) -> ModelSpec:
    return ModelSpec(f"transformers:{folder}" if family.startswith("transformers:") else str(folder))


@pytest.mark.parametrize(("problem", "K"), PROBLEMS)
@pytest.mark.parametrize("family", HEADS)
def test_scores_are_those_of_the_references_pipeline(family: str, problem: str | None, K: int, tmp_path: Path) -> None:
    theirs = save(family, tmp_path, problem, [f"class {id}" for id in range(K)])
    ours = load_model(spec(family, tmp_path), dtype="float32", device="cpu")
    height, width = ours.card.preprocess.size_HW
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (3, height, width, 3)).astype(np.uint8)
    output = Labels(**LABELS)
    features = ours.forward_pixels(pixels_BHWC, output.wants(ours.card))
    (column,) = output.columns(ours.card, features, BatchRows(["a", "b", "c"], [(height, width)] * 3))
    assert img2parquet.class_labels(features["logits"], ours) == column.to_pylist()
    pipeline = SimpleNamespace(model=theirs)
    for row, logits_K in zip(column.to_pylist(), features["logits"], strict=True):
        expected = ImageClassificationPipeline.postprocess(pipeline, {"logits": logits_K[None]})
        assert [label["name"] for label in row] == [label["label"] for label in expected]
        np.testing.assert_allclose([label["score"] for label in row], [label["score"] for label in expected], 1e-5)


def test_a_threshold_of_probabilities_is_refused_for_a_regression(tmp_path: Path) -> None:
    save("vit", tmp_path, "regression", ["age"])
    card = load_model(spec("vit", tmp_path), dtype="float32", device="cpu").card
    with pytest.raises(img2parquet.OutputUnavailable, match="is a regression"):
        Labels(**{**LABELS, "threshold": 0.5}).wants(card)


@pytest.mark.parametrize(
    ("logits", "settings", "match"),
    [
        (torch.zeros(2, 3), {}, r"shape \(2, 3\), where model `.*` has 4 classes"),
        (torch.zeros(4), {}, r"shape \(4,\)"),
        (torch.zeros(2, 4), {"top_k": 0}, "top_k: 0"),
        (torch.zeros(2, 4), {"threshold": 1.5}, "threshold: 1.5"),
        (torch.tensor([[0.0] * 4, [float("nan")] * 4]), {}, "images 1: .*not finite"),
    ],
)
def test_logits_that_have_no_labels(logits: torch.Tensor, settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    save("vit", tmp_path, None, NAMES)
    model = load_model(spec("vit", tmp_path), dtype="float32", device="cpu")
    with pytest.raises(img2parquet.InputError, match=match):
        img2parquet.class_labels(logits, model, **settings)


def test_an_unknown_problem_is_refused(tmp_path: Path) -> None:
    save("vit", tmp_path, None, ["a", "b"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": "ranking"}))
    card = load_model(spec("vit", tmp_path), dtype="float32", device="cpu").card
    with pytest.raises(img2parquet.OutputUnavailable, match="unknown `problem_type: ranking`"):
        Labels(**LABELS).wants(card)


# ---- whole jobs --------------------------------------------------------------------------------------------------

NAMES = ["cat", "outdoor", "night", "people"]


@pytest.fixture(scope="module")
def multi_label(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a job whose model has several labels per image."""
    folder = tmp_path_factory.mktemp("multi-label")
    save("vit", folder / "model", "multi_label_classification", NAMES)
    document = job_dict(shards, folder / "model", str(folder / "out"))
    document["models"][0]["outputs"] = [{"kind": "labels", "top_k": 4}, {"kind": "logits"}]
    img2parquet.run(img2parquet.parse_job(document), "local")
    return str(folder / "out")


def test_the_column_and_the_identity_say_how_labels_are_scored(multi_label: str) -> None:
    (part, *_) = sorted(Path(multi_label).glob("model=tiny/*.parquet"))
    assert pq.read_schema(part).field("labels").metadata[b"scores"] == b"sigmoid"
    identities = json.loads((Path(multi_label) / "_run.json").read_text())["identities"]
    assert identities["tiny"]["scores"] == "sigmoid"
    for row in rows_of(multi_label):
        shares = 1 / (1 + np.exp(-np.array(row["logits"], np.float64)))
        np.testing.assert_allclose([label["score"] for label in row["labels"]], np.sort(shares)[::-1], 1e-5)


def expected_labels(row: dict[str, Any]) -> list[str]:
    return [label["name"] for label in row["labels"] if label["score"] >= 0.5]


def test_label_studio_gets_several_choices(multi_label: str, tmp_path: Path) -> None:
    img2parquet.export(multi_label, "label-studio", str(tmp_path / "tasks"))
    config = ElementTree.parse(tmp_path / "tasks" / "label_config.xml")
    assert [choices.get("choice") for choices in config.iter("Choices")] == ["multiple"]
    tasks = json.loads((tmp_path / "tasks" / "tasks-0000.json").read_text())
    results = [task["predictions"][0]["result"] for task in tasks]
    found = [result[0]["value"]["choices"] if result else [] for result in results]
    assert found == [expected_labels(row) for row in rows_of(multi_label)]
    assert {len(names) for names in found} - {1}, "the test's model predicts one label for every image"


def test_cvat_gets_a_tag_for_each_label(multi_label: str, tmp_path: Path) -> None:
    img2parquet.export(multi_label, "cvat", str(tmp_path / "tags.xml"))
    images = ElementTree.parse(tmp_path / "tags.xml").iter("image")
    found = [[tag.get("label") for tag in image.iter("tag")] for image in images]
    assert found == [expected_labels(row) for row in rows_of(multi_label)] and len(found) == GOOD


def test_the_report_shows_such_labels(multi_label: str, tmp_path: Path) -> None:
    [page] = img2parquet.report(multi_label, tmp_path / "report.html", sample=20)
    assert "outdoor" in page.read_text()


@pytest.fixture(scope="module")
def regression(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a job whose model gives two values per image."""
    folder = tmp_path_factory.mktemp("regression")
    save("vit", folder / "model", "regression", ["age", "weight"])
    document = job_dict(shards, folder / "model", str(folder / "out"))
    document["models"][0]["outputs"] = [{"kind": "labels"}, {"kind": "logits"}]
    img2parquet.run(img2parquet.parse_job(document), "local")
    return str(folder / "out")


def test_values_are_values_in_every_tool(regression: str, tmp_path: Path) -> None:
    rows = rows_of(regression)
    assert [{x["id"]: x["score"] for x in row["labels"]} for row in rows] == [
        dict(enumerate(r["logits"])) for r in rows
    ]
    wanted = [{x["name"]: pytest.approx(x["score"]) for x in row["labels"]} for row in rows]
    img2parquet.export(regression, "label-studio", str(tmp_path / "tasks"))
    config = ElementTree.parse(tmp_path / "tasks" / "label_config.xml")
    names = dict(
        zip(
            (n.get("name") for n in config.iter("Number")), (h.get("value") for h in config.iter("Header")), strict=True
        )
    )
    assert list(names.values()) == ["age", "weight"] and not list(config.iter("Choices"))
    tasks = json.loads((tmp_path / "tasks" / "tasks-0000.json").read_text())
    results = [task["predictions"][0]["result"] for task in tasks]
    assert [{names[one["from_name"]]: one["value"]["number"] for one in result} for result in results] == wanted
    img2parquet.export(regression, "cvat", str(tmp_path / "tags.xml"))
    images = ElementTree.parse(tmp_path / "tags.xml").iter("image")
    found = [{tag.get("label"): float(tag.findtext("attribute", "")) for tag in image.iter("tag")} for image in images]
    assert found == wanted
    img2parquet.export(regression, "fiftyone", str(tmp_path / "voxel"))
    samples = json.loads((tmp_path / "voxel" / "samples.json").read_text())["samples"]
    fields = json.loads((tmp_path / "voxel" / "metadata.json").read_text())["info"]["values"]
    assert [{fields[f]: sample[f]["value"] for f in fields} for sample in samples] == wanted
    [page] = img2parquet.report(regression, tmp_path / "report.html", sample=20)
    assert "<h3>Values</h3>" in page.read_text() and "Confidence</h3>" not in page.read_text()


def test_a_jobs_threshold_decides_which_labels_tools_get(shards: str, tmp_path: Path) -> None:
    save("vit", tmp_path / "model", "multi_label_classification", NAMES)
    document = job_dict(shards, tmp_path / "model", str(tmp_path / "out"))
    document["models"][0]["outputs"] = [{"kind": "labels", "threshold": 0.4}]
    img2parquet.run(img2parquet.parse_job(document), "local")
    rows, out = rows_of(str(tmp_path / "out")), str(tmp_path / "out")
    assert any(0.4 <= label["score"] < 0.5 for row in rows for label in row["labels"])
    img2parquet.export(out, "cvat", str(tmp_path / "tags.xml"))
    images = ElementTree.parse(tmp_path / "tags.xml").iter("image")
    assert [[tag.get("label") for tag in image.iter("tag")] for image in images] == [
        [label["name"] for label in row["labels"]] for row in rows
    ]


# ---- evaluation --------------------------------------------------------------------------------------------------


def logits_output(
    folder: Path, problem: str, truths: list[Any], logits_BK: np.ndarray, truth_type: pa.DataType | None = None
) -> str:
    K = logits_BK.shape[1]
    identity = {
        "outputs": [{"kind": "logits", "name": "logits"}],
        "config": {"problem_type": problem, "id2label": {str(id): f"class {id}" for id in range(K)}},
    }
    values = pa.array(logits_BK.astype(np.float32).reshape(-1))
    table = pa.table(
        {"truth": pa.array(truths, truth_type), "logits": pa.FixedSizeListArray.from_arrays(values, K)},
    )
    return make_output(str(folder / "out"), identity, [table])


@pytest.mark.parametrize("form", ["shares", "ids", "names"])
def test_several_labels_are_evaluated_as_scikit_learn_does(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true_BK, logits_BK = rng.random((200, 5)) < 0.3, rng.standard_normal((200, 5))
    ids = [np.flatnonzero(row).tolist() for row in true_BK]
    truths: list[Any] = {
        "shares": true_BK.astype(int).tolist(),
        "ids": ids,
        "names": [[f"class {id}" for id in row] for row in ids],
    }[form]
    if form == "ids":
        truths = [row if len(row) != 5 else ids[0] for row in truths]
    found = img2parquet.evaluate(logits_output(tmp_path, "multi_label_classification", truths, logits_BK), "truth")
    predicted_BK = logits_BK.astype(np.float32) >= 0
    assert (found.task, found.top1, found.top5, found.rows) == ("multi_label", None, None, 200)
    assert found.f1 == pytest.approx(metrics.f1_score(true_BK, predicted_BK, average="micro"))
    assert found.exact == pytest.approx(metrics.accuracy_score(true_BK, predicted_BK))
    recalls = metrics.recall_score(true_BK, predicted_BK, average=None)
    assert [score.recall for score in found.classes] == pytest.approx(list(recalls))
    assert found.calibration_error is not None and 0 < found.calibration_error < 1


def test_a_regression_is_evaluated_by_its_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truths, values_B1 = rng.standard_normal(100), rng.standard_normal((100, 1))
    found = img2parquet.evaluate(logits_output(tmp_path, "regression", truths.tolist(), values_B1), "truth")
    assert found.task == "regression" and found.top1 is None and not found.classes
    assert found.mean_absolute_error == pytest.approx(metrics.mean_absolute_error(truths, values_B1[:, 0]), 1e-5)
    assert found.root_mean_squared_error == pytest.approx(
        metrics.root_mean_squared_error(truths, values_B1[:, 0]), 1e-5
    )


def test_a_class_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    uri = logits_output(tmp_path, "multi_label_classification", [["class 0", "dog"]], np.zeros((1, 3)))
    with pytest.raises(img2parquet.InputError, match="`dog` is not a class of this model"):
        img2parquet.evaluate(uri, "truth")


def test_labels_of_earlier_versions_are_still_scored_by_a_softmax() -> None:
    from img2parquet.results.evaluation.scorers import ScoringTask

    config = {"problem_type": "multi_label_classification", "id2label": {"0": "a", "1": "b"}}
    identity = {"outputs": [{"kind": "labels"}], "config": config}
    assert [task.kind for task in ScoringTask.of("m", identity)] == ["labels"]
    assert [task.kind for task in ScoringTask.of("m", {**identity, "scores": "sigmoid"})] == ["multi_label"]
    assert score_function(config, 2) == "sigmoid" and torch.tensor(0.0).sigmoid() == 0.5


@pytest.mark.parametrize("names", [{"1": "a", "2": "b"}, {"a": "b", "c": "d"}])
def test_names_that_do_not_count_from_0_fail_only_outputs_with_names(names: dict[str, str], tmp_path: Path) -> None:
    save("vit", tmp_path, None, ["a", "b"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": names}))
    card = load_model(spec("vit", tmp_path), dtype="float32", device="cpu").card
    assert card.gives["logits"] == (2,)
    with pytest.raises(img2parquet.OutputUnavailable, match="does not count from 0"):
        Labels(**LABELS).wants(card)
