"""Imports go one way, heavy libraries stay where they belong: read from the source with `ast`, and held."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import img2parquet

ROOT = Path(img2parquet.__file__).parent

# A package may import what stands below it, never what stands beside or above it.
LAYERS = [
    {"errors", "schema"},
    {"storage"},
    {"telemetry", "read", "images"},
    {"models"},
    {"outputs"},
    {"job"},
    {"run_identity", "batch", "submit"},
    {"inference", "dataset"},
    {"isolation", "results"},
    {"runners"},
    {"engine"},
    {"cli"},
]
HEAVY = {
    "torch": {"models", "images", "outputs", "inference", "runners"},
    "ray": {"runners", "submit"},
    "PIL": {"images", "models", "outputs", "results"},
    "simplejpeg": {"images"},
    "pyarrow": {"schema", "storage", "read", "outputs", "dataset", "batch", "inference", "isolation", "runners"}
    | {"engine", "results"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "pydantic": {"job", "run_identity", "read", "outputs", "results"},
    "jinja2": {"results"},
    "umap": {"results"},
    "yaml": {"job", "cli", "models"},
    "safetensors": {"models", "results"},
    "huggingface_hub": {"models"},
    "lance": {"results"},
    "usearch": {"results"},
    "sklearn": {"results"},
    "tokenizers": set(),  # nor this: models/text.py asks for it with the first prompt
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


def _module_imports(path: Path) -> set[str]:
    """Our modules that a file imports. `from package import module` is an import of that module alone."""
    names = list(imported(path))
    submodules = {name.rpartition(".")[0] for name in names if name in MODULES and name.rpartition(".")[0] in names}
    attributes = {name.rpartition(".")[0] for name in names if name not in MODULES}
    return {name for name in names if name in MODULES and (name not in submodules or name in attributes)}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in modules()}


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    for name in imported(path):
        there = name.split(".")[1] if name.startswith("img2parquet.") else here
        if there == here or not ((ROOT / there).is_dir() or (ROOT / f"{there}.py").is_file()):
            continue  # the same package, or a public name of the whole
        assert layer(there) < layer(here), f"{path.relative_to(ROOT)} imports {name}"


def test_no_circle_of_imports() -> None:
    """Not between packages, nor between the modules of one; imports inside functions count."""
    graph = {dotted(path): _module_imports(path) for path in modules()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for there in graph.get(name, ()):
                visit(there, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in HEAVY or room(path) in HEAVY[top], f"{path.relative_to(ROOT)} imports {top}"


def test_siblings_do_not_import_each_other() -> None:
    from img2parquet.models import FAMILIES
    from img2parquet.outputs import OUTPUTS
    from img2parquet.read import SOURCES
    from img2parquet.results.exports import EXPORTS

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
        "import img2parquet",
        "import img2parquet.job",
        "import img2parquet.cli.console; img2parquet.cli.console.build_parser()",
        "import img2parquet.results.reader, img2parquet.results.verify",
        "import img2parquet.isolation.supervisor",
        "import img2parquet.results.report",
    ],
)
def test_light_imports_load_neither_torch_nor_ray(statement: str) -> None:
    code = f"{statement}; import sys; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_command_starts_without_numpy_and_pyarrow() -> None:
    code = "import img2parquet.cli.console, sys; print([m for m in ('numpy', 'pyarrow') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_module_says_what_it_does() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
