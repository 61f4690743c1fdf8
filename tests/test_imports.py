"""Imports go one way, heavy libraries stay where they belong: read from the source with `ast`, and held."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline

ROOT = Path(pipeline.__file__).parent

# Later may import earlier, never the reverse; within a layer only as WITHIN says.
LAYERS = [
    {"errors"},
    {"schema", "vectors"},
    {"storage"},
    # what an image's first bytes say; what stages did; where models run; what threads are at; the C library's memory
    {"headers", "meter", "device", "gpus", "flight", "stacks", "allocator"},
    {"logs", "metrics"},  # what is said of a job while it runs
    {"tell"},  # what commands print
    {"read", "decode", "preprocess", "models", "outputs"},
    {"shrink"},  # how much of a JPEG the resizes can spare
    {"job"},
    {"graphs", "batch_size"},
    {"packed"},  # many parts in little memory
    {"plan", "batch", "probe", "forward", "listing"},
    {"embed_images"},  # a job's way for images at hand
    {"embed", "write", "commit"},
    {"child", "generations"},  # a process that may die; what later runs added
    {"apart", "watch", "signals", "stragglers", "slices", "extending"},
    {"pump"},
    {"rounds"},
    {"actors", "ray_metrics"},  # what workers of a cluster do; Ray's exporter
    {"local", "cluster"},
    {"sample"},  # some images of a plan
    # partitions made from others; what a truth says of a row; rows -> their images, small
    {"derived", "judge", "source_images", "thumbnails"},
    {"standing"},
    {"losses", "finish", "session", "evaluate"},
    {"driver", "measure"},  # a job; a sample of one
    {"retrying"},
    {"results", "verify", "progress", "catalogue", "supervise", "vectors"},
    {"embeddings"},
    {"report", "exports"},
    {"index", "embed_image", "few_shot", "label_file"},
    {"mirror"},  # labels for each file of a model
    {"search", "duplicates", "sheet", "linear_probe"},
    {"ask", "look", "submit"},  # commands: on finished outputs; those that change nothing; on clusters elsewhere
    {"cli"},
]
WITHIN = {
    ("models", "preprocess"): "a model's card says how its images are prepared",
    ("outputs", "models"): "an output asks a model's card what it can give",
    ("embed", "embed_images"): "the package's function `embed` is called by the name of that file",
    ("job", "job"): "",
    ("write", "write"): "",
}
HEAVY = {
    "torch": {"models", "decode", "preprocess", "outputs", "embed", "local", "probe"}
    | {"device", "graphs", "forward", "batch_size", "gpus", "embed_images"},
    "ray": {"cluster", "actors", "ray_metrics", "submit"},
    "PIL": {"decode", "preprocess", "models", "outputs", "report", "exports", "thumbnails", "judge"},
    "simplejpeg": {"decode"},
    "pyarrow": {"schema", "storage", "read", "outputs", "plan", "batch", "embed", "write", "commit", "cluster"}
    | {"results", "verify", "losses", "finish", "session", "forward", "apart", "actors"}
    | {"generations", "packed", "retrying", "report", "exports", "vectors"}
    | {"embeddings", "duplicates", "evaluate", "judge", "label_file", "linear_probe", "mirror", "sample"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "pydantic": {"job", "read", "outputs", "source_images"},
    "jinja2": {"report"},
    "umap": {"report"},
    "yaml": {"job"},
    "safetensors": {"models", "linear_probe"},
    "huggingface_hub": {"models"},
    "lance": {"exports"},
    "usearch": {"index"},
    "sklearn": {"few_shot"},
    "transformers": set(),  # nor timm: models/external.py asks for them by name, when a job does
    "timm": set(),
    "torchvision": set(),
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, without those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    for name in imported(path):
        if not name.startswith("pipeline.") or name.split(".")[1] == here:
            continue
        there = name.split(".")[1]
        if not (ROOT / there).is_dir() and not (ROOT / f"{there}.py").is_file():
            continue  # a public name of the package itself
        below = layer(there) < layer(here) or (here, there) in WITHIN
        same = layer(there) == layer(here) and here in {
            "plan",
            "batch",
            "probe",
            "embed",
            "write",
            "commit",
            "results",
            "verify",
        }
        assert below or same, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in HEAVY or room(path) in HEAVY[top], f"{path.relative_to(ROOT)} imports {top}"


def test_siblings_do_not_import_each_other() -> None:
    from pipeline.exports import EXPORTS
    from pipeline.models import FAMILIES
    from pipeline.outputs import OUTPUTS
    from pipeline.read import SOURCES

    groups = [set(FAMILIES.values()), {m for m, _ in OUTPUTS.values()}, {m for m, _ in SOURCES.values()}]
    groups.append({m for m, _ in EXPORTS.values()})
    for group in groups:
        for module in group:
            path = ROOT.parent / (module.replace(".", "/") + ".py")
            others = group - {module}
            assert not others & set(imported(path)), f"{module} imports a sibling"


@pytest.mark.parametrize(
    "statement",
    [
        "import pipeline",
        "import pipeline.job",
        "import pipeline.cli; pipeline.cli._parser()",
        "import pipeline.results, pipeline.verify",
        "import pipeline.supervise",
        "import pipeline.report",
    ],
)
def test_light_imports_load_neither_torch_nor_ray(statement: str) -> None:
    code = f"{statement}; import sys; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_module_says_what_it_does() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
