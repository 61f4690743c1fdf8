"""The suite `growth` measures what it says: costs without start-up, memory of the process alone, real outputs."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from img2parquet.engine.driver import run
from img2parquet.job import load_job
from img2parquet.results.reader import status
from img2parquet.results.verify import verify
from infra.bench import growth
from infra.bench.__main__ import main
from infra.bench.growth import Taken
from infra.bench.growth_inputs import commit_all_but, make_empty, make_images, make_model, write_job


def taken(wall_s: float, cpu_s: float, peak_mb: float = 100, rows_in: int = 0, planned_s: float = 1) -> Taken:
    said = {"rows_in": rows_in, "meter": {"startup_s": 0.5, "seconds": wall_s / 2}}
    return Taken(wall_s, cpu_s, peak_mb, planned_s, json.dumps(said))


def test_an_images_cost_is_without_start_up() -> None:
    of = {1_000: taken(2, 3.0), 10_000: taken(3, 7.5), 100_000: taken(30, 57.0, 111)}
    assert growth.cost_ms(of) == {10_000: pytest.approx(0.5), 100_000: pytest.approx(0.55)}
    cost, memory = growth.image_bars(of)
    assert cost.ratio == pytest.approx(1 / 1.1) and memory.ratio == pytest.approx(100 / 111)
    assert not growth.image_bars({**of, 100_000: taken(30, 60.0)})[0].reached
    rows = growth.image_rows("local", of)
    assert [row[-2] for row in rows] == ["", "0.500", "0.550"]
    assert rows[0][2:5] == ["1.5", "2.0", "1,000"]


def test_limits_are_those_of_the_largest_size() -> None:
    of = {name: taken(5, 1) for name in growth.LIMITS_S}
    large = {**of, "status": taken(20, 1), "resume": taken(60, 1, planned_s=3)}
    bars = {bar.label.partition(",")[0]: bar for bar in growth.part_bars({10: of, 20: large})}
    assert bars["plan"].ratio == 3 and bars["resume"].ratio == 5  # until it works, not until it ends
    assert not bars["status"].reached


def test_the_median_turn_has_the_median_cpu_time() -> None:
    middle = growth.median([taken(3, 1), taken(1, 5), taken(2, 9)])
    assert (middle.wall_s, middle.cpu_s) == (2, 5)


def test_the_largest_job_is_in_the_middle() -> None:
    assert growth.schedule([1, 2, 3], 3) == [1, 2, 1, 2, 3, 1, 2]
    assert growth.schedule([3], 1) == [3]


def test_a_command_is_measured_from_outside() -> None:
    ballast = bytearray(600 << 20)  # its memory is its own, not what it was forked from
    one = growth.take("schema")
    assert json.loads(one.said)["title"] == "img2parquet job"
    assert 0 < one.cpu_s < 60 and 20 < one.peak_mb < 550 and one.until_planned_s == 0
    assert len(ballast)
    with pytest.raises(SystemExit, match=r"_plan\.parquet"):
        growth.take("status", "/nowhere")


@pytest.mark.slow
def test_what_is_prepared_is_what_a_killed_driver_leaves(tmp_path: Path) -> None:
    make_empty(tmp_path / "in", 6)
    model = make_model(tmp_path / "model")
    killed = write_job(tmp_path / "killed.yaml", model, tmp_path / "in", tmp_path / "killed")
    quiet = write_job(tmp_path / "quiet.yaml", model, tmp_path / "in", tmp_path / "quiet")
    commit_all_but(killed, 2)
    assert status(str(tmp_path / "killed")).parts_done == {"model": 4}
    assert run(load_job(killed), "local").parts_done_before == 4
    run(load_job(quiet), "local")
    assert verify(str(tmp_path / "killed")) == []
    written = [
        {path.name: path.read_bytes() for path in tmp_path.glob(f"{name}/model=*/*")} for name in ("killed", "quiet")
    ]
    assert written[0] == written[1] and len(written[0]) == 6


def test_images_are_as_many_as_asked_for(tmp_path: Path) -> None:
    make_images(tmp_path / "in", 25, per_shard=10)
    made = []
    for path in sorted((tmp_path / "in").iterdir()):
        with tarfile.open(path) as tar:
            made.append(len(tar.getnames()))
    assert made == [10, 10, 5]


@pytest.mark.slow
def test_growth_from_the_command_line(tmp_path: Path) -> None:
    assert main(["growth", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "growth.md").read_text()
    assert "| local | 160 |" in page and "| ray | 40 |" in page and "| 40 |" in page
    assert (tmp_path / "growth.png").is_file()
