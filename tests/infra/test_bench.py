"""The benchmark suite measures what it says: turns, medians, floors, and that contestants agree."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.bench import decode, models
from infra.bench.__main__ import main
from infra.bench.contest import Array, Call, Record, Rules, Turn, compete
from infra.bench.report import Bar, Report, draw

QUICK = Rules(rounds=1, round_s=0.0, quick=True)
TINY_LEVIT = models.Subject(
    "facebook/levit-128S",
    {"float32": 0.001, "bfloat16": 1e6},
    changes={"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]},
)


def prepare_sleeper(seconds: float, value: float) -> Call:
    def call() -> Array:
        time.sleep(seconds)
        return np.array([value])

    return call


def prepare_failure() -> Call:
    raise ValueError("broken on purpose")


# -- the contest ---------------------------------------------------------------------------------------------------


def test_turns_are_timed_in_each_contestants_own_process() -> None:
    rules = Rules(rounds=2, round_s=0.08, quick=True)
    slow, fast = partial(prepare_sleeper, 0.04, 1.0), partial(prepare_sleeper, 0.01, 2.0)
    records = compete({"slow": slow, "fast": fast}, rules)
    assert {name: list(record.output) for name, record in records.items()} == {"slow": [1.0], "fast": [2.0]}
    assert all(len(record.turns) == 2 for record in records.values())
    assert 0.04 <= records["slow"].wall_s < 0.4 and 0.01 <= records["fast"].wall_s < 0.1
    assert records["slow"].cpu_s < 0.02  # it slept


def test_a_contestant_that_fails_ends_the_contest_by_name() -> None:
    with pytest.raises(SystemExit, match="contestant `broken` failed"):
        compete({"broken": prepare_failure}, QUICK)


def test_disturbed_turns_are_not_counted() -> None:
    record = Record(np.zeros(1), [Turn(1.0, 1.0, 0.0), Turn(9.0, 2.0, 0.5), Turn(2.0, 1.5, 0.02), Turn(3.0, 1.7, 0.01)])
    assert (record.clean, record.wall_s, record.cpu_s) == (3, 2.0, 1.5)
    assert Record(np.zeros(1), [Turn(9.0, 2.0, 0.5)]).wall_s == 9.0


# -- what is reported ----------------------------------------------------------------------------------------------


def record(wall_s: float, *output: float) -> Record:
    return Record(np.array(output, np.float32), [Turn(wall_s, wall_s * 2, 0.0)])


def measured(ours_float32: float = 1.0) -> dict[str, Record]:
    walls = dict(zip((one.name for one in models.CONTESTANTS), (8.0, 4.0, 2.0, 4.0, 1.0), strict=True))
    return {
        name: record(wall_s, 4.0, ours_float32 if name == "ours float32" else 1.0) for name, wall_s in walls.items()
    }


@pytest.fixture(params=[True, False], ids=["matrix units", "none"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor multiplies matrices of bfloat16, whichever this one is."""
    monkeypatch.setattr(models.machine, "multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


def test_ratios_are_to_both_of_transformers_columns(units: bool) -> None:
    rows = {row[0]: row[1:] for row in models.table(models.SUBJECTS[0], measured(), batch=32)}
    assert rows["ours bfloat16"] == [
        "32.0",
        "62.50",
        "8.00",
        "4.00",
        "8.00",
        "4.3" if units else "",
        "0.0e+00",
        "1 of 1",
    ]
    assert rows["transformers bfloat16, our allocator settings"][2:4] == ["4.00", "2.00"]


def test_bars_know_their_floor(units: bool) -> None:
    bars = models.bars_of(models.SUBJECTS[0], measured())
    assert [(bar.ratio, bar.reached) for bar in bars] == [(2.0, True), (8.0, True)][: 1 + units]
    assert not Bar("x", 1.04, 1.05).reached


def test_a_different_output_is_told_with_its_size() -> None:
    ours = models.CONTESTANTS[3]
    assert models.differs(measured(), ours) == 0
    assert models.differs(measured(ours_float32=1.4), ours) == pytest.approx(0.1)
    assert models.differs(measured(ours_float32=float("nan")), ours) == float("inf")


def test_a_page_names_what_is_below_its_floor(tmp_path: Path) -> None:
    bars = [Bar("levit float32", 1.5, 1.9), Bar("levit bfloat16", 5.0, 4.3)]
    made = Report("models", "Title", ["how"], ["model", "x"], [["levit", "1.5"]], bars, agrees=True)
    page, picture = made.write(tmp_path)
    assert "Below the floor: levit float32: 1.50 of 1.9." in page.read_text()
    assert "| levit | 1.5 |" in page.read_text()
    assert Image.open(picture).size == draw("Title", bars).size
    assert "Outputs do not agree" in replace(made, agrees=False).markdown()


def test_every_floor_is_issue_threes() -> None:
    floors = [(subject.floors["float32"], subject.floors["bfloat16"]) for subject in models.SUBJECTS]
    assert floors == [(1.9, 4.3), (1.7, 5.3), (2.2, 9.0), (1.05, 4.8), (1.1, 5.3)]
    ours, fast, pillow, transformers = decode.OURS, decode.FAST, decode.PILLOW, decode.TRANSFORMERS
    assert [images.floors for images in decode.SETS] == [
        {(ours, pillow): 1.6, (ours, transformers): 2.4, (fast, ours): 0.97},
        {(ours, pillow): 2, (fast, pillow): 2.7},
        {},
    ]


def test_generated_images_are_the_same_every_time_and_of_their_size() -> None:
    one, two = (decode.generate(decode.SETS[0], 16) for _ in range(2))
    assert one == two and one != decode.generate(decode.SETS[0], 16, seed=1)
    sizes = [Image.open(io.BytesIO(file)).size for file in one]
    assert len(set(sizes)) > 8 and 350 < np.mean([width for width, _ in sizes]) < 490
    assert 60_000 < np.mean([len(file) for file in one]) < 130_000


def test_an_unknown_suite_is_misuse() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model"])
    assert stopped.value.code == 2


# -- the suites themselves -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_from_checkpoint_to_page(tmp_path: Path, units: bool) -> None:
    made = models.report(QUICK, 1, [], [TINY_LEVIT])
    assert made.agrees and [bar.reached for bar in made.bars] == [True, False][: 1 + units]
    page, _ = made.write(tmp_path)
    assert page.name == f"models{'' if units else '-without-amx'}-1-threads.md"
    assert all(f"| {one.name} |" in page.read_text() for one in models.CONTESTANTS)


@pytest.mark.slow
def test_decoding_from_the_command_line(tmp_path: Path) -> None:
    assert main(["decode", "--quick", "--only", "imagenet-like", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "decode-imagenet-like.md").read_text()
    assert all((f"| {one.name} |" in page) == one.is_installed for one in decode.CONTESTANTS)
    assert all((f"{one.name}: not measured" in page) != one.is_installed for one in decode.CONTESTANTS)
    assert "1600x1200" not in page and "| levit-photos, fast |" in page
    assert Image.open(tmp_path / "decode-imagenet-like.png").format == "PNG"
