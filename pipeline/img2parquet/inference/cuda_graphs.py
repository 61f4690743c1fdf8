"""Launch a model's whole forward pass at once with a CUDA graph, where that is faster. Used for whole batches.

- Small models have hundreds of short kernels, and launching them one by one takes longer than running them.
- A graph replays the same kernels, so its results are bit-identical. Whether one is used is therefore not part of a
  run's identity, and each worker may find out for itself.
- A worker tries it after `TRY_AFTER` whole batches, so a short job never pays for it. The meter's stage `graphs` has
  the time it cost and the number of images that were computed this way.
- torch.compile is no alternative: it would change the bits, and it takes minutes for each model.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from img2parquet.inference.device import AcceleratorApi, DeviceClock

if TYPE_CHECKING:
    from img2parquet.models.model import Model

TRY_AFTER = 8  # whole batches of a model
TIMED_CALLS = 5  # of the graph, and of the eager pass
MAX_TIME_RATIO = 0.95  # seconds of the graph to seconds of the eager pass
Features = dict[str, Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CudaGraph:
    """Hold a captured forward pass, whose input and features stay at the same place in memory."""

    replay: Callable[[], None]
    pixels_BHWC: Tensor
    features: Mapping[str, Tensor]

    def __call__(self, pixels_BHWC: Tensor) -> Features:
        self.pixels_BHWC.copy_(pixels_BHWC, non_blocking=True)
        self.replay()
        return {name: feature.clone() for name, feature in self.features.items()}  # the next replay writes over them


class CudaGraphs:
    """Hold the graphs of one worker, by model and wanted features. Only one thread may call it at a time."""

    def __init__(self, api: AcceleratorApi, batch_size: int) -> None:
        self.api, self.batch_size = api, batch_size
        self.batches_seen: Counter[tuple[str, frozenset[str]]] = Counter()
        self.graphs: dict[tuple[str, frozenset[str]], CudaGraph] = {}

    def __call__(
        self, model: Model, pixels_BHWC: Tensor, wants: frozenset[str], clock: DeviceClock | None = None
    ) -> Features:
        """Return the same bits as `model.forward_pixels`; record in `clock` what was tried and what was replayed."""
        if len(pixels_BHWC) != self.batch_size:
            return model.forward_pixels(pixels_BHWC, wants)
        key = model.card.name, wants
        self.batches_seen[key] += 1
        if self.batches_seen[key] == TRY_AFTER:
            self._try(model, pixels_BHWC, wants, clock or DeviceClock())
        graph = self.graphs.get(key)
        if graph and clock:
            clock.replayed += len(pixels_BHWC)
        return graph(pixels_BHWC) if graph else model.forward_pixels(pixels_BHWC, wants)

    def drop(self) -> None:
        """Free the memory of all graphs. Models that had one get no new one."""
        self.graphs.clear()

    def _try(self, model: Model, pixels_BHWC: Tensor, wants: frozenset[str], clock: DeviceClock) -> None:
        name = f"{model.card.name}: CUDA graph for batches of {self.batch_size}"
        started = time.perf_counter()
        try:
            graph = capture_graph(self.api, model, pixels_BHWC, wants)
            eager_s = self._seconds(lambda: model.forward_pixels(pixels_BHWC, wants))
            graph_s = self._seconds(lambda: graph(pixels_BHWC))
            same = _equal(graph(pixels_BHWC), model.forward_pixels(pixels_BHWC, wants))
        except RuntimeError as error:  # e.g. a model that waits for the device during its pass, or no memory
            log.warning("%s: not used: %s", name, str(error).splitlines()[0])
            return
        finally:
            clock.trying_s += time.perf_counter() - started
        used = same and graph_s <= MAX_TIME_RATIO * eager_s
        if used:
            self.graphs[model.card.name, wants] = graph
        verdict = "used" if used else ("not worth it" if same else "not used: its results differ")
        took_s = time.perf_counter() - started
        log.info(
            "%s: %s: %.2f instead of %.2f ms, tried in %.1f s", name, verdict, graph_s * 1e3, eager_s * 1e3, took_s
        )

    def _seconds(self, call: Callable[[], object]) -> float:
        self.api.synchronize()
        started = time.perf_counter()
        for _ in range(TIMED_CALLS):
            call()
        self.api.synchronize()
        return (time.perf_counter() - started) / TIMED_CALLS


def capture_graph(api: AcceleratorApi, model: Model, pixels_BHWC: Tensor, wants: frozenset[str]) -> CudaGraph:
    """Capture a model's forward pass as a graph. Raises RuntimeError when that is impossible."""
    kept_BHWC, features = pixels_BHWC.clone(), Features()

    def call() -> None:
        features.update(model.forward_pixels(kept_BHWC, wants))

    return CudaGraph(api.capture(call), kept_BHWC, features)


def _equal(ours: Features, theirs: Features) -> bool:
    """Compare bit by bit, so that NaN equals NaN."""
    return all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in theirs)
