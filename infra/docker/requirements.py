"""Print the requirements of `pyproject.toml` and some extras, one per line, to install before the source is copied.

python requirements.py pyproject.toml hub cluster
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path


def requirements(document: Path, extras: Iterable[str]) -> list[str]:
    """Collect requirements, following extras that name extras. Raises KeyError for an unknown extra."""
    project = tomllib.loads(document.read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        for need in project["optional-dependencies"][extra]:
            inner = re.fullmatch(rf"{project['name']}\[(.+)\]", need)
            wanted += requirements(document, inner[1].split(",")) if inner else [need]
    return list(dict.fromkeys(wanted))


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
