"""A label file with several labels for each row gives a classifier of independent classes, read as such everywhere."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import img2parquet
from img2parquet.cli import main
from img2parquet.errors import InputError
from img2parquet.results.probe.label_file import read_labels
from img2parquet.results.probe.multi_label import _fitted, balanced_folds, calibration_error, fit_multi_label, log_loss
from img2parquet.results.verify import verify
from tests.support.finished_outputs import copy_of, part_paths, rows_of, small_run

PROBED = "tiny+probe"
NAMES = ["bright", "left", "rare"]


def points(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors, and which of three overlapping half spaces each is in, with some noise."""
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((rows, 8))
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    planes_DK = np.random.default_rng(99).standard_normal((8, 3))
    return x_ND, x_ND @ planes_DK + 0.3 * rng.standard_normal((rows, 3)) > [0.0, 0.2, 1.2]


def test_the_linear_one_is_scikit_learns() -> None:
    (x, y), (other, _) = points(80), points(40, 1)
    ours = _fitted(("linear", 0.1), x, y).probabilities(other)
    model = OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=2000))
    np.testing.assert_allclose(ours, make_pipeline(StandardScaler(), model).fit(x, y).predict_proba(other), atol=1e-9)


def test_the_neighbours_are_scikit_learns() -> None:
    (x, y), (other, _) = points(80), points(40, 1)
    weigh = {"weights": lambda distances: np.exp(-distances / 0.07), "metric": "cosine"}
    shares = [KNeighborsClassifier(5, **weigh).fit(x, y[:, k]).predict_proba(other)[:, 1] for k in range(3)]
    np.testing.assert_allclose(_fitted(("knn", 5.0), x, y).probabilities(other), np.stack(shares, 1), atol=2e-3)


def test_what_it_reports_is_what_it_does_on_rows_it_never_saw() -> None:
    (x, y), (fresh, truth) = points(300), points(4000, 7)
    classifier, report = fit_multi_label(x, y, NAMES)
    assert report.judged_by == "held_out" and report.per_class == dict(zip(NAMES, y.sum(0).tolist(), strict=True))
    said = classifier.probabilities(fresh)
    assert report.accuracy == pytest.approx(((said >= 0.5) == truth).mean(), abs=0.06)
    assert report.f1 == pytest.approx(metrics.f1_score(truth, said >= 0.5, average="micro"), abs=0.1)
    assert report.accuracy > report.majority + 0.05
    assert calibration_error(said, truth) < 0.06
    assert log_loss(said, truth) == pytest.approx(
        np.mean([metrics.log_loss(truth[:, k], said[:, k]) for k in range(3)]), rel=1e-6
    )


def test_folds_have_every_class_and_a_constant_one_is_learnt_as_such() -> None:
    y = points(60)[1]
    y[:, 2] = np.arange(60) < 5
    fold_N = balanced_folds(y, 5, 0)
    counts = np.array([[(y[fold_N == fold, k]).sum() for k in range(3)] for fold in range(5)])
    assert (counts[:, 2] == 1).all() and np.ptp(counts, axis=0).max() <= 2
    assert np.ptp(np.bincount(fold_N)) <= 3
    y[:, 2] = True
    classifier, _ = fit_multi_label(points(60)[0], y, NAMES)
    assert (classifier.probabilities(points(10, 3)[0])[:, 2] > 0.9).all()


@pytest.fixture
def out(tmp_path: Path) -> str:
    return copy_of(small_run(), tmp_path / "out")


def truths(uri: str) -> dict[str, list[str]]:
    """Label each row by the halves of two directions of its embedding, so that some have both labels, some none."""
    rows = rows_of(uri)
    values = np.array([row["embedding"] for row in rows], np.float64)
    along_N2 = np.linalg.svd(values - values.mean(0), full_matrices=False)[0][:, :2]
    high_N2 = along_N2 > np.median(along_N2, axis=0)
    return {
        row["key"]: [n for n, there in zip(NAMES, high, strict=False) if there]
        for row, high in zip(rows, high_N2, strict=True)
    }


def write(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("key", "labels")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.mark.parametrize("form", ["|".join, json.dumps])
def test_every_reader_takes_the_probes_labels_as_independent(out: str, form: Any, tmp_path: Path) -> None:
    known = truths(out)
    file = write(tmp_path / "labels.csv", [(key, form(names)) for key, names in list(known.items())[::2]])
    made = img2parquet.fit_probe(out, file)
    assert made.report["f1"] > 0.8 and made.rows == len(known)
    rows = rows_of(out, PROBED)
    said = {row["key"]: {x["name"] for x in row["labels"] if x["score"] >= 0.5} for row in rows}
    assert np.mean([said[key] == set(names) for key, names in known.items()]) > 0.75
    assert {len(names) for names in said.values()} == {0, 1, 2}
    for row in rows:
        assert len(row["labels"]) == 2 and row["confidence"] == row["labels"][0]["score"] >= row["labels"][1]["score"]
    assert pq.read_schema(part_paths(out, PROBED)[0]).field("labels").metadata[b"scores"] == b"sigmoid"
    assert verify(out) == [] and img2parquet.fit_probe(out, file).parts_now == 0
    img2parquet.export(out, "cvat", str(tmp_path / "tags.xml"), model=PROBED)
    images = ElementTree.parse(tmp_path / "tags.xml").iter("image")
    assert [{tag.get("label") for tag in image.iter("tag")} for image in images] == [said[row["key"]] for row in rows]


def test_the_command_and_the_report_say_how_good_it_is(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "labels.csv", [(key, "|".join(names)) for key, names in truths(out).items()])
    assert main(["probe", out, "--labels", file]) == 0
    said = capsys.readouterr().out
    assert "F1         " in said and "each class's more frequent answer" in said
    [page] = img2parquet.report(out, str(tmp_path / "report.html"))
    assert "<dt>F1</dt>" in page.read_text()


def test_the_digest_and_the_classes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [(f"k{i}", names) for i, names in enumerate(["a|b", "a", "", "b|a", "a|b", "b", "b"])]
    file = read_labels(write(tmp_path / "a.csv", rows))
    turned = [(key, "|".join(reversed(names.split("|")))) for key, names in reversed(rows)]
    assert file.classes == ("a", "b") and file.sha256 == read_labels(write(tmp_path / "b.csv", turned)).sha256
    assert file.rows[2].labels == ()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([("k0", "a"), ("k0", "b")], "already in line 2, as `a` and as `b`"),
        ([("k0", "a|b"), ("k1", "a"), ("k2", "a")], "too few rows of 1 of 2 classes: `b` 1"),
        ([("k0", ""), ("k1", "")], "the file has no labels"),
        ([("k0", "a"), ("k1", "a"), ("k2", "a")], "all rows have the label `a`"),
        ([("", "a")], "its key is empty"),
    ],
)
def test_bad_files(rows: list[tuple[str, str]], match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        read_labels(write(tmp_path / "bad.csv", rows))


def test_a_key_with_two_labels_is_told_about_the_other_column(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_labels(write(tmp_path / "bad.csv", [("k0", "a"), ("k0", "b")], ("key", "label")))
    assert "name the column `labels`" in caught.value.hint
