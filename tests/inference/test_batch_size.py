"""Test `batch_size: auto`: its rule on made-up curves, and trials of a real model on a fake accelerator."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from img2parquet.engine.driver import run
from img2parquet.errors import JobFailed
from img2parquet.inference import batch_size
from img2parquet.inference.batch_size import BatchDoesNotFit, Trial, auto_batch_size, best_size, cpu_batch_size
from img2parquet.job import JobSpec, parse_job
from img2parquet.models import ModelSpec, load_model, read_card
from img2parquet.models.model import Model
from tests.support.fake_accelerator import FakeApi
from tests.support.small_job import make_checkpoint, make_shards, small_job

LEVIT = {"model": "facebook/levit-128S", "weights": "random(0)", "outputs": [{"kind": "logits"}]}


def curve(fixed: float, each: float, room: int = 1 << 30) -> tuple[Callable[[int], float], list[int]]:
    """Return a function for the seconds of a batch, `fixed` + `each` per image, and the list of sizes it measured."""
    measured = list[int]()

    def measure(size: int) -> float:
        measured.append(size)
        if size > room:
            raise BatchDoesNotFit(f"{size} images do not fit")
        return fixed + each * size

    return measure, measured


@pytest.mark.parametrize(
    ("fixed", "each", "room", "best"),
    [
        (0.0, 1.0, 1 << 30, 32),  # larger batches gain nothing: the smallest
        (1.0, 1.0, 1 << 30, 32),  # 3 % at best
        (32.0, 1.0, 1 << 30, 512),  # 0.5, .67, .8, .89, .94, .97: 512 is within 5 % of what 1024 gives
        (32.0, 1.0, 300, 256),  # the same, but no room for 512
        (1e9, 1.0, 1 << 30, 1024),  # only launches take time
        (32.0, 1.0, 20, 16),  # not even the smallest fits
        (32.0, 1.0, 1, 1),
    ],
)
def test_the_smallest_size_near_the_best(fixed: float, each: float, room: int, best: int) -> None:
    measure, measured = curve(fixed, each, room)
    assert best_size(measure) == best
    assert len(measured) == len(set(measured)), "each size is tried once"


def test_trying_stops_where_it_no_longer_pays() -> None:
    measure, measured = curve(1.0, 1.0)
    best_size(measure)
    assert measured == [32, 64]


def test_a_size_that_is_slower_than_the_one_before_is_not_taken() -> None:
    rates: Mapping[int, float] = {32: 100.0, 64: 190.0, 128: 120.0, 256: 900.0}
    assert best_size(lambda size: size / rates[size]) == 64


def test_where_not_one_image_fits_the_last_complaint_is_passed_on() -> None:
    measure, measured = curve(1.0, 1.0, room=0)
    with pytest.raises(BatchDoesNotFit, match=r"^1 images do not fit"):
        best_size(measure)
    assert measured == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("sizes_HW", "size"),
    [([(224, 224)], 32), ([(64, 64)], 32), ([(384, 384)], 10), ([(224, 224), (640, 640)], 3), ([(4000, 4000)], 1)],
)
def test_on_a_cpu_a_batch_is_so_many_pixels(sizes_HW: list[tuple[int, int]], size: int) -> None:
    assert cpu_batch_size(sizes_HW) == size


# -- measuring -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("facebook/levit-128S", weights="random(0)")


class OutOfMemoryAbove:
    """A backbone that runs out of memory on more than `most` images."""

    def __init__(self, model: Model, most: int) -> None:
        self.backbone, self.most = model.backbone, most

    def __call__(self, x_BCHW: torch.Tensor, wants: frozenset[str], **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(x_BCHW) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand more")
        return self.backbone(x_BCHW, wants, **inputs)


def limited(model: Model, most: int) -> Model:
    backbone: Any = OutOfMemoryAbove(model, most)
    return Model(model.card, backbone, model.dtype, model.device)


def test_a_trial_gives_seconds_of_one_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "MIN_TRIAL_S", 0.05)
    trial = Trial([(model, frozenset({"logits"}))], FakeApi())
    assert 0 < trial(1) < trial(8) < 5


def test_a_trial_that_runs_out_of_memory_says_so_and_gives_it_back(model: Model) -> None:
    api = FakeApi()
    with pytest.raises(BatchDoesNotFit, match=r"^4 images: CUDA out of memory. Tried to allocate 20.00 MiB$"):
        Trial([(limited(model, 3), frozenset({"logits"}))], api)(4)
    assert api.releases == 2


def test_a_trial_leaves_a_fifth_of_the_memory_free(model: Model) -> None:
    with pytest.raises(BatchDoesNotFit, match="stay free"):
        Trial([(model, frozenset({"logits"}))], FakeApi(free=19))(1)
    assert Trial([(model, frozenset({"logits"}))], FakeApi(free=21))(1) > 0


def test_other_errors_are_not_taken_for_memory(model: Model) -> None:
    def broken(x_BCHW: torch.Tensor, wants: frozenset[str]) -> dict[str, torch.Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    backbone: Any = broken
    with pytest.raises(RuntimeError, match="mat1"):
        Trial([(Model(model.card, backbone, model.dtype, model.device), frozenset({"logits"}))], FakeApi())(2)


def test_a_job_for_which_not_one_image_fits_is_refused_by_name() -> None:
    job = parse_job({"input": {"kind": "folder", "uris": ["x"]}, "models": [LEVIT], "output": {"uri": "out"}})
    with pytest.raises(JobFailed, match=r"(?s)not even one image.*`levit-128S` at 224x224.*image_size"):
        batch_size._on_accelerator(job, "float32", "cpu", FakeApi(free=1))


def test_auto_on_a_cpu_tries_nothing() -> None:
    job = parse_job({"input": {"kind": "folder", "uris": ["x"]}, "models": [LEVIT], "output": {"uri": "out"}})
    cards = {"levit-128S": read_card(ModelSpec("facebook/levit-128S", weights="random(0)"))}
    assert auto_batch_size(job, cards, "float32", "cpu") == 32


# -- once a run ----------------------------------------------------------------------------------------------------


def test_a_resumed_job_takes_the_size_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "shards", shards=1)
    job = small_job(
        str(tmp_path / "shards" / "*.tar"), make_checkpoint(tmp_path / "model"), str(tmp_path / "out"), resources={}
    )
    devices = list[str]()

    def find(job: JobSpec, cards: object, dtype: str, device: str) -> int:
        devices.append(device)
        return 7

    monkeypatch.setattr("img2parquet.inference.capabilities.auto_batch_size", find)
    run(job, "local")
    next((tmp_path / "out" / "model=tiny").glob("*.parquet")).unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    run(job, "local")
    assert devices == ["cpu"]
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["batch_size"] == 7
