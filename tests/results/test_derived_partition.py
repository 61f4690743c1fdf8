"""A probe's partition is a model's like any other: exported, shown, judged, by its name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import img2parquet
from img2parquet.cli import main
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.probe.linear_probe import fit_probe
from img2parquet.results.report import report
from tests.support.finished_outputs import copy_of, rows_of, small_run

PROBED = "tiny+probe"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small job's output with labels for all rows: of each its own passthrough column `label`."""
    folder = tmp_path_factory.mktemp("derived")
    uri = copy_of(small_run(), folder / "out")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "label"), *((row["key"], f"kind {row['label']}") for row in rows_of(uri))])
    fit_probe(uri, str(folder / "labels.csv"))
    return uri


def test_it_is_exported_by_its_name(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(out, PROBED)
    assert main(["export", out, "--model", PROBED, "--to", "label-studio", str(tmp_path / "tasks")]) == 0
    tasks = json.loads((tmp_path / "tasks" / "tasks-0000.json").read_text())
    found = [task["predictions"][0]["result"][0]["value"]["choices"] for task in tasks]
    assert found == [[row["labels"][0]["name"]] for row in rows] and f"{len(rows)} rows" in capsys.readouterr().out
    img2parquet.export(out, "csv", str(tmp_path / "all.csv"), model=PROBED)
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == [row["key"] for row in rows]
    assert main(["export", out, "--model", PROBED, "--to", "coco", str(tmp_path / "m.json")]) == 2
    assert "`coco` needs a mask" in capsys.readouterr().err
    assert main(["export", out, "--model", "tiny-probe", "--to", "csv", str(tmp_path / "x.csv")]) == 2
    assert PROBED in capsys.readouterr().err  # named among what there is


def test_the_report_shows_it_beside_its_model(out: str, tmp_path: Path) -> None:
    page = report(out, tmp_path / "r.html")[0].read_text()
    assert f"rows of <bdi>{PROBED}</bdi>" in page and "Fitted from a few labels" in page
    sections = page.split('<section class="model"')[1:]
    assert len(sections) == 2 and "kind 0" in sections[1] and "data-picture" in sections[1]


def test_it_is_evaluated(out: str) -> None:
    found = evaluate(out, "label", PROBED)  # text of digits: ids of the probe's classes
    assert found.rows == sum(row["label"] is not None for row in rows_of(out)) and found.column == "labels"


def test_a_report_of_one_that_is_damaged_has_a_note(out: str, tmp_path: Path) -> None:
    there = Path(copy_of(Path(out), tmp_path / "out"))
    (there / "_derived" / PROBED / "_SUCCESS").unlink()
    part = next((there / f"model={PROBED}").iterdir())
    part.write_bytes(part.read_bytes()[:-9])
    page = report(str(there), tmp_path / "r.html")[0].read_text()
    assert "does not label all rows yet" in page and f"{part.name} cannot be read" in page
