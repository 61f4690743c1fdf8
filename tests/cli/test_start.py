"""`embed`, `label`, `segment` and `init`: from images to a job file that says the same, and to its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from img2parquet.cli import main
from img2parquet.job import load_job
from img2parquet.results.reader import open_results


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for n, name in enumerate(("cats/0.png", "dogs/1.png", "dogs/2.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 70), (n, 2 * n, 50)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.mark.parametrize("task", ["embed", "label"])
def test_one_line_gives_results_and_the_job_file(task: str, photos: Path, checkpoint: Path, capsys: Any) -> None:
    out = photos.parent / "out" / "photos"
    command = [task, str(photos), "--model", str(checkpoint), "--to", str(out), "--set", "resources.batch_size=2"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "Found 3 images (3 .png)" in said.err and f"{out}.yaml" in said.err
    table = open_results(str(out)).to_table()
    assert sorted(table["key"].to_pylist()) == ["cats/0.png", "dogs/1.png", "dogs/2.png"]
    assert sorted(table["class"].to_pylist()) == ["cats", "dogs", "dogs"]
    assert ("embedding" if task == "embed" else "labels") in table.column_names
    job = load_job(f"{out}.yaml")
    assert job.output.uri == str(out) and job.resources.batch_size == 2
    assert main(["run", f"{out}.yaml"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    Image.new("RGB", (80, 70)).save(photos / "cats" / "3.png")  # what the file counts in a comment has changed
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["run", f"{out}.yaml", "--extend"]) == 0
    assert open_results(str(out)).to_table().num_rows == 4


def test_another_job_at_the_same_place_is_refused(photos: Path, checkpoint: Path, capsys: Any) -> None:
    command = ["embed", str(photos), "--model", str(checkpoint), "--to", str(photos.parent / "out")]
    assert main(command) == 0
    before = (photos.parent / "out.yaml").read_text()
    assert main([*command, "--set", "models.0.outputs.0.normalize=none"]) == 2
    said = capsys.readouterr().err
    assert "describes another job" in said and "img2parquet run" in said
    assert (photos.parent / "out.yaml").read_text() == before


def test_a_mistake_writes_nothing(photos: Path, checkpoint: Path, capsys: Any) -> None:
    out = photos.parent / "out"
    for command in (
        ["embed", str(photos), "--model", str(checkpoint), "--to", str(out), "--set", "dtype=int3"],
        ["embed", str(photos / "cats" / "none"), "--model", str(checkpoint), "--to", str(out)],
        ["embed", str(photos), "--model", str(photos), "--to", str(out)],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err.rstrip().splitlines()[-1].startswith(("error:", "hint:", "  known:"))
        assert not out.exists() and not Path(f"{out}.yaml").exists()


def test_a_model_without_a_pooled_vector_gives_its_class_token(photos: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BeitConfig(**sizes, image_size=32, patch_size=16, use_mask_token=False, out_indices=[1])
    transformers.BeitModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "beit")
    transformers.BeitImageProcessorPil(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path / "beit")
    assert main(["embed", str(photos), "--model", str(tmp_path / "beit"), "--to", str(tmp_path / "out")]) == 0
    outputs = yaml.safe_load((tmp_path / "out.yaml").read_text())["models"][0]["outputs"]
    assert outputs == [{"kind": "embedding", "normalize": "l2", "pool": "cls"}]


@pytest.mark.parametrize("task", ["embed", "label", "segment"])
def test_init_writes_a_job_that_loads(
    task: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "photos", "--task", task]) == 0
    assert "img2parquet run job.yaml" in capsys.readouterr().out
    text = (tmp_path / "job.yaml").read_text()
    job = load_job("job.yaml")
    assert job.input.kind == "folder" and job.output.uri == str(tmp_path / "out" / "photos")
    assert "# 3 images (3 .png)" in text and text.count("#") > 4
    assert main(["init", "photos", "--task", task, "--to", "elsewhere"]) == 2  # job.yaml says something else
    assert (tmp_path / "job.yaml").read_text() == text


def test_a_text_where_a_list_is_expected(photos: Path, checkpoint: Path) -> None:
    from img2parquet.job import parse_job

    document = {
        "input": {"kind": "folder", "uris": str(photos), "keep": "class"},
        "models": [{"model": str(checkpoint), "outputs": [{"kind": "labels"}]}],
        "output": {"uri": str(photos.parent / "out")},
    }
    given = parse_job(document).input
    assert given.names == (str(photos),) and given.keep == ("class",)  # type: ignore[attr-defined]


def test_the_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("img2parquet ")
