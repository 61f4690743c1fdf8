"""Probe labels are a partition of the same output that mirrors its source: created once, resumed, verified."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from img2parquet.cli import main
from img2parquet.dataset.commit import Output
from img2parquet.dataset.derived import derived_history, mirror_problems
from img2parquet.engine.driver import run
from img2parquet.errors import InputError, RunMismatch
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.probe.classifier import calibration_error
from img2parquet.results.probe.label_file import read_labels
from img2parquet.results.probe.linear_probe import fit_probe
from img2parquet.results.reader import open_results, read_rejects, status
from img2parquet.results.verify import verify
from tests.support.finished_outputs import copy_of, part_paths, rows_of, small_run
from tests.support.small_job import small_job

PROBED = "tiny+probe"


@pytest.fixture
def out(tmp_path: Path) -> str:
    return copy_of(small_run(), tmp_path / "out")


def sides(uri: str) -> dict[str, str]:
    """Label each row by the side of the embeddings' median it lies on, which a classifier can learn."""
    rows = rows_of(uri)
    values = np.array([row["embedding"] for row in rows], np.float64)
    along = np.linalg.svd(values - values.mean(0), full_matrices=False)[0][:, 0]
    return {row["key"]: "left" if a < np.median(along) else "right" for row, a in zip(rows, along, strict=True)}


def write(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("key", "label")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture
def labels(out: str, tmp_path: Path) -> str:
    return write(tmp_path / "labels.csv", list(sides(out).items())[::3])


def test_all_rows_are_labelled_and_the_union_verifies(out: str, labels: str) -> None:
    made = fit_probe(out, labels)
    assert (made.model, made.parts, made.parts_now, made.parts_left) == (PROBED, 6, 6, 0)
    source, rows = rows_of(out), rows_of(out, PROBED)
    for name in ("key", "shard", "width", "height", "warnings", "label", "caption"):
        assert [row[name] for row in rows] == [row[name] for row in source]
    assert made.rows == len(rows) == len(source)
    known = sides(out)
    right = np.array([row["labels"][0]["name"] == known[row["key"]] for row in rows])
    assert right.mean() > 0.85 and made.report["accuracy"] > 0.7
    for row in rows:
        scores = [label["score"] for label in row["labels"]]
        assert row["confidence"] == scores[0] == max(scores) and sum(scores) == pytest.approx(1, abs=1e-5)
    confidence = np.array([row["confidence"] for row in rows])
    assert calibration_error(np.stack([confidence, 1 - confidence], 1), (~right).astype(int)) < 0.2
    assert verify(out) == []


def test_its_parts_mirror_the_source_with_its_rejects(out: str, labels: str) -> None:
    fit_probe(out, labels)
    for source, path in zip(part_paths(out), part_paths(out, PROBED), strict=True):
        theirs, ours = pq.read_metadata(source).metadata, pq.read_metadata(path).metadata
        for name in (b"img2parquet.part", b"img2parquet.rows_in", b"img2parquet.rejects"):
            assert ours[name] == theirs[name]
        assert ours[b"img2parquet.identity"] != theirs[b"img2parquet.identity"]
    assert read_rejects(out).num_rows == 3  # rejects of the output's own run


def test_a_second_call_does_nothing_and_a_lost_part_comes_back_the_same(out: str, labels: str) -> None:
    first = fit_probe(out, labels)
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    again = fit_probe(out, labels)
    assert again.parts_now == 0 and again.report == first.report
    assert {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} == before
    lost = part_paths(out, PROBED)[3]
    lost.unlink()
    assert [p for p in verify(out) if "missing" in p] == [f"missing: model={PROBED}/{lost.name}"]
    assert fit_probe(out, labels).parts_now == 1 and lost.read_bytes() == before[lost]


def test_a_killed_probe_goes_on_with_the_classifier_it_had(out: str, labels: str, tmp_path: Path) -> None:
    other = copy_of(Path(out), tmp_path / "other")
    fit_probe(out, labels)
    records = Path(other, "_derived", PROBED)
    records.mkdir(parents=True)
    shutil.copy(Path(out, "_derived", PROBED, "_classifier.safetensors"), records)
    fit_probe(other, labels)
    for a, b in zip(part_paths(out, PROBED), part_paths(other, PROBED), strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_it_follows_a_run_that_is_not_complete(out: str, labels: str, tmp_path: Path) -> None:
    late = [part_paths(out)[0], part_paths(out)[5]]
    known = [row for row in csv.reader(Path(labels).read_text().splitlines()) if row[0][:3] not in ("000", "005")]
    some = write(tmp_path / "some.csv", known[1:])
    for path in late:
        shutil.move(path, tmp_path / path.name)
    made = fit_probe(out, some)
    assert (made.parts_now, made.parts_left) == (4, 2) and not Path(out, "_derived", PROBED, "_SUCCESS").exists()
    for path in late:
        shutil.move(tmp_path / path.name, path)
    made = fit_probe(out, some)
    assert (made.parts_now, made.parts_left, made.rows) == (2, 0, len(rows_of(out))) and verify(out) == []


def test_other_labels_need_another_name(out: str, labels: str, tmp_path: Path) -> None:
    fit_probe(out, labels)
    flipped = [(key, "up" if side == "left" else "down") for key, side in list(sides(out).items())[::3]]
    other = write(tmp_path / "other.csv", flipped)
    with pytest.raises(RunMismatch, match="the labels differ"):
        fit_probe(out, other)
    assert fit_probe(out, other, name="tiny+updown").parts_now == 6 and verify(out) == []
    with pytest.raises(InputError, match="--name tiny"):
        fit_probe(out, labels, name="tiny")


def test_the_run_itself_and_its_readers_go_on(out: str, labels: str) -> None:
    from img2parquet.dataset.plan import decode_plan

    fit_probe(out, labels)
    assert open_results(out, "tiny+probe").to_table().num_rows == len(rows_of(out))
    assert open_results(out).to_table().column("model").unique().to_pylist() == ["tiny"]
    now = status(out)
    assert now.is_complete and now.parts_done == {"tiny": 6}
    folder = small_run().parent
    assert decode_plan(Path(out, "_plan.parquet").read_bytes()).parts
    summary = run(small_job(str(folder / "in" / "*.tar"), folder / "model", out), "local")
    assert summary.parts_done_before == 6


@pytest.mark.parametrize("damage", ["byte", "foreign", "record"])
def test_verify_finds_damage_in_the_derived_partition(out: str, labels: str, damage: str) -> None:
    fit_probe(out, labels)
    path = part_paths(out, PROBED)[1]
    if damage == "foreign":
        shutil.copy(path, path.with_name("part-000009-0123456789abcdef.parquet"))
    else:
        victim = path if damage == "byte" else Path(out, "_derived", PROBED, "_manifest.parquet")
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    said = " ".join(verify(out))
    assert {"byte": path.name, "foreign": "not of this run", "record": "_manifest.parquet"}[damage] in said


def test_verify_compares_keys_with_the_source(out: str, labels: str) -> None:
    fit_probe(out, labels)
    output = Output.at(out)
    history = derived_history(output, PROBED, output.files())
    assert history
    ours, theirs = (f"model={model}/{part_paths(out, model)[0].name}" for model in (PROBED, "tiny"))
    assert not list(mirror_problems(history, {ours: {"s": ["a", "b"]}, theirs: {"s": ["a", "b"]}}))
    assert list(mirror_problems(history, {ours: {"s": ["a", "b"]}, theirs: {"s": ["b", "a"]}}))


def test_it_can_be_evaluated_like_any_model(out: str, tmp_path: Path) -> None:
    names = write(tmp_path / "captions.csv", [(row["key"], str(row["label"])) for row in rows_of(out)[::2]])
    fit_probe(out, names)
    found = evaluate(out, "label", PROBED)
    right = [str(row["label"]) == row["labels"][0]["name"] for row in rows_of(out, PROBED)]
    assert found.top1 == pytest.approx(np.mean(right)) and found.top5 == 1.0


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([("a", "x")] * 3, ("name", "label"), "no column `key`"),
        ([("a", "x"), ("b", "")], ("key", "label"), "line 3: its label is empty"),
        ([("a", "x"), ("b",)], ("key", "label"), "line 3 has only 1 fields"),
        ([("a", "x"), ("b", "x"), ("a", "y")], ("key", "label"), "line 4: the key `a` is already in line 2, as `x`"),
        ([("a", "x"), ("b", "x"), ("c", "x")], ("key", "label"), "all rows have the label `x`"),
        ([("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")], ("key", "label"), "too few rows of 1 of 2 classes: `y` 1"),
        ([], ("key", "label"), "the file has no labels"),
    ],
)
def test_unusable_label_files_are_refused(
    rows: list[tuple[str, ...]], header: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        read_labels(write(tmp_path / "labels.csv", rows, header))
    assert said in str(error.value)


def test_unreadable_label_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_labels(str(tmp_path / "none.csv"))
    (tmp_path / "x.csv").write_bytes(b"key,label\n\xff,1\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_labels(str(tmp_path / "x.csv"))


def test_numeric_classes_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [(f"k{i}", str((2, 10, -1)[i % 3])) for i in range(9)]
    file = read_labels(write(tmp_path / "labels.csv", rows))
    assert file.classes == ("-1", "2", "10")
    odd = read_labels(write(tmp_path / "odd.csv", [(f"k{i}", ("--5", "5")[i % 2]) for i in range(9)]))
    assert odd.classes == ("--5", "5")
    assert read_labels(write(tmp_path / "back.csv", rows[::-1])).sha256 == file.sha256


def test_unknown_keys_are_reported_with_their_reject_reason(out: str, labels: str, tmp_path: Path) -> None:
    known = list(csv.reader(Path(labels).read_text().splitlines()))[1:]
    bad = write(tmp_path / "bad.csv", [*known, ("000/0003", "left"), ("nobody", "right")])
    with pytest.raises(InputError) as error:
        fit_probe(out, bad)
    assert "2 of" in str(error.value) and "`000/0003` (rejected: empty)" in str(error.value)
    assert "`nobody`" in str(error.value) and not Path(out, "_derived").exists()


def test_shards_tell_equal_keys_apart(out: str, tmp_path: Path) -> None:
    rows = [(row["key"], sides(out)[row["key"]], row["shard"]) for row in rows_of(out)[::4]]
    path = write(tmp_path / "labels.csv", rows, ("key", "label", "shard"))
    assert fit_probe(out, path).rows == len(rows_of(out))
    wrong = write(tmp_path / "wrong.csv", [(k, s, "elsewhere") for k, s, _ in rows], ("key", "label", "shard"))
    with pytest.raises(InputError, match="have no row of"):
        fit_probe(out, wrong, name="other")


def test_on_the_command_line(out: str, labels: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", out, "--labels", labels]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and f"model={PROBED}, 6 of 6 parts now" in said
    record = json.loads(Path(out, "_derived", PROBED, "_run.json").read_text())
    assert record["report"]["rows"] == 39 and record["report"]["judged_by"] == "held_out"
    assert main(["verify", out]) == 0
    assert main(["probe", out, "--labels", "nowhere.csv"]) == 2
    assert "no such file" in capsys.readouterr().err
