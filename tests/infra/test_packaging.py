"""Build the wheel and the source distribution, install the wheel outside the checkout, and use it there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from infra.docker.exercise import context
from tests.support.small_job import job_dict, make_checkpoint, make_shards

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the working tree that reach an image: a build in the tree itself would leave a folder there."""
    return context(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", ".", *OFFLINE, "--wheel-dir", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else. On PYTHONPATH it precedes the editable install."""
    folder = tmp_path_factory.mktemp("site")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def packaged(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("img2parquet/") and not name.endswith("/")}


def test_a_wheel_holds_the_whole_package_and_says_what_it_is(wheel: Path) -> None:
    tracked = [path.relative_to(ROOT / "pipeline") for path in (ROOT / "pipeline" / "img2parquet").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts]  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        assert packaged(archive.namelist()) == {str(path) for path in tracked}
        assert "img2parquet/py.typed" in archive.namelist()
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        told = Parser().parsestr(archive.read(metadata).decode())
    assert told["Name"] == "img2parquet" and told["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in told.get_all("Classifier", []) and told.get_all("Project-URL")
    assert "prometheus_client>=" in "".join(told.get_all("Requires-Dist", []))


def test_the_source_distribution_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", code, cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", "pipeline"} <= tops
    run(*PIP, "wheel", sdist, *OFFLINE, "--wheel-dir", tmp_path, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert one.namelist() == other.namelist()


def test_an_installed_wheel_runs_a_job_and_a_report(site: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "in", shards=2, per_shard=4, broken=False)
    document = job_dict(f"{tmp_path}/in/*.tar", make_checkpoint(tmp_path / "tiny"), str(tmp_path / "out"))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    where = run(sys.executable, "-P", "-c", "import img2parquet; print(img2parquet.__file__)", cwd=tmp_path,
                PYTHONPATH=str(site))  # fmt: skip
    assert Path(where.strip()) == site / "img2parquet" / "__init__.py"
    command = site / "bin" / "img2parquet"
    run(command, "run", "job.yaml", "--runner", "local", cwd=tmp_path, PYTHONPATH=str(site))
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("model=*/part-*.parquet")) == 8
    run(command, "report", "out", "--to", "report.html", cwd=tmp_path, PYTHONPATH=str(site))
    page = (tmp_path / "report.html").read_text()
    for asset in ("page.css", "page.js"):
        assert (site / "img2parquet" / "results" / "report" / "page" / asset).read_text().strip() in page
