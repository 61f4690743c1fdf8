"""`dtype: auto` means the same to a job and to `load_model`, also on GPUs that only emulate bfloat16."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from img2parquet.inference import capabilities, device_selection
from img2parquet.inference.device_selection import GpuInventory
from img2parquet.job import parse_job
from img2parquet.models import load_model, model
from img2parquet.models.dtypes import resolve_dtype
from tests.support.small_job import job_dict, make_checkpoint

GPUS = [(6, "float32"), (7, "float16"), (8, "bfloat16"), (9, "bfloat16")]  # compute capability: 7 is V100 and T4


def use_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """Make torch report one GPU of this compute capability; it would emulate bfloat16."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))


@pytest.mark.parametrize(("major", "expected"), GPUS)
def test_a_job_and_load_model_agree_on_a_gpu(
    major: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = parse_job(job_dict("*.tar", make_checkpoint(tmp_path), str(tmp_path / "out")), ["dtype=auto"])
    job = job.model_copy(update={"resources": job.resources.model_copy(update={"batch_size": 2})})
    use_gpu(monkeypatch, major)
    monkeypatch.setattr(device_selection, "detect_gpus", lambda in_cluster=0: GpuInventory(1, 1, "2.13.0"))
    monkeypatch.setattr(model, "_device", lambda device: torch.device("cpu"))

    probed = capabilities.probe_capabilities(job)

    assert (probed.device, probed.dtype) == ("cuda", expected)
    assert load_model(job.spec_of(job.models[0]), dtype="auto", device="cuda").dtype == getattr(torch, expected)


@pytest.mark.parametrize(("has_amx", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_on_cpus_it_depends_on_matrix_units(has_amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert resolve_dtype("auto", "cpu") == resolve_dtype("auto") == expected
    assert resolve_dtype("auto", "mps") == "float32"


def test_without_a_gpu_cuda_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_dtype("auto", "cuda") == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_everywhere(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(monkeypatch, 7)
    assert resolve_dtype(dtype, "cuda") == resolve_dtype(dtype) == dtype
