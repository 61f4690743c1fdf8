"""Suspect labels equal the definition of confident learning, computed naively, over files and batches of any size."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from img2parquet.cli import main
from img2parquet.errors import InputError
from img2parquet.outputs.labels import LABELS
from img2parquet.results.evaluation import evaluate, mistakes
from img2parquet.results.evaluation.mistakes import find_mistakes
from tests.support.finished_outputs import make_output

N, K = 900, 5
NAMES = {str(k): f"class {k}" for k in range(K)}


def noisy(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a tenth are wrong, and logits that know the right ones fairly well. Class 4 is never a label."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, K - 1, N)
    given = np.where(rng.random(N) < 0.1, (right + 1) % (K - 1), right)
    return given, rng.standard_normal((N, K)) + 3 * np.eye(K)[right]


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def by_definition(given: np.ndarray, scores: np.ndarray) -> list[tuple[int, int]]:
    """Row and suggested class of each suspect, the most suspect first."""
    thresholds = [scores[given == k, k].mean() if (given == k).any() else np.inf for k in range(K)]
    found = []
    for row in range(len(given)):
        confident = [k for k in range(K) if scores[row, k] >= thresholds[k]]
        if confident and (best := max(confident, key=lambda k: scores[row, k])) != given[row]:
            margin = scores[row, given[row]] - max(scores[row, k] for k in range(K) if k != given[row])
            found.append((margin, row, best))
    return [(row, best) for _, row, best in sorted(found)]


def output(
    tmp_path: Path, truths: Any, logits: np.ndarray, kind: str = "logits", names: Any = NAMES, k: int = K
) -> str:
    if kind == "logits":
        column = pa.FixedSizeListArray.from_arrays(pa.array(logits.astype(np.float32).reshape(-1)), K)
    else:
        best, scores = np.argsort(-logits, axis=1)[:, :k], softmax(logits)
        rows = [
            [{"id": int(i), "name": str(i), "score": float(scores[row, i])} for i in ids]
            for row, ids in enumerate(best)
        ]
        column = pa.array(rows, LABELS)
    whole = pa.table({"truth": truths, kind: column})
    tables = [whole.slice(0, 310), whole.slice(310)]
    config = {"id2label": names} if names else {}
    return make_output(str(tmp_path / "out"), {"outputs": [{"kind": kind, "name": kind}], "config": config}, tables)


def written(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_suspects_are_those_of_the_definition(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 97)
    given, logits = noisy()
    logits = logits.astype(np.float32).astype(np.float64)
    uri, file = output(tmp_path, pa.array(given), logits, kind), tmp_path / "suspects.csv"
    made = find_mistakes(uri, "truth", str(file))
    expected, rows = by_definition(given, softmax(logits)), written(file)
    assert 60 < len(expected) < 130 and (made.rows, made.suspects, made.written) == (N, len(expected), len(expected))
    keys = sorted(row["key"] for row in rows)
    assert len(set(keys)) == len(keys) and [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert [row["suggested"] for row in rows] == [f"class {best}" for _, best in expected]
    assert [row["given"] for row in rows] == [f"class {given[row]}" for row, _ in expected]
    scores = softmax(logits)
    assert [float(row["suggested_score"]) for row in rows] == pytest.approx(
        [scores[r, b] for r, b in expected], abs=2e-6
    )
    assert [float(row["given_score"]) for row in rows] == pytest.approx(
        [scores[r, given[r]] for r, _ in expected], abs=2e-6
    )


def test_only_the_worst_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, logits = noisy()
    uri = output(tmp_path, pa.array(given), logits)
    made = find_mistakes(uri, "truth", str(tmp_path / "few.csv"), most=7)
    find_mistakes(uri, "truth", str(tmp_path / "all.csv"))
    assert made.written == 7 < made.suspects
    assert written(tmp_path / "few.csv") == written(tmp_path / "all.csv")[:7]
    assert mistakes.MOST == 100_000


def test_names_digits_missing_and_ignored_labels(tmp_path: Path) -> None:
    given, logits = noisy()
    truths: list[Any] = [f"class {k}" if row % 2 else str(k) for row, k in enumerate(given)]
    truths[5] = None
    made = find_mistakes(output(tmp_path, pa.array(truths), logits), "truth", str(tmp_path / "a.csv"))
    assert made.rows == N - 1
    ids = pa.array([-100 if row == 5 else int(k) for row, k in enumerate(given)])
    uri = output(tmp_path / "other", ids, logits, "labels", names=None, k=2)  # neither names nor all classes
    assert find_mistakes(uri, "truth", str(tmp_path / "b.csv")).rows == N - 1
    assert {row["given"] for row in written(tmp_path / "b.csv")} <= {"0", "1", "2", "3"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, logits = noisy()
    uri, file = output(tmp_path, pa.array(given), logits), tmp_path / "suspects.csv"
    assert main(["evaluate", uri, "--truth", "truth", "--mistakes", str(file)]) == 0
    count = len(written(file))
    assert f"{count} rows whose ground truth is probably wrong" in capsys.readouterr().out
    before = file.read_bytes()
    assert main(["evaluate", uri, "--truth", "truth", "--mistakes", str(file)]) == 2
    assert "is not overwritten" in capsys.readouterr().err and file.read_bytes() == before
    assert main(["evaluate", uri, "--truth", "truth", "--mistakes", str(tmp_path / "b.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mistakes"]["suspects"] == count


def test_what_cannot_be_ranked(tmp_path: Path) -> None:
    given, logits = noisy()
    uri = output(tmp_path, pa.array([None] * N, pa.int64()), logits)
    with pytest.raises(InputError, match=r"no row .* has a value in `truth`"):
        find_mistakes(uri, "truth", str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="no column `nothing`"):
        find_mistakes(uri, "nothing", str(tmp_path / "a.csv"))
    wrong = output(tmp_path / "wrong", pa.array([*map(int, given[:-1]), 99]), logits)
    with pytest.raises(InputError, match="class 99 is not among"):
        find_mistakes(wrong, "truth", str(tmp_path / "a.csv"))
    about = {"outputs": [{"kind": "logits", "name": "logits"}], "config": {"id2label": NAMES}}
    about["config"]["problem_type"] = "multi_label_classification"  # type: ignore[index]
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.astype(np.float32).reshape(-1)), K)
    several = make_output(str(tmp_path / "several"), about, [pa.table({"truth": pa.array(given), "logits": column})])
    with pytest.raises(InputError, match="is a multi_label output"):
        find_mistakes(several, "truth", str(tmp_path / "a.csv"))
    assert not list(tmp_path.glob("*.csv"))
