"""`--runner auto`: a job that one process does in minutes runs in this one, and what is finished starts nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

import img2parquet
from img2parquet import runners
from img2parquet.errors import InputError, JobError, RunMismatch
from img2parquet.runners import LOCAL_BYTES, LOCAL_CPUS, choose_automatically
from img2parquet.runners.local import LocalRunner
from tests.support.small_job import GOOD, job_dict, small_job

HUGE = 100 * LOCAL_BYTES


def counted() -> int:
    raise AssertionError("the input was counted though the answer does not depend on it")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two CPUs without a GPU, where no cluster is named or joined."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(runners, "count_nvidia_devices", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))


def test_a_small_machine_works_in_this_process_whatever_the_input() -> None:
    assert choose_automatically(None, counted) == ("local", "")


def test_a_named_cluster_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    name, why = choose_automatically("head:6379", counted)
    assert name == "ray" and "head:6379" in why
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    name, why = choose_automatically(None, counted)
    assert name == "ray" and "other:6379" in why


def test_every_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "count_nvidia_devices", lambda: 1)
    assert choose_automatically(None, counted)[0] == "local"
    monkeypatch.setattr(runners, "count_nvidia_devices", lambda: 4)
    assert choose_automatically(None, counted) == ("ray", "this machine has 4 GPUs")


@pytest.mark.parametrize(("size", "name"), [(LOCAL_BYTES, "local"), (HUGE, "ray")])
def test_on_many_cpus_the_input_decides(size: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(LOCAL_CPUS + 1)))
    assert choose_automatically(None, lambda: size)[0] == name


def test_an_unknown_runner_is_an_error_even_if_nothing_is_left(finished: Path, shards: str, checkpoint: Path) -> None:
    with pytest.raises(JobError, match="unknown runner `lokal`"):
        img2parquet.run(small_job(shards, checkpoint, str(finished)), "lokal")


def test_the_default_runs_here(shards: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr("img2parquet.engine.driver.choose_runner", lambda name: (chosen.append(name), LocalRunner())[1])
    summary = img2parquet.run(small_job(shards, checkpoint, str(tmp_path / "out")))
    assert chosen == ["local"] and summary.rows_written == {"tiny": GOOD}


def command(job: Mapping[str, object], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a job in a process that ends with code 70 if it has imported Ray."""
    (folder / "job.yaml").write_text(yaml.safe_dump(dict(job)))
    code = (
        "import sys; from img2parquet.cli import main; done = main(sys.argv[1:]); "
        "sys.exit(done or 70 * ('ray' in sys.modules))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "run", str(folder / "job.yaml"), *options],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_finished_job_starts_no_runner(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    job = job_dict(shards, checkpoint, str(tmp_path / "out"))
    first = command(job, tmp_path)
    assert first.returncode == 0, first
    assert "Listing the input" in first.stderr, first
    again = command(job, tmp_path, "--runner", "ray")  # ends with 70 if it has imported Ray
    assert again.returncode == 0, again
    assert "nothing to do" in again.stdout, again
    assert "Listing the input" not in again.stderr, again
    other = command({**job, "dtype": "bfloat16"}, tmp_path, "--runner", "ray")
    assert other.returncode == 2 and "bfloat16" in other.stderr, other  # it is still compared


def test_a_lost_part_is_made_again_and_other_settings_are_refused(
    shards: str, checkpoint: Path, tmp_path: Path
) -> None:
    job = small_job(shards, checkpoint, str(tmp_path / "out"))
    img2parquet.run(job)
    lost = sorted(Path(job.output.uri).glob("model=*/*.parquet"))[0]
    bytes_before = lost.read_bytes()
    lost.unlink()
    assert img2parquet.run(job).parts_done_before > 0 and lost.read_bytes() == bytes_before
    model = job.models[0].model_copy(update={"image_size": 60})
    with pytest.raises(RunMismatch):
        img2parquet.run(job.model_copy(update={"models": (model,)}))


def test_the_input_is_checked_before_the_models(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    document = job_dict(str(tmp_path / "none-*.tar"), checkpoint, str(tmp_path / "out"))
    document["models"][0]["model"] = "no-such/model"
    document["models"][0]["name"] = "m"
    with pytest.raises(InputError):
        img2parquet.run(img2parquet.parse_job(document))
    document["input"] = {"kind": "folder", "uris": [str(tmp_path / "photos")]}
    with pytest.raises(InputError):
        img2parquet.run(img2parquet.parse_job(document))
    assert not (tmp_path / "out").exists()


def test_a_job_is_given_as_a_file_or_as_its_content(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    document = job_dict(shards, checkpoint, str(tmp_path / "out"))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    assert img2parquet.run(tmp_path / "job.yaml").rows_written == {"tiny": GOOD}
    assert img2parquet.run(document).parts_done_before > 0
    with pytest.raises(JobError, match="no such job file"):
        img2parquet.run("none.yaml")
