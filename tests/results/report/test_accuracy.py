"""What is right in a sample: as `evaluate` says of the same rows, and what it leaves out is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from img2parquet.errors import InputError
from img2parquet.outputs.labels import LABELS
from img2parquet.outputs.segmentation import png
from img2parquet.outputs.visual_tokens import PATCHES
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.evaluation.scorers import ScoringTask
from img2parquet.results.report import report
from img2parquet.results.report.accuracy import foreign_labels, guess_truth, score_sample
from img2parquet.results.report.row_sample import read_samples
from img2parquet.results.report.run_summary import read_run_summary
from img2parquet.results.report.sections import ModelSection, show
from tests.support.finished_outputs import make_output

NAMES = ("ant", "bee", "cat")
TASK = ScoringTask("m", "labels", "labels", 0, NAMES, 255, False)


def labels(*ids: int, score: float = 0.9) -> list[dict[str, Any]]:
    return [{"id": id, "name": NAMES[id], "score": score / (i + 1)} for i, id in enumerate(ids)]


def table(rows: list[list[dict[str, Any]]], truths: pa.Array) -> pa.Table:
    keys = [f"k{i}" for i in range(len(rows))]
    return pa.table({"key": keys, "labels": pa.array(rows, LABELS), "truth": truths})


def sections(uri: str, truth: str | None = None) -> list[ModelSection]:
    summary = read_run_summary(uri, {})
    return show(summary, read_samples(summary, 100, truth), truth).sections


def test_which_rows_are_wrong_and_which_are_left_out() -> None:
    rows = [labels(0, 1), labels(1, 0), labels(0, 1), labels(2), []]
    found = score_sample(table(rows, pa.array(["ant", "ant", "dog", None, "cat"])), TASK, "truth")
    assert (found.found.rows, found.found.rows_without_truth, found.not_understood) == (3, 1, 1)
    assert found.found.top1 == pytest.approx(1 / 3) and found.wrong == {1, 4}
    assert found.names == ["ant", "bee", "cat", "no class"]
    assert found.confusion.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert [score.name for score in found.classes] == ["ant", "cat"]


@pytest.mark.parametrize("truth", [[0, 1, 1], ["0", "1", "1"], ["ant", "bee", "bee"]])
def test_truth_may_be_ids_or_names(truth: list[Any]) -> None:
    found = score_sample(table([labels(0), labels(1), labels(0)], pa.array(truth)), TASK, "truth")
    assert found.found.top1 == pytest.approx(2 / 3) and found.wrong == {2}


def test_no_truth_at_all() -> None:
    with pytest.raises(InputError, match="no sampled row"):
        score_sample(table([labels(0)], pa.array([None], pa.string())), TASK, "truth")
    with pytest.raises(InputError, match="`dog` is not a class"):
        score_sample(table([labels(0)], pa.array(["dog"])), TASK, "truth")


def test_many_classes_are_gathered_and_none_is_lost() -> None:
    names = tuple(f"class {i}" for i in range(26))
    rows = [[{"id": i, "name": names[i], "score": 0.5}] for i in range(26)]
    found = score_sample(
        table(rows, pa.array(range(25, -1, -1))), ScoringTask("m", "labels", "labels", 0, names, 255, False), "truth"
    )
    assert found.names[-1] == "others" and found.confusion.sum() == 26 and len(found.names) == 17


@pytest.mark.parametrize("ids", [True, False])
def test_labels_of_a_foreign_folder(ids: bool) -> None:
    """By their own ids; where these are missing, by the names, of which the truth then is one."""
    rows = [labels(2), labels(0)]
    for row in rows:
        row[0]["id"] = row[0]["id"] if ids else None
    whole = pa.table({"key": ["a", "b"], "truth": pa.array([2, 1] if ids else ["cat", "cat"])})
    said, task = foreign_labels(whole, "m", rows)
    assert task.names == (("ant", "class 1", "cat") if ids else ("ant", "cat"))
    assert score_sample(said, task, "truth").wrong == {1}


def test_truth_is_guessed_from_names_only() -> None:
    names = {"cat", "dog"}
    assert guess_truth([("id", [0, 1]), ("text", ["a cat", "dog"]), ("label", ["cat", "dog"])], names) == "label"
    assert guess_truth([("label", ["cat", None, None, None])], names) is None
    assert guess_truth([], names) is None


def labelled(uri: str) -> str:
    rng = np.random.default_rng(3)
    rows = [labels(*rng.permutation(3).tolist(), score=float(rng.random())) for _ in range(40)]
    identity = {"outputs": [{"kind": "labels", "name": "labels"}], "config": {"id2label": dict(enumerate(NAMES))}}
    truth = pa.array([NAMES[i] for i in rng.integers(0, 3, 40)])
    return make_output(uri, identity, [pa.table({"truth": truth, "labels": pa.array(rows, LABELS)})])


def test_a_page_of_all_rows_says_what_evaluate_says(tmp_path: Path) -> None:
    uri = labelled(str(tmp_path / "out"))
    (section,) = sections(uri)
    expected = evaluate(uri, "truth")
    found = section.judged["labels"].found
    assert found.headline == expected.headline and found.classes == expected.classes
    assert found.confusion == expected.confusion and found.calibration == expected.calibration
    page = report(uri, tmp_path / "r.html")[0].read_text()
    for number in (expected.top1, expected.mean_accuracy, expected.calibration_error):
        assert f"{100 * (number or 0):.1f} %" in page
    part = report(uri, tmp_path / "r.html", sample=20)[0].read_text()
    assert "Over the sample." in part and "scores all rows" in part


def test_masks_are_scored_by_the_column_that_the_job_names(tmp_path: Path) -> None:
    """A smaller mask is scaled to the size of its ground truth, as `evaluate` does."""
    ids_HW = np.arange(12).reshape(3, 4) % 3
    said = [png(ids_HW, 3), png(ids_HW, 3), b"no mask"]
    large = png(ids_HW.repeat(2, 0).repeat(2, 1), 3)
    rows = pa.table({"mask": pa.array(said, pa.binary()), "scene": pa.array([png(1 - ids_HW % 2, 3), large, large])})
    identity = {
        "outputs": [{"kind": "segmentation", "name": "mask"}, {"kind": "loss", "name": "loss", "truth": "scene"}],
        "config": {"id2label": dict(enumerate(NAMES))},
    }
    (section,) = sections(make_output(str(tmp_path / "out"), identity, [rows]))
    found = section.judged["mask"]
    assert (found.found.rows, found.found.resized, found.not_understood) == (2, 1, 1)
    right = int((ids_HW == 1 - ids_HW % 2).sum()) + 4 * 12
    assert found.found.pixel_accuracy == pytest.approx(right / (12 + 48))


def test_masked_patches_are_scored(tmp_path: Path) -> None:
    patches = [[{"patch": p, "codes": [p, 7, 8, 9, 10], "scores": [0.5, 0.2, 0.1, 0.1, 0.1]} for p in (1, 3)]] * 2
    rows = pa.table({"tokens": pa.array(patches, PATCHES), "codes": [[0, 1, 2, 7], [0, 5, 2, 3]]})
    identity = {"outputs": [{"kind": "visual_tokens", "name": "tokens"}], "config": {}}
    uri = make_output(str(tmp_path / "out"), identity, [rows])
    (section,) = sections(uri, "codes")
    found = section.judged["visual_tokens"].found
    assert (found.top1, found.top5, found.counted) == (0.5, 0.75, 4) and found.headline == evaluate(
        uri, "codes"
    ).headline
    page = report(uri, tmp_path / "r.html", truth="codes")[0].read_text()
    assert "Masked patches against <code>codes</code>" in page and "75.0 %" in page


def test_a_truth_that_judges_nothing_is_a_note(tmp_path: Path) -> None:
    uri = labelled(str(tmp_path / "out"))
    summary = read_run_summary(uri, {})
    show(summary, read_samples(summary, 100, "key"), "key")
    assert any("labels of tiny is not scored" in note for note in summary.notes)
