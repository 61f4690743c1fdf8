"""On the cluster, before a submitted job begins: is all there that it needs? -> the command, or one clear message.

Goes along with each job and is run by the cluster's own Python, of whatever version: the standard library, and
`packaging`, which Ray has; beside it lies `needs.json` (see `parcel.py`). Exit code 2 where something is missing.
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
    "upload": "use an image that has them (infra/docker/Dockerfile), or submit with --install pip",
    "pip": "Ray was asked to install them: look at the job's runtime_env_setup log on the head",
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
    # the same process: who stops the job stops the driver
    os.execv(sys.executable, [sys.executable, "-u", "-m", "pipeline.cli", *sys.argv[1:]])


def missing(needs: dict[str, Any]) -> list[str]:
    """Each thing that is not there, or in another version, as one phrase.

    An old Python must get as far as its message: annotations are not evaluated, and nothing here is new."""
    if sys.version_info[:2] < OLDEST:
        return [f"Python is {sys.version.split()[0]}, and {OLDEST[0]}.{OLDEST[1]} or newer is needed"]
    from packaging.requirements import Requirement

    problems = []
    for text in needs["requires"]:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate():
            continue
        there = _version(need.name)
        if not there:
            problems.append(f"{need.name} is not installed")
        elif not need.specifier.contains(there, prereleases=True):
            problems.append(f"{need.name} is {there}, and {need.specifier} is needed")
    if needs["version"]:
        there = _version("img2parquet")
        if there != needs["version"]:
            problems.append(f"img2parquet is {there or 'not installed'}, and {needs['version']} was submitted")
    return problems


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
