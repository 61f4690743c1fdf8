"""The measure of recall, where the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from img2parquet.engine.driver import run
from infra.bench.recall import main, nearest, recall
from tests.support.small_job import make_checkpoint, make_shards, small_job


def test_nearest_leaves_out_the_row_itself_and_takes_the_earlier_of_equals() -> None:
    scores = np.array([[9, 1, 1, 0], [0, 9, 2, 3], [5, 5, 9, 5], [1, 2, 3, 9]], np.float32)
    found = nearest(scores, 2)
    assert found.tolist() == [[1, 2], [3, 2], [0, 1], [2, 1]]
    assert recall(found, found) == 1
    assert recall(found, np.array([[1, 3], [0, 2], [3, 1], [0, 3]])) == pytest.approx(3 / 8)


def test_a_table_of_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "in", 2, 10, broken=False)
    run(small_job(f"{tmp_path}/in/*.tar", make_checkpoint(tmp_path / "model"), str(tmp_path / "out")), "local")
    main([f"{tmp_path}/out#tiny"])
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == ["tiny", "20", "32"]
    int8, binary, again = map(float, cells[3:])
    assert 0.5 < int8 <= 1 and binary <= again <= 1
