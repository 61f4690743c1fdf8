"""Files of the user's own, in the current folder or beside his script, are never imported by our processes.

Each planted file leaves a mark when it is imported and ends the process that imported it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray._private.ray_constants as ray_constants
import yaml

from img2parquet.isolation import import_path
from img2parquet.isolation.import_path import worker_path
from img2parquet.job import load_job
from img2parquet.runners.ray_import_path import UV_HOOK, own_code_only
from img2parquet.submit.bundle import make_bundle
from tests.support.planted_modules import NAMES, Trap
from tests.support.small_job import job_dict, make_checkpoint, make_shards

LIMIT_S = 500
CONSOLE = Path(sys.executable).parent / "img2parquet"


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    made = Trap(tmp_path / "current", tmp_path / "marks")
    yield made
    assert not made.sprung()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def job(tmp_path: Path, checkpoint: Path) -> Path:
    make_shards(tmp_path / "in", shards=2, per_shard=4, broken=False)
    document = job_dict(f"{tmp_path}/in/*.tar", checkpoint, str(tmp_path / "out"), resources={"workers": 1})
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def ran(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run(
        command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=LIMIT_S
    )


def assert_done(done: subprocess.CompletedProcess[str], job: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    parts = (job.parent / "out").glob("model=*/part-*.parquet")
    assert sum(pq.read_metadata(path).num_rows for path in parts) == 8


def test_a_trap_is_sprung_by_who_steps_into_it(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "current", tmp_path / "marks")
    assert ran([sys.executable, "-c", "import decode"], trap.folder).returncode == 66
    assert ran([sys.executable, "-P", "-c", "import decode"], trap.folder).returncode == 1
    assert len(trap.sprung()) == 1


def test_the_local_runner_imports_nothing_from_the_current_folder(trap: Trap, job: Path) -> None:
    assert_done(ran([str(CONSOLE), "run", str(job), "--runner", "local"], trap.folder), job)


def test_the_command_as_a_module_imports_only_itself_from_there(trap: Trap, job: Path) -> None:
    """`python -m img2parquet.cli` finds a foreign `img2parquet.py` before any code of ours runs; nothing else."""
    (trap.folder / "img2parquet.py").unlink()
    assert_done(ran([sys.executable, "-m", "img2parquet.cli", "run", str(job), "--runner", "local"], trap.folder), job)


ISOLATED = """
import os, sys
script_folder = sys.path.pop(0)  # this process's own imports are not what is tested
from img2parquet import load_job
from img2parquet.batch import Work, split_into_batches
from img2parquet.dataset.plan import make_plan
from img2parquet.inference.capabilities import probe_capabilities
from img2parquet.isolation.child_process import ChildProcess

job = load_job(sys.argv[1])
found = probe_capabilities(job)
work = Work(job, found.cards, found.dtype, found.device, batch_size=4, threads=1)
part = make_plan(job, found.cards, found.dtype).parts[0]
batch = next(split_into_batches(job.input, part, 4))
sys.path[:0] = [script_folder, "", os.getcwd()]
child = ChildProcess(work)
rows = list(child.request("read", part))
(prepared,) = child.request("prepare", batch)
(embedded,) = child.request("embed", prepared)
child.close()
print(len(rows), len(embedded.tables["tiny"]))
"""


def test_isolated_processes_import_nothing_from_the_current_or_the_scripts_folder(
    trap: Trap, job: Path, tmp_path: Path, ray_cluster: str
) -> None:
    script = tmp_path / "scripts" / "embed.py"
    script.parent.mkdir()
    script.write_text(ISOLATED)
    trap.plant(script.parent, NAMES)
    done = ran([sys.executable, str(script), str(job)], trap.folder)
    assert (done.returncode, done.stdout) == (0, "4 4\n"), done.stderr


def test_a_submitted_job_imports_nothing_from_the_folder_it_is_submitted_or_started_in(
    trap: Trap, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/harness/multinode/test_submit.py` does so with a live head."""
    monkeypatch.chdir(trap.folder)
    upload = tmp_path / "upload"
    upload.mkdir()
    make_bundle(load_job(job), "job", shared_paths=True).pack(upload)
    assert not {f"{name}.py" for name in NAMES} & {path.name for path in upload.iterdir()}
    command = [sys.executable, str(upload / "bootstrap.py"), "run", "job.json", "--runner", "local"]
    assert_done(ran(command, trap.folder), job)


def test_what_pythonpath_names_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was set on purpose: a checkout, or libraries beside the user's own files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(tmp_path / "libraries"), *sys.path])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert str(tmp_path) not in worker_path() and str(tmp_path / "libraries") in worker_path()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert str(tmp_path) in worker_path() and "" not in worker_path()


def test_a_checkout_is_found_and_site_packages_do_not_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_path, "PACKAGE_FOLDER", Path("/checkout/pipeline"))
    assert import_path.package_folders() == ["/checkout/pipeline"]
    monkeypatch.setattr(import_path, "PACKAGE_FOLDER", Path(sysconfig.get_path("purelib")).resolve())
    assert import_path.package_folders() == []


def test_below_uv_run_the_current_folder_is_not_uploaded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_constants, UV_HOOK, True)
    monkeypatch.setenv(UV_HOOK, "1")
    own_code_only(None)
    assert getattr(ray_constants, UV_HOOK) is True
    monkeypatch.delenv(UV_HOOK)
    own_code_only(None)
    assert getattr(ray_constants, UV_HOOK) is False
    assert own_code_only("ray://head:10001") == {}


@pytest.mark.slow
def test_rays_workers_import_nothing_from_the_current_folder(trap: Trap, job: Path) -> None:
    assert_done(ran([str(CONSOLE), "run", str(job), "--runner", "ray"], trap.folder), job)


@pytest.mark.slow
def test_workers_of_a_cluster_that_is_joined_import_nothing_from_there_or_beside_the_script(
    trap: Trap, job: Path, tmp_path: Path, ray_cluster: str
) -> None:
    script = tmp_path / "scripts" / "embed.py"
    script.parent.mkdir()
    script.write_text(f"import img2parquet\nimg2parquet.run(img2parquet.load_job({str(job)!r}), runner='ray')\n")
    trap.plant(script.parent, ("pipeline", "decode", "read", "job", "sitecustomize"))
    assert_done(ran([sys.executable, str(script)], trap.folder, RAY_ADDRESS=ray_cluster), job)
