"""The four commands that the README shows after `make demo`, as they stand there, on what it leaves."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.cli import main
from pipeline.driver import run
from pipeline.job import load_job

ROOT = Path(__file__).parents[1]
MOSAICS = 4


def commands() -> list[list[str]]:
    """Arguments of each line that begins with `img2parquet` in the README's section about them."""
    section = (ROOT / "README.md").read_text().split("## Four commands after the demo")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.S)
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("img2parquet ")]


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `make demo` leaves of its first two jobs, with fewer images: the same scripts, job files and paths."""
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
    demo.leave_a_cat()


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


def test_the_readme_is_one_page_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 155
    for path in ("README.md", "infra/MANUAL.md"):
        body = (ROOT / path).read_text()
        links = [*re.findall(r"\]\(([^)\s]+)\)", body), *re.findall(r'src="([^"]+)"', body)]
        for link in links:
            file, _, anchor = link.partition("#")
            target = (ROOT / path).parent / file if file else ROOT / path
            assert target.is_file(), f"{path}: {link}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else []
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in known, f"{path}: {link}"
