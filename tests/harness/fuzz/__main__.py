"""`python -m tests.harness.fuzz`: run mutated images, shards, jobs and texts, one process at a time.

`--seed N --suite S` does one seed again and leaves its input; what crashed, hung or went wrong is left there by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tests.harness.chaos.warm  # noqa: F401 - before anything that reads it
from tests.harness.chaos.forks import result_of
from tests.harness.fuzz import images, shards
from tests.harness.fuzz.children import Result, Suite, run
from tests.harness.fuzz.corpus import images as corpus
from tests.harness.fuzz.guided import guide
from tests.harness.fuzz.parsers import PARSERS
from tests.support.small_job import make_checkpoint

PACKAGES = ("torch", "pyarrow", "pillow", "simplejpeg", "numpy", "pydantic", "pyyaml", "safetensors", "atheris")


def main() -> int:
    arguments = _arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    _silence_decoders()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    checkpoint = folder / "model"
    result_of(lambda: make_checkpoint(checkpoint) and None)
    corpus()
    suites: dict[str, tuple[Suite[Any], int]] = {
        "images": (images.SUITE, arguments.images),
        "shards": (shards.READERS, arguments.shards),
        "jobs": (Suite(shards.make, partial(shards.check_job, checkpoint), limit_s=120, most_mb=2000), arguments.jobs),
    }
    if arguments.seed is not None:
        return _again(*suites[arguments.suite], arguments.seed, folder)
    record: dict[str, Any] = {"versions": _versions()}
    for name, (suite, count) in suites.items():
        record[name] = _suite(name, suite, range(arguments.first, arguments.first + count), folder)
        _write(record, arguments.out)
    record["parsers"] = {}
    for name in PARSERS if arguments.runs else ():
        record["parsers"][name] = _parser(name, arguments.runs, arguments.first + 1)
        _write(record, arguments.out)
    problems = sum(len(record[name]["problems"]) for name in suites)
    problems += sum(bool(said["problem"]) for said in record["parsers"].values())
    print(_summary(record, problems))
    if not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.fuzz", description=__doc__)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--shards", type=int, default=4_000, help="mutated shards through a reader")
    parser.add_argument("--jobs", type=int, default=400, help="mutated shards through a whole job")
    parser.add_argument("--runs", type=int, default=10_000, help="of each parser under atheris; 0: none")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--suite", choices=("images", "shards", "jobs"), default="images")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--out", type=Path, help="counts as JSON")
    return parser.parse_args()


def _suite(name: str, suite: Suite[Any], seeds: range, folder: Path) -> dict[str, Any]:
    """What became of the seeds, by count; the largest and the slowest; and problems, whose inputs are left behind."""
    started, counts, problems = time.monotonic(), Counter[str](), list[str]()
    most_mb = slowest_s = 0.0
    for result in run(seeds, suite):
        counts[result.became or "problem"] += 1
        most_mb, slowest_s = max(most_mb, result.grew_mb), max(slowest_s, result.seconds)
        if result.problem:
            problems.append(_told(name, result, suite, folder))
            print(problems[-1], flush=True)
    return {
        "cases": len(seeds),
        "counts": dict(counts.most_common()),
        "problems": problems,
        "most memory taken by one, MB": most_mb,
        "bound, MB": suite.most_mb,
        "slowest, s": slowest_s,
        "limit, s": suite.limit_s,
        "seconds": round(time.monotonic() - started, 1),
    }


def _told(name: str, result: Result, suite: Suite[Any], folder: Path) -> str:
    place = folder / f"{name}-{result.seed}"
    _leave(suite.make(result.seed), place)
    again = f"python -m tests.harness.fuzz --suite {name} --seed {result.seed}"
    return f"FAILED {name} {result.seed}: {result.problem}\n  input: {place}\n  again: {again}"


def _leave(made: Any, place: Path) -> None:
    if isinstance(made, bytes):
        place.write_bytes(made)
        return
    for name, data in made.files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


def _again(suite: Suite[Any], count: int, seed: int, folder: Path) -> int:
    (result,) = run([seed], suite)
    _leave(suite.make(seed), folder / str(seed))
    print(f"{result}\n{result.problem}\ninput: {folder / str(seed)}")
    return 1 if result.problem else 0


def _parser(name: str, runs: int, seed: int) -> dict[str, Any]:
    if find_spec("atheris") is None:
        raise SystemExit("error: atheris is not installed\nhint: pip install 'img2parquet[fuzz]', or --runs 0")
    started = time.monotonic()
    guided = guide(name, runs, seed)
    if guided.problem:
        print(f"FAILED parser {name}: {guided.problem}", flush=True)
    return {**vars(guided), "seconds": round(time.monotonic() - started, 1)}


def _write(record: dict[str, Any], out: Path | None) -> None:
    """After each suite: one that is stopped leaves what it had."""
    done = [record[name] for name in ("images", "shards", "jobs") if name in record]
    record["seconds"] = round(sum(said["seconds"] for said in (*done, *record.get("parsers", {}).values())))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"  {record['seconds']} s so far", file=sys.stderr)


def _silence_decoders() -> None:
    """libtiff and others write to file descriptor 2; ours goes where it went."""
    ours = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stderr = ours


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES if name != "atheris" or find_spec("atheris")}
    return {"python": sys.version.split()[0], **found}


def _summary(record: dict[str, Any], problems: int) -> str:
    counts = {name: record[name]["cases"] for name in ("images", "shards", "jobs")}
    runs = sum(said["ran"] for said in record["parsers"].values())
    return (
        f"fuzz: {sum(counts.values())} bad inputs ({', '.join(f'{count} {name}' for name, count in counts.items())}), "
        f"{runs} runs of parsers, {problems} crashed, hung, took too much or lost a row, {record['seconds']} s"
    )


if __name__ == "__main__":
    sys.exit(main())
