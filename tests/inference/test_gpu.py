"""Test streams, graphs, memory and numbers of the real CUDA runtime. Skipped on machines without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch

from img2parquet.batch import Batch, Embedded, Prepared, Work
from img2parquet.inference.batch_size import LARGEST, auto_batch_size
from img2parquet.inference.cuda_graphs import TRY_AFTER, CudaGraphs, capture_graph
from img2parquet.inference.device import Accelerator, Cuda, open_device
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.job import JobSpec, parse_job
from img2parquet.models import ModelSpec, load_model, read_card
from img2parquet.schema import Row
from tests.support.small_job import jpeg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
B = 32
MODELS = (
    "facebook/levit-128S",
    "facebook/vit-msn-small",
    "google/bit-50",
    "microsoft/beit-base-patch16-224",
)


def work_of(*models: str, dtype: str = "bfloat16", batch_size: int = B) -> Work:
    job = job_of(*models)
    cards = {wanted.name: read_card(ModelSpec(wanted.model, weights="random(0)")) for wanted in job.models}
    return Work(job, cards, dtype, "cuda", batch_size, threads=1)


def job_of(*models: str) -> JobSpec:
    outputs = [{"kind": "embedding"}]
    listed = [{"model": model, "weights": "random(0)", "outputs": outputs} for model in models]
    return parse_job({"input": {"kind": "folder", "uris": ["x"]}, "models": listed, "output": {"uri": "out"}})


def batches(work: Work, count: int) -> list[Prepared]:
    prepare = Preparer(work)
    rows = [[Row(n, f"{n}", "x", jpeg(n)) for n in range(k * B, (k + 1) * B)] for k in range(count)]
    return [prepare(Batch(0, k, tuple(some))) for k, some in enumerate(rows)]


def tables(results: Iterator[object]) -> list[dict[str, pa.Table]]:
    found = list(results)
    assert all(isinstance(result, Embedded) for result in found), found
    return [dict(result.tables) for result in found if isinstance(result, Embedded)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overlapping_batches_are_the_same_bits_as_one_after_the_other(dtype: str) -> None:
    work = work_of("facebook/levit-128S", "google/bit-50", dtype=dtype)
    prepared, overlapped = batches(work, 2 * TRY_AFTER), Embedder(work)
    with ThreadPoolExecutor(6) as pool:
        found = tables(pool.map(overlapped, prepared))
    assert found == tables(map(Embedder(work), prepared))


@pytest.mark.parametrize("model", MODELS)
def test_float32_is_what_the_cpu_gives(model: str) -> None:
    pixels = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here, there = (load_model(model, weights="random(0)", image_size=224, device=device) for device in ("cpu", "cuda"))
    expected = here.forward_pixels(pixels, frozenset({"pooled"}))["pooled"]
    found = there.forward_pixels(pixels, frozenset({"pooled"}))["pooled"].cpu()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("model", MODELS)
def test_every_family_can_be_captured_with_the_same_bits(model: str) -> None:
    loaded = load_model(model, weights="random(0)", image_size=224, device="cuda", dtype="bfloat16")
    one, two = torch.randint(0, 256, (2, B, 224, 224, 3), dtype=torch.uint8).cuda()
    wants = frozenset({"pooled"})
    graph = capture_graph(Cuda(torch.device("cuda")), loaded, one, wants)
    for pixels in (two, one):
        assert torch.equal(graph(pixels)["pooled"], loaded.forward_pixels(pixels, wants)["pooled"])


def test_a_small_model_is_replayed() -> None:
    loaded = load_model("facebook/levit-128S", weights="random(0)", device="cuda", dtype="bfloat16")
    graphs = CudaGraphs(Cuda(torch.device("cuda")), B)
    for _ in range(TRY_AFTER):
        graphs(loaded, torch.zeros((B, 224, 224, 3), dtype=torch.uint8, device="cuda"), frozenset({"pooled"}))
    assert graphs.graphs


def test_running_out_of_memory_halves_the_batch() -> None:
    work = work_of("microsoft/beit-base-patch16-224", dtype="float32", batch_size=64)
    rows = tuple(Row(n, f"{n}", "x", jpeg(n % 8)) for n in range(64))
    prepared, embedder = Preparer(work)(Batch(0, 0, rows)), Embedder(work)
    held = torch.cuda.memory_allocated() + (1 << 28)
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    try:
        (found,) = tables(iter([embedder(prepared)]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (forward,) = [forward for _, forward in embedder.models]
    assert found["beit-base-patch16-224"].num_rows == 64 and 1 <= forward.max_images < 64


def test_a_batch_size_is_found() -> None:
    work = work_of("facebook/levit-128S")
    size = auto_batch_size(work.job, work.cards, "bfloat16", "cuda")
    assert 32 <= size <= LARGEST and size & (size - 1) == 0


def test_the_device_is_an_accelerator() -> None:
    assert isinstance(open_device("cuda"), Accelerator) and "GiB are free" in open_device("cuda").memory()
