"""SIGTERM and Ctrl-C to a driver at random moments: complete parts are committed, and the same command does the rest.

Also workers that sleep for ever, in whole jobs; `hang` puts one into a process of ours or of Ray's."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2parquet.dataset.commit import Output
from img2parquet.engine.driver import run
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.job import parse_job
from img2parquet.results.verify import find_problems
from tests.support.patched_workers import before_each_batch
from tests.support.ray_cluster import driver_environment
from tests.support.small_job import job_dict, make_checkpoint, make_shards

SHARDS, PER_SHARD = 40, 6
pytestmark = pytest.mark.timeout(600)  # on a machine however busy
PATIENT_S = 600.0  # longer than a batch takes there


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    make_shards(folder / "in", SHARDS, PER_SHARD, broken=False)
    make_checkpoint(folder / "model")
    run(parse_job(document(folder, str(folder / "quiet"))), "local")
    return folder


DRIVER = ("-m", "img2parquet.cli")


def document(made: Path, uri: str, **resources: Any) -> dict[str, Any]:
    few = {"workers": 1, "batch_size": 4, **resources}
    return job_dict(f"{made}/in/*.tar", made / "model", uri, resources=few)


def start(
    made: Path, folder: Path, runner: str, hang: str = "", driver: tuple[str, ...] = DRIVER, **resources: Any
) -> subprocess.Popen[str]:
    """hang: code that a worker runs before each batch."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document(made, str(folder / "out"), **resources)))
    site = before_each_batch(folder / "site", hang)
    environment = driver_environment(PYTHONPATH=site) if runner == "ray" else {**os.environ, "PYTHONPATH": site}
    command = [sys.executable, *driver, "run", str(path), "--runner", runner]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def parts(folder: Path) -> int:
    return len(list((folder / "out").glob("model=*/part-*.parquet")))


def wait_for_parts(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while process.poll() is None and parts(folder) < count:
        time.sleep(0.01)


def check_whole(made: Path, folder: Path) -> None:
    stores = [Output.at(str(place)) for place in (made / "quiet", folder / "out")]
    assert find_problems(stores[1]) == []
    quiet, ours = ({n: o.store.read(e.uri) for n, e in o.part_files().items()} for o in stores)
    assert ours == quiet


def torment(
    made: Path, folder: Path, runner: str, number: signal.Signals, times: int, seed: int, enough: int | None = None
) -> int:
    """Send up to `times` signals, or until `enough` have hit a driver at work; resume; return how many hit."""
    rng, hits = random.Random(seed), 0
    for _ in range(times):
        if hits == enough:
            break
        process = start(made, folder, runner)
        wait_for_parts(process, folder, parts(folder) + rng.randint(1, 4))
        time.sleep(rng.random() * 0.05)
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        if process.returncode == 0:
            continue
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said
        stopped = re.search(
            r"^stopped by (SIGTERM|Ctrl-C): (\d+) of 40 parts are committed; run the same command", said, re.M
        )
        if stopped:
            assert int(stopped[2]) == parts(folder)
            assert list((folder / "out").glob("_meter-*"))
            hits += 1
    last = start(made, folder, runner)
    said = last.communicate(timeout=120)[1]
    assert last.returncode == 0, said
    check_whole(made, folder)
    return hits


def test_sigterm_at_random_moments_and_a_resume(made: Path, tmp_path: Path) -> None:
    assert torment(made, tmp_path, "local", signal.SIGTERM, times=3, seed=0) >= 1


@pytest.mark.slow
def test_ctrl_c_and_a_resume(made: Path, tmp_path: Path) -> None:
    assert torment(made, tmp_path, "local", signal.SIGINT, times=2, seed=1) >= 1


@pytest.mark.slow
def test_sigterm_to_a_ray_driver(made: Path, tmp_path: Path) -> None:
    assert torment(made, tmp_path, "ray", signal.SIGTERM, times=3, seed=2, enough=1) == 1


SLEEP_ONCE = """
if batch.part_index == 5:
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        time.sleep(3600)
"""


def test_a_sleeping_local_worker_ends_in_one_error_that_names_its_batch(made: Path, tmp_path: Path) -> None:
    process = start(made, tmp_path, "local", SLEEP_ONCE.format(marker=str(tmp_path / "slept")), stall_s=2)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert said.count("threads of the driver") == 1
    error = said[said.index("error: ") :]
    assert "part 5: batch 0 is missing" in error and "run the same command again" in error and "Traceback" not in error
    again = start(made, tmp_path, "local", SLEEP_ONCE.format(marker=str(tmp_path / "slept")), stall_s=2)
    assert again.wait(120) == 0
    check_whole(made, tmp_path)


WITH_FAST_CLOCK = """
import pathlib, sys, time
from img2parquet.cli import main
from img2parquet.engine import stall_detector
marker = pathlib.Path({marker!r})


class Clock:
    ahead_s = 0.0

    def monotonic(self):
        self.ahead_s += {ahead_s} * marker.exists()
        return time.monotonic() + self.ahead_s


def report(*what):
    marker.unlink()
    return report_stall(*what)


report_stall = stall_detector.StallDetector.report_stall
stall_detector.StallDetector.report_stall = report
stall_detector.time, stall_detector.MAX_TICK_S = Clock(), {ahead_s}
sys.exit(main(sys.argv[1:]))
"""


def start_with_fast_clock(made: Path, folder: Path, sleep: str) -> subprocess.Popen[str]:
    """Start a driver on Ray whose stall detector's clock is fast while a worker sleeps, so that nobody waits."""
    marker = str(folder / "sleeping")
    hang = sleep.replace("time.sleep(3600)", f"open({marker!r}, 'w').close(); time.sleep(3600)")
    driver = ("-c", WITH_FAST_CLOCK.format(marker=marker, ahead_s=PATIENT_S / 2))
    return start(made, folder, "ray", hang, driver, stall_s=PATIENT_S)


@pytest.mark.slow
def test_a_sleeping_ray_worker_is_replaced(made: Path, tmp_path: Path) -> None:
    process = start_with_fast_clock(made, tmp_path, SLEEP_ONCE.format(marker=str(tmp_path / "slept")))
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 0, said
    assert (tmp_path / "slept").exists() and "parts again with new workers (attempt 1 of 2)" in said
    assert "the workers' batches" in said
    check_whole(made, tmp_path)


@pytest.mark.slow
def test_a_ray_worker_that_always_sleeps_ends_in_one_error(made: Path, tmp_path: Path) -> None:
    always = SLEEP_ONCE.format(marker=str(tmp_path / "slept")).replace("os.O_CREAT | os.O_EXCL", "os.O_CREAT")
    process = start_with_fast_clock(made, tmp_path, always)
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 1, said
    assert "part 5: batch 0 is missing" in said[said.index("error: ") :]
    assert 0 < parts(tmp_path) < SHARDS


def test_the_second_signal_ends_at_once(made: Path, tmp_path: Path) -> None:
    process = start(made, tmp_path, "local", SLEEP_ONCE.format(marker=str(tmp_path / "slept")), grace_s=600)
    while not (tmp_path / "slept").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)  # longer than SAME_S, within which signals count once
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143


def test_a_signal_that_is_sent_twice_at_once_counts_once() -> None:
    with StopSignals() as signals, signals.graceful():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM and signals.exit_code == 143


@pytest.fixture
def _a_terminal() -> Iterator[None]:
    """Make this process handle Ctrl-C, which a background job of a shell ignores."""
    at_start = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, at_start)


@pytest.mark.usefixtures("_a_terminal")
def test_handlers_are_as_before_and_nothing_is_heard_outside_the_main_thread() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGINT) == signals._on_signal
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    heard = list[object]()

    def elsewhere() -> None:
        with StopSignals():
            heard.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard == before[1:]
