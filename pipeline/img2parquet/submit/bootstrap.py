"""Check on the cluster that a submitted job has everything it needs, then run it; or exit with one clear message.

This file is uploaded with each job, next to `needs.json` (see `bundle.py`), and run by the cluster's own Python of any
version. It uses the standard library and `packaging`, which comes with Ray. Exit code 2 when something is missing.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OLDEST = (3, 11)
HINTS = {
    "upload": "use an image that contains them (infra/docker/Dockerfile), or submit with --install pip",
    "pip": "Ray was asked to install them: see the job's runtime_env_setup log on the head",
    "image": "build the image from this version (infra/docker/Dockerfile), or submit without --install image",
}


def main() -> None:
    os.chdir(Path(__file__).resolve().parent)
    needs = json.loads(Path("needs.json").read_text())
    problems = missing(needs)
    if problems:
        print("error: the cluster does not have what this job needs: " + "; ".join(problems), file=sys.stderr)
        print("hint: " + HINTS[needs["install"]], file=sys.stderr)
        sys.exit(2)
    sys.stdout.flush()
    # in the same process, so that stopping the job stops the driver
    os.execv(sys.executable, [sys.executable, "-u", "-m", "img2parquet.cli", *sys.argv[1:]])


def missing(needs: dict[str, Any]) -> list[str]:
    """Return one phrase for each requirement that is missing or has another version.

    An old Python must get far enough to report itself, so this uses no recent syntax or library."""
    if sys.version_info[:2] < OLDEST:
        return [f"Python is {sys.version.split()[0]}, and {OLDEST[0]}.{OLDEST[1]} or newer is needed"]
    from packaging.requirements import Requirement

    problems = []
    for text in needs["requires"]:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate():
            continue
        installed = _version(need.name)
        if not installed:
            problems.append(f"{need.name} is not installed")
        elif not need.specifier.contains(installed, prereleases=True):
            problems.append(f"{need.name} is {installed}, and {need.specifier} is needed")
    if needs["version"]:
        installed = _version("img2parquet")
        if installed != needs["version"]:
            problems.append(f"img2parquet is {installed or 'not installed'}, and {needs['version']} was submitted")
    return problems


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
