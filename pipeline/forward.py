"""One model's share of a batch: uint8 crops -> the columns of its outputs, on a device's lane.

Where the device's memory runs out, the batch is done again in halves and nothing is lost; later ones begin with the
smaller size. It is the one thing besides the batch size itself that may change the last bits of a result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.device import Device, Lane, is_out_of_memory
from pipeline.errors import JobFailed
from pipeline.graphs import Graphs
from pipeline.outputs import BatchRows, Output

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.model import Model

Pixels = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One forward pass: what is wanted of it, the outputs that read it, and what else the model sees (a mask)."""

    wants: frozenset[str]
    places: tuple[int, ...]  # of its outputs, in the job's order
    inputs: Mapping[str, Any]


class Forward:
    """A loaded model and its outputs. Threads may share it."""

    def __init__(self, model: Model, outputs: Sequence[Output], batch_size: int, device: Device) -> None:
        self.model, self.outputs, self.device = model, tuple(outputs), device
        self.batch_size = self.most = batch_size  # `most`: images that are tried at a time
        self.graphs = Graphs(device.api, batch_size) if device.api else None

    def columns(self, lane: Lane, pixels_BHWC: Pixels, about: BatchRows) -> list[pa.Array] | None:
        """The outputs' columns, each as long as the batch, or None where memory ran out: with a smaller size from now
        on it is to be tried again, best alone. Raises JobFailed where not even one image fits, and PartFailed."""
        count, most = len(pixels_BHWC), self.most
        try:
            parts = [
                self._chunk(lane, pixels_BHWC[first : first + most], rows_of(about, first, first + most))
                for first in range(0, count, most)
            ]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(lane, min(most, count), str(error).splitlines()[0])
            return None  # and not from within a loop: the traceback keeps the tensors alive
        return parts[0] if len(parts) == 1 else [pa.concat_arrays(chunks) for chunks in zip(*parts, strict=True)]

    def _chunk(self, lane: Lane, pixels_BHWC: Pixels, about: BatchRows) -> list[pa.Array]:
        card, count = self.model.card, len(pixels_BHWC)
        rows = lane.rows(count, self.batch_size)
        passes = self._passes(about)
        pixels = lane.upload(pixels_BHWC, rows)
        inputs = [{name: lane.upload(value, rows) for name, value in one.inputs.items()} for one in passes]
        with lane.computing():
            found = [self._run(lane, pixels, one, given) for one, given in zip(passes, inputs, strict=True)]
        columns: dict[int, list[pa.Array]] = {}
        with lane.fetching():
            for one, features in zip(passes, found, strict=True):
                real = {name: feature[:count] for name, feature in features.items()}
                columns |= {place: self.outputs[place].columns(card, real, about) for place in one.places}
        return [column for place in range(len(self.outputs)) for column in columns[place]]

    def _run(self, lane: Lane, pixels: Tensor, one: Pass, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if given or self.graphs is None:
            return self.model.forward_pixels(pixels, one.wants, **given)
        return self.graphs(self.model, pixels, one.wants, lane.clock)

    def _passes(self, about: BatchRows) -> list[Pass]:
        """One for all outputs but those that change what the model sees, which have their own."""
        card, own, shared = self.model.card, list[Pass](), list[int]()
        for place, output in enumerate(self.outputs):
            inputs = output.inputs(card, about)
            if inputs:
                own.append(Pass(output.wants(card), (place,), inputs))
            else:
                shared.append(place)
        wants = frozenset[str]().union(*(self.outputs[place].wants(card) for place in shared))
        return [*([Pass(wants, tuple(shared), {})] if shared else []), *own]

    def _shrink(self, lane: Lane, size: int, said: str) -> None:
        """Half of what did not fit; one image has a second try with the device to itself."""
        if size == 1 and lane.alone:
            card, (height, width) = self.model.card, self.model.card.preprocess.size_HW
            raise JobFailed(
                f"model `{card.name}`: not even one image of {height}x{width} fits: {said}; {self.device.memory()}",
                hint="use a smaller `image_size`, `dtype: bfloat16`, fewer models in a job, or a larger device",
            ) from None
        self.most = min(self.most, max(1, size // 2))  # another thread may have been here
        if self.graphs:
            self.graphs.drop()
        log.warning("%s: %d images do not fit into memory; %d from now on", self.model.card.name, size, self.most)


def rows_of(about: BatchRows, first: int, stop: int) -> BatchRows:
    """What is known of some rows of a batch."""
    passthrough = {name: values[first:stop] for name, values in about.passthrough.items()}
    return BatchRows(about.keys[first:stop], about.sizes_HW[first:stop], passthrough)
