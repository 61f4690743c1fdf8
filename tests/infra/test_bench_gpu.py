"""The suite for one GPU, run on a CPU: every way gives images, and the page says what was reached."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from img2parquet.schema import Row
from infra.bench import gpu
from infra.bench.__main__ import main
from infra.bench.gpu import FLOOR, InMemory, Measured, Rate, Settings, Subject

RATES = {
    "model only": Rate(1000.0, 0.98),
    "decoding": Rate(800.0),
    "memory": Rate(760.0, 0.76),
    "processes": Rate(720.0),
    "shards": Rate(700.0),
}
LEVIT = Subject("facebook/levit-128S")


def test_what_feeds_a_model_is_measured_by_the_slower_of_both() -> None:
    bars = gpu.bars_of(LEVIT, Measured(256, RATES, 0.01))
    assert [(bar.label, bar.ratio, bar.reached) for bar in bars] == [
        ("levit-128S, memory", 0.95, True),
        ("levit-128S, processes", 0.9, True),
        ("levit-128S, shards", 0.875, False),
    ]
    assert all(bar.floor == FLOOR == 0.9 for bar in bars)


def test_the_table_has_every_way() -> None:
    rows = gpu.table(LEVIT, Measured(256, RATES, 0.01))
    assert [row[2] for row in rows] == list(RATES)
    assert rows[0][3:] == ("1,000", "1.00", "1.25", "98%", "1.0e-02")
    assert rows[2][3:] == ("760", "0.76", "0.95", "76%", "")


def test_memory_gives_the_same_files_for_ever_under_new_keys() -> None:
    rows = list(itertools.islice(InMemory((b"a", b"b")).read(gpu.EVERYTHING), 5))
    assert all(isinstance(row, Row) for row in rows)
    assert len({row.key for row in rows}) == 5 and [row.row for row in rows] == [0, 1, 2, 3, 4]
    assert [row.image for row in rows if isinstance(row, Row)] == [b"a", b"b", b"a", b"b", b"a"]


def test_shards_are_as_many_images_as_were_asked_for(tmp_path: Path) -> None:
    gpu.write_shards(tmp_path, [b"a", b"b", b"c"], per_shard=4, images=13)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]


def test_results_that_differ_fail_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measure", lambda *_: Measured(256, RATES, float("inf")))
    assert not gpu.report(Settings("cpu", images=2), [LEVIT]).agrees


def test_an_unknown_model_is_misuse() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--only", "levit"])
    assert stopped.value.code == 2


@pytest.mark.slow
def test_from_the_command_line_without_a_gpu(tmp_path: Path) -> None:
    settings = ["--device", "cpu", "--seconds", "0.2", "--images", "8", "--only", "levit-128S"]
    assert main(["gpu", *settings, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {way} |" in page for way in RATES) and "no GPU" in page
