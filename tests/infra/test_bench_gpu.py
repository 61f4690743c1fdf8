"""The suite for one GPU, run on a CPU: every way gives images, and the page says what was reached."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from img2parquet.schema import Row
from infra.bench import gpu
from infra.bench.__main__ import main
from infra.bench.gpu import FLOOR, InMemory, Measured, Rate, Settings, Subject
from infra.bench.report import Report

RATES = {
    "model only": Rate(1000.0, 0.98),
    "decoding": Rate(800.0),
    "memory": Rate(760.0, 0.76),
    "processes": Rate(720.0),
    "shards": Rate(700.0),
}
LEVIT, BIT = Subject("facebook/levit-128S"), Subject("google/bit-50")
ROOT = Path(__file__).parents[2]


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
    assert rows[0][3:] == ("1,000", "1.00", "1.25", "98%", "0.60", "1.0e-02")  # 2 x 0.302e9 x 1,000
    assert rows[2][3:] == ("760", "0.76", "0.95", "76%", "", "")


def test_memory_gives_the_same_files_for_ever_under_new_keys() -> None:
    rows = list(itertools.islice(InMemory((b"a", b"b")).read(gpu.EVERYTHING), 5))
    assert all(isinstance(row, Row) for row in rows)
    assert len({row.key for row in rows}) == 5 and [row.row for row in rows] == [0, 1, 2, 3, 4]
    assert [row.image for row in rows if isinstance(row, Row)] == [b"a", b"b", b"a", b"b", b"a"]


def test_shards_are_as_many_images_as_were_asked_for(tmp_path: Path) -> None:
    gpu.write_shards(tmp_path, [b"a", b"b", b"c"], per_shard=4, images=13)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]


def pages(monkeypatch: pytest.MonkeyPatch, measure: Callable[..., Measured], minutes: float = 8.0) -> list[Report]:
    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "BESIDE_S", 0.01)
    return list(gpu.reports(Settings("cpu", seconds=0.01, minutes=minutes, images=2), [LEVIT, BIT]))


def test_results_that_differ_fail_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, lambda *_: Measured(256, RATES, 0.01))[-1].agrees
    assert not pages(monkeypatch, lambda *_: Measured(256, RATES, float("inf")))[-1].agrees


def test_a_page_is_written_after_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pages(monkeypatch, lambda *_: Measured(256, RATES, 0.01))
    assert [len(page.rows) for page in made] == [0, 5, 10, 10]
    assert "not measured in 8 minutes: levit-128S, bit-50" in made[0].markdown()
    assert "not measured in 8 minutes: bit-50" in made[1].markdown() and "not measured" not in made[2].markdown()


def test_what_hangs_is_cut_off_and_what_was_measured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(subject: Subject, *_: object) -> Measured:
        if subject is BIT:
            time.sleep(60)
        return Measured(256, RATES, 0.01)

    monkeypatch.setattr(gpu, "LEAST_S", 0.01)
    began = time.monotonic()
    made = pages(monkeypatch, measure, minutes=2 / 60)
    assert time.monotonic() - began < 30
    assert len(made[-1].rows) == 5 and "not measured in 0.0333333 minutes: bit-50" in made[-1].markdown()


def test_time_is_divided_among_the_models_that_are_left() -> None:
    deadline = gpu.Deadline(8)
    assert deadline.seconds_of_a_way(6, 10.0) == 10.0
    assert deadline.seconds_of_a_way(12, 10.0) == pytest.approx(5.6, abs=0.1)
    assert deadline.seconds_of_a_way(40, 10.0) == gpu.LEAST_S  # not all of them, but well
    assert gpu.Deadline(0.1).seconds_of_a_way(1, 10.0) is None


def test_failed_tests_fail_the_suite_but_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_tests", lambda *_: (False, "1 failed, 10 passed"))
    last = pages(monkeypatch, lambda *_: Measured(256, RATES, 0.01))[-1]
    assert not last.agrees and len(last.rows) == 10 and "tests: 1 failed, 10 passed" in last.markdown()


def test_an_unknown_model_is_misuse() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--only", "levit"])
    assert stopped.value.code == 2


@pytest.mark.slow
def test_from_the_command_line_without_a_gpu_and_without_ray(tmp_path: Path) -> None:
    settings = ["--device", "cpu", "--seconds", "0.2", "--images", "8", "--only", "levit-128S", "--out", str(tmp_path)]
    without = "import sys; sys.modules['ray'] = sys.modules['s3fs'] = None"
    code = f"{without}; from infra.bench import gpu; sys.exit(gpu.main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", code, *settings], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {way} |" in page for way in RATES) and "no GPU" in page
    assert re.search(r"card: [\d.,]+ TFLOP/s in bfloat16; copies of [\d.,]+ GB/s on it", page)


def test_the_tests_are_run_first_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they are all skipped, which is no failure."""
    passed, said = gpu.run_tests(Settings("cuda"), gpu.Deadline(8))
    assert passed and "skipped" in said
