"""Fit a classifier on a few labelled vectors: select a linear or nearest-neighbour one, evaluate it, calibrate it.

Shapes: N labelled rows, B rows, D values of a vector, K classes, C a regularisation's inverse.

* Selected by stratified cross-validation: highest accuracy; on a tie the lower log loss after calibration.
* Evaluated on a stratified fifth that is held out of everything; where a class has fewer than HELD_OUT_FROM rows, by
  the cross-validation itself, which is slightly optimistic, since the best of several was taken.
* Calibrated by one temperature, fitted to the cross-validation's predictions for rows outside each training fold.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from img2parquet.errors import MissingDependency
from img2parquet.outputs.score_function import ScoreFunction

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # for features scaled to unit variance
NEIGHBOURS = (1, 3, 5, 10, 20)
NEIGHBOUR_TEMPERATURE = 0.07  # of the votes exp(cosine / t), as in the evaluations of DINO and MSN
SMOOTHING = 1e-3  # of a vote, so that no class is impossible
FOLDS, HELD_OUT_FROM, HELD_OUT = 5, 5, 0.2
TEMPERATURES = np.geomspace(0.05, 20, 241)
BINS = 15


@dataclass(frozen=True)
class Classifier:
    """Score classes for unit vectors. `linear` has weights (K, D) and bias (K,), `knn` labelled vectors (N, D) and
    their classes (N,), or (N, K) of 0 and 1 for independent classes, whose probabilities are sigmoids."""

    kind: str  # linear | knn
    setting: float  # C, or k
    classes: int
    temperature: float
    first: Doubles
    second: Doubles
    function: ScoreFunction = "softmax"

    def probabilities(self, unit_BD: npt.NDArray[np.floating[Any]]) -> Doubles:
        """Compute calibrated probabilities, (B, D) -> (B, K)."""
        scores_BK = self.scores(unit_BD) / self.temperature
        return _softmax(scores_BK) if self.function == "softmax" else sigmoid(scores_BK)

    def scores(self, unit_BD: npt.NDArray[np.floating[Any]]) -> Doubles:
        """Compute log probabilities before calibration, up to a constant per row, (B, D) -> (B, K); log odds of
        independent classes.

        In float64, so that the written values do not depend on how rows are grouped into blocks."""
        wide_BD = unit_BD.astype(np.float64)
        if self.kind == "linear":
            scores_BK: Doubles = wide_BD @ self.first.T + self.second
            return scores_BK
        similar_BN, k = wide_BD @ self.first.T, int(self.setting)
        near_Bk = np.argsort(-similar_BN, axis=1, kind="stable")[:, :k]
        votes_Bk = np.exp((np.take_along_axis(similar_BN, near_Bk, 1) - 1) / NEIGHBOUR_TEMPERATURE)
        total_B1 = np.maximum(votes_Bk.sum(1, keepdims=True), 1e-300)
        if self.function == "sigmoid":
            odds_BK: Doubles = np.einsum("bk,bkc->bc", votes_Bk / total_B1, self.second[near_Bk])
            return np.log(odds_BK + SMOOTHING) - np.log(1 - odds_BK + SMOOTHING)
        votes_BK = np.zeros((len(wide_BD), self.classes))
        np.add.at(votes_BK, (np.arange(len(wide_BD))[:, None], self.second[near_Bk].astype(int)), votes_Bk)
        shares_BK: Doubles = votes_BK / np.maximum(votes_BK.sum(1, keepdims=True), 1e-300)
        return np.log(shares_BK + SMOOTHING)


@dataclass(frozen=True)
class Report:
    """Quality of a classifier. Accuracy, loss and calibration errors are measured on rows that it was not fitted on."""

    rows: int
    per_class: dict[str, int]
    judged_by: str  # held_out | cross_validation
    judged_rows: int
    accuracy: float
    majority: float  # accuracy of always predicting the most common class
    log_loss: float
    calibration_error: float
    calibration_error_before: float
    chosen: str
    temperature: float
    folds: int
    cross_validation: dict[str, float]  # accuracy of each candidate
    f1: float | None = None  # of independent classes, over all pairs of row and class, as are accuracy and errors


def fit(
    unit_ND: npt.NDArray[np.floating[Any]], classes_N: Ints, names: Sequence[str], seed: int = 0
) -> tuple[Classifier, Report]:
    """Fit a classifier on (N, D) unit vectors and their classes, at least three rows of each; report its quality.

    The classifier is fitted on all rows. Raises MissingDependency without scikit-learn."""
    wide_ND: Doubles = unit_ND.astype(np.float64)
    least = min(Counter(classes_N.tolist()).values())
    held_N = _held_out(classes_N, seed) if least >= HELD_OUT_FROM else np.zeros(len(classes_N), bool)
    known_ND, known_N = wide_ND[~held_N], classes_N[~held_N]
    chosen, accuracies, scores_NK, folds = _choose(known_ND, known_N, len(names), seed)
    temperature = best_temperature(scores_NK, known_N)
    if held_N.any():
        judged = _fitted(chosen, known_ND, known_N, len(names))
        scores_NK, truth_N, judged_by = judged.scores(wide_ND[held_N]), classes_N[held_N], "held_out"
    else:
        truth_N, judged_by = known_N, "cross_validation"
    before, after = _softmax(scores_NK), _softmax(scores_NK / temperature)
    report = Report(
        rows=len(classes_N),
        per_class={name: int((classes_N == id).sum()) for id, name in enumerate(names)},
        judged_by=judged_by,
        judged_rows=len(truth_N),
        accuracy=float((after.argmax(1) == truth_N).mean()),
        majority=float((truth_N == np.bincount(known_N).argmax()).mean()),
        log_loss=log_loss(after, truth_N),
        calibration_error=calibration_error(after, truth_N),
        calibration_error_before=calibration_error(before, truth_N),
        chosen=candidate_name(chosen),
        temperature=temperature,
        folds=folds,
        cross_validation=accuracies,
    )
    return replace(_fitted(chosen, wide_ND, classes_N, len(names)), temperature=temperature), report


Candidate = tuple[str, float]


def _choose(unit_ND: Doubles, classes_N: Ints, K: int, seed: int) -> tuple[Candidate, dict[str, float], Doubles, int]:
    """Cross-validate; return the best candidate, the accuracy of each, the best one's out-of-fold scores, and the
    number of folds."""
    folds = min(FOLDS, min(Counter(classes_N.tolist()).values()))
    splits = list(
        import_sklearn("model_selection")
        .StratifiedKFold(folds, shuffle=True, random_state=seed)
        .split(unit_ND, classes_N)
    )
    smallest = min(len(train) for train, _ in splits)
    candidates = [("linear", C) for C in INVERSE_STRENGTHS]
    candidates += [("knn", float(k)) for k in NEIGHBOURS if k <= smallest]
    accuracies, best = dict[str, float](), None
    for candidate in candidates:
        scores_NK = np.zeros((len(unit_ND), K))
        for train, test in splits:
            scores_NK[test] = _fitted(candidate, unit_ND[train], classes_N[train], K).scores(unit_ND[test])
        accuracy = float((scores_NK.argmax(1) == classes_N).mean())
        loss = log_loss(_softmax(scores_NK / best_temperature(scores_NK, classes_N)), classes_N)
        accuracies[candidate_name(candidate)] = accuracy
        if best is None or (accuracy, -loss) > best[0]:
            best = (accuracy, -loss), candidate, scores_NK
    assert best is not None
    return best[1], accuracies, best[2], folds


def _fitted(candidate: Candidate, unit_ND: Doubles, classes_N: Ints, K: int) -> Classifier:
    kind, setting = candidate
    if kind == "knn":
        return Classifier(kind, setting, K, 1.0, unit_ND, classes_N.astype(np.float64))
    mean_D, std_D = unit_ND.mean(0), unit_ND.std(0)
    std_D = np.where(std_D > 1e-12, std_D, 1.0)
    model = import_sklearn("linear_model").LogisticRegression(C=setting, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # incomplete convergence shows in the measured accuracy
        model.fit((unit_ND - mean_D) / std_D, classes_N)
    weights_KD, bias_K = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    if K == 2:  # scikit-learn has one row for two classes
        weights_KD, bias_K = np.vstack([np.zeros_like(weights_KD), weights_KD]), np.array([0.0, bias_K[0]])
    weights_KD = weights_KD / std_D  # the scaling becomes part of the weights
    return Classifier(kind, setting, K, 1.0, weights_KD, bias_K - weights_KD @ mean_D)


def _held_out(classes_N: Ints, seed: int) -> npt.NDArray[np.bool_]:
    """Choose a fifth of each class, at least one row."""
    rng, held_N = np.random.default_rng(seed), np.zeros(len(classes_N), bool)
    for id in np.unique(classes_N):
        rows = np.flatnonzero(classes_N == id)
        held_N[rng.permutation(rows)[: max(1, round(HELD_OUT * len(rows)))]] = True
    return held_N


def best_temperature(scores_NK: Doubles, classes_N: Ints) -> float:
    """Return the temperature with the least log loss against Platt's targets of (N + 1) / (N + 2): a few rows that are
    all correct do not justify certainty. A grid will do: the loss has one minimum, and a few per cent do not matter."""
    N, K = scores_NK.shape
    targets_NK = np.full((N, K), 1 / (N + 2) / (K - 1))
    targets_NK[np.arange(N), classes_N] = (N + 1) / (N + 2)
    losses = [-(targets_NK * _log_softmax(scores_NK / t)).sum() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def log_loss(probabilities_NK: Doubles, classes_N: Ints) -> float:
    own_N = probabilities_NK[np.arange(len(classes_N)), classes_N]
    return float(-np.log(np.maximum(own_N, 1e-12)).mean())


def calibration_error(probabilities_NK: Doubles, classes_N: Ints) -> float:
    """Compute the expected calibration error: mean highest probability against accuracy, over BINS of equal width."""
    confidence_N, right_N = probabilities_NK.max(1), probabilities_NK.argmax(1) == classes_N
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [abs((confidence_N[bin_N == b] - right_N[bin_N == b]).sum()) for b in range(BINS)]
    return float(sum(gaps) / len(classes_N))


def _log_softmax(scores_BK: Doubles) -> Doubles:
    shifted_BK = scores_BK - scores_BK.max(1, keepdims=True)
    logs_BK: Doubles = shifted_BK - np.log(np.exp(shifted_BK).sum(1, keepdims=True))
    return logs_BK


def _softmax(scores_BK: Doubles) -> Doubles:
    exp_BK = np.exp(scores_BK - scores_BK.max(1, keepdims=True))
    shares_BK: Doubles = exp_BK / exp_BK.sum(1, keepdims=True)
    return shares_BK


def candidate_name(candidate: Candidate) -> str:
    kind, setting = candidate
    return f"linear C={setting:g}" if kind == "linear" else f"knn k={int(setting)}"


def sigmoid(scores_BK: Doubles) -> Doubles:
    shares_BK: Doubles = 0.5 * (1 + np.tanh(0.5 * scores_BK))  # does not overflow
    return shares_BK


def import_sklearn(module: str) -> Any:
    try:
        import sklearn.linear_model
        import sklearn.model_selection
    except ImportError:
        raise MissingDependency(
            "a probe needs scikit-learn, which is not installed", hint="pip install 'img2parquet[probe]'"
        ) from None
    return getattr(sklearn, module)
