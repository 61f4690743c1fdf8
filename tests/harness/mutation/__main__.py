"""`python -m tests.harness.mutation`: put one fault at a time into a copy of the package, and run its area's tests.

A fault is killed when a test fails, or does not end. The run fails when a fault survives that `reasons.py` does not
explain. `--only AREA --count N` does a part, and `--match TEXT` the faults whose key holds a text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.harness.mutation.areas import AREAS
from tests.harness.mutation.by_hand import faults_by_hand
from tests.harness.mutation.operators import Fault, faults_of, sample
from tests.harness.mutation.reasons import REASONS

ROOT = Path(__file__).parents[3]
PACKAGE = "img2parquet"
SOURCE = ROOT / "pipeline" / PACKAGE
TEST_LIMIT_S = 100  # for a test that hangs
SLOWER, LEAST_LIMIT_S = 8, 300  # all tests take so many times as long as without a fault, or more: then they hang
KILLED, UNEXPLAINED = "killed by ", "survives, and no reason is known"


def main() -> int:
    arguments = _arguments()
    started = time.monotonic()
    record = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        shutil.copytree(SOURCE, Path(folder, PACKAGE), ignore=shutil.ignore_patterns("__pycache__"))
        bench = Bench(Path(folder))
        for name in arguments.only:
            faults = faults_in(name, arguments.seed, arguments.count, arguments.match)
            before = record.get(name, {}).get("faults", {}) if arguments.survivors else {}
            fates = {fault.key: before[fault.key] for fault in faults if _is_killed(before.get(fault.key, ""))}
            record[name] = {"seed": arguments.seed, "commit": _git("describe", "--always", "--dirty"), "faults": fates}
            for key, fate in _fates(bench, name, [fault for fault in faults if fault.key not in fates]):
                fates[key] = fate
                print(f"{name}: {key}: {fate}", flush=True)
                _write(record, arguments.out)
    results = [fate for name in arguments.only for fate in record[name]["faults"].values()]
    killed, unexplained = sum(map(_is_killed, results)), results.count(UNEXPLAINED)
    print(
        f"mutation: seed {arguments.seed}, {len(results)} faults in {len(arguments.only)} areas: {killed} killed, "
        f"{len(results) - killed} survived, {unexplained} without a reason, {time.monotonic() - started:.0f} s"
    )
    return 1 if unexplained else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.mutation", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=AREAS, default=list(AREAS), metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=7, help="faults by the seed in each area, beside those by hand")
    parser.add_argument("--match", default="", help="only faults whose key holds this text, of all that are possible")
    parser.add_argument("--survivors", action="store_true", help="only faults that the results do not show as killed")
    parser.add_argument("--out", type=Path, help="the results as JSON; what is there of other areas stays")
    return parser.parse_args()


def faults_in(name: str, seed: int, count: int, match: str = "") -> list[Fault]:
    """Return the faults of an area: those by hand, and a sample of the others."""
    sources = {file: (SOURCE / file).read_text() for file in AREAS[name].files}
    own = [fault for file, source in sources.items() for fault in faults_by_hand(file, source)]
    possible = [fault for file, source in sources.items() for fault in faults_of(file, source)]
    if match:
        return [fault for fault in (*own, *possible) if match in fault.key]
    return [*own, *sample(possible, seed, count)]


def _fates(bench: Bench, name: str, faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """Put each fault in, and yield its key and what became of it."""
    started, tests = time.monotonic(), AREAS[name].tests
    if said := bench.run(tests, limit_s=1200):
        raise SystemExit(f"{name}: not every test passes without a fault: {said}")
    limit_s = max(LEAST_LIMIT_S, SLOWER * (time.monotonic() - started))
    for fault in faults:
        with bench.fault(fault):
            killed_by = bench.run(tests, limit_s)
        reason = REASONS.get(fault.key)
        yield fault.key, f"{KILLED}{killed_by}" if killed_by else f"survives: {reason}" if reason else UNEXPLAINED


def _is_killed(fate: str) -> bool:
    return fate.startswith(KILLED)


class Bench:
    """A copy of the package that the tests import in place of the working tree's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(folder)}
        code = f"import {PACKAGE}; print({PACKAGE}.__path__[0])"
        ran = subprocess.run(
            [sys.executable, "-c", code], env=self.environment, cwd=ROOT, capture_output=True, text=True
        )
        assert ran.stdout.strip() == str(folder / PACKAGE), f"the tests would import {ran.stdout}{ran.stderr}"

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        path = self.folder / PACKAGE / fault.file
        source = path.read_text()
        try:
            self._write(path, fault.applied_to(source))
            yield
        finally:
            self._write(path, source)

    def run(self, tests: tuple[str, ...], limit_s: float) -> str:
        """Return the first test that failed, or how the tests ended otherwise; empty when they passed."""
        options = f"-x -q --tb=no -rfE -p no:cacheprovider -p no:xdist --timeout={TEST_LIMIT_S}"
        command = [sys.executable, "-m", "pytest", *options.split(), "-m", "not slow and not realstore"]
        command += [f"tests/{test}" for test in tests]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            said = f"the limit of {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a test has started
            process.communicate()
        if process.returncode == 0:
            return ""
        if process.returncode in (3, 4, 5):
            raise SystemExit(f"pytest ended with {process.returncode}:\n{said[-2000:]}")
        told = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)
        return told[1] if told else said.strip().rpartition("\n")[2]

    @staticmethod
    def _write(path: Path, source: str) -> None:
        path.write_text(source)
        # Python compares only size and whole seconds, which a fault may leave as they are
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def _write(record: dict[str, Any], out: Path | None) -> None:
    """Write after each fault: a run that is stopped leaves what it had."""
    if out is None:
        return
    ordered = {name: _counted(record[name]) for name in AREAS if name in record}
    out.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def _counted(area: dict[str, Any]) -> dict[str, Any]:
    killed, count = sum(map(_is_killed, area["faults"].values())), len(area["faults"])
    counts = {"killed": killed, "survived": count - killed}
    return {"seed": area["seed"], "commit": area["commit"], **counts, "faults": area["faults"]}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
