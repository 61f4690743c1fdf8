"""A change of `img2parquet.inference.steps` in processes that are not ours: a folder for their PYTHONPATH."""

from __future__ import annotations

from pathlib import Path

SITE = '''
import os, sys, time
from importlib.machinery import PathFinder


def change(embed):
    real = embed.Preparer.__call__

    def prepare(self, batch):
{before}
        return real(self, batch)

    embed.Preparer.__call__ = prepare


class Late:
    """Changes it when it is imported, which most processes of Ray's never do."""

    def find_spec(self, name, path=None, target=None):
        if name != "img2parquet.inference.steps":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), change(module))
        return spec


sys.meta_path.insert(0, Late())
'''
INDENT = " " * 8


def before_each_batch(folder: Path, code: str) -> str:
    """code: what runs in a worker before it decodes a `batch`. PYTHONPATH for the process whose workers are meant."""
    folder.mkdir(exist_ok=True)
    lines = "\n".join(INDENT + line for line in (code or "pass").strip().splitlines())
    (folder / "sitecustomize.py").write_text(SITE.replace("{before}", lines))
    return f"{folder}:{Path(__file__).parents[2]}"
