"""Fixtures for streams that hang: the small job with a short patience, and runs of it by a runner of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from img2parquet.engine import scheduler, stall_detector
from img2parquet.engine.driver import run
from img2parquet.job import JobSpec
from tests.support.fast_clock import CLOCK
from tests.support.small_job import small_job

STALL_S = 2.0


@pytest.fixture
def job(shards: str, checkpoint: Path, finished: Path, tmp_path: Path) -> JobSpec:
    """Its undisturbed output is `finished`."""
    resources = {"workers": 2, "batch_size": 8, "stall_s": STALL_S}
    return small_job(shards, checkpoint, str(tmp_path / "out"), resources=resources)


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[JobSpec, Any], Any]:
    """Run a job with a runner that is given, by a clock that is fast while one of its streams hangs."""

    def go(job: JobSpec, runner: Any) -> Any:
        monkeypatch.setattr("img2parquet.engine.driver.choose_runner", lambda name: runner)
        monkeypatch.setattr(stall_detector, "time", CLOCK)
        monkeypatch.setattr(scheduler, "TICK_S", 0.02)  # of the real clock
        return run(job, "local")

    return go
