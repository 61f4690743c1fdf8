"""Check that CUDA graphs are used where they are faster and bit-identical, and never where they cannot be captured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from img2parquet.inference import cuda_graphs
from img2parquet.inference.cuda_graphs import TRY_AFTER, CudaGraphs
from tests.support.fake_accelerator import FakeApi

WANTS = frozenset({"pooled"})


@dataclass
class Slow:
    """A model whose forward pass takes 4 ms, but by default no time in a replay, which reuses the same memory."""

    launch_s: float = 0.004
    replay_s: float = 0.0
    replayed: bool = False
    wrong: float = 0.0  # what a replay is off by
    calls: list[int] = field(default_factory=list)
    place: Tensor = field(default_factory=lambda: torch.empty(4, 3))
    card: Any = field(default_factory=lambda: SimpleNamespace(name="slow"))

    def forward_pixels(self, pixels_BHWC: Tensor, wants: frozenset[str]) -> dict[str, Tensor]:
        self.calls.append(len(pixels_BHWC))
        time.sleep(self.replay_s if self.replayed else self.launch_s)
        pooled = pixels_BHWC.float().mean((1, 2)) + (self.wrong if self.replayed else 0.0)
        pooled = torch.where(pooled > 200, torch.nan, pooled)
        return {"pooled": self.place.copy_(pooled) if self.replayed else pooled}


class Replays(FakeApi):
    """A fake runtime that captures one model's calls."""

    def __init__(self, model: Slow, broken: str = "") -> None:
        super().__init__()
        self.model, self.broken = model, broken

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        self.captures += 1
        if self.broken:
            raise RuntimeError(f"{self.broken}\nCUDA kernel errors might be reported elsewhere")

        def replay() -> None:
            self.model.replayed = True
            call()
            self.model.replayed = False

        replay()
        return replay


def run(api: FakeApi, model: Any, batches: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return the graphs' features and the expected ones for each of some batches."""
    made, found = CudaGraphs(api, 4), []
    for n in range(batches):
        pixels_BHWC = torch.full((size, 8, 8, 3), n + 1, dtype=torch.uint8)
        pixels_BHWC[0] = 255
        found.append((made(model, pixels_BHWC, WANTS)["pooled"], model.forward_pixels(pixels_BHWC, WANTS)["pooled"]))
    return found


def same(found: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(ours.nan_to_num(-1), right.nan_to_num(-1)) for ours, right in found)


def test_a_graph_is_used_where_it_is_faster_and_gives_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, cuda_graphs.__name__)
    model = Slow()
    api = Replays(model)
    assert same(run(api, model, TRY_AFTER + 4)) and api.captures == 1
    assert "slow: CUDA graph for batches of 4: used" in caplog.text
    started = time.perf_counter()
    made = CudaGraphs(api, 4)
    for _ in range(TRY_AFTER):
        made(model, torch.zeros((4, 8, 8, 3), dtype=torch.uint8), WANTS)
    model.launch_s = 10.0  # only replays from here on
    for _ in range(5):
        made(model, torch.zeros((4, 8, 8, 3), dtype=torch.uint8), WANTS)
    assert time.perf_counter() - started < model.launch_s


def test_features_outlive_the_next_replay() -> None:
    model = Slow()
    found = run(Replays(model), model, TRY_AFTER + 4)
    assert [ours[1, 0].item() for ours, _ in found] == [n + 1 for n in range(TRY_AFTER + 4)]


@pytest.mark.parametrize(
    ("model", "broken", "message"),
    [
        (Slow(launch_s=0.0, replay_s=0.004), "", "not worth it"),  # slower by far, also on a busy machine
        (Slow(wrong=1e-3), "", "its results differ"),
        (Slow(), "operation not permitted when stream is capturing", "not used: operation not permitted"),
    ],
)
def test_otherwise_it_is_not_used_with_one_line_that_says_why(
    model: Slow, broken: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, cuda_graphs.__name__)
    api = Replays(model, broken)
    assert same(run(api, model, TRY_AFTER + 4))
    assert [message in record.getMessage() for record in caplog.records] == [True]
    assert api.captures == 1


def test_short_jobs_and_short_batches_never_pay_for_one() -> None:
    model = Slow()
    api = Replays(model)
    assert same(run(api, model, TRY_AFTER - 1)) and same(run(api, model, TRY_AFTER + 4, size=3))
    assert api.captures == 0


def test_memory_can_be_had_back() -> None:
    model = Slow()
    made, pixels = CudaGraphs(Replays(model), 4), torch.zeros((4, 8, 8, 3), dtype=torch.uint8)
    for _ in range(TRY_AFTER):
        made(model, pixels, WANTS)
    assert made.graphs
    made.drop()
    made(model, pixels, WANTS)
    assert not made.graphs
