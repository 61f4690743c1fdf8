"""`make parity`: compare every published checkpoint with transformers, into infra/bench/results/parity.md.

    python -m tests.harness.parity.parity [--only PATTERN] [--threads 2] [--examples 250] [--scratch FOLDER]

- One checkpoint at a time, each in a process of its own, small ones first; its files are deleted when it ends.
- Then the random configurations of every family (`pytest -k`), more of them than in each test run.
- Exit 1 if any feature differs by more than 1e-5 of its scale (or the exception of `parity_of_one.excused` fails), a
  config field differs, or a process died; the result file says so too.
- With `--only` (`levit`, `beit-*-512`) nothing is written: the file stands for all of them.
- With `--random` the checkpoints are left out, and the file's last section is written anew, for the same model code.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from img2parquet.models import Published, published
from tests.harness.parity.parity_of_one import Found

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "infra/bench/results/parity.md"
MODEL_CODE = ROOT / "pipeline/img2parquet/models"
RANDOM_TESTS = ("test_random_combinations", "test_fields_together")  # each family's test file has one of them
RANDOM = "Random configurations"  # the title of the file's last section
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "hypothesis")


@dataclass(frozen=True)
class Died:
    """A checkpoint whose process ended without a result."""

    repo: str
    reason: str


@dataclass(frozen=True)
class Random:
    """The outcome of a family's random configurations."""

    family: str
    examples: int
    seconds: float
    failure: str  # "" if all agree


def main() -> int:
    options = _options()
    if options.random:
        return _random_alone(options)
    entries = sorted((entry for _, entry in published()), key=lambda entry: entry.gmacs)
    chosen = [entry for entry in entries if fnmatch.fnmatch(entry.repo, f"*{options.only}*")]
    results = [_told(_compare(entry, options), n, len(chosen)) for n, entry in enumerate(chosen, 1)]
    if options.only:
        left = len(entries) - len(chosen)
        print(f"--only: {left} other checkpoints and the random configurations were not compared; nothing is written")
        return int(not chosen or any(map(_is_wrong, results)))
    random = random_configurations(options)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(markdown(results, random, options.threads))
    print(f"written: {RESULT.relative_to(ROOT)}")
    return int(any(map(_is_wrong, results)) or any(one.failure for one in random))


def _random_alone(options: argparse.Namespace) -> int:
    recorded = RESULT.read_text()
    if _model_code() not in recorded:
        print(f"{RESULT.relative_to(ROOT)} is of other model code: leave out --random", file=sys.stderr)
        return 2
    random = random_configurations(options)
    section = _section(RANDOM, [_random_line(one) for one in random])
    RESULT.write_text(recorded.partition(f"\n## {RANDOM}\n")[0] + section)
    print(f"written: the last section of {RESULT.relative_to(ROOT)}")
    return int(any(one.failure for one in random))


def _compare(entry: Published, options: argparse.Namespace) -> Found | Died:
    """Compare one checkpoint in a process of its own, and delete its files."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        command = [sys.executable, "-m", "tests.harness.parity.parity_of_one", entry.repo, scratch]
        done = subprocess.run(command, cwd=ROOT, env=_environment(options), capture_output=True, text=True)
        written = Path(scratch) / "found.json"
        if done.returncode == 0 and written.is_file():
            return Found(**json.loads(written.read_text()))
    last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Died(entry.repo, f"exit {done.returncode}: {last_line}")


def random_configurations(options: argparse.Namespace) -> list[Random]:
    """Run the families' random tests in one process; every one of them must be found."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        selected = ["-k", " or ".join(RANDOM_TESTS), "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=3600", "tests/models", *selected]
        subprocess.run(command, cwd=ROOT, env=_environment(options), stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    return [_random(case, options.examples) for case in cases] + _absent(cases)


def _random(case: ElementTree.Element, examples: int) -> Random:
    family = case.get("classname", "").rpartition(".test_")[-1]
    failed = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
    found = Random(family, examples, float(case.get("time", "0")), " ".join(failed).partition("\n")[0])
    print(f"{family}: {examples} random configurations: {found.failure or 'agree'} ({found.seconds:.0f} s)", flush=True)
    return found


def _absent(cases: list[ElementTree.Element]) -> list[Random]:
    seen = {case.get("classname", "").rpartition(".test_")[-1] for case in cases}
    families = {family.MODEL_TYPE for family, _ in published()}
    return [Random(name, 0, 0.0, "its random test did not run") for name in sorted(families - seen)]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    return {**os.environ, **threads, "IMG2PARQUET_EXAMPLES": str(options.examples), "HF_HUB_OFFLINE": "1"}


def _told(result: Found | Died, number: int, total: int) -> Found | Died:
    """Print one line, and the errors below it."""
    if isinstance(result, Died):
        print(f"[{number}/{total}] {result.repo}: FAILED: {result.reason}", flush=True)
        return result
    state = "FAILED" if result.wrong else "agrees by exception" if result.excuses else "agrees"
    far = f"plain {result.plain:.1e}, fast {result.fast:.1e}, second dialect {result.second:.1e}"
    drift = ", ".join(f"{name} {cosine:.5f}" for name, cosine in result.bfloat16.items())
    times = f"{result.seconds:.0f} s, CPU {result.cpu_seconds:.0f} s"
    print(f"[{number}/{total}] {result.repo}: {state}: {far}; bfloat16 {drift}; {times}", flush=True)
    for line in (*result.notes, *result.excuses, *result.wrong):
        print(f"    {line}", flush=True)
    return result


def _is_wrong(result: Found | Died) -> bool:
    return isinstance(result, Died) or bool(result.wrong)


# --- the result file ---

HEAD = """# Parity with transformers

Made by `make parity`: every published configuration at full depth and at its own input size, float32, on one CPU. The
weights are seeded (non-trivial in every parameter and statistic) and saved by transformers; ours loads them and is
compared with the reference class that the checkpoint names, on the same pixels.

"""
COLUMNS = """
- *plain*, *fast*: the largest |difference| of any feature, relative to that feature's largest value; the bound is 1e-5.
  *Second dialect*: the larger of both forms, read from a file with the names that transformers 5 has in memory (in
  brackets: how many of them differ from those on the hub).
- *Config*: fields of our settings, training's too, that equal the reference's: read from the `config.json` that it
  saved, which names all, and from our catalogue, which leaves the rest to our defaults.
- *bfloat16*: smallest cosine over the batch between the fast form in bfloat16 and the float32 reference, on these
  random weights; in brackets that of transformers' own bfloat16.
- *CPU seconds* of all threads: making, saving, loading and running all of it.

| checkpoint | parameters | input | config | plain | fast | second dialect | bfloat16 | CPU seconds |
|---|--:|--:|--:|--:|--:|--:|---|--:|
"""


def markdown(results: list[Found | Died], random: list[Random], threads: int) -> str:
    text = HEAD + _summary(results) + "\n" + _versions(threads) + COLUMNS
    text += "".join(_row(result) for result in results)
    text += "\n† a stated exception, below.\n" if any(getattr(result, "excuses", ()) for result in results) else ""
    text += _section("Features compared", _features(results))
    text += _section("Notes", [f"`{r.repo}`: {note}." for r in results if isinstance(r, Found) for note in r.notes])
    text += _section("Exceptions", _exceptions(results))
    text += _section("Wrong", _wrong(results))
    return text + _section(RANDOM, [_random_line(one) for one in random])


def _summary(results: list[Found | Died]) -> str:
    wrong = sum(map(_is_wrong, results))
    excused = sum(1 for result in results if isinstance(result, Found) and result.excuses)
    return f"**{len(results)} checkpoints: {len(results) - wrong} agree, {wrong} do not; {excused} by exception.**\n"


def _versions(threads: int) -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {packages}.\n{_cpu()}, {threads} threads.\n{_model_code()}"


def _model_code() -> str:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(MODEL_CODE.glob("*.py")))).hexdigest()
    return f"Model code: `cat pipeline/img2parquet/models/*.py | sha256sum` begins with {digest[:12]}.\n"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(units)})"


def _row(result: Found | Died) -> str:
    if isinstance(result, Died):
        return f"| {result.repo} | FAILED: {result.reason} |" + " |" * 7 + "\n"
    cells = (
        result.repo,
        f"{result.parameters / 1e6:.1f} M",
        f"{result.batch}x{result.side}x{result.side}",
        str(result.config_fields),
        *(_far(far, result) for far in (result.plain, result.fast)),
        f"{_far(result.second, result)} ({result.second_dialect or 'same names'})",
        _drift(result),
        f"{result.cpu_seconds:.0f}",
    )
    return "| " + " | ".join(cells) + " |\n"


def _far(distance: float, result: Found) -> str:
    excused = result.excuses and not distance <= 1e-5
    return ("0" if distance == 0 else f"{distance:.1e}") + ("†" if excused else "")


def _drift(result: Found) -> str:
    theirs = result.bfloat16_reference
    return ", ".join(f"{name} {cosine:.5f} ({theirs[name]:.5f})" for name, cosine in result.bfloat16.items())


def _features(results: list[Found | Died]) -> list[str]:
    """Group the checkpoints that are compared by the same features into one line."""
    lines: dict[str, list[str]] = {}
    for result in results:
        if isinstance(result, Found):
            key = f"{result.architecture}: {', '.join(result.compared)}"
            lines.setdefault(key, []).append(result.repo.rpartition("/")[-1])
    return [f"{key} — {', '.join(repos)}" for key, repos in lines.items()]


def _exceptions(results: list[Found | Died]) -> list[str]:
    lines = [f"`{r.repo}`, {excuse}." for r in results if isinstance(r, Found) for excuse in r.excuses]
    rule = (
        "Random weights in a deep network may amplify float32's own rounding. Allowed only where the reference is "
        "itself far from its own float64, and ours at most twice as far (the rule of the test files):"
    )
    return [rule, *lines] if lines else []


def _wrong(results: list[Found | Died]) -> list[str]:
    died = [f"`{r.repo}`: {r.reason}" for r in results if isinstance(r, Died)]
    return died + [f"`{r.repo}`: {line}" for r in results if isinstance(r, Found) for line in r.wrong]


def _random_line(one: Random) -> str:
    drawn = f"{one.examples} drawn, every feature of each compared, plain and fast, in {one.seconds:.0f} s"
    return (
        f"{one.family}: {one.failure}." if one.failure else f"{one.family}: {drawn}: all agree by the rule of its test."
    )


def _section(title: str, lines: list[str]) -> str:
    return f"\n## {title}\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.parity.parity")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only checkpoints whose name holds this")
    parser.add_argument("--random", action="store_true", help="the random configurations alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--examples", type=int, default=250, help="random configurations of each family")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the saved weights (9 GB at most)")
    return parser.parse_args()


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(status)
