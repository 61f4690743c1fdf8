"""`img2parquet submit` against a live head: a cluster with a node that has a GPU and nodes that have none."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from img2parquet.engine.driver import run
from img2parquet.job import parse_job
from img2parquet.results.verify import verify
from tests.harness.chaos.bed import read_parts
from tests.harness.multinode.conftest import LIMIT_S, Fleet
from tests.support.planted_modules import Trap
from tests.support.small_job import ROWS, SHARDS, job_dict, make_checkpoint, make_shards

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(1200)]

WAIT_S = 400.0


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a checkpoint, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("bed")
    make_shards(folder / "shards")
    make_checkpoint(folder / "tiny")
    run(parse_job(document(folder, folder / "alone")), "local")
    return folder


def document(bed: Path, out: Path, **resources: object) -> dict[str, object]:
    made = job_dict(f"{bed}/shards/*.tar", bed / "tiny", str(out))
    made["resources"] = {"batch_size": 8, **resources}
    return made


def job_file(bed: Path, tmp_path: Path, **resources: object) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document(bed, tmp_path / "out", **resources)))
    return str(path)


def assert_same(bed: Path, tmp_path: Path) -> None:
    assert read_parts(str(tmp_path / "out")) == read_parts(str(bed / "alone"))
    assert verify(str(tmp_path / "out")) == []


def wait_until(what: Callable[[], object], limit_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def marks(fleet: Fleet, what: str) -> set[str]:
    """Nodes on which it was done."""
    return {path.name.partition("-")[2] for path in fleet.marks.glob(f"{what}-*")}


def begin(fleet: Fleet, slow_s: float = 0.0) -> None:
    for path in fleet.marks.iterdir():
        path.unlink()
    (fleet.marks / "slow").write_text(str(slow_s))


@pytest.fixture(scope="session")
def nodes(fleet: Fleet) -> dict[str, str]:
    return {"gpu": fleet.add(num_cpus=1, num_gpus=1), "cpu": fleet.add(num_cpus=2)}


def test_a_mixed_cluster_gives_what_one_process_gives(
    fleet: Fleet, nodes: dict[str, str], bed: Path, tmp_path: Path
) -> None:
    """The GPU's node computes, all nodes decode; with `device: auto` the GPU is found and used."""
    begin(fleet)
    ran = fleet.submit(job_file(bed, tmp_path), "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["status"] == "SUCCEEDED" and told["summary"]["rows_in"] == ROWS
    assert re.fullmatch(r"img2parquet-job-[0-9a-f]{8}", told["job_id"])
    assert "now 3 CPUs and 1 GPUs" in ran.stderr
    assert marks(fleet, "embed") == {nodes["gpu"]} and nodes["cpu"] in marks(fleet, "prepare")
    assert_same(bed, tmp_path)
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["job"]["output"]["uri"] == str(tmp_path / "out")
    # the same command again: another job, which finds nothing to do
    again = fleet.submit(job_file(bed, tmp_path))
    assert again.returncode == 0 and "nothing to do" in again.stdout and f"{told['job_id']}-2" in again.stderr


def test_files_of_the_folder_it_is_submitted_from_are_not_imported_on_the_cluster(
    fleet: Fleet, nodes: dict[str, str], bed: Path, tmp_path: Path
) -> None:
    begin(fleet)
    trap = Trap(tmp_path / "current", tmp_path / "marks")
    (trap.folder / "img2parquet.py").unlink()  # `python -m` would find it in place of the command
    ran = fleet.submit(job_file(bed, tmp_path, device="cpu"), cwd=trap.folder)
    assert ran.returncode == 0, ran.stderr
    assert not trap.sprung()
    assert_same(bed, tmp_path)


def test_nodes_may_go_and_come(fleet: Fleet, nodes: dict[str, str], bed: Path, tmp_path: Path) -> None:
    """CPUs alone: the node that does most of it is lost after the first part, and another one joins."""
    begin(fleet, slow_s=0.4)
    fleet_job = subprocess.Popen(
        fleet.command(job_file(bed, tmp_path, device="cpu", workers=2)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=fleet.environment,
    )  # fmt: skip
    wait_until(lambda: list(tmp_path.glob("out/model=*/part-*.parquet")) or fleet_job.poll() is not None)
    (fleet.marks / "hold").touch()
    fleet.remove(nodes["cpu"])
    parts = len(list(tmp_path.glob("out/model=*/part-*.parquet")))
    nodes["cpu"] = fleet.add(num_cpus=2)
    # nothing goes on until the node that joined is used
    wait_until(lambda: nodes["cpu"] in marks(fleet, "prepare") or fleet_job.poll() is not None)
    (fleet.marks / "hold").unlink()
    said = fleet_job.communicate(timeout=LIMIT_S)[0]
    assert 0 < parts < SHARDS, "it was over before its node went"
    assert fleet_job.returncode == 0, said
    assert nodes["cpu"] in marks(fleet, "prepare"), "the node that joined was not used"
    assert_same(bed, tmp_path)


def test_ctrl_c_leaves_the_job_running_and_the_same_command_follows_it(
    fleet: Fleet, nodes: dict[str, str], bed: Path, tmp_path: Path
) -> None:
    begin(fleet, slow_s=0.6)
    job = job_file(bed, tmp_path, device="cpu")
    first = subprocess.Popen(
        fleet.command(job), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=fleet.environment
    )
    wait_until(lambda: (tmp_path / "out" / "_run.json").exists() or first.poll() is not None)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=LIMIT_S)[1]
    assert first.returncode == 130, said
    found = re.search(r"stop +ray job stop (\S+) --address (\S+)", said)
    assert found and found[2] == fleet.jobs
    job_id = found[1]
    assert "RUNNING" in fleet.ray("job", "status", job_id)
    # who submits it again follows the one that runs; stopped, it ends in its own way: what is begun is committed
    second = subprocess.Popen(
        fleet.command(job), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=fleet.environment
    )
    assert second.stdout
    wait_until(lambda: list(tmp_path.glob("out/model=*/part-*.parquet")))
    fleet.ray("job", "stop", job_id)
    out, said = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 143, (out, said)
    assert "already running" in said and "SIGTERM" in out
    begin(fleet)
    done = fleet.submit(job)
    assert done.returncode == 0 and f"{job_id}-2" in done.stderr, done.stderr
    assert_same(bed, tmp_path)


def test_the_exit_code_is_the_jobs(fleet: Fleet, nodes: dict[str, str], bed: Path, tmp_path: Path) -> None:
    begin(fleet)
    ran = fleet.submit(job_file(bed, tmp_path, device="cpu"), "--set", "reject_limit=0.001")
    assert ran.returncode == 1 and "more than reject_limit" in ran.stdout
    wanted = fleet.submit(job_file(bed, tmp_path), "--set", "models.0.model=/nowhere/at/all", "--no-wait")
    assert wanted.returncode == 0 and wanted.stdout.startswith("img2parquet-job-"), wanted.stderr
    followed = fleet.submit(job_file(bed, tmp_path), "--set", "models.0.model=/nowhere/at/all")
    assert followed.returncode == 2 and "/nowhere/at/all" in followed.stdout


def test_a_head_says_no_to_a_wrong_token(fleet: Fleet, bed: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        fleet.command(job_file(bed, tmp_path)), capture_output=True, text=True, timeout=LIMIT_S,
        env=fleet.environment | {"RAY_AUTH_TOKEN": "0" * 32},
    )  # fmt: skip
    assert ran.returncode == 2 and "RAY_AUTH_TOKEN" in ran.stderr and "Traceback" not in ran.stderr


def test_a_driver_of_another_version_is_told(fleet: Fleet, bed: Path, tmp_path: Path) -> None:
    """`run --address`, which joins the cluster itself, with another Ray than the cluster's."""
    code = "import ray, sys; ray.__version__ = '2.1.0'; from img2parquet.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, "run", job_file(bed, tmp_path), "--address", fleet.address],
        capture_output=True, text=True, timeout=LIMIT_S, env=fleet.environment,
    )  # fmt: skip
    assert ran.returncode == 1 and "runs other versions than this process" in ran.stderr, ran.stderr
    assert "Ray: 2.1.0" in ran.stderr and "img2parquet submit" in ran.stderr and "Traceback" not in ran.stderr
