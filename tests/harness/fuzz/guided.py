"""A parser under atheris: inputs that reach new code are kept and changed further.

`python -m tests.harness.fuzz.guided PARSER --runs N --seed S` prints how many ran and how many were kept,
or the traceback and the input that broke it. Needs `pip install 'img2parquet[fuzz]'`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LIMIT_S, MOST_MB, MOST_BYTES = 20, 2048, 8192
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Guided:
    """What one parser's process said. `problem` has its last words where it found something."""

    ran: int
    kept: int
    edges: int
    peak_mb: int
    problem: str


def guide(parser: str, runs: int, seed: int) -> Guided:
    """In a process of its own, which a crash, a hang or too much memory ends."""
    command = [sys.executable, "-m", "tests.harness.fuzz.guided", parser, "--runs", str(runs), "--seed", str(seed)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=3600)
    said = ran.stdout + ran.stderr
    problem = "" if ran.returncode == 0 else said[-3000:]

    def number(pattern: str) -> int:
        found = re.findall(pattern, said)
        return int(found[-1]) if found else 0

    return Guided(
        ran=number(r"stat::number_of_executed_units:\s*(\d+)"),
        kept=number(r"stat::new_units_added:\s*(\d+)"),
        edges=number(r"cov: (\d+)"),
        peak_mb=number(r"stat::peak_rss_mb:\s*(\d+)"),
        problem=problem,
    )


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m tests.harness.fuzz.guided", description=__doc__)
    words.add_argument("parser")
    words.add_argument("--runs", type=int, default=10_000)
    words.add_argument("--seed", type=int, default=1)
    wanted = words.parse_args()
    import atheris

    with atheris.instrument_imports(include=["img2parquet"]):
        from tests.harness.fuzz.parsers import PARSERS
    parse, seeds = PARSERS[wanted.parser]
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds):
            (Path(folder) / f"seed-{number}").write_bytes(data[:MOST_BYTES])
        options = {
            "runs": wanted.runs, "seed": wanted.seed, "max_len": MOST_BYTES, "timeout": LIMIT_S,
            "rss_limit_mb": MOST_MB, "print_final_stats": 1,
            "artifact_prefix": f"{tempfile.gettempdir()}/fuzz-{wanted.parser}-",
        }  # fmt: skip
        atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), folder], parse)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
