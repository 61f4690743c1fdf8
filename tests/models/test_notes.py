"""What a loader assumed or lacks is a note of the card; `plan` and `run` print it, and the record keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from img2parquet.cli import main
from img2parquet.models import ModelSpec, read_card
from tests.models import oracle
from tests.models.test_external import timm, timm_folder  # noqa: F401 (a fixture)
from tests.outputs.test_loss import segmenter
from tests.support.small_job import job_dict, make_checkpoint
from tests.whole_jobs.test_problem_types import HEADS, save

FAMILIES = [*HEADS, "transformers:vit", "transformers:dinov2"]
RESIZED = ("beit", "vit_msn", "vit", "dinov2", "transformers:vit", "transformers:dinov2")


def notes(model: str, **spec: Any) -> str:
    return "\n".join(read_card(ModelSpec(model, **spec)).notes)


def checkpoint(family: str, folder: Path, **more: Any) -> str:
    """Save a small checkpoint of three classes, whose own size its images have."""
    library, _, name = family.rpartition(":")
    save(name if name in HEADS else family, folder, None, ["a", "b", "c"], **more)
    return f"{library}:{folder}" if library else str(folder)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_and_other_sizes(family: str, tmp_path: Path) -> None:
    model = checkpoint(family, tmp_path, **({"use_relative_position_bias": True} if family == "beit" else {}))
    assert "resized" not in notes(model) and "reach the model" not in notes(model)
    assert "no preprocessor_config.json" not in notes(model)
    if family in RESIZED:
        said = notes(model, image_size=64)
        assert "positions resized from 4x4 to 8x8" in said or "64x64 reach the model, where config.json has" in said
    (tmp_path / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in notes(model)


def test_a_beit_without_positions_has_none_to_resize(tmp_path: Path) -> None:
    assert "resized" not in notes(checkpoint("beit", tmp_path), image_size=64)


def test_the_size_that_timm_has(timm: Any, tmp_path: Path) -> None:  # noqa: F811
    folder = timm_folder(tmp_path)
    assert "reach the model" not in notes(f"timm:{folder}")
    assert "images of 40x40 reach the model, where config.json has 32x32" in notes(f"timm:{folder}", image_size=40)


@pytest.mark.parametrize(
    "model", ["facebook/levit-128S", "google/bit-50", "microsoft/beit-base-patch16-224", "transformers:vit"]
)
def test_random_weights(model: str) -> None:
    assert "no weights are read from a file: they are random(7)" in notes(model, weights="random(7)")


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_that_do_not_count_from_0(family: str, tmp_path: Path) -> None:
    model = checkpoint(family, tmp_path)
    assert "id2label" not in notes(model)
    edit(tmp_path, id2label={"1": "a", "2": "b", "3": "c"})
    assert "`id2label` in config.json does not count from 0" in notes(model)


def test_a_mask_of_one_class(tmp_path: Path) -> None:
    oracle.saved(segmenter(num_labels=1), tmp_path)
    assert "single class, which every pixel of a mask has" in notes(str(tmp_path))


def test_plan_and_run_print_them_once_and_the_record_keeps_them(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path / "model")
    edit(folder, architectures=["LevitForImageClassification"])
    note = "logits are the mean of both heads"
    path, out = tmp_path / "job.yaml", tmp_path / "out"
    path.write_text(json.dumps({**job_dict(shards, folder, str(out)), "reject_limit": 0.2}))
    assert main(["plan", str(path)]) == 0
    assert capsys.readouterr().out.count(f"note     {note}") == 1
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["tiny"]["notes"][0].startswith(note)
    assert main(["run", str(path), "--runner", "local"]) == 0
    assert [record.getMessage().startswith(f"model `tiny`: {note}") for record in caplog.records].count(True) == 1
    assert json.loads((out / "_run.json").read_text())["notes"]["tiny"][0].startswith(note)
