"""Classifiers agree with scikit-learn's, the best one is selected, and probabilities are calibrated."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as reference_loss
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from img2parquet.errors import MissingDependency
from img2parquet.results.probe.classifier import (
    NEIGHBOUR_TEMPERATURE,
    _fitted,
    _held_out,
    best_temperature,
    calibration_error,
    fit,
    log_loss,
)


def clusters(rows: int, K: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers, classes = np.random.default_rng(99).standard_normal((K, 16)), np.arange(rows) % K
    values = centers[classes] + noise * rng.standard_normal((rows, 16))
    return values / np.linalg.norm(values, axis=1, keepdims=True), classes


@pytest.mark.parametrize("K", [2, 5])
def test_the_linear_one_is_scikit_learns(K: int) -> None:
    x, y = clusters(60, K, 1.0)
    other, _ = clusters(40, K, 1.0, seed=1)
    ours = _fitted(("linear", 0.1), x, y, K).probabilities(other)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(x, y)
    np.testing.assert_allclose(ours, reference.predict_proba(other), atol=1e-9)


def test_the_neighbours_are_scikit_learns_and_vote_by_cosine() -> None:
    x, y = clusters(60, 4, 1.0)
    other, _ = clusters(20, 4, 1.0, seed=1)
    distance, near = NearestNeighbors(n_neighbors=5, metric="cosine").fit(x).kneighbors(other)
    votes = np.zeros((20, 4))
    for row in range(20):
        for d, i in zip(distance[row], near[row], strict=True):
            votes[row, y[i]] += np.exp(-d / NEIGHBOUR_TEMPERATURE)
    ours = _fitted(("knn", 5.0), x, y, 4).probabilities(other)
    assert (ours.argmax(1) == votes.argmax(1)).all()
    np.testing.assert_allclose(ours, votes / votes.sum(1, keepdims=True), atol=5e-3)  # equal except for the smoothing


def test_what_it_reports_is_what_it_does_on_rows_it_never_saw() -> None:
    names = [f"c{i}" for i in range(5)]
    x, y = clusters(150, 5, 0.9)
    classifier, report = fit(x, y, names)
    fresh_x, fresh_y = clusters(4000, 5, 0.9, seed=7)
    accuracy = (classifier.probabilities(fresh_x).argmax(1) == fresh_y).mean()
    assert report.judged_by == "held_out" and report.judged_rows == 30 and report.rows == 150
    assert abs(report.accuracy - accuracy) < 0.15 and accuracy > 0.7 > 2 * report.majority
    assert calibration_error(classifier.probabilities(fresh_x), fresh_y) < 0.08
    best = max(report.cross_validation.values())
    assert report.cross_validation[report.chosen] == best and len(report.cross_validation) == 11


def test_labels_that_mean_nothing_are_not_reported_as_good() -> None:
    rng = np.random.default_rng(0)
    x, _ = clusters(200, 4, 0.5)
    classifier, report = fit(x, rng.integers(0, 4, 200), list("abcd"))
    assert report.accuracy < 0.5
    assert classifier.probabilities(x).max(1).mean() < 0.7  # low confidence shows the uncertainty


def test_few_rows_are_judged_by_cross_validation() -> None:
    x, y = clusters(9, 3, 0.2)
    _, report = fit(x, y, list("abc"))
    assert (report.judged_by, report.judged_rows, report.folds) == ("cross_validation", 9, 3)
    assert max(int(name.partition("k=")[2]) for name in report.cross_validation if "k=" in name) <= 6


def test_the_same_labels_give_the_same_classifier() -> None:
    x, y = clusters(60, 3, 0.8)
    (first, said), (second, again) = fit(x, y, list("abc"), 4), fit(x, y, list("abc"), 4)
    assert said == again and (first.first == second.first).all() and first.temperature == second.temperature


def test_the_temperature_mends_scores_that_are_too_sure() -> None:
    rng = np.random.default_rng(0)
    scores = 1.5 * rng.standard_normal((4_000, 4))
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    truth = np.array([rng.choice(4, p=p) for p in shares])
    assert best_temperature(scores, truth) == pytest.approx(1, abs=0.1)
    assert best_temperature(4 * scores, truth) == pytest.approx(4, abs=0.4)


def test_all_right_is_no_reason_to_be_certain() -> None:
    scores = np.eye(3)[np.arange(9) % 3]
    shares = np.exp(scores / best_temperature(scores, np.arange(9) % 3))
    assert (shares / shares.sum(1, keepdims=True)).max() == pytest.approx(10 / 11, abs=0.01)


def test_losses_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(4), 500)
    truth = rng.integers(0, 4, 500)
    assert log_loss(shares, truth) == pytest.approx(reference_loss(truth, shares, labels=range(4)))
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (shares.max(1) > low) & (shares.max(1) <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(shares.max(1)[inside].mean() - (shares.argmax(1) == truth)[inside].mean())
    assert calibration_error(shares, truth) == pytest.approx(total)


def test_a_fifth_of_each_class_is_held_out() -> None:
    classes = np.repeat([0, 1, 2], [50, 10, 5])
    held = _held_out(classes, 0)
    assert [int(held[classes == k].sum()) for k in range(3)] == [10, 2, 1]


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependency, match=r"img2parquet\[probe\]"):
        fit(*clusters(9, 3, 0.2), list("abc"))
