"""Fit a classifier of independent classes on labelled vectors: several, one or none may be true of a row.

Shapes: N labelled rows, D values of a vector, K classes.

* It is chosen, evaluated and calibrated as one of exclusive classes (`classifier.py`), except that the lowest log loss
  after calibration chooses, and that numbers are over all pairs of row and class.
* The linear one is a logistic regression for each class; the neighbours vote on each class.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from img2parquet.results.probe.classifier import (
    BINS,
    FOLDS,
    HELD_OUT,
    HELD_OUT_FROM,
    INVERSE_STRENGTHS,
    NEIGHBOURS,
    TEMPERATURES,
    Candidate,
    Classifier,
    Doubles,
    Ints,
    Report,
    candidate_name,
    import_sklearn,
    sigmoid,
)

Bools = npt.NDArray[np.bool_]


def fit_multi_label(
    unit_ND: npt.NDArray[np.floating], true_NK: Bools, names: list[str], seed: int = 0
) -> tuple[Classifier, Report]:
    """Fit a classifier on (N, D) unit vectors and the classes that are true of them; report its quality.

    The classifier is fitted on all rows. Raises MissingDependency without scikit-learn."""
    wide_ND: Doubles = unit_ND.astype(np.float64)
    least = int(true_NK.sum(0).min())
    held_N = np.zeros(len(wide_ND), bool)
    if least >= HELD_OUT_FROM:
        held_N = balanced_folds(true_NK, round(1 / HELD_OUT), seed) == 0
    known_ND, known_NK = wide_ND[~held_N], true_NK[~held_N]
    chosen, accuracies, scores_NK, folds = _choose(known_ND, known_NK, seed)
    temperature = best_temperature(scores_NK, known_NK)
    judged_NK, judged_by = known_NK, "cross_validation"
    if held_N.any():
        judged_NK, judged_by = true_NK[held_N], "held_out"
        scores_NK = _fitted(chosen, known_ND, known_NK).scores(wide_ND[held_N])
    before, after = sigmoid(scores_NK), sigmoid(scores_NK / temperature)
    said_NK = after >= 0.5
    report = Report(
        rows=len(true_NK),
        per_class=dict(zip(names, true_NK.sum(0).tolist(), strict=True)),
        judged_by=judged_by,
        judged_rows=len(judged_NK),
        accuracy=float((said_NK == judged_NK).mean()),
        majority=float((judged_NK == (known_NK.mean(0) >= 0.5)).mean()),
        log_loss=log_loss(after, judged_NK),
        calibration_error=calibration_error(after, judged_NK),
        calibration_error_before=calibration_error(before, judged_NK),
        chosen=candidate_name(chosen),
        temperature=temperature,
        folds=folds,
        cross_validation=accuracies,
        f1=float(2 * (said_NK & judged_NK).sum() / max(1, said_NK.sum() + judged_NK.sum())),
    )
    return replace(_fitted(chosen, wide_ND, true_NK), temperature=temperature), report


def _choose(unit_ND: Doubles, true_NK: Bools, seed: int) -> tuple[Candidate, dict[str, float], Doubles, int]:
    """Cross-validate; return the best candidate, the accuracy of each, the best one's out-of-fold scores, and the
    number of folds."""
    folds = min(FOLDS, max(2, int(true_NK.sum(0).min())))
    fold_N = balanced_folds(true_NK, folds, seed)
    smallest = min(int((fold_N != fold).sum()) for fold in range(folds))
    candidates = [("linear", C) for C in INVERSE_STRENGTHS]
    candidates += [("knn", float(k)) for k in NEIGHBOURS if k <= smallest]
    accuracies, best = dict[str, float](), None
    for candidate in candidates:
        scores_NK = np.zeros(true_NK.shape)
        for fold in range(folds):
            test_N = fold_N == fold
            scores_NK[test_N] = _fitted(candidate, unit_ND[~test_N], true_NK[~test_N]).scores(unit_ND[test_N])
        accuracies[candidate_name(candidate)] = float(((scores_NK >= 0) == true_NK).mean())
        loss = log_loss(sigmoid(scores_NK / best_temperature(scores_NK, true_NK)), true_NK)
        if best is None or loss < best[0]:
            best = loss, candidate, scores_NK
    assert best is not None
    return best[1], accuracies, best[2], folds


def _fitted(candidate: Candidate, unit_ND: Doubles, true_NK: Bools) -> Classifier:
    (kind, setting), K = candidate, true_NK.shape[1]
    if kind == "knn":
        return Classifier(kind, setting, K, 1.0, unit_ND, true_NK.astype(np.float64), "sigmoid")
    mean_D, std_D = unit_ND.mean(0), unit_ND.std(0)
    std_D = np.where(std_D > 1e-12, std_D, 1.0)
    scaled_ND = (unit_ND - mean_D) / std_D
    weights_KD, bias_K = np.zeros((K, unit_ND.shape[1])), np.zeros(K)
    for k in range(K):
        count = int(true_NK[:, k].sum())
        if 0 < count < len(true_NK):
            model = import_sklearn("linear_model").LogisticRegression(C=setting, max_iter=2000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # incomplete convergence shows in the measured accuracy
                model.fit(scaled_ND, true_NK[:, k])
            weights_KD[k], bias_K[k] = model.coef_[0] / std_D, model.intercept_[0]
        else:  # true of all rows, or of none: as Laplace's rule of succession
            bias_K[k] = np.log((count + 1) / (len(true_NK) - count + 1))
    return Classifier(kind, setting, K, 1.0, weights_KD, bias_K - weights_KD @ mean_D, "sigmoid")


def balanced_folds(true_NK: Bools, folds: int, seed: int) -> Ints:
    """Spread rows over folds so that each class is spread as evenly as it can be, the rarest first -> (N,)."""
    order, fold_N = np.random.default_rng(seed).permutation(len(true_NK)), np.full(len(true_NK), -1)
    all_F = np.zeros(folds, int)
    rarest = np.argsort(true_NK.sum(0), kind="stable")
    for of_class_N in (*(true_NK[:, k] for k in rarest), np.ones(len(true_NK), bool)):
        own_F = np.bincount(fold_N[of_class_N & (fold_N >= 0)], minlength=folds)
        for row in order[(fold_N[order] < 0) & of_class_N[order]]:
            fold_N[row] = fold = np.lexsort((all_F, own_F))[0]
            own_F[fold] += 1
            all_F[fold] += 1
    return fold_N


def best_temperature(scores_NK: Doubles, true_NK: Bools) -> float:
    """Return the temperature with the least log loss against Platt's targets, (N1 + 1) / (N1 + 2) and 1 / (N0 + 2) of
    each class's N1 rows that have it and N0 that do not."""
    have_K = true_NK.sum(0)
    targets_NK = np.where(true_NK, (have_K + 1) / (have_K + 2), 1 / (len(true_NK) - have_K + 2))
    losses = []
    for t in TEMPERATURES:
        loss_NK = np.logaddexp(0, scores_NK / t) - targets_NK * scores_NK / t
        losses.append(float(loss_NK.sum()))
    return float(TEMPERATURES[int(np.argmin(losses))])


def log_loss(probabilities_NK: Doubles, true_NK: Bools) -> float:
    own_NK = np.where(true_NK, probabilities_NK, 1 - probabilities_NK)
    return float(-np.log(np.maximum(own_NK, 1e-12)).mean())


def calibration_error(probabilities_NK: Doubles, true_NK: Bools) -> float:
    """Compute the expected calibration error: mean probability against frequency, over BINS of equal width."""
    bin_NK = np.clip(np.ceil(probabilities_NK * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [abs((probabilities_NK[bin_NK == b] - true_NK[bin_NK == b]).sum()) for b in range(BINS)]
    return float(sum(gaps) / true_NK.size)
