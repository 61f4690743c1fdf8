"""Resolve `batch_size: auto` to a number, by trials on a worker before the first part.

- On a GPU, sizes are doubled while that pays. The smallest size within `CLOSE_TO_BEST` of the best is taken, since
  smaller batches leave more memory free and make shorter tails.
- On a CPU nothing is tried: every family's plateau is known (16 to 64 images of 224 pixels; research: models, 4.5), and
  a larger image is more work by itself, so the size follows from the number of pixels.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from img2parquet.errors import JobFailed

if TYPE_CHECKING:
    from img2parquet.inference.device import AcceleratorApi
    from img2parquet.job import JobSpec
    from img2parquet.models import Card
    from img2parquet.models.model import Model

SMALLEST, LARGEST = 32, 1024  # a worker that decodes holds whole batches, and a part has 16 of these
MIN_SPEEDUP = 1.05  # in images per second, for each doubling: less does not pay for twice the memory
CLOSE_TO_BEST = 0.95  # share of the best images per second
MAX_MEMORY_SHARE = 0.8  # of the device's memory: the rest is for outputs, and for what libraries allocate
MIN_TRIAL_S = 0.3  # for each size
CPU_IMAGES, CPU_PIXELS = 32, 32 * 224 * 224

log = logging.getLogger(__name__)


class BatchDoesNotFit(Exception):
    """Raised for a batch size that does not fit into the device's memory."""


def auto_batch_size(job: JobSpec, cards: Mapping[str, Card], dtype: str, device: str) -> int:
    """Choose one batch size for all models of a job. Raises JobFailed when not even one image fits."""
    if device == "cpu":
        return cpu_batch_size(card.preprocess.size_HW for card in cards.values())
    import torch

    from img2parquet.inference.device import Cuda

    return _on_accelerator(job, dtype, device, Cuda(torch.device(device)))


def cpu_batch_size(sizes_HW: Iterable[tuple[int, int]]) -> int:
    """Return the size at which throughput levels off: `CPU_IMAGES`, or fewer for images larger than 224 pixels."""
    pixels = max(height * width for height, width in sizes_HW)
    return max(1, min(CPU_IMAGES, CPU_PIXELS // pixels))


def best_size(measure: Callable[[int], float], smallest: int = SMALLEST, largest: int = LARGEST) -> int:
    """Find the best batch size with `measure(size)`, which returns the seconds of one batch or raises BatchDoesNotFit.

    Raises BatchDoesNotFit when not even one image fits."""
    size, rates = smallest, dict[int, float]()
    while size <= largest:
        try:
            rates[size] = size / measure(size)
        except BatchDoesNotFit:
            break
        if size > smallest and rates[size] < MIN_SPEEDUP * rates[size // 2]:
            break
        size *= 2
    if not rates:
        return _first_that_fits(measure, smallest // 2)
    return min(size for size, rate in rates.items() if rate >= CLOSE_TO_BEST * max(rates.values()))


def _first_that_fits(measure: Callable[[int], float], size: int) -> int:
    """Halve `size` until a batch fits; with so little memory, speed does not matter."""
    while True:
        try:
            measure(size)
            return size
        except BatchDoesNotFit:
            if size <= 1:
                raise
            size //= 2


def _on_accelerator(job: JobSpec, dtype: str, device: str, api: AcceleratorApi) -> int:
    from img2parquet.models import load_model

    loaded = [load_model(job.spec_of(wanted), dtype=dtype, device=device) for wanted in job.models]
    wants = [
        frozenset[str]().union(*(output.wants(model.card) for output in wanted.outputs))
        for model, wanted in zip(loaded, job.models, strict=True)
    ]
    try:
        size = best_size(Trial(list(zip(loaded, wants, strict=True)), api))
    except BatchDoesNotFit as error:
        names = ", ".join("`{}` at {}x{}".format(m.card.name, *m.card.preprocess.size_HW) for m in loaded)
        raise JobFailed(
            f"not even one image fits on {device}: {names}: {error}",
            hint="use a smaller `image_size`, fewer models in one job, `dtype: bfloat16`, or a device with more memory",
        ) from None
    log.info("found the batch size by trials on %s: %d", device, size)
    return size


class Trial:
    """Time batches of black images through all models. Call with a batch size to get the seconds of one batch.

    Raises BatchDoesNotFit when memory runs out, or when less than a fifth of it would stay free."""

    def __init__(self, models: Sequence[tuple[Model, frozenset[str]]], api: AcceleratorApi) -> None:
        self.models, self.api = models, api

    def __call__(self, size: int) -> float:
        self.api.release_cache()
        seconds, problem = self._seconds(size)
        free, total = self.api.memory()
        if not problem and free < (1 - MAX_MEMORY_SHARE) * total:
            problem = f"only {free / 2**30:.1f} of {total / 2**30:.1f} GiB stay free"
        if problem:  # raised outside `except`, whose traceback keeps the tensors alive
            self.api.release_cache()
            raise BatchDoesNotFit(f"{size} images: {problem}")
        return seconds

    def _seconds(self, size: int) -> tuple[float, str]:
        """Return the seconds of one batch and, when memory ran out, torch's message."""
        from img2parquet.inference.device import LANES, is_out_of_memory

        try:
            batch = self._batch(size)
            # hold as many batches' features as the lanes will hold in a job
            kept = deque((batch() for _ in range(LANES)), maxlen=LANES)
            once_s = self._timed(batch, 1, kept)
            return self._timed(batch, max(1, math.ceil(MIN_TRIAL_S / once_s)), kept), ""
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf, str(error).splitlines()[0]

    def _batch(self, size: int) -> Callable[[], object]:
        """Return a function that runs one batch, already on the device, through every model."""
        import torch

        shapes = [(size, *model.card.preprocess.shape_HWC) for model, _ in self.models]
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
