"""Plant modules that must not be imported: each leaves a mark and ends the process that imported it."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "pipeline", "img2parquet", "decode", "read", "job", "numpy", "torch", "pyarrow", "PIL", "simplejpeg", "ray",
    "safetensors", "sitecustomize", "usercustomize",
)  # fmt: skip
PLANTED = """
import os, pathlib, sys
(pathlib.Path({marks!r}) / "{name}-{{}}".format(os.getpid())).write_text(" ".join(sys.orig_argv))
os._exit(66)
"""


class Trap:
    """A folder of files that must not be imported; `sprung` names those that were, and by which command."""

    def __init__(self, folder: Path, marks: Path) -> None:
        self.folder, self.marks = folder, marks
        folder.mkdir()
        marks.mkdir()
        self.plant(folder, NAMES)

    def plant(self, folder: Path, names: tuple[str, ...]) -> None:
        for name in names:
            (folder / f"{name}.py").write_text(PLANTED.format(marks=str(self.marks), name=name))

    def sprung(self) -> dict[str, str]:
        return {mark.name: mark.read_text() for mark in self.marks.iterdir()}
