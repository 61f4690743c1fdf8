"""Run one model on a batch: uint8 crops -> the columns of the model's outputs, on a device's lane.

Rows whose values are not finite are left out of the columns, and reported.

When the device's memory runs out, the batch is computed again in halves, so nothing is lost, and later batches start
with the smaller size. Besides the batch size itself, this is the only thing that may change the last bits of a result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.errors import JobFailed, NotFinite
from img2parquet.inference.cuda_graphs import CudaGraphs
from img2parquet.inference.device import Device, Lane, is_out_of_memory
from img2parquet.outputs import BatchRows, Output

if TYPE_CHECKING:
    from torch import Tensor

    from img2parquet.models.model import Model

Pixels = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass: the wanted features, the outputs that read them, and inputs besides pixels (a mask)."""

    wants: frozenset[str]
    output_indices: tuple[int, ...]  # in the job's order
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a batch without the rows that are not finite, whose messages `not_finite` has by index."""

    arrays: list[pa.Array]
    not_finite: Mapping[int, str]


class ModelExecutor:
    """Run a loaded model on batches and compute the columns of its outputs. Threads may share it."""

    def __init__(self, model: Model, outputs: Sequence[Output], batch_size: int, device: Device) -> None:
        self.model, self.outputs, self.device = model, tuple(outputs), device
        self.batch_size = self.max_images = batch_size  # `max_images`: images that are tried at a time
        self.graphs = CudaGraphs(device.api, batch_size) if device.api else None

    def columns(self, lane: Lane, pixels_BHWC: Pixels, about: BatchRows) -> Columns | None:
        """Compute the outputs' columns; return None when memory ran out.

        Then call it again, best with the device to itself: it uses a smaller size from then on. Raises JobFailed when
        not even one image fits, and PartFailed when ground truth cannot be interpreted."""
        count, most = len(pixels_BHWC), self.max_images
        try:
            parts = [
                self._chunk(lane, pixels_BHWC[first : first + most], rows_of(about, first, first + most))
                for first in range(0, count, most)
            ]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._reduce_size(lane, min(most, count), str(error).splitlines()[0])
            return None  # retried by the caller, since the traceback keeps the tensors alive here
        if len(parts) == 1:
            return parts[0]
        arrays = [pa.concat_arrays(chunks) for chunks in zip(*(part.arrays for part in parts), strict=True)]
        return Columns(
            arrays, {n * most + row: text for n, part in enumerate(parts) for row, text in part.not_finite.items()}
        )

    def _chunk(self, lane: Lane, pixels_BHWC: Pixels, about: BatchRows) -> Columns:
        card, count = self.model.card, len(pixels_BHWC)
        rows = lane.rows(count, self.batch_size)
        passes = self._passes(about)
        pixels = lane.upload(pixels_BHWC, rows)
        inputs = [{name: lane.upload(value, rows) for name, value in one.inputs.items()} for one in passes]
        with lane.computing():
            found = [self._run(lane, pixels, one, given) for one, given in zip(passes, inputs, strict=True)]
        kept, not_finite = list(range(count)), dict[int, str]()
        with lane.fetching():
            features = {
                index: {name: feature[:count] for name, feature in given.items()}
                for one, given in zip(passes, found, strict=True)
                for index in one.output_indices
            }
            while kept:
                try:
                    arrays = self._arrays(features, about)
                    return Columns(arrays, not_finite)
                except NotFinite as error:
                    not_finite |= {kept[row]: error.message for row in error.rows}
                    rest = [row for row in range(len(kept)) if row not in error.rows]
                    kept, about = [kept[row] for row in rest], pick(about, rest)
                    features = {index: {n: f[rest] for n, f in given.items()} for index, given in features.items()}
        fields = [field for output in self.outputs for field in output.fields(card)]
        return Columns([pa.array([], field.type) for field in fields], not_finite)

    def _arrays(self, features: Mapping[int, Mapping[str, Tensor]], about: BatchRows) -> list[pa.Array]:
        card = self.model.card
        return [
            column
            for index, output in enumerate(self.outputs)
            for column in output.columns(card, features[index], about)
        ]

    def _run(self, lane: Lane, pixels: Tensor, one: ForwardPass, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if given or self.graphs is None:
            return self.model.forward_pixels(pixels, one.wants, **given)
        return self.graphs(self.model, pixels, one.wants, lane.clock)

    def _passes(self, about: BatchRows) -> list[ForwardPass]:
        """Plan one forward pass for all outputs, and one more for each mask that changes what the model sees."""
        card, own, shared = self.model.card, list[ForwardPass](), list[int]()
        for index, output in enumerate(self.outputs):
            inputs = output.inputs(card, about)
            same = next((n for n, one in enumerate(own) if inputs and _are_equal(one.inputs, inputs)), None)
            if same is not None:
                wants, indices = own[same].wants | output.wants(card), (*own[same].output_indices, index)
                own[same] = ForwardPass(wants, indices, inputs)
            elif inputs:
                own.append(ForwardPass(output.wants(card), (index,), inputs))
            else:
                shared.append(index)
        wants = frozenset[str]().union(*(self.outputs[index].wants(card) for index in shared))
        return [*([ForwardPass(wants, tuple(shared), {})] if shared else []), *own]

    def _reduce_size(self, lane: Lane, size: int, problem: str) -> None:
        """Halve the size that did not fit. A single image gets a second try with the device to itself."""
        if size == 1 and lane.alone:
            card, (height, width) = self.model.card, self.model.card.preprocess.size_HW
            raise JobFailed(
                f"model `{card.name}`: not even one image of {height}x{width} fits: {problem}; {self.device.memory()}",
                hint="use a smaller `image_size`, `dtype: bfloat16`, fewer models in a job, or a larger device",
            ) from None
        self.max_images = min(self.max_images, max(1, size // 2))  # another thread may have halved it already
        if self.graphs:
            self.graphs.drop()
        log.warning("%s: %d images do not fit into memory; %d from now on", self.model.card.name, size, self.max_images)


def _are_equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(bool((some[name] == others[name]).all()) for name in some)


def pick(about: BatchRows, rows: Sequence[int]) -> BatchRows:
    """Return these rows of a batch."""
    passthrough = {name: [values[row] for row in rows] for name, values in about.passthrough.items()}
    return BatchRows([about.keys[row] for row in rows], [about.sizes_HW[row] for row in rows], passthrough)


def rows_of(about: BatchRows, first: int, stop: int) -> BatchRows:
    """Return the rows from `first` up to `stop` of a batch."""
    passthrough = {name: values[first:stop] for name, values in about.passthrough.items()}
    return BatchRows(about.keys[first:stop], about.sizes_HW[first:stop], passthrough)
