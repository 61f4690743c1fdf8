"""Compare models, decoding and whole jobs with alternatives; print tables and write a file for each.

    python -m infra.bench [SUITE ...] [--quick] [--threads 2] [--rounds 5] [--only bit-50 ...] [--out FOLDER]

Without a name, all suites run; results of `--only` have pages of their own. `--quick` checks that a suite works: one
round, small batches, results in out/bench. Two suites run only by name: `gpu` for one GPU, and `simulate` for the
driver of a job of 1e9 images; both have a `--help`.
Exits with 1 when a contestant's output differs from the reference; a floor that is not reached is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from infra.bench import decode, efficiency, end_to_end, gpu, growth, models, simulate
from infra.bench.contest import Rules
from infra.bench.report import Report

SUITES: dict[str, Callable[[Rules, int, Sequence[str]], Report]] = {
    "models": models.report,
    "decode": decode.report,
    "end_to_end": end_to_end.report,
    "efficiency": efficiency.report,
    "growth": growth.report,
}
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("out/bench")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["gpu"]:  # for a machine with a GPU, with options of its own
        return gpu.main(given[1:])
    if given[:1] == ["simulate"]:  # the driver alone: hours at full size
        return simulate.main(given[1:], RESULTS)
    options = _options(given)
    rules = Rules(rounds=1, round_s=0.0, quick=True) if options.quick else Rules(rounds=options.rounds)
    folder: Path = options.out or (QUICK_RESULTS if options.quick else RESULTS)
    good = True
    for name in options.suites or SUITES:
        report = SUITES[name](rules, options.threads, options.only)
        report = replace(
            report, name="-".join([report.name, *options.only])
        )  # a separate page from that of all subjects
        print(report.markdown())
        print(f"written: {', '.join(map(str, report.write(folder)))}")
        good = good and report.agrees
    return 0 if good else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="|".join(SUITES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="of each model; decoding is always measured with one")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed rounds whose median is taken")
    parser.add_argument("--only", nargs="+", default=[], metavar="SUBJECT", help="models or image sets by name")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    unknown = set(options.suites) - SUITES.keys()
    if unknown:
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; known: {', '.join(SUITES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
