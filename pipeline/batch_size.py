"""`batch_size: auto` -> a number, found by trying on a worker before the first part.

On a GPU sizes double while that pays; the smallest within `CLOSE` of the best is taken, since smaller batches leave
more memory and shorter tails. On a CPU every family's plateau is known (16 to 64 images of 224 pixels; research:
models, 4.5) and a larger image is more work by itself, so the size follows from the pixels and nothing is tried.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import JobFailed

if TYPE_CHECKING:
    from pipeline.device import Api
    from pipeline.job import JobSpec
    from pipeline.models import Card
    from pipeline.models.model import Model

SMALLEST, LARGEST = 32, 1024  # a worker that decodes holds whole batches, and a part has 16 of these
GAIN = 1.05  # of images per second: less does not pay for twice the memory
CLOSE = 0.95  # of the best
MOST_MEMORY = 0.8  # of the device's: the rest is for outputs, and for what libraries take
TRIED_S = 0.3  # at least, for each size
CPU_IMAGES, CPU_PIXELS = 32, 32 * 224 * 224

log = logging.getLogger(__name__)


class NoRoom(Exception):
    """A batch of this size does not fit."""


def auto_batch_size(job: JobSpec, cards: Mapping[str, Card], dtype: str, device: str) -> int:
    """One size for all of a job's models. Raises JobFailed where not even one image fits."""
    if device == "cpu":
        return cpu_batch_size(card.preprocess.size_HW for card in cards.values())
    import torch

    from pipeline.device import Cuda

    return _on_accelerator(job, dtype, device, Cuda(torch.device(device)))


def cpu_batch_size(sizes_HW: Iterable[tuple[int, int]]) -> int:
    """The plateau's size, fewer of images larger than 224 pixels."""
    pixels = max(height * width for height, width in sizes_HW)
    return max(1, min(CPU_IMAGES, CPU_PIXELS // pixels))


def best_size(measure: Callable[[int], float], smallest: int = SMALLEST, largest: int = LARGEST) -> int:
    """The batch size to take, by `measure(size)`: seconds of one batch, or NoRoom.

    Raises NoRoom where not even one image fits."""
    size, rates = smallest, dict[int, float]()
    while size <= largest:
        try:
            rates[size] = size / measure(size)
        except NoRoom:
            break
        if size > smallest and rates[size] < GAIN * rates[size // 2]:
            break
        size *= 2
    if not rates:
        return _first_that_fits(measure, smallest // 2)
    return min(size for size, rate in rates.items() if rate >= CLOSE * max(rates.values()))


def _first_that_fits(measure: Callable[[int], float], size: int) -> int:
    """Where memory is this short, speed is not the question."""
    while True:
        try:
            measure(size)
            return size
        except NoRoom:
            if size <= 1:
                raise
            size //= 2


def _on_accelerator(job: JobSpec, dtype: str, device: str, api: Api) -> int:
    from pipeline.models import load_model

    loaded = [
        load_model(
            wanted.model,
            name=wanted.name,
            dtype=dtype,
            device=device,
            image_size=wanted.image_size,
            weights=wanted.weights,
        )
        for wanted in job.models
    ]
    wants = [
        frozenset[str]().union(*(output.wants(model.card) for output in wanted.outputs))
        for model, wanted in zip(loaded, job.models, strict=True)
    ]
    try:
        size = best_size(Trial(list(zip(loaded, wants, strict=True)), api))
    except NoRoom as error:
        names = ", ".join("`{}` at {}x{}".format(m.card.name, *m.card.preprocess.size_HW) for m in loaded)
        raise JobFailed(
            f"not even one image fits on {device}: {names}: {error}",
            hint="use a smaller `image_size`, fewer models in one job, `dtype: bfloat16`, or a device with more memory",
        ) from None
    log.info("batch size by trying on %s: %d", device, size)
    return size


class Trial:
    """Called with a batch size: seconds of one batch of black images through all models. Raises NoRoom."""

    def __init__(self, models: Sequence[tuple[Model, frozenset[str]]], api: Api) -> None:
        self.models, self.api = models, api

    def __call__(self, size: int) -> float:
        self.api.release_cache()
        seconds, said = self._seconds(size)
        free, total = self.api.memory()
        if not said and free < (1 - MOST_MEMORY) * total:
            said = f"only {free / 2**30:.1f} of {total / 2**30:.1f} GiB stay free"
        if said:  # not within `except`, whose traceback keeps the tensors alive
            self.api.release_cache()
            raise NoRoom(f"{size} images: {said}")
        return seconds

    def _seconds(self, size: int) -> tuple[float, str]:
        """With what torch said where memory ran out."""
        from pipeline.device import LANES, is_out_of_memory

        try:
            batch = self._batch(size)
            kept = deque((batch() for _ in range(LANES)), maxlen=LANES)  # features, as many as the lanes will hold
            once_s = self._timed(batch, 1, kept)
            return self._timed(batch, max(1, math.ceil(TRIED_S / once_s)), kept), ""
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf, str(error).splitlines()[0]

    def _batch(self, size: int) -> Callable[[], object]:
        """One batch through every model, its pixels on the device already."""
        import torch

        shapes = [(size, *model.card.preprocess.size_HW, 3) for model, _ in self.models]
        pixels = [torch.zeros(shape, dtype=torch.uint8, device=self.models[0][0].device) for shape in shapes]
        ready = list(zip(self.models, pixels, strict=True))
        return lambda: [model.forward_pixels(pixels_BHWC, wants) for (model, wants), pixels_BHWC in ready]

    def _timed(self, batch: Callable[[], object], calls: int, kept: deque[object]) -> float:
        self.api.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            kept.append(batch())
        self.api.synchronize()
        return (time.perf_counter() - started) / calls
