"""The short version of `make bounds`: a fiftieth of its sizes, and bounds that can be missed."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.harness.bounds.__main__ import BASE_MB, cases
from tests.harness.bounds.inputs import many_bytes, many_images, many_pixels
from tests.harness.bounds.memory import _watch

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_small_jobs_stay_within_their_bounds(tmp_path: Path) -> None:
    out = tmp_path / "bounds.json"
    command = [sys.executable, "-m", "tests.harness.bounds", "--scale", "0.02", "--runner", "local", "--out", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    jobs = json.loads(out.read_text())["jobs"]
    assert len(jobs) == 3 and all(job["held"] and job["rows written"] == job["images"] for job in jobs)
    assert all(100 < job["driver, MB"] < job["driver may, MB"] for job in jobs)


def test_inputs_are_what_they_say(tmp_path: Path) -> None:
    many_images(tmp_path / "a.tar", 30)
    many_bytes(tmp_path / "b.tar", 5, 1 << 20)
    many_pixels(tmp_path / "c.tar", 300, 400, 2)
    names = {}
    for path in sorted(tmp_path.iterdir()):
        with tarfile.open(path) as tar:
            names[path.name] = tar.getnames()
            for member in tar:
                file = tar.extractfile(member)
                assert file
                with Image.open(file) as image:
                    assert image.size == ((400, 300) if path.name == "c.tar" else (64, 48))
    assert {name: len(found) for name, found in names.items()} == {"a.tar": 30, "b.tar": 5, "c.tar": 4}
    assert (tmp_path / "b.tar").stat().st_blocks * 512 < 1 << 20, "its zeros are holes"


def test_the_bounds_are_below_the_inputs() -> None:
    """A job that held its whole shard, or decoded all its images at once, would be told."""
    by_name = {(case.name, case.runner): case for case in cases(1.0)}
    assert by_name["a tar of 4.2 GB", "local"].driver_bound_mb < BASE_MB + 1000
    assert by_name["JPEGs and PNGs of 80 megapixels", "local"].driver_bound_mb < BASE_MB + 6 * 80 * 7


def test_a_peak_that_is_over_is_still_seen() -> None:
    import threading

    held = "import time; x = b'x' * (200 << 20); del x; print('done', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline()
    peaks: dict[int, tuple[str, float]] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    while process.pid not in peaks:
        ended.wait(0.05)
    ended.set()
    watcher.join()
    process.kill()
    process.wait()
    assert peaks[process.pid][1] > 200
