"""Test the Embedder on a fake accelerator: same rows, overlapping batches, bounded memory, recovery from out-of-memory.

The fake runtime copies late, on threads of its own, so data that is read too early is wrong.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from img2parquet.batch import Batch, Embedded, Failed, Prepared, Work
from img2parquet.errors import JobFailed
from img2parquet.inference import cuda_graphs
from img2parquet.inference.device import (
    LANES,
    Accelerator,
    ComputeQueue,
    Cpu,
    Device,
    DeviceClock,
    is_out_of_memory,
    open_device,
)
from img2parquet.inference.forward import ModelExecutor
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.job import JobSpec
from img2parquet.models import read_card
from img2parquet.models.model import Model
from img2parquet.outputs import BatchRows
from img2parquet.outputs.embedding import Embedding
from img2parquet.outputs.visual_tokens import VisualTokens
from img2parquet.schema import Row
from tests.models import oracle
from tests.support.fake_accelerator import FakeApi
from tests.support.small_job import jpeg, make_checkpoint, small_job

B = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"))
    job = two_models(checkpoint)
    cards = {wanted.name: read_card(job.spec_of(wanted)) for wanted in job.models}
    return Work(job, cards, "float32", "cpu", batch_size=B, threads=1)


def two_models(checkpoint: Path) -> JobSpec:
    outputs = [{"kind": "embedding"}, {"kind": "labels", "top_k": 2}, {"kind": "logits"}]
    models = [{"model": str(checkpoint), "name": name, "outputs": outputs} for name in ("tiny", "other")]
    return small_job("*.tar", checkpoint, "out", models=models)


def batches(work: Work, *sizes: int) -> list[Prepared]:
    prepare = Preparer(work)
    return [
        prepare(Batch(0, k, tuple(row(k * B + n) for n in range(size)), rows_in=None)) for k, size in enumerate(sizes)
    ]


def row(number: int) -> Row:
    return Row(number, f"{number:04d}", "a.tar", jpeg(number), {"label": number, "caption": ""})


def tables(result: Embedded | Failed) -> Mapping[str, pa.Table]:
    assert isinstance(result, Embedded), result
    return result.tables


class Watched:
    """A backbone that counts its concurrent callers, and runs out of memory on more than `most` images."""

    def __init__(self, backbone: Any, most: int = 1 << 30, message: str = "CUDA out of memory") -> None:
        self.backbone, self.most, self.message = backbone, most, message
        self.seen, self.inside, self.crowd = list[int](), 0, 0

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], **inputs: Tensor) -> dict[str, Tensor]:
        self.inside += 1
        self.crowd = max(self.crowd, self.inside)
        try:
            self.seen.append(len(x_BCHW))
            if len(x_BCHW) > self.most:
                raise torch.OutOfMemoryError(f"{self.message}. Tried to allocate 2.00 GiB\nand more")
            return self.backbone(x_BCHW, wants, **inputs)  # type: ignore[no-any-return]
        finally:
            self.inside -= 1


def embedder(work: Work, device: Device, most: int = 1 << 30) -> tuple[Embedder, list[Watched]]:
    made = Embedder(work, device)
    watched = [Watched(forward.model.backbone, most) for _, forward in made.models]
    for (_, forward), backbone in zip(made.models, watched, strict=True):
        forward.model.backbone = backbone
    return made, watched


# -- overlap -------------------------------------------------------------------------------------------------------


def test_overlapping_batches_give_the_same_rows(work: Work) -> None:
    prepared = batches(work, *[B] * 12)
    expected = [tables(Embedder(work)(one)) for one in prepared]
    overlapped, watched = embedder(work, Accelerator(FakeApi()))
    with ThreadPoolExecutor(6) as pool:
        found = [tables(result) for result in pool.map(overlapped, prepared)]
    assert found == expected
    assert [backbone.crowd for backbone in watched] == [1, 1], "launches take turns"


@pytest.mark.parametrize(("images", "computed"), [(8, 8), (7, 8), (6, 8), (5, 5), (1, 1)])
def test_a_batch_that_is_nearly_whole_is_padded_to_a_whole_one(work: Work, images: int, computed: int) -> None:
    made, (backbone, _) = embedder(work, Accelerator(FakeApi()))
    (prepared,) = batches(work, images)
    result, alone = tables(made(prepared)), tables(Embedder(work)(prepared))
    assert backbone.seen == [computed]
    for name in result:
        ours, right = (np.stack(table[name]["logits"].to_numpy()) for table in (result, alone))
        assert np.allclose(ours, right, atol=1e-5) and result[name]["key"] == alone[name]["key"]


def test_an_empty_batch_launches_nothing(work: Work) -> None:
    made, watched = embedder(work, Accelerator(FakeApi()))
    assert [table.num_rows for table in tables(made(batches(work, 0)[0])).values()] == [0, 0]
    assert [backbone.seen for backbone in watched] == [[], []]


def test_what_a_model_sees_besides_pixels_goes_the_same_way(tmp_path: Path) -> None:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BeitConfig(**sizes, image_size=32, patch_size=8, vocab_size=11, use_mask_token=True)
    found = oracle.opened(oracle.saved(BeitForMaskedImageModeling(config), tmp_path))
    place = torch.device("cpu")
    model = Model(found.card(), found.filled(torch.float32, place, True), torch.float32, place)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    about = BatchRows([f"{n}" for n in range(6)], [(32, 32)] * 6)
    outputs = (VisualTokens(), Embedding(pool="mean"), VisualTokens(name="seed_1", seed=1))

    def columns(device: Device) -> list[pa.Array]:
        with device.lane() as lane:
            made = ModelExecutor(model, outputs, 6, device).columns(lane, pixels, about)
        assert made is not None and not made.not_finite
        return made.arrays

    ours, right = columns(Accelerator(FakeApi())), columns(Cpu())
    assert ours == right and ours[0] != ours[2]


def test_few_batches_are_on_the_device_whatever_the_number_of_threads() -> None:
    device, crowd, lock = Accelerator(FakeApi()), [0, 0], threading.Lock()

    def visit(_: int) -> None:
        with device.lane():
            with lock:
                crowd[0] += 1
                crowd[1] = max(crowd)
            time.sleep(0.01)
            with lock:
                crowd[0] -= 1

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(visit, range(30)))
    assert crowd == [0, LANES]


def test_a_batch_that_needs_the_device_alone_gets_it() -> None:
    device, seen = Accelerator(FakeApi()), list[str]()

    def visit(n: int) -> None:
        if n % 3:
            with device.lane() as lane:
                assert not lane.alone
                seen.append("in")
                time.sleep(0.002)
                seen.append("out")
        else:
            with device.alone() as lane:
                assert lane.alone
                seen.append("alone")
                time.sleep(0.004)
                seen.append("again")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
    inside = 0
    for before, now in itertools.pairwise(seen):
        inside += {"in": 1, "out": -1}.get(before, 0)
        if now == "alone":
            assert inside == 0
        assert before != "alone" or now == "again"


def test_after_an_error_nothing_runs_that_could_read_freed_memory() -> None:
    api = FakeApi()
    with Accelerator(api).lane() as lane, pytest.raises(ValueError), lane.computing():
        raise ValueError("broken")
    assert api.waits == 1


def test_the_device_has_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, clocks = ComputeQueue(), [DeviceClock(), DeviceClock(), DeviceClock()]
    # the second is launched while the first one runs: busy only since that was done; the third after a pause
    for clock, launched, done in zip(clocks, (10, 12, 20), (15, 16, 22), strict=True):
        monkeypatch.setattr("img2parquet.inference.device.time", SimpleNamespace(perf_counter=lambda done=done: done))
        queue.finished(launched, clock)
    assert [(clock.busy_s, clock.idle_s) for clock in clocks] == [(5, 0), (1, 0), (2, 4)]


def test_the_meter_has_the_devices_seconds_not_the_threads(work: Work) -> None:
    made, _ = embedder(work, Accelerator(FakeApi()))
    prepared = batches(work, *[B] * 6)
    started = time.perf_counter()
    with ThreadPoolExecutor(6) as pool:
        results = [result for result in pool.map(made, prepared) if isinstance(result, Embedded)]
    wall_s = time.perf_counter() - started
    total_s = sum(result.spent["embed"].seconds + result.waited["models"] for result in results)
    assert len(results) == 6 and 0 < total_s <= wall_s


def test_graphs_change_nothing_and_the_meter_has_what_they_cost(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "TRY_AFTER", 3)
    monkeypatch.setattr(cuda_graphs, "MAX_TIME_RATIO", 1e9)
    api, prepared = FakeApi(), batches(work, *[B] * 6, 2)
    made, _ = embedder(work, Accelerator(api))
    results = [made(one) for one in prepared]
    assert [tables(result) for result in results[:6]] == [tables(Embedder(work)(one)) for one in prepared[:6]]
    spent = [result.spent.get("graphs") for result in results if isinstance(result, Embedded)]
    assert [one and one.images for one in spent] == [None, None, 2 * B, 2 * B, 2 * B, 2 * B, None]
    assert [one is not None and one.seconds > 0 for one in spent] == [n == 2 for n in range(7)]
    assert api.captures == 2


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [Cpu(), Accelerator(FakeApi())], ids=["cpu", "accelerator"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    work: Work, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = batches(work, B, B, 5)
    made, (first, second) = embedder(work, device, most=3)
    found, right = [tables(made(one)) for one in prepared], [tables(Embedder(work)(one)) for one in prepared]
    for ours, expected in zip(found, right, strict=True):
        assert same_rows(ours["tiny"], expected["tiny"]) and same_rows(ours["other"], expected["other"])
    assert first.seen[:2] == [8, 4] and set(first.seen[2:]) == {2, 1}, "8 and 4 fail once; then it is known"
    assert (first.seen.count(8), second.seen.count(8)) == (1, 1)
    assert [record.getMessage().partition(" ")[2] for record in caplog.records if "tiny" in record.getMessage()] == [
        "8 images do not fit into memory; 4 from now on",
        "4 images do not fit into memory; 2 from now on",
    ]


def same_rows(ours: pa.Table, expected: pa.Table) -> bool:
    """Compare labels and keys exactly, numbers approximately, since another batch size rounds differently."""
    assert ours.schema == expected.schema
    near = all(
        np.allclose(np.stack(ours[name].to_numpy()), np.stack(expected[name].to_numpy()), atol=1e-5)
        for name in ("embedding", "logits")
    )
    ids = [[[label["id"] for label in labels] for labels in table["labels"].to_pylist()] for table in (ours, expected)]
    return near and ours["key"] == expected["key"] and ids[0] == ids[1]


def test_several_threads_that_run_out_at_once_halve_once(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    made, (backbone, _) = embedder(work, Accelerator(FakeApi()), most=4)
    prepared = batches(work, *[B] * 8)
    with ThreadPoolExecutor(8) as pool:
        found = [tables(result) for result in pool.map(made, prepared)]
    assert [table["tiny"].num_rows for table in found] == [B] * 8
    assert made.models[0][1].max_images == 4 and min(backbone.seen) == 4
    assert backbone.seen.count(8) <= LANES


def test_memory_that_other_batches_held_is_not_blamed_on_one_image(work: Work) -> None:
    """A single image that does not fit beside others gets a second try with the device to itself."""
    device = Accelerator(FakeApi())
    made, _ = embedder(work, device)
    (prepared,) = batches(work, 1)
    for _, forward in made.models:
        forward.model.backbone = Crowded(forward.model.backbone, device)
    assert tables(made(prepared))["tiny"].num_rows == 1


class Crowded:
    """A backbone that runs out of memory unless the device has released its cached memory."""

    def __init__(self, backbone: Any, device: Accelerator) -> None:
        self.backbone, self.device = backbone, device

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str]) -> dict[str, Tensor]:
        if isinstance(self.device.api, FakeApi) and not self.device.api.releases:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return self.backbone(x_BCHW, wants)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("device", "memory"),
    [(Cpu(), "the machine has"), (Accelerator(FakeApi(1 << 30, 80 << 30)), "1.0 of the device's 80.0 GiB are free")],
    ids=["cpu", "accelerator"],
)
def test_where_not_one_image_fits_the_error_has_all_that_helps(work: Work, device: Device, memory: str) -> None:
    made, _ = embedder(work, device, most=0)
    with pytest.raises(JobFailed) as raised:
        made(batches(work, 3)[0])
    message = str(raised.value)
    assert "model `tiny`: not even one image of 64x64 fits: CUDA out of memory. Tried to allocate 2.00 GiB;" in message
    assert memory in message and "hint: use a smaller `image_size`" in message


def test_a_failed_batch_leaves_its_lane_to_others(work: Work) -> None:
    made, watched = embedder(work, Accelerator(FakeApi()), most=0)
    for one in batches(work, *[1] * (LANES + 2)):
        with pytest.raises(JobFailed):
            made(one)
    for backbone in watched:
        backbone.most = B
    assert tables(made(batches(work, B)[0]))["tiny"].num_rows == B


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


def test_errors_of_other_kinds_are_not_retried(work: Work) -> None:
    made, watched = embedder(work, Cpu())
    watched[0].backbone = None
    with pytest.raises(TypeError):
        made(batches(work, 2)[0])
    assert watched[0].seen == [2]


def test_a_device_by_name() -> None:
    assert isinstance(open_device("cpu"), Cpu)
