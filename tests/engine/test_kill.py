"""SIGKILL of the driver at random moments, then a resume: no row is lost or doubled, no torn file is ever seen."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from img2parquet.dataset.commit import Output
from img2parquet.engine.driver import run
from img2parquet.job import parse_job
from img2parquet.results.reader import open_results
from img2parquet.results.verify import find_problems
from tests.support.patched_workers import before_each_batch
from tests.support.ray_cluster import driver_environment
from tests.support.small_job import job_dict, make_checkpoint, make_shards

SHARDS, PER_SHARD = 60, 6


class Reader(threading.Thread):
    """Reads all visible files over and over, and notes torn ones and duplicate keys."""

    def __init__(self, output: Output) -> None:
        super().__init__(daemon=True)
        self.output, self.problems, self.looks, self.stopped = output, [], 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.05):
            try:
                self.look()
            except Exception as error:
                self.problems.append(repr(error))

    def look(self) -> None:
        keys: list[str] = []
        for name, entry in self.output.part_files().items():
            table = pq.read_table(pa.BufferReader(self.output.store.read(entry.uri)))
            if table.num_rows != PER_SHARD:
                self.problems.append(f"{name}: {table.num_rows} rows")
            keys += table["key"].to_pylist()
        if len(keys) != len(set(keys)):
            self.problems.append("a row twice")
        self.looks += 1


def start(job: Path, runner: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "img2parquet.cli", "run", str(job), "--runner", runner]
    environment = driver_environment() if runner == "ray" else None
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=environment
    )


def kill_after_progress(process: subprocess.Popen[bytes], output: Output, rng: random.Random) -> None:
    """Send SIGKILL a moment after the first new part, unless the driver has ended by itself by then."""
    before = len(output.part_files())
    deadline = time.monotonic() + 120
    while process.poll() is None and len(output.part_files()) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def torment(tmp_path: Path, uri: str, runner: str, kills: int, seed: int, enough: int | None = None) -> int:
    """Kill a job `kills` times, or until `enough` hit; resume and compare with an undisturbed run. Return the hits."""
    make_shards(tmp_path / "in", SHARDS, PER_SHARD, broken=False)
    resources = {"workers": 1, "batch_size": 4}
    document = job_dict(f"{tmp_path}/in/*.tar", make_checkpoint(tmp_path / "model"), uri, resources=resources)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(document))
    output, rng, hits = Output.at(uri), random.Random(seed), 0
    reader = Reader(output)
    reader.start()
    for _ in range(kills):
        if hits == enough:
            break
        process = start(job, runner)
        kill_after_progress(process, output, rng)
        hits += process.returncode == -signal.SIGKILL
    last = start(job, runner)
    said = last.communicate(timeout=180)[1].decode()
    assert last.returncode == 0, said
    reader.stopped.set()
    reader.join()
    assert reader.problems == []
    assert reader.looks > kills
    assert find_problems(output) == []
    assert open_results(uri).count_rows() == SHARDS * PER_SHARD
    quiet = parse_job({**document, "output": {"uri": str(tmp_path / "quiet")}})
    run(quiet, "local")
    undisturbed = Output.at(quiet.output.uri)
    assert {n: undisturbed.store.read(e.uri) for n, e in undisturbed.part_files().items()} == {
        n: output.store.read(e.uri) for n, e in output.part_files().items()
    }
    return hits


@pytest.mark.slow
def test_ten_kills_and_a_resume(tmp_path: Path) -> None:
    assert torment(tmp_path, str(tmp_path / "out"), "local", kills=10, seed=0) >= 8


@pytest.mark.slow
def test_kills_while_writing_to_s3(tmp_path: Path, s3_bucket: str) -> None:
    assert torment(tmp_path, f"{s3_bucket}/out", "local", kills=3, seed=1) >= 2


@pytest.mark.slow
def test_kills_of_a_ray_driver(tmp_path: Path) -> None:
    assert torment(tmp_path, str(tmp_path / "out"), "ray", kills=3, seed=2, enough=1) == 1


@pytest.mark.realstore
@pytest.mark.slow
def test_kills_on_a_real_store(tmp_path: Path, realstore_bucket: str) -> None:
    assert torment(tmp_path, f"{realstore_bucket}/out", "local", kills=3, seed=3) >= 2


@pytest.mark.slow
def test_two_drivers_at_once_write_each_row_once(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", 8, PER_SHARD, broken=False)
    uri = str(tmp_path / "out")
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(job_dict(f"{tmp_path}/in/*.tar", make_checkpoint(tmp_path / "model"), uri)))
    drivers = [start(job, "local") for _ in range(2)]
    assert [driver.wait(120) for driver in drivers] == [0, 0]
    assert find_problems(Output.at(uri)) == []
    assert open_results(uri).count_rows() == 8 * PER_SHARD


def below(pid: int) -> list[int]:
    """List the processes that descend from this one."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


@pytest.mark.multinode
@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_a_driver_whose_cluster_dies_says_so_and_the_next_run_resumes(process: str, tmp_path: Path) -> None:
    make_shards(tmp_path / "in", SHARDS, PER_SHARD, broken=False)
    resources = {"workers": 1, "batch_size": 4}
    checkpoint, out = make_checkpoint(tmp_path / "model"), tmp_path / "out"
    job = tmp_path / "job.yaml"
    document = job_dict(f"{tmp_path}/in/*.tar", checkpoint, str(out), resources=resources)
    job.write_text(yaml.safe_dump(document))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = before_each_batch(tmp_path / "site", "time.sleep(0.3)")
    command = [sys.executable, "-m", "img2parquet.cli", "run", str(job), "--runner", "ray"]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    try:
        while driver.poll() is None and not list(out.glob("model=*/*.parquet")):
            time.sleep(0.01)
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in below(driver.pid)}
        os.kill(next(pid for pid, name in names.items() if name == process), signal.SIGKILL)
        _, said = driver.communicate(timeout=300)
    finally:
        driver.kill()
    committed = len(Output.at(str(out)).part_files())
    assert driver.returncode == 1 and b"\nerror: " in said, said.decode()
    last = said.decode().rpartition("\nerror: ")[2]
    assert "run the same command again" in last and "\nhint: " in last and "Traceback" not in said.decode(), (
        said.decode()
    )
    assert 0 < committed < SHARDS, "it was over before its cluster went"
    summary = run(parse_job(document), "local")
    assert summary.parts_done_before == committed and find_problems(Output.at(str(out))) == []
    assert open_results(str(out)).count_rows() == SHARDS * PER_SHARD
