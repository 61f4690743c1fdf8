"""README and guides: links and anchors resolve, named files exist, commands parse, job files load, names are public."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

import img2parquet
from img2parquet.cli.console import build_parser
from img2parquet.job import load_job, parse_job

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "infra").rglob("*.md"))]
GUIDES = sorted((ROOT / "infra" / "docs").glob("*.md"))
PLACEHOLDERS = {"JOB": "jobs/demo.yaml", "URI": "out", "OUT": "out", "DIR": "dir", "FORMAT": "coco", "DESTINATION": "x"}
FOLDERS = r"(?:infra|tests|jobs|pipeline)/"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_resolve(page: Path) -> None:
    text = page.read_text()
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_prose_exist(page: Path) -> None:
    for path in re.findall(rf"`({FOLDERS}[\w./-]*\w/?)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_diagram_names_todays_files() -> None:
    for page in (ROOT / "README.md", ROOT / "infra/docs/internals.md"):
        named = set(re.findall(r"\b[a-z]+/[a-z_]*(?:\.py)?", next(text for text in code(page, "") if "URIs" in text)))
        assert {"read/", "models/", "outputs/"} <= named and len(named) == 8
        assert all((ROOT / "pipeline" / "img2parquet" / path).exists() for path in named), named


def test_every_guide_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(GUIDES) >= 5
    assert all(f"({name(page)})" in readme for page in GUIDES)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_our_commands_parse(page: Path) -> None:
    for line in "".join(code(page, "sh")).splitlines():
        if not line.startswith("img2parquet ") or " | " in line.partition("#")[0]:
            continue
        words = shlex.split(re.sub(r"\[.*?\]", "", line) if "[-" in line else line, comments=True)[1:]
        arguments = build_parser().parse_args([PLACEHOLDERS.get(word, word) for word in without_redirect(words)])
        if hasattr(arguments, "job") and arguments.job != "photos.yaml":
            load_job(ROOT / arguments.job, arguments.set)


def without_redirect(words: list[str]) -> list[str]:
    return words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=name)
def test_job_files_and_python_are_valid(page: Path) -> None:
    for text in code(page, "yaml"):
        parse_job(yaml.safe_load(text))
    for text in code(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "img2parquet":
                assert node.attr in img2parquet.__all__
