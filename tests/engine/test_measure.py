"""`plan --measure` runs a sample through the real steps, predicts what a run would give, and writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from img2parquet.cli import main
from img2parquet.dataset.plan import make_plan
from img2parquet.engine.driver import run
from img2parquet.engine.measure import STAGES, Measurement, estimate, measure
from img2parquet.engine.sample_source import Seen, count_rows, spread
from img2parquet.errors import InputError, UserError
from img2parquet.job import JobSpec, parse_job
from img2parquet.runners.local import LocalRunner
from img2parquet.schema import Part, Piece
from tests.support.small_job import (
    BROKEN,
    GOOD,
    PER_SHARD,
    ROWS,
    SHARDS,
    job_dict,
    jpeg,
    make_shards,
)


def job_of(made: Path, out: Path, **changes: Any) -> JobSpec:
    return parse_job({**job_dict(f"{made}/in/*.tar", made / "model", str(out)), **changes})


def measured(job: JobSpec, seconds: float = 60.0) -> Measurement:
    probed = LocalRunner().start(job)
    return measure(job, probed, make_plan(job, probed.cards, probed.dtype), seconds)


def written(out: Path, model: str = "tiny") -> int:
    return sum(path.stat().st_size for path in (out / f"model={model}").iterdir())


def test_a_sample_of_everything_says_what_the_run_then_does(made: Path, tmp_path: Path) -> None:
    job = job_of(made, tmp_path / "out")
    found = measured(job)
    assert not (tmp_path / "out").exists()
    assert (found.parts, found.parts_sampled, found.parts_failed) == (SHARDS, SHARDS, 0)
    assert (found.images, found.rows, found.rows_estimated) == (ROWS, ROWS, False)
    summary = run(job, "local")
    assert (found.rows, found.rejected) == (summary.rows_in, summary.rejected)
    assert found.bytes_out == {"tiny": written(tmp_path / "out")}  # each part was whole: not one byte off
    assert set(found.stages) == set(STAGES) and all(rate > 0 for rate in found.stages.values())
    assert "-bound: " in found.bottleneck
    assert (found.workers, found.worker, found.batch_size, found.cpus_per_gpu) == (2, "CPU", 8, None)
    busy_s = sum(1 / found.stages[stage] for stage in ("decode", "preprocess", "embed"))  # of one worker, for one image
    assert found.images_per_s <= found.workers / busy_s  # nobody is busy for longer than the sample took


def test_the_drift_of_the_other_kind_of_pixels_is_measured(made: Path, tmp_path: Path) -> None:
    """Images that need no resize are equal in both kinds; others differ by little."""

    def noted(folder: Path, preprocess: str, size: tuple[int, int]) -> tuple[float, int]:
        folder.mkdir()
        for n in range(3):
            Image.effect_noise(size, 90).convert("RGB").save(folder / f"{n}.png")
        source = {"kind": "folder", "uris": [str(folder)]}
        found = measured(job_of(made, folder / "out", input=source, preprocess=preprocess), seconds=1e-4)
        (note,) = [note for note in found.notes if note.startswith("pixels of `tiny` are")]
        own, other = re.findall(r"`preprocess: (\w+)`", note)
        assert (own, other) == (("exact", "pil") if preprocess == "exact" else ("pil", "exact"))
        match = re.search(r"by ([\d.]+) of 255 on average and by (\d+) at most, over [23] images", note)
        assert match, note
        return float(match[1]), int(match[2])

    assert noted(tmp_path / "same", "exact", (73, 73)) == (0.0, 0)  # 256 / 224 of the model's 64
    mean, most = noted(tmp_path / "larger", "exact", (200, 150))
    assert 0 < mean < 2 and 1 <= most < 60
    assert noted(tmp_path / "back", "pil", (200, 150))[0] > 0


def test_a_short_sample_estimates_rows_from_bytes(made: Path, tmp_path: Path) -> None:
    found = measured(job_of(made, tmp_path / "out"), seconds=1e-4)
    assert found.images == 2 * SHARDS and found.rows_estimated
    assert any("estimated from the bytes" in note for note in found.notes)
    assert any("takes too long for the sample" in note for note in found.notes)
    assert abs(found.rows - ROWS) < ROWS / 3
    run(job_of(made, tmp_path / "out"), "local")
    assert abs(found.bytes_out["tiny"] - written(tmp_path / "out")) < written(tmp_path / "out") / 3


def test_a_few_parts_stand_for_many(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    make_shards(folder, shards=30, per_shard=6, broken=False)
    job = parse_job(job_dict(f"{folder}/*.tar", made / "model", str(tmp_path / "out")))
    found = measured(job)
    assert (found.parts_sampled, found.parts, found.images) == (8, 30, 48)
    assert found.rows_estimated and abs(found.rows - 180) < 180 / 4
    run(job, "local")
    assert abs(found.bytes_out["tiny"] - written(tmp_path / "out")) < written(tmp_path / "out") / 4


def test_rows_that_the_plan_counts_are_no_estimate(made: Path, tmp_path: Path) -> None:
    rows = [{"key": str(n), "image": jpeg(n)} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet", row_group_size=10)
    source = {"kind": "parquet", "uris": [str(tmp_path / "images.parquet")], "key": "key"}
    found = measured(job_of(made, tmp_path / "out", input=source), seconds=1e-4)
    assert found.images < 40 and (found.rows, found.rows_estimated) == (40, False)


def test_two_models_count_each_image_once(made: Path, tmp_path: Path) -> None:
    job = job_of(made, tmp_path / "out")
    twice = (job.models[0], job.models[0].model_copy(update={"name": "again"}))
    found = measured(job.model_copy(update={"models": twice}))
    assert found.images == ROWS and sum(found.rejected.values()) == len(BROKEN)
    assert found.bytes_out["tiny"] > 0 and set(found.bytes_out) == {"tiny", "again"}


def test_what_cannot_be_measured_says_so(made: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "page.jpg").write_bytes(b"<html>no</html>")
    broken = job_of(made, tmp_path / "out", input={"kind": "folder", "uris": [str(tmp_path / "in")]})
    with pytest.raises(InputError, match=r"all 2 images of the sample were rejected \(not_an_image 2\)"):
        measured(broken)
    with pytest.raises(UserError, match="0 seconds to measure"):
        measured(job_of(made, tmp_path / "out"), seconds=0)
    shards = make_shards(tmp_path / "changed", shards=2, broken=False)
    source = {"kind": "webdataset", "uris": [str(tmp_path / "changed/*.tar")], "shards_per_part": 1}
    job = job_of(made, tmp_path / "out", input=source)
    probed = LocalRunner().start(job)
    plan = make_plan(job, probed.cards, probed.dtype)
    shards[0].write_bytes(shards[0].read_bytes() + bytes(10_240))  # changed since
    found = measure(job, probed, plan, 60.0)
    assert (found.parts_failed, found.images) == (1, PER_SHARD)
    assert any("1 parts of the sample could not be done; part 0: " in note for note in found.notes)
    shards[1].unlink()
    with pytest.raises(InputError, match="none of the 2 parts of the sample could be measured: "):
        measure(job, probed, plan, 60.0)


def test_the_estimate(made: Path, tmp_path: Path) -> None:
    found = measured(job_of(made, tmp_path / "out"), seconds=1e-4)
    as_here, more = estimate(found), estimate(found, workers=7, price_per_hour=3.0)
    assert (as_here.workers, as_here.machines, as_here.cost) == (2, 1, None)
    assert as_here.eta_s == pytest.approx(found.rows / found.images_per_s)
    assert more.eta_s == pytest.approx(as_here.eta_s * 2 / 7)
    assert more.machines == 4 and more.cost == pytest.approx(more.eta_s / 3600 * 4 * 3.0)
    for workers, price, words in ((0, None, "0 workers"), (None, -1.0, "price of -1"), (None, float("nan"), "nan")):
        with pytest.raises(UserError, match=words):
            estimate(found, workers, price)


def test_parts_are_spread_over_the_plan() -> None:
    parts = [Part(index, (Piece(f"{index}.tar", 100, "e"),)) for index in range(100)]
    assert [part.index for part in spread(parts, 4)] == [12, 37, 62, 87]
    assert spread(parts[:3], 8) == parts[:3]
    counted = Part(100, (Piece("c.parquet", 1000, "e", rows=50),))
    assert count_rows([*parts, counted], {}) == (50 + 100 * 100 // 20, True)
    assert count_rows([counted], {}) == (50, False)
    empty, full, cut = Seen(is_whole=True), Seen(rows=20, is_whole=True), Seen(rows=2, offsets=[0, 10, 2])
    assert count_rows(parts[:2], {0: empty, 1: full}) == (20, False)
    assert count_rows(parts, {0: empty, 1: full}) == (20 + 98 * 10, True)  # 200 bytes hold 20 images
    assert count_rows(parts[:4], {0: cut}) == (40, True)  # 10 bytes an image


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_dict(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))))
    assert main(["plan", str(path), "--measure", "--workers", "2000", "--price-per-hour", "0.5"]) == 0
    said = capsys.readouterr().out
    for words in (
        f"measured   {ROWS} images of 6 of 6 parts",
        f"{ROWS - GOOD} rejected; nothing was written",
        "  preprocess",
        "\nbottleneck ",
        "-bound: ",
        "\nCPUs       no GPU here",
        "batch      8, `auto` would use 32",
        "with 2,000 CPUs on 1,000 machines like this one",
        "bytes of model=tiny",
        "\ncost       ",
    ):
        assert words in said, said
    assert main(["plan", str(path), "--measure", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parts"] == 6 and values["models"]["tiny"]["parts_done"] == 0
    assert values["measured"]["rows"] == ROWS and values["estimate"]["workers"] == 2
    assert main(["plan", str(path), "--json"]) == 0
    assert "measured" not in json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "8"], "add --measure"),
        (["--measure", "--workers", "0"], "0 workers"),
        (["--measure", "--price-per-hour", "-2"], "price of -2"),
        (["--measure", "--seconds", "-1"], "-1 seconds"),
    ],
)
def test_wishes_that_cannot_be(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_dict(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))))
    assert main(["plan", str(path), *options]) == 2
    assert words in capsys.readouterr().err
