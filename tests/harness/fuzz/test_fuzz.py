"""The short version of `make fuzz`, and what keeps the fuzzer itself honest."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.fuzz import images, shards
from tests.harness.fuzz.mutate import mutated, pieces_of
from tests.harness.fuzz.parsers import PARSERS

ROOT = Path(__file__).parents[3]


def test_a_thousand_images_a_hundred_shards_and_a_few_jobs(tmp_path: Path) -> None:
    """In a process of its own, since only a single-threaded one may fork."""
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "tests.harness.fuzz", "--first", "1000000", "--runs", "0", "--out", str(out)]
    ran = subprocess.run(
        [*command, "--images", "1000", "--shards", "150", "--jobs", "6"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = json.loads(out.read_text())
    assert len(record["images"]["counts"]) > 6 and record["images"]["counts"]["pixels"] > 50
    assert len(record["shards"]["counts"]) > 9
    assert sum(record["jobs"]["counts"].values()) == 6


@pytest.mark.parametrize("parser", PARSERS)
def test_parsers_hold_under_mutations(parser: str) -> None:
    parse, seeds = PARSERS[parser]
    for number in range(40):
        rng = random.Random(f"{parser} {number}")
        parse(mutated(rng.choice(seeds), rng, seeds)[:8192])


@pytest.mark.parametrize("parser", PARSERS)
@settings(max_examples=15, deadline=None)
@given(data=st.binary(max_size=2000), at=st.integers(0, 5000), seed=st.integers(0, 9))
def test_parsers_hold_for_any_bytes(parser: str, data: bytes, at: int, seed: int) -> None:
    """Alone, and put into a good input."""
    parse, seeds = PARSERS[parser]
    parse(data)
    good = seeds[seed % len(seeds)][:8192]
    parse(good[:at] + data[:40] + good[at + len(data[:40]) :])


def test_a_seed_always_makes_the_same() -> None:
    assert [images.image(seed) for seed in range(50)] == [images.image(seed) for seed in range(50)]
    assert [shards.make(seed).files for seed in range(30)] == [shards.make(seed).files for seed in range(30)]


def test_pieces_go_together_again() -> None:
    """Of a format whose pieces are found, a join without a change decodes as before."""
    from img2parquet.images.decode import decode
    from tests.support.bad_images import GIF, JPEG, PNG, TIFF, WEBP

    for data in (GIF, JPEG, PNG, TIFF, WEBP):
        found = pieces_of(data)
        assert found and found[0]
        joined = found[1](found[0], True)
        assert (decode(joined).rgb_HWC == decode(data).rgb_HWC).all()  # type: ignore[union-attr]


TROUBLE = """
import os, signal, time
from tests.harness.fuzz.children import Suite, run

def check(seed, given):
    if seed == 2: os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 4: time.sleep(60)
    if seed == 5: raise ValueError("stray")
    if seed == 6: held = b"x" * (200 << 20)
    return "fine"

for result in run(range(8), Suite(lambda seed: b"", check, limit_s=5, most_mb=50)):
    print(result.seed, result.became or "-", result.problem.splitlines()[-1] if result.problem else "")
"""


def test_a_crash_a_hang_a_stray_error_and_a_bomb_are_named_by_their_seed() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TROUBLE], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "FUZZ_START_S": "1"},
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["0", "fine"], ["1", "fine"], ["2", "-"], ["3", "fine"], ["4", "-"], ["5", "-"], ["6", "fine"], ["7", "fine"],
    ], ran.stderr  # fmt: skip
    assert "ended with -11" in lines[2] and "hangs" in lines[4] and "stray" in lines[5] and "took 2" in lines[6]


def test_the_outcome_of_a_lost_image_is_a_failure() -> None:
    """The check can fail: an image that is neither read nor told as damaged."""
    with pytest.raises(AssertionError, match=r"000\.jpg is lost"):
        shards._check_untouched((100_000, 100_001), [])
