"""Whole jobs as commands: what they cost is counted to the last child, speeds are of the steady job, vectors agree."""

from __future__ import annotations

import math
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.bench import efficiency, end_to_end, jobs, models, peers
from infra.bench.command import Pair, run, take_turns
from infra.bench.contest import Record, Rules, Turn
from infra.bench.images import PER_SHARD, shards
from infra.bench.jobs import calibrated, checkpoint, least_cosine, vectors
from infra.bench.peers import PEERS, Settings

QUICK = Rules(rounds=1, round_s=0.0, quick=True)
LEVIT, BIT, BEIT = end_to_end.SUBJECTS
TINY = models.Subject("facebook/vit-msn-small", {}, changes=efficiency.TINY)
BUSY = "import time\nuntil = time.process_time() + 0.4\nwhile time.process_time() < until: pass\n"


def turns(*walls_s: float, foreign: float = 0.0) -> Record:
    return Record(np.empty(0), [Turn(wall_s, wall_s * 2, foreign) for wall_s in walls_s])


def pair(small_s: float, large_s: float, images: tuple[int, int] = (100, 300)) -> Pair:
    return Pair(images, turns(small_s), turns(large_s))


# -- commands ------------------------------------------------------------------------------------------------------


def test_seconds_of_a_grandchild_that_was_left_behind_are_counted(tmp_path: Path) -> None:
    """As Ray's workers are: in a session of their own, ending after the command that started them."""
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BUSY!r}], start_new_session=True)"
    turn = run([sys.executable, "-c", orphan], tmp_path / "log")
    assert 0.4 <= turn.cpu_s < 2


def test_seconds_of_a_child_that_nobody_asks_for_are_counted(tmp_path: Path) -> None:
    """As raylet's are: who ignores the end of a child is never told what it used, and nor is anyone above."""
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {BUSY!r}]); time.sleep(2)"
    )
    assert 0.3 <= run([sys.executable, "-c", deaf], tmp_path / "log").cpu_s < 2


def test_wall_seconds_are_the_commands_alone(tmp_path: Path) -> None:
    orphan, started = "import subprocess; subprocess.Popen(['sleep', '4'], start_new_session=True)", time.monotonic()
    wall_s = run([sys.executable, "-c", orphan], tmp_path / "log").wall_s
    assert 0 < wall_s < time.monotonic() - started - 1  # which waits for the orphan as well


def test_a_command_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)no such thing.*failed with 3"):
        run([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], tmp_path / "log")


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SystemExit, match="failed with"):
        run(["sleep", "60"], tmp_path / "log", limit_s=0.3)
    assert time.monotonic() - started < 10


def test_commands_see_no_thread_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['X'])"
    run([sys.executable, "-c", code], tmp_path / "log", env={"X": "1"})
    assert (tmp_path / "log").read_text() == "None 1\n"


# -- two sizes -----------------------------------------------------------------------------------------------------


def test_speed_is_of_the_images_that_the_larger_job_has_more() -> None:
    one = pair(6.0, 8.0)
    assert (one.images_per_s, one.startup_s, one.cpu_ms_per_image) == pytest.approx((100.0, 5.0, 20.0))
    assert math.isnan(pair(6.0, 5.9).images_per_s)


def test_turns_go_on_until_enough_are_clean_and_no_longer() -> None:
    disturbed = iter([0.5, 0.0, 0.0, 0.0])
    taken: list[tuple[str, int]] = []

    def take(name: str, foreign: float, images: int) -> Turn:
        taken.append((name, images))
        return Turn(1.0, 1.0, foreign)

    pairs = {"a": Pair((1, 3)), "b": Pair((1, 3))}
    takes = {"a": lambda images: take("a", next(disturbed), images), "b": lambda images: take("b", 0.0, images)}
    take_turns(takes, pairs, Rules(), rounds=1, pause_s=0.0)
    assert taken == [("a", 1), ("a", 3), ("b", 1), ("b", 3), ("a", 1)]
    assert pairs["a"].clean == 1


# -- images and checkpoints ----------------------------------------------------------------------------------------


def test_shards_are_the_same_every_time_and_name_every_image(tmp_path: Path) -> None:
    one, two = shards(2, tmp_path / "one", distinct=8), shards(2, tmp_path / "two", distinct=8)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    names = [name for path in one for name in members(path)]
    assert len(set(names)) == 2 * PER_SHARD
    assert not list((tmp_path / "one").glob("*.[0-9]*"))


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_checkpoints_say_the_size_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from img2parquet.models import ModelSpec, read_card

    monkeypatch.setattr(jobs, "WORK", tmp_path)
    small = replace(TINY, size=112)
    card = read_card(ModelSpec(str(checkpoint(small))))
    assert card.preprocess.size_HW == (112, 112) and card.gives["pooled"] == (16,)
    assert checkpoint(small) != checkpoint(TINY)


def test_only_the_named_norms_are_weakened(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    save_file({"a.norm3.weight": torch.ones(2), "a.norm2.weight": torch.ones(2)}, file)
    jobs._weaken_branches(file, ".norm3.")
    weights = load_file(file)
    assert weights["a.norm3.weight"].tolist() == pytest.approx([0.1, 0.1])
    assert weights["a.norm2.weight"].tolist() == [1, 1]


# -- what is compared ----------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: dict[str, list[float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": list(rows), "embedding": list(rows.values())}), folder / name)


def test_vectors_are_read_from_whatever_files_a_tool_writes(tmp_path: Path) -> None:
    write(tmp_path / "model=x", "part-0.parquet", {"a": [1.0, 2.0]})
    write(tmp_path, "x.parquet", {"b": [3.0, 4.0]})
    write(tmp_path, "_plan.parquet", {"c": [0.0, 0.0]})
    assert {key: list(vector) for key, vector in vectors(tmp_path).items()} == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    write(tmp_path, "y.parquet", {"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="3 rows, but 2 keys"):
        vectors(tmp_path)


def test_vectors_are_compared_by_key_and_without_their_mean() -> None:
    random = np.random.default_rng(0)
    reference = {str(key): 1000 + random.normal(size=16) for key in range(8)}
    shuffled = dict(reversed(reference.items()))
    assert least_cosine(shuffled, reference) == pytest.approx(1.0)
    unrelated = {key: 1000 + random.normal(size=16) for key in reference}
    assert least_cosine(unrelated, reference) < 0.5
    assert least_cosine({key: reference[key] for key in list(reference)[1:]}, reference) == 0
    assert least_cosine({**reference, "0": np.full(16, np.nan)}, reference) == 0


# -- peers ---------------------------------------------------------------------------------------------------------


def test_a_peer_gets_the_fastest_of_its_settings_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CALIBRATION", tmp_path / "calibration.json")
    asked: list[Settings] = []

    def take(settings: Settings) -> Turn:
        asked.append(settings)
        return Turn(1.0 if settings == PEERS[0].settings[1] else 2.0, 1.0, 0.0)

    for _ in range(2):
        assert calibrated(PEERS[0], "levit", take) == PEERS[0].settings[1]
    assert asked == list(PEERS[0].settings)
    calibrated(PEERS[0], "bit", take)
    assert len(asked) == 2 * len(PEERS[0].settings)


def test_constraints_pin_what_both_environments_share() -> None:
    ours = dict(line.split("==") for line in Path("infra/constraints.txt").read_text().splitlines() if "==" in line)
    theirs = dict(line.split("==") for line in peers.CONSTRAINTS.read_text().splitlines() if "==" in line)
    shared = ("torch", "transformers", "ray", "pillow", "numpy")
    assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}
    assert "torchvision" not in theirs


# -- what is reported ----------------------------------------------------------------------------------------------


def cell(dtype: str, local_s: float, ray_s: float, *peers_s: float) -> end_to_end.Cell:
    """Seconds that 200 more images take."""
    names = [*end_to_end.OURS, *(peer.name for peer in PEERS)]
    pairs = {name: pair(5.0, 5.0 + more_s) for name, more_s in zip(names, (local_s, ray_s, *peers_s), strict=False)}
    return end_to_end.Cell(LEVIT, dtype, pairs, dict.fromkeys(pairs, 1.0))


def test_ratios_are_of_the_best_peer_in_the_same_precision_and_in_float32() -> None:
    cells = [cell("float32", 1.0, 2.0, 4.0, 8.0, 16.0), cell("bfloat16", 0.5, 1.0, 2.0, 4.0, 8.0)]
    rows = {row[0]: row for row in end_to_end.table(cells[1], cells, auto="bfloat16")}
    assert rows["ours, local"][5:8] == ["4.00", "8.00", "2, 3.5 x float32"]
    assert rows["Daft"][5:8] == ["0.50", "1.00", ""]
    bars = [bar for one in cells for bar in end_to_end.bars_of(one, cells, auto="bfloat16")]
    assert [(bar.ratio, bar.floor) for bar in bars] == [(4.0, 2.0), (4.0, 2.0), (8.0, 3.5)]
    assert len(end_to_end.bars_of(cells[0], cells, auto="float32")) == 1


def test_peers_far_behind_the_best_are_measured_once() -> None:
    one = cell("float32", 1.0, 2.0, 4.0, 4.5, 8.0)
    assert [name for name in one.pairs if one.contends(name)] == ["ours, local", "ours, ray", "Ray Data", "Daft"]


def test_who_decodes_with_libjpeg_has_to_agree_closely() -> None:
    one = cell("float32", 1.0, 2.0, 4.0, 4.5)
    one.settings = {"Ray Data": Settings(2, 1, "model"), "Daft": Settings(2, 1, "engine")}
    one.cosines = dict.fromkeys(one.pairs, 0.995)
    assert [name for name in one.pairs if one.agrees(name)] == ["Daft"]
    one.cosines["Daft"] = 0.97
    assert not one.agrees("Daft")


def test_every_floor_is_issue_fours() -> None:
    assert [subject.floors for subject in (LEVIT, BIT, BEIT)] == [
        {"float32": 2.0, "bfloat16": 2.0},
        {"float32": 2.0, "bfloat16": 2.0},
        {"float32": 1.1, "bfloat16": 1.25},
    ]
    assert [subject.auto_floor for subject in (LEVIT, BIT, BEIT)] == [3.5, 7.0, 4.5]
    assert efficiency.FLOORS == {"local": 0.9, "ray": 0.85}


def test_jobs_three_times_as_long() -> None:
    sizes = [size for subject in end_to_end.SUBJECTS for size in subject.shards.values()]
    sizes += [subject.shards for subject in efficiency.SUBJECTS]
    assert all(large == 3 * small for small, large in sizes)


def test_efficiency_is_of_all_cores_and_the_sum_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "cores", lambda: 2)
    alone = {"decode": 0.002, "forward": 0.007, "encode": 0.001}
    one = efficiency.Measured(
        efficiency.SUBJECTS[0], "float32", alone, {key: 2 * value for key, value in alone.items()}
    )
    one.jobs = {"local": pair(5.0, 6.0), "ray": pair(5.0, 7.0)}
    assert (one.ideal, one.ideal_at_once) == pytest.approx((200.0, 100.0))
    assert [(round(bar.ratio, 3), bar.reached) for bar in efficiency.bars_of(one)] == [(1.0, True), (0.5, False)]
    unknown = replace(one, jobs={"local": pair(5.0, 4.0)})
    assert not efficiency.bars_of(unknown)[0].reached
    assert efficiency.table(one)[2][3:6] == ["0.50", "0.85", "1.00"]


# -- the suites themselves -----------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (jobs, end_to_end, efficiency):
        monkeypatch.setattr(module, "WORK", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_end_to_end_without_peers(work: Path) -> None:
    subject = end_to_end.Subject(TINY, {"float32": (1, 3)}, {"float32": 2.0}, 4.0)
    made = end_to_end.report(QUICK, 1, [], [subject])
    assert made.agrees and not made.bars
    assert [row[0] for row in made.rows] == ["**vit-msn-small, float32**", "ours, local", "ours, ray"]
    assert [row[8] for row in made.rows[1:]] == ["1.00000", "1.00000"]
    assert "peers are not installed" in made.markdown()


@pytest.mark.slow
def test_efficiency_of_both_runners(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, asked = jobs.Job.ours, list[str]()

    def locally(job: jobs.Job, runner: str) -> Turn:
        """Ray takes half a minute to start, and the test before this one has run the same command under it."""
        asked.append(runner)
        return ours(job, "local")

    monkeypatch.setattr(jobs.Job, "ours", locally)
    made = efficiency.report(QUICK, 1, [], [efficiency.Subject("tiny", TINY, (1, 3))])
    assert asked == ["local", "local", "ray", "ray"]
    assert [row[0] for row in made.rows[1:]] == ["local", "ray"]
    assert float(made.rows[1][2]) > 5  # images a second of all cores: a tiny model, on a machine however busy
