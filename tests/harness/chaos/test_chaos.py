"""The short version of the chaos suite: a few runs of each kind. `make chaos` is the long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.chaos.drivers import Blow
from tests.harness.chaos.plans import KINDS, OBJECTS, PART, STEPS, plan_of

ROOT = Path(__file__).parents[3]


def test_a_few_runs_of_each_kind() -> None:
    """In a process of its own, since only a single-threaded one may fork."""
    command = [sys.executable, "-m", "tests.harness.chaos", "--each", "2"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = ran.stdout.splitlines()[-1]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (runs|kills|stops|storage faults)", last)}
    assert counts["runs"] == 2 * len(KINDS) and min(counts.values()) > 0, last
    assert "rows lost = 0, rows twice = 0, 0 failures" in last
    print(last)


def test_a_seed_always_means_the_same() -> None:
    assert [plan_of(seed, 1.0) for seed in range(50)] == [plan_of(seed, 1.0) for seed in range(50)]


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_a_thousand_seeds_meet_every_step_of_every_object(store: str) -> None:
    plans = [plan_of(seed, 1.0) for seed in range(1000)]
    blows = [blow for plan in plans if plan.store == store for wave in plan.waves for blow in wave if blow]
    met = {(blow.step, blow.name) for blow in blows if isinstance(blow, Blow) and blow.what == "kill" and blow.step}
    missing = {(step, name) for step in STEPS[store] for name in (PART, *OBJECTS)} - met
    assert not missing


READER = """
import os, signal, sys
from tests.harness.chaos import reader
from tests.harness.chaos.reader import Reader

def ended(seen):
    print([problem.partition(":")[0] for problem in seen.problems])

one = Reader(sys.argv[1], "")
os.kill(one.pid, signal.SIGKILL)
ended(one.stop())
reader._Look._files = lambda self: 1 / 0
two = Reader(sys.argv[1], "")
os.waitid(os.P_PID, two.pid, os.WEXITED | os.WNOWAIT)  # gone before it is told to stop
ended(two.stop())
"""


def test_a_reader_that_ends_early_says_why(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    died, failed = ran.stdout.splitlines()
    assert died == "['a reader ended with -9']" and failed == "['a reader met ZeroDivisionError']"
