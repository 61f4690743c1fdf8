"""Choose the folders that worker processes import from, so that no file of the user's is taken for one of ours.

* Python puts the current folder or the script's folder first on `sys.path`, and Ray passes both on to its workers. A
  `numpy.py` or `img2parquet.py` there would run in place of the real one.
* Workers need this package and its dependencies alone. `PYTHONPATH` is left as it is: it was set on purpose.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


def package_folders() -> list[str]:
    """Return the folder to import this package from when it is not installed, as in a checkout; else nothing.

    An installed package is found anyway, and site-packages in front of the standard library could shadow it.
    """
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    installed.update(site.getsitepackages())
    return [] if PACKAGE_FOLDER in map(_resolved, installed) else [str(PACKAGE_FOLDER)]


def worker_path() -> list[str]:
    """Return this process's `sys.path` without the current folder and the folder of the running script."""
    implicit = _implicit_folders() - _explicit_folders()
    kept = [place for place in sys.path if place and _resolved(place) not in implicit]
    return list(dict.fromkeys([*package_folders(), *kept]))


def _implicit_folders() -> set[Path]:
    found = set()
    with suppress(OSError):  # the current folder was removed
        found.add(Path.cwd().resolve())
    if sys.argv and sys.argv[0] not in ("", "-c", "-m"):
        found.add(_resolved(sys.argv[0]).parent)
    return found


def _explicit_folders() -> set[Path]:
    return {_resolved(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place}


def _resolved(place: str) -> Path:
    with suppress(OSError, RuntimeError):
        return Path(place).resolve()
    return Path(place)
