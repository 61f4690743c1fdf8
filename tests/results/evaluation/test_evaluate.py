"""Evaluation against scikit-learn's metrics, on tables made for it; every kind of truth and of mistake in it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn import metrics

from img2parquet.cli import main
from img2parquet.engine.driver import run
from img2parquet.errors import InputError
from img2parquet.job import parse_job
from img2parquet.outputs.labels import LABELS
from img2parquet.outputs.segmentation import RLE, coco_runs, png
from img2parquet.outputs.visual_tokens import PATCHES
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.evaluation.scorers import read_mask
from tests.support.finished_outputs import make_output, small_run
from tests.support.small_job import job_dict

K = 7
NAMES = {str(k): f"class {k}" for k in range(K)}


def identity(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"outputs": [{"kind": kind, "name": name}], "config": {"id2label": NAMES}, **more}


def labelled(tmp_path: Path, truths: pa.Array, logits: np.ndarray, k: int = 5) -> str:
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)[:, :k]
    rows = [
        [{"id": int(i), "name": NAMES[str(i)], "score": float(shares[row, i])} for i in order[row]]
        for row in range(len(logits))
    ]
    half = len(rows) // 2
    tables = [
        pa.table({"truth": truths[part], "labels": pa.array(rows[part], LABELS)})
        for part in (slice(0, half), slice(half, len(rows)))
    ]
    return make_output(str(tmp_path / "out"), identity("labels", "labels"), tables)


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    truth = rng.integers(0, K - 1, 400)  # a class that is never true, but said
    return truth, rng.standard_normal((400, K)) + 2.0 * np.eye(K)[truth]


def reference_calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    place = np.minimum((confidence * bins - 1e-12).astype(int), bins - 1)
    weight = [(place == b).mean() for b in range(bins)]
    gap = [
        abs(confidence[place == b].mean() - right[place == b].mean()) if (place == b).any() else 0 for b in range(bins)
    ]
    return float(np.dot(weight, gap))


@pytest.mark.parametrize("form", ["id", "text", "name"])
def test_labels_against_scikit_learn(tmp_path: Path, scores: tuple[np.ndarray, np.ndarray], form: str) -> None:
    truth, logits = scores
    said = logits.argmax(1)
    written = {"id": truth.tolist(), "text": list(map(str, truth)), "name": [NAMES[str(t)] for t in truth]}[form]
    found = evaluate(labelled(tmp_path, pa.array(written), logits), "truth")
    assert found.top1 == pytest.approx(metrics.accuracy_score(truth, said))
    assert found.top5 == pytest.approx(metrics.top_k_accuracy_score(truth, logits, k=5, labels=range(K)))
    matrix = metrics.confusion_matrix(truth, said, labels=range(K))
    assert dict(found.confusion) == {(t, p): matrix[t, p] for t in range(K) for p in range(K) if matrix[t, p]}
    expected = metrics.precision_recall_fscore_support(truth, said, labels=range(K), zero_division=0)
    for k, score in enumerate(found.classes):
        assert (score.id, score.name, score.rows) == (k, NAMES[str(k)], expected[3][k])
        assert (score.precision or 0) == pytest.approx(expected[0][k])
        assert (score.recall or 0) == pytest.approx(expected[1][k])
        assert (score.f1 or 0) == pytest.approx(expected[2][k])
    assert found.classes[K - 1].recall is None  # never true: nothing to divide by
    assert found.mean_accuracy == pytest.approx(metrics.balanced_accuracy_score(truth, said))
    confidence = np.exp(logits).max(1) / np.exp(logits).sum(1)
    assert found.calibration_error == pytest.approx(reference_calibration(confidence, said == truth), abs=1e-6)
    assert sum(bin.rows for bin in found.calibration) == 400


def test_logits_are_preferred_and_give_the_same(tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]) -> None:
    truth, logits = scores
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.astype(np.float32).reshape(-1)), K)
    both = identity("labels", "labels")
    both["outputs"].append({"kind": "logits", "name": "raw"})
    table = pa.table({"truth": truth, "raw": column, "labels": pa.array([[]] * 400, LABELS)})
    found = evaluate(make_output(str(tmp_path / "out"), both, [table]), "truth")
    assert found.column == "raw"
    assert found.top5 == pytest.approx(metrics.top_k_accuracy_score(truth, logits, k=5, labels=range(K)))
    confidence = np.exp(logits).max(1) / np.exp(logits).sum(1)
    assert found.calibration_error == pytest.approx(
        reference_calibration(confidence, logits.argmax(1) == truth), abs=1e-5
    )
    empty = evaluate(str(tmp_path / "out"), "truth", column="labels")  # every class was below a threshold
    assert empty.top1 == 0 and empty.top5 is None and {p for _, p in empty.confusion} == {-1}


def test_fewer_than_five_classes_are_no_top5(tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]) -> None:
    found = evaluate(labelled(tmp_path, pa.array(scores[0]), scores[1], k=2), "truth")
    assert found.top5 is None and found.top1 is not None


def test_rows_without_a_truth_are_left_out(tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]) -> None:
    truth, logits = scores
    some = [int(t) if i % 3 else None for i, t in enumerate(truth)]
    some[1] = -100  # ignored, as in a loss
    found = evaluate(labelled(tmp_path, pa.array(some), logits), "truth")
    there = [i for i in range(400) if i % 3 and i != 1]
    assert found.top1 == pytest.approx((logits.argmax(1) == truth)[there].mean())
    assert (found.rows, found.rows_without_truth, found.counted) == (266, 134, 265)


@pytest.mark.parametrize("encoding", ["png", "rle"])
@pytest.mark.parametrize("reduces", [False, True])
def test_masks_against_scikit_learn(tmp_path: Path, encoding: str, reduces: bool) -> None:
    rng = np.random.default_rng(8)
    truths, saids = [], []
    for height, width in ((20, 31), (9, 8), (33, 17)):
        true = rng.integers(0, K - 1, (height, width))
        said = np.where(rng.random(true.shape) < 0.6, true, rng.integers(0, K, true.shape))
        true[0, :3] = 255
        truths.append(true)
        saids.append(said)
    raised = [np.where(true == 255, 0, true + 1) if reduces else true for true in truths]
    column = [png(said, K) for said in saids] if encoding == "png" else [coco_runs(said) for said in saids]
    table = pa.table(
        {
            "truth": [png(true, K) for true in raised],
            "mask": pa.array(column, pa.binary() if encoding == "png" else RLE),
        }
    )
    about = identity("segmentation", "mask", **({"reduces_labels": True} if reduces else {}))
    found = evaluate(make_output(str(tmp_path / "out"), about, [table.slice(0, 2), table.slice(2)]), "truth")
    flat_true, flat_said = (np.concatenate([a.reshape(-1) for a in arrays]) for arrays in (truths, saids))
    counts = flat_true != 255
    flat_true, flat_said = flat_true[counts], flat_said[counts]
    assert found.pixel_accuracy == pytest.approx(metrics.accuracy_score(flat_true, flat_said))
    assert found.mean_iou == pytest.approx(metrics.jaccard_score(flat_true, flat_said, average="macro"))
    by_class = metrics.jaccard_score(flat_true, flat_said, average=None, labels=range(K))
    np.testing.assert_allclose([score.iou for score in found.classes], by_class)
    assert (found.counted, found.resized, found.top1) == (int(counts.sum()), 0, None)


def test_a_mask_of_the_models_size_is_made_as_large_as_its_truth(tmp_path: Path) -> None:
    small = np.arange(6).reshape(2, 3)
    large = np.kron(small, np.ones((4, 5), int))
    table = pa.table({"truth": [png(large, K)], "mask": [png(small, K)]})
    found = evaluate(make_output(str(tmp_path / "out"), identity("segmentation", "mask"), [table]), "truth")
    assert (found.resized, found.pixel_accuracy, found.mean_iou) == (1, 1.0, 1.0)


def test_run_lengths_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (7, 300), (200, 3), (64, 64)):
        ids = (
            rng.integers(0, 3, shape)
            if shape != (64, 64)
            else np.kron(rng.integers(0, 4, (4, 4)), np.ones((16, 16), int))
        )
        np.testing.assert_array_equal(read_mask(coco_runs(ids)), ids)
        np.testing.assert_array_equal(read_mask(png(ids, 300)), ids)


@pytest.mark.parametrize("whole", [True, False])
def test_visual_tokens(tmp_path: Path, whole: bool) -> None:
    rng = np.random.default_rng(3)
    rows, truths, right, near = [], [], [], []
    for _ in range(30):
        places = np.sort(rng.choice(16, 6, replace=False))
        codes_N = rng.integers(0, 8, 16)
        best = [rng.permutation(8)[:5].tolist() for _ in places]
        rows.append(
            [
                {"patch": int(p), "codes": b, "scores": [0.5, 0.2, 0.1, 0.1, 0.1]}
                for p, b in zip(places, best, strict=True)
            ]
        )
        codes_N[places[0]] = -100
        truths.append((codes_N if whole else codes_N[places]).tolist())
        right += [codes_N[p] == b[0] for p, b in zip(places[1:], best[1:], strict=True)]
        near += [codes_N[p] in b for p, b in zip(places[1:], best[1:], strict=True)]
    table = pa.table({"truth": truths, "visual_tokens": pa.array(rows, PATCHES)})
    found = evaluate(make_output(str(tmp_path / "out"), identity("visual_tokens", "visual_tokens"), [table]), "truth")
    assert found.top1 == pytest.approx(np.mean(right)) and found.top5 == pytest.approx(np.mean(near))
    assert found.counted == 150 and not found.classes
    assert found.calibration_error == pytest.approx(abs(0.5 - np.mean(right)))


def test_what_cannot_be_judged_is_told(tmp_path: Path, scores: tuple[np.ndarray, np.ndarray]) -> None:
    truth, logits = scores
    uri = labelled(tmp_path, pa.array([*map(str, truth[:-1]), "class 77"]), logits)
    with pytest.raises(InputError, match="`1/199`: `class 77` is not a class of this model"):
        evaluate(uri, "truth")
    with pytest.raises(InputError, match="no column `thruth`") as error:
        evaluate(uri, "thruth")
    assert "did you mean `truth`" in str(error.value)
    with pytest.raises(InputError, match="no model `x`"):
        evaluate(uri, "truth", "x")
    with pytest.raises(InputError, match="no output `mask`"):
        evaluate(uri, "truth", column="mask")
    with pytest.raises(InputError, match="not an output of img2parquet"):
        evaluate(str(tmp_path / "none"), "truth")
    table = pa.table({"truth": pa.nulls(3, pa.int64()), "labels": pa.array([[]] * 3, LABELS)})
    empty = make_output(str(tmp_path / "empty"), identity("labels", "labels"), [table])
    with pytest.raises(InputError, match="no row of model `tiny` has a value in `truth`"):
        evaluate(empty, "truth")
    sink = io.BytesIO()
    Image.new("RGB", (3, 3)).save(sink, "PNG")
    table = pa.table({"truth": [sink.getvalue()], "mask": [png(np.zeros((3, 3), int), K)]})
    with pytest.raises(InputError, match="holds colours"):
        evaluate(make_output(str(tmp_path / "colours"), identity("segmentation", "mask"), [table]), "truth")


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = str(small_run())
    assert main(["evaluate", out, "--truth", "label"]) == 0
    said = capsys.readouterr().out
    assert "top1" in said and "class 3" in said and "mistaken" in said
    assert main(["evaluate", out, "--truth", "label", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == evaluate(out, "label").top1 and sum(p["count"] for p in found["confusion"]) == found["rows"]
    assert main(["evaluate", out, "--truth", "nope"]) == 2


def test_a_run_that_names_a_truth_ends_with_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from img2parquet.cli.output import print_summary

    folder = small_run().parent
    job = job_dict(str(folder / "in" / "00[01].tar"), folder / "model", str(tmp_path / "out"))
    job["models"][0]["outputs"].append({"kind": "loss", "truth": "label"})
    summary = run(parse_job(job), "local")
    found = evaluate(str(tmp_path / "out"), "label")
    assert summary.scores["tiny.logits"] == found.headline and "tiny.labels" in summary.scores
    assert run(parse_job(job), "local").scores == summary.scores  # from the record
    print_summary(summary)
    assert f"scores     tiny.logits top1 {found.top1:.4f}" in capsys.readouterr().out


def test_classes_of_one_name_are_scored_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truths are ids, or the names that the scores and the exports show."""
    names = ["crane", "crane", "a bird with quite a long name", "a bird with quite a long name"]
    rows = [[{"id": k, "name": names[k], "score": 0.9}] for k in (0, 1, 1, 2, 3)]
    about = {
        "outputs": [{"kind": "labels", "name": "labels"}],
        "config": {"id2label": {str(k): name for k, name in enumerate(names)}},
    }
    shown = ["crane (0)", "crane (0)", "crane (1)", f"{names[2]} (2)", f"{names[3]} (3)"]
    table = pa.table({"labels": pa.array(rows, LABELS), "ids": [0, 0, 1, 2, 3], "names": shown, "same": ["crane"] * 5})
    out = make_output(str(tmp_path / "out"), about, [table])
    for truth in ("ids", "names"):
        found = evaluate(out, truth)
        assert [(score.name, score.rows, score.correct) for score in found.classes] == [
            ("crane (0)", 2, 1), ("crane (1)", 1, 1), (shown[3], 1, 1), (shown[4], 1, 1),
        ]  # fmt: skip
    assert main(["evaluate", out, "--truth", "ids"]) == 0
    said = capsys.readouterr().out
    assert "mistaken   crane (0) for crane (1): 1" in said
    lines = [line.split("  ")[0] for line in said.splitlines() if line.startswith("a bird")]
    assert len(set(lines)) == 2
    with pytest.raises(InputError, match=r"`crane` is the name of several classes: 0, 1(.|\n)*write `crane \(0\)`"):
        evaluate(out, "same")
