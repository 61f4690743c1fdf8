"""Meters of several sessions, as they lie in an output."""

from __future__ import annotations

from typing import Any

import pytest

from img2parquet.results.report.charts import bar, histogram, steps
from img2parquet.results.report.speed import speed


def meter(session: str, seconds: float, rows: int, **more: Any) -> dict[str, Any]:
    spent = {"images": 100, "size_bytes": 5}
    stages = {"read": {"seconds": 1.0, **spent}, "embed": {"seconds": 3.0, **spent}}
    values = {"session": session, "seconds": seconds, "rows_in": rows, "startup_s": 2.0, "stages": stages,
              "pools": {"workers": 2, "readers": 1}, "waited": {"workers": 1.0}, "retries": {"SlowDown": 3},
              "bottleneck": "model-bound: the model took 75 %"}  # fmt: skip
    return {**values, **more}


def test_rates_are_of_what_came_between_two_snapshots() -> None:
    found = speed([meter("a", 10, 100), meter("a", 20, 400), meter("b", 5, 50)])
    assert found is not None
    assert found.steps == [(0, 10, 10), (10, 20, 30), (20, 25, 10)]
    assert found.images_per_s == pytest.approx(450 / 25) and found.sessions == 2 and found.retries == 6


def test_stages_and_the_one_that_is_named() -> None:
    found = speed([meter("a", 10, 100)])
    assert found is not None
    stages = {stage.name: stage for stage in found.stages}
    assert stages["embed"].share == 0.75 and stages["read"].images_per_s == 100
    assert [name for name, stage in stages.items() if stage.is_bottleneck] == ["embed"]
    assert found.pools == [("workers", 2, 0.25)]


def test_nothing_measured_and_nonsense() -> None:
    assert speed([]) is None
    assert speed([meter("a", 0, 0, pools={}, stages={}, bottleneck="")]) is not None


def test_charts_count_and_escape() -> None:
    svg = histogram([0.1, 0.1, 0.9], 0, 1, 10, 'scores "of" <b>')
    assert svg.count("<rect") == 10 and "0.10 to 0.20: 2" in svg and "<b>" not in svg
    assert 'width="42.00"' in bar(0.42, "<") and "&lt;" in bar(0.42, "<")
    assert steps([(0, 60, 10), (60, 120, 20)], "rate").count("<title>") == 2
