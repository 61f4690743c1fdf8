"""A model's whole forward pass as one launch, where that is faster: CUDA graphs, for whole batches.

Small models have hundreds of short kernels, and launching them one by one takes longer than running them. A graph
replays the same kernels, so its results are the same bits: whether one is used is no part of a run's identity, and each
worker may find out for itself. It does so after `AFTER` whole batches, so a short job never pays for it. What it cost,
and how many images went this way, is in the meter under `graphs`. torch.compile would change the bits, and takes
minutes a model.
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

from pipeline.device import Api, Clock

if TYPE_CHECKING:
    from pipeline.models.model import Model

AFTER = 8  # whole batches of a model
CALLS = 5  # timed, of each kind
WORTH = 0.95  # of the eager pass's seconds, at most
Features = dict[str, Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Graph:
    """A captured forward pass: its input and its features stay where they are in memory."""

    replay: Callable[[], None]
    pixels_BHWC: Tensor
    features: Mapping[str, Tensor]

    def __call__(self, pixels_BHWC: Tensor) -> Features:
        self.pixels_BHWC.copy_(pixels_BHWC, non_blocking=True)
        self.replay()
        return {name: feature.clone() for name, feature in self.features.items()}  # the next replay writes over them


class Graphs:
    """The graphs of one worker, by model and wanted features. One thread at a time calls it."""

    def __init__(self, api: Api, batch_size: int) -> None:
        self.api, self.batch_size = api, batch_size
        self.seen: Counter[tuple[str, frozenset[str]]] = Counter()
        self.made: dict[tuple[str, frozenset[str]], Graph] = {}

    def __call__(
        self, model: Model, pixels_BHWC: Tensor, wants: frozenset[str], clock: Clock | None = None
    ) -> Features:
        """The same as `model.forward_pixels`, bit by bit. The clock learns what was tried and what was replayed."""
        if len(pixels_BHWC) != self.batch_size:
            return model.forward_pixels(pixels_BHWC, wants)
        key = model.card.name, wants
        self.seen[key] += 1
        if self.seen[key] == AFTER:
            self._try(model, pixels_BHWC, wants, clock or Clock())
        graph = self.made.get(key)
        if graph and clock:
            clock.replayed += len(pixels_BHWC)
        return graph(pixels_BHWC) if graph else model.forward_pixels(pixels_BHWC, wants)

    def drop(self) -> None:
        """Give their memory back; none is made again."""
        self.made.clear()

    def _try(self, model: Model, pixels_BHWC: Tensor, wants: frozenset[str], clock: Clock) -> None:
        name = f"{model.card.name}: CUDA graph for batches of {self.batch_size}"
        started = time.perf_counter()
        try:
            graph = captured(self.api, model, pixels_BHWC, wants)
            eager_s = self._seconds(lambda: model.forward_pixels(pixels_BHWC, wants))
            graph_s = self._seconds(lambda: graph(pixels_BHWC))
            same = _equal(graph(pixels_BHWC), model.forward_pixels(pixels_BHWC, wants))
        except RuntimeError as error:  # a model that waits for the device within its pass, say; or no memory
            log.warning("%s: not used: %s", name, str(error).splitlines()[0])
            return
        finally:
            clock.trying_s += time.perf_counter() - started
        used = same and graph_s <= WORTH * eager_s
        if used:
            self.made[model.card.name, wants] = graph
        said = "used" if used else ("not worth it" if same else "not used: its results differ")
        took_s = time.perf_counter() - started
        log.info(
            "%s: %s: %.2f instead of %.2f ms, found out in %.1f s", name, said, graph_s * 1e3, eager_s * 1e3, took_s
        )

    def _seconds(self, call: Callable[[], object]) -> float:
        self.api.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        self.api.synchronize()
        return (time.perf_counter() - started) / CALLS


def captured(api: Api, model: Model, pixels_BHWC: Tensor, wants: frozenset[str]) -> Graph:
    """Raises RuntimeError where a forward pass cannot be captured."""
    kept_BHWC, features = pixels_BHWC.clone(), Features()

    def call() -> None:
        features.update(model.forward_pixels(kept_BHWC, wants))

    return Graph(api.capture(call), kept_BHWC, features)


def _equal(ours: Features, theirs: Features) -> bool:
    """Bit by bit; what is not a number equals itself."""
    return all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in theirs)
