"""Run the quick start of the README and its four commands after the demo, verbatim."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from img2parquet.cli import main
from img2parquet.engine.driver import run
from img2parquet.job import load_job

ROOT = Path(__file__).parents[2]
MOSAICS = 4
CHECKPOINT = ROOT / "infra" / "demo" / "checkpoints" / "levit-photos"


def blocks(heading: str, language: str) -> list[str]:
    """Code blocks of one language in a section of the README."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


def arguments(block: str) -> list[list[str]]:
    """The arguments of each line that starts with `img2parquet`."""
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("img2parquet ")]


def commands() -> list[list[str]]:
    (block,) = blocks("The demo, and four commands after it", "sh")
    return arguments(block)


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the outputs of the demo's first two jobs from fewer images, with its own scripts, job files and paths."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "infra").symlink_to(ROOT / "infra")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(ROOT / "infra" / "demo"))
        demo, shards, mosaics = (importlib.import_module(name) for name in ("demo", "make_shards", "mosaics"))
        make(demo, shards, mosaics)
        yield folder


def make(demo: ModuleType, shards: ModuleType, mosaics: ModuleType) -> None:
    shards.make_shards(Path(demo.SHARDS), shards.Recipe(crops=64, shards=2))
    run(load_job(demo.PHOTOS_JOB, ["reject_limit=0.5"]), "local")
    mosaics.make_mosaics(Path(demo.MOSAICS), count=MOSAICS)
    run(load_job(demo.TEXTURES_JOB), "local")
    demo.save_a_cat()


@pytest.mark.slow
def test_the_four_commands(after_the_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = commands()
    assert [words[0] for words in given] == ["report", "search", "export", "export"]
    said = []
    for words in given:
        assert main(words) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    page = (after_the_demo / "report.html").read_text()
    assert "levit-photos" in page and "data:image/" in page
    hits = [line for line in said[1].splitlines() if line]
    assert len(hits) == 12
    assert hits[0].startswith("1.0000  ")  # the crop itself, which is among the rows
    assert (after_the_demo / "cats.html").read_text().count("data:image/") >= 12
    masks = json.loads((after_the_demo / "masks.json").read_text())
    assert len(masks["images"]) == MOSAICS and masks["annotations"] and masks["categories"]
    written = [path.name for path in (after_the_demo / "tasks").rglob("*") if path.is_file()]
    assert any(name.endswith(".json") for name in written) and any("xml" in name for name in written), written


@pytest.mark.slow
def test_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of the README, with the demo's checkpoint in place of the one on the hub."""
    (tmp_path / "photos").mkdir()
    shutil.copy(ROOT / "infra" / "demo" / "report-light.png", tmp_path / "photos" / "light.png")
    monkeypatch.chdir(tmp_path)
    steps = blocks("Quick start: a folder of images", "sh")[-1]
    assert [words[0] for words in arguments(steps)] == ["label", "report"]
    for words in arguments(steps):
        assert main([str(CHECKPOINT) if word == "facebook/levit-256" else word for word in words]) == 0, (
            capsys.readouterr().err
        )
    assert (tmp_path / "out" / "photos.yaml").is_file()
    assert (tmp_path / "photos.html").is_file()
    (query,) = [line for line in steps.splitlines() if line.startswith("python ")]
    line = query.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(line, shell=True, check=True, capture_output=True, text=True)
    assert "light.png" in done.stdout


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 155
