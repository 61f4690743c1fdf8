"""Everything that reads labels takes them as the checkpoint means them: shares, probabilities, or values."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn import metrics

import img2parquet
from img2parquet.cli import main
from img2parquet.errors import InputError
from img2parquet.outputs.labels import LABELS
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.label_scores import LabelScores, scores_of_output
from img2parquet.results.report import report
from tests.support.finished_outputs import make_output

N = 60
NAMES = ("cat", "outdoor", "night, dark", "people")
K = len(NAMES)
MULTI, REGRESSION = "multi_label_classification", "regression"
SCORES: dict[Any, str] = {MULTI: "sigmoid", REGRESSION: "none"}  # of the run identity; older ones have none


def outputs(top_k: int = K, threshold: float = 0.0) -> list[dict[str, Any]]:
    labels = {"kind": "labels", "name": "labels", "top_k": top_k, "threshold": threshold}
    return [labels, {"kind": "logits", "name": "logits"}]


def made(
    folder: Path, problem: str | None, truths: Any, top_k: int = K, threshold: float = 0.0, names: Any = NAMES
) -> tuple[str, np.ndarray, np.ndarray]:
    """Write an output as a run would; return it, its logits and its scores, both (N, K)."""
    logits_NK = np.random.default_rng(3).standard_normal((N, len(names))).astype(np.float32)
    scores_NK = 1 / (1 + np.exp(-logits_NK.astype(np.float64))) if problem == MULTI else logits_NK
    rows = [
        [
            {"id": int(k), "name": names[k], "score": float(scores[k])}
            for k in np.argsort(-scores)[:top_k]
            if not threshold or scores[k] >= threshold
        ]
        for scores in scores_NK
    ]
    raw = pa.FixedSizeListArray.from_arrays(pa.array(logits_NK.reshape(-1)), len(names))
    table = pa.table({"truth": truths, "labels": pa.array(rows, LABELS), "logits": raw})
    config = {"problem_type": problem, "id2label": {str(k): name for k, name in enumerate(names)}}
    identity = {
        "outputs": outputs(top_k, threshold), "config": config,
        **({"scores": SCORES[problem]} if problem in SCORES else {}), "input": {"keep": ["truth"]}, "family": "vit",
    }  # fmt: skip
    return make_output(str(folder / "out"), identity, [table]), logits_NK, scores_NK


@pytest.fixture
def truth_NK() -> np.ndarray:
    return np.random.default_rng(9).random((N, K)) < 0.4


FORMS = {
    "shares": lambda row: [float(x) for x in row],
    "flags": lambda row: [bool(x) for x in row],
    "names": lambda row: [NAMES[k] for k in np.flatnonzero(row)],
    "text": lambda row: json.dumps([int(x) for x in row]),
    "text of names": lambda row: json.dumps([NAMES[k] for k in np.flatnonzero(row)]),
}


@pytest.mark.parametrize("column", ["logits", "labels"])
@pytest.mark.parametrize("form", FORMS)
def test_several_labels_against_scikit_learn(tmp_path: Path, truth_NK: np.ndarray, form: str, column: str) -> None:
    uri, logits_NK, _ = made(tmp_path, MULTI, [FORMS[form](row) for row in truth_NK])
    found, said_NK = evaluate(uri, "truth", column=column), logits_NK >= 0
    assert (found.task, found.rows, found.top1, found.top5, found.truncated) == ("multi_label", N, None, None, 0)
    assert found.threshold == 0.5
    score_NK = 1 / (1 + np.exp(-logits_NK.astype(np.float64)))
    f1_of = {step / 100: metrics.f1_score(truth_NK, score_NK >= step / 100, average="micro") for step in range(101)}
    assert found.best_f1 == pytest.approx(max(f1_of.values())) == f1_of[found.best_threshold]
    assert found.exact == pytest.approx(metrics.accuracy_score(truth_NK, said_NK))
    assert found.f1 == pytest.approx(metrics.f1_score(truth_NK, said_NK, average="micro"))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth_NK, said_NK, average="macro"))
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(truth_NK, said_NK)
    for k, score in enumerate(found.classes):
        assert (score.name, score.rows, score.precision) == (NAMES[k], rows[k], pytest.approx(precision[k]))
        assert (score.recall, score.f1) == (pytest.approx(recall[k]), pytest.approx(f1[k]))
    assert sum(b.rows for b in found.calibration) == N * K and not found.confusion
    assert all(b.low < b.confidence <= b.high for b in found.calibration)


def test_a_jobs_threshold_decides_and_rows_that_may_lack_labels_are_counted(
    tmp_path: Path, truth_NK: np.ndarray
) -> None:
    truths = [FORMS["shares"](row) for row in truth_NK]
    uri, _, scores_NK = made(tmp_path / "low", MULTI, truths, threshold=0.3)
    found = evaluate(uri, "truth", column="labels")
    assert found.f1 == pytest.approx(metrics.f1_score(truth_NK, scores_NK >= 0.3, average="micro"))
    assert (found.truncated, found.threshold) == (0, 0.3)
    assert evaluate(uri, "truth", column="logits").f1 == found.f1  # its labels say from where a class is predicted
    uri, _, scores_NK = made(tmp_path / "few", MULTI, truths, top_k=2)
    assert evaluate(uri, "truth", column="labels").truncated == ((scores_NK >= 0.5).sum(1) >= 2).sum()


def test_one_logit_is_present_or_not(tmp_path: Path) -> None:
    truth_N = np.random.default_rng(9).random(N) < 0.5
    uri, logits_NK, _ = made(tmp_path, MULTI, truth_N.astype(int), names=("hot dog",))
    found = evaluate(uri, "truth")
    assert found.exact == pytest.approx(metrics.accuracy_score(truth_N, logits_NK[:, 0] >= 0))
    assert found.f1 == pytest.approx(metrics.f1_score(truth_N, logits_NK[:, 0] >= 0))


@pytest.mark.parametrize(("truth", "present"), [(3, {3}), ("2", {2}), ("night, dark", {2}), ([], set())])
def test_ids_and_single_names_are_labels_too(tmp_path: Path, truth: Any, present: set[int]) -> None:
    uri, _, _ = made(tmp_path, MULTI, pa.array([truth] * N, pa.list_(pa.float64()) if truth == [] else None))
    assert {score.id for score in evaluate(uri, "truth").classes if score.rows} == present


@pytest.mark.parametrize("truth", [["rabbit"], [0, 9], "rabbit", [0.3, 0.7]])
def test_a_truth_that_is_no_class_is_refused(tmp_path: Path, truth: Any) -> None:
    uri, _, _ = made(tmp_path, MULTI, [truth] * N)
    with pytest.raises(InputError, match="`truth` of `0/0`"):
        evaluate(uri, "truth")


@pytest.mark.parametrize("column", ["logits", "labels"])
@pytest.mark.parametrize("names", [("beauty",), NAMES])
def test_values_against_scikit_learn(tmp_path: Path, names: tuple[str, ...], column: str) -> None:
    truth_NK = np.random.default_rng(4).standard_normal((N, len(names)))
    truths = [str(row[0]) if len(names) == 1 else row.tolist() for row in truth_NK]  # a kept column is text
    uri, values_NK, _ = made(tmp_path, REGRESSION, truths, names=names)
    found = evaluate(uri, "truth", column=column)
    true, said = truth_NK.reshape(-1), values_NK.reshape(-1)
    assert found.mean_absolute_error == pytest.approx(metrics.mean_absolute_error(true, said), rel=1e-6)
    assert found.root_mean_squared_error == pytest.approx(metrics.root_mean_squared_error(true, said), rel=1e-6)
    assert found.r2 == pytest.approx(metrics.r2_score(truth_NK, values_NK), rel=1e-6)
    assert (found.task, found.rows, found.top1, found.calibration_error, found.classes) == (
        "regression", N, None, None, (),
    )  # fmt: skip


def test_values_that_were_not_written_are_not_guessed(tmp_path: Path) -> None:
    uri, _, _ = made(tmp_path, REGRESSION, [[0.0] * K] * N, top_k=2)
    with pytest.raises(InputError, match="only 2 of the model's 4 values") as caught:
        evaluate(uri, "truth", column="labels")
    assert "logits" in caught.value.hint


@pytest.mark.parametrize("problem", [MULTI, REGRESSION])
def test_the_command_prints_them(tmp_path: Path, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri, _, _ = made(tmp_path, problem, [[1.0, 0.0, 0.0, 1.0]] * N)
    assert main(["evaluate", uri, "--truth", "truth"]) == 0
    said = capsys.readouterr().out
    assert ("the highest F1 is" in said) == (problem == MULTI)
    assert ("macro f1" in said, "mean absolute error" in said) == (problem == MULTI, problem == REGRESSION)
    assert "top1" not in said


def test_ids_that_are_not_those_of_the_logits_name_nothing(tmp_path: Path) -> None:
    """Sorted, they would give every class the name of another one."""
    logits = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(3, dtype=np.float32).reshape(-1)), 3)
    config = {"id2label": {"1": "cat", "2": "dog", "3": "cow"}}
    identity = {"outputs": [{"kind": "logits", "name": "logits"}], "config": config, "input": {"keep": ["truth"]}}
    uri = make_output(str(tmp_path / "out"), identity, [pa.table({"truth": [0, 1, 2], "logits": logits})])
    found = evaluate(uri, "truth")
    assert found.top1 == 1 and [score.name for score in found.classes] == ["0", "1", "2"]
    report(uri, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "LABEL_0" in page and ">cat<" not in page


# --- pages and exports ---


@pytest.mark.parametrize("column", ["labels", "logits"])
def test_the_report_shows_each_label_with_its_own_probability(
    tmp_path: Path, truth_NK: np.ndarray, column: str
) -> None:
    uri, _, scores_NK = made(tmp_path, MULTI, [json.dumps(FORMS["names"](row)) for row in truth_NK])
    if column == "logits":
        drop_labels(Path(uri))
    report(uri, str(tmp_path / "page.html"), truth="truth")
    page = (tmp_path / "page.html").read_text()
    for k in range(K):
        assert f"{(scores_NK[:, k] >= 0.5).sum()} rows" in page
    assert "F1 over labels" in page and "<dt>macro f1</dt>" in page and "a score of at least 0.5" in page
    assert "Confidently wrong" not in page


def drop_labels(out: Path) -> None:
    import pyarrow.parquet as pq

    for path in out.glob("model=*/*.parquet"):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.drop_columns(["labels"]), path)


def test_the_report_shows_values_as_they_are(tmp_path: Path) -> None:
    uri, values_NK, _ = made(tmp_path, REGRESSION, ["1.5"] * N, names=("beauty",))
    report(uri, str(tmp_path / "page.html"), truth="truth")
    page = (tmp_path / "page.html").read_text()
    assert f"from {values_NK.min():.4g} to {values_NK.max():.4g}" in page
    assert "mean absolute error" in page and "Highest values" in page and "Confidence" not in page
    assert f'<span class="score">{values_NK.max():.4g}</span>' in page


def exported(uri: str, to: str, place: Path, *names: str) -> Any:
    img2parquet.export(uri, to, str(place), columns=("labels",))
    texts = [(place / name).read_text() for name in names] or [place.read_text()]
    return texts if len(texts) > 1 else texts[0]


def chosen(scores_NK: np.ndarray, limit: float = 0.5) -> list[set[str]]:
    return [{NAMES[k] for k in np.flatnonzero(row >= limit)} for row in scores_NK]


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_label_studio_takes_every_probable_label(tmp_path: Path, threshold: float) -> None:
    uri, _, scores_NK = made(tmp_path, MULTI, [0] * N, threshold=threshold)
    tasks, config = exported(uri, "label-studio", tmp_path / "l", "tasks-0000.json", "label_config.xml")
    (choices,) = ET.fromstring(config).iter("Choices")
    assert choices.get("choice") == "multiple" and {c.get("value") for c in choices} == set(NAMES)
    results = [task["predictions"][0]["result"] for task in json.loads(tasks)]
    found = [set(result[0]["value"]["choices"]) if result else set() for result in results]
    assert found == chosen(scores_NK, threshold or 0.5) and any(len(names) > 1 for names in found) and set() in found


def test_label_studio_takes_values_as_numbers(tmp_path: Path) -> None:
    uri, values_NK, _ = made(tmp_path, REGRESSION, [0] * N)
    tasks, config = exported(uri, "label-studio", tmp_path / "l", "tasks-0000.json", "label_config.xml")
    names = [tag.get("name") for tag in ET.fromstring(config).iter("Number")]
    assert names == [f"value-{k}" for k in range(K)] and not list(ET.fromstring(config).iter("Choices"))
    for task, values_K in zip(json.loads(tasks), values_NK, strict=True):
        result = task["predictions"][0]["result"]
        assert {one["from_name"]: one["value"]["number"] for one in result} == {
            f"value-{k}": pytest.approx(values_K[k]) for k in range(K)
        }
        assert {one["type"] for one in result} == {"number"}


def test_cvat_tags_every_probable_label(tmp_path: Path) -> None:
    uri, _, scores_NK = made(tmp_path, MULTI, [0] * N)
    root = ET.fromstring(exported(uri, "cvat", tmp_path / "a.xml"))
    assert [{tag.get("label") for tag in image.findall("tag")} for image in root.findall("image")] == chosen(scores_NK)
    assert {label.findtext("name") for label in root.iter("label")} == set(NAMES)


def test_cvat_keeps_values_as_attributes(tmp_path: Path) -> None:
    uri, values_NK, _ = made(tmp_path, REGRESSION, [0] * N)
    root = ET.fromstring(exported(uri, "cvat", tmp_path / "a.xml"))
    for image, values_K in zip(root.findall("image"), values_NK, strict=True):
        found = {tag.get("label"): float(tag.findtext("attribute[@name='value']", "")) for tag in image.findall("tag")}
        assert found == {name: pytest.approx(value) for name, value in zip(NAMES, values_K, strict=True)}
    assert {label.findtext("attributes/attribute/name") for label in root.iter("label")} == {"value"}


def test_fiftyone_takes_every_probable_label_and_values_as_regressions(tmp_path: Path) -> None:
    uri, _, scores_NK = made(tmp_path / "m", MULTI, [0] * N)
    samples = json.loads(exported(uri, "fiftyone", tmp_path / "f", "samples.json"))["samples"]
    found = [{one["label"] for one in sample["labels"]["classifications"]} for sample in samples]
    assert found == chosen(scores_NK)
    assert [sample["label"] is None for sample in samples] == [not names for names in found]
    uri, values_NK, _ = made(tmp_path / "r", REGRESSION, [0] * N)
    samples, fields = exported(uri, "fiftyone", tmp_path / "g", "samples.json", "metadata.json")
    for sample, values_K in zip(json.loads(samples)["samples"], values_NK, strict=True):
        assert [sample[f"value_{k}"]["value"] for k in range(K)] == pytest.approx(values_K.tolist())
    fields = json.loads(fields)
    assert all(fields["sample_fields"][f"value_{k}"].endswith(".Regression)") for k in range(K))
    assert "label" not in fields["sample_fields"] and fields["info"]["values"]["value_0"] == NAMES[0]


def test_outputs_of_earlier_versions_are_read_as_they_were_stored() -> None:
    """Their multi-label scores are a softmax, and their logits are what they are now."""
    config = {"problem_type": MULTI, "id2label": dict(enumerate(NAMES))}
    assert scores_of_output({"kind": "labels", "top_k": 5}, {"config": config}) == LabelScores(most=5)
    assert scores_of_output({"kind": "logits"}, {"config": config}).function == "sigmoid"
    assert scores_of_output({"kind": "logits"}, {"config": {"num_classes": 1}}).function == "sigmoid"
