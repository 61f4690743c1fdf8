"""What is right, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.report.accuracy import guess_truth, judge, judge_masks


def labels(*names: str, score: float = 0.9) -> list[dict[str, Any]]:
    return [{"id": ord(name[0]) - ord("a"), "name": name, "score": score / (i + 1)} for i, name in enumerate(names)]


def test_top1_topk_and_classes() -> None:
    predictions = [labels("a", "b"), labels("b", "a"), labels("a", "b"), labels("c", "b"), []]
    judged = judge(predictions, ["a", "a", "b", None, "a"])
    assert judged is not None
    assert (judged.rows, judged.without_truth) == (3, 2)
    assert judged.top1 == pytest.approx(1 / 3) and judged.topk == 1 and judged.k == 2
    assert judged.classes == [("a", 2, 0.5, 0.5), ("b", 1, 0.0, 0.0)]
    assert judged.names == ["a", "b"] and judged.confusion.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("truth", [[0, 1, 1], ["0", "1", "1"], ["a", "b", "b"]])
def test_truth_may_be_ids_or_names(truth: list[Any]) -> None:
    judged = judge([labels("a"), labels("b"), labels("a")], truth)
    assert judged is not None and judged.top1 == pytest.approx(2 / 3)
    assert [name for name, *_ in judged.classes] == ["b", "a"]


def test_calibration() -> None:
    predictions = [labels("a", score=0.75)] * 4 + [labels("a", score=0.25)] * 4
    judged = judge(predictions, ["a", "a", "a", "b", "a", "b", "b", "b"])
    assert judged is not None
    assert judged.bins == [(0.25, 0.25, 4), (0.75, 0.75, 4)] and judged.calibration_error == pytest.approx(0)
    off = judge([labels("a", score=0.9)] * 2, ["b", "b"])
    assert off is not None and off.calibration_error == pytest.approx(0.9)


def test_many_classes_are_gathered_and_none_is_lost() -> None:
    names = [chr(ord("a") + i) for i in range(26)]
    judged = judge([labels(name) for name in names], names[::-1])
    assert judged is not None and judged.names[-1] == "others" and judged.confusion.sum() == 26


def test_no_truth_at_all() -> None:
    assert judge([labels("a")], [None]) is None and judge([[]], ["a"]) is None


def test_truth_is_guessed_from_names_only() -> None:
    names = {"cat", "dog"}
    assert guess_truth([("id", [0, 1]), ("text", ["a cat", "dog"]), ("label", ["cat", "dog"])], names) == "label"
    assert guess_truth([("label", ["cat", None, None, None])], names) is None
    assert guess_truth([], names) is None


def test_iou_by_hand() -> None:
    ours, true = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 255]])
    judged = judge_masks([(ours, true), (None, true), (ours, np.zeros((3, 3), int))], 3)
    assert judged is not None
    assert (judged.masks, judged.skipped) == (1, 2)
    assert judged.pixel_accuracy == pytest.approx(2 / 3) and judged.mean_iou == pytest.approx(0.5)
    assert judged.classes == [(0, 0.5, 1), (1, 0.5, 2)]
    assert judge_masks([], 3) is None
