"""Check that a GPU that would stay idle is an error unless the job asks for that. Needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from img2parquet.errors import JobError
from img2parquet.inference import capabilities, device_selection
from img2parquet.inference.device_selection import GpuInventory, choose_device, count_nvidia_devices
from img2parquet.job import parse_job
from img2parquet.models import ModelSpec, read_card
from img2parquet.run_identity import identity
from tests.support.small_job import job_dict, make_checkpoint

NONE, ONE, TWO = GpuInventory(0, 0, "2.13.0"), GpuInventory(1, 1, "2.13.0"), GpuInventory(2, 2, "2.13.0")
UNUSABLE = GpuInventory(1, 0, "2.13.0+cpu, built without CUDA")
ELSEWHERE = GpuInventory(8, 1, "2.13.0")  # a worker sees only the GPU that Ray gave it


@pytest.mark.parametrize(
    ("wanted", "each", "seen", "expected"),
    [
        ("auto", "auto", NONE, "cpu"),
        ("auto", 0, NONE, "cpu"),
        ("auto", "auto", ONE, "cuda"),
        ("auto", 1.0, ELSEWHERE, "cuda"),
        ("auto", 0.5, TWO, "cuda"),
        ("cuda", "auto", ONE, "cuda"),
        ("cpu", "auto", ONE, "cpu"),
        ("cpu", 0, UNUSABLE, "cpu"),
        ("auto", "auto", UNUSABLE, "torch cannot use it: 2.13.0+cpu, built without CUDA"),
        ("cuda", "auto", UNUSABLE, "device: cpu"),
        ("auto", 0, ONE, "there is 1 GPU, but a worker gets none"),
        ("auto", 0.0, TWO, "there are 2 GPUs"),
        ("cuda", "auto", NONE, "none here"),
        ("auto", 1.0, NONE, "none here"),
        ("cpu", 1.0, ONE, "gpus_per_worker is 1"),
    ],
)
def test_the_device_or_what_to_do(wanted: Any, each: Any, seen: GpuInventory, expected: str) -> None:
    if expected in ("cpu", "cuda"):
        assert choose_device(wanted, each, seen) == expected
    else:
        with pytest.raises(JobError) as caught:
            choose_device(wanted, each, seen)
        assert expected in str(caught.value)
        assert "hint: " in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("0,1", 2), ("1", 1), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,1,2,3", 2)]
)
def test_devices_that_this_process_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_nvidia_devices(tmp_path) == count


def test_a_job_is_stopped_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device_selection, "detect_gpus", lambda in_cluster: GpuInventory(max(in_cluster, 0), 0, "2.13.0+cpu")
    )
    job = parse_job(job_dict("*.tar", make_checkpoint(tmp_path), str(tmp_path / "out")))
    assert capabilities.probe_capabilities(job).device == "cpu"
    with pytest.raises(JobError, match="there are 4 GPUs, but torch"):
        capabilities.probe_capabilities(job, cluster_gpus=4)
    idle = job.model_copy(update={"resources": job.resources.model_copy(update={"device": "cpu"})})
    assert capabilities.probe_capabilities(idle, cluster_gpus=4).device == "cpu"


def test_the_device_is_not_part_of_the_identity(tmp_path: Path) -> None:
    document = job_dict("*.tar", make_checkpoint(tmp_path), str(tmp_path / "out"))
    made = []
    for device in ("auto", "cpu"):
        job = parse_job(document, [f"resources.device={device}"])
        made.append(identity(job, job.models[0], read_card(ModelSpec(job.models[0].model, name="tiny")), "float32"))
    assert made[0] == made[1]
