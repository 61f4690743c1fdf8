"""A worker's two steps, the same code in every runner.

    Preparer   Batch -> Prepared      decode each image once, crop it once for each geometry
    Embedder   Prepared -> Embedded   backbones and outputs

On CPU-only machines both run in one process, so that pixels never cross the object store; with GPUs the first is a
stage of CPU tasks. A reject leaves a hole in its batch and shifts nothing.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.batch import Batch, Crops, Embedded, Failed, Prepared, Work
from pipeline.decode import decode
from pipeline.errors import PartFailed
from pipeline.job import JobSpec, ModelJob
from pipeline.models import Card
from pipeline.outputs import BatchRows
from pipeline.preprocess import Preprocessor
from pipeline.schema import RESERVED_COLUMNS, Bad, Pixels, Reject, Row

if TYPE_CHECKING:
    from pipeline.models.model import Model


class Preparer:
    """Decode and crop. Loads no model."""

    def __init__(self, work: Work) -> None:
        self.policy = work.job.decode.policy()
        geometries = {card.preprocess.geometry for card in work.cards.values()}
        self.croppers = {geometry: Preprocessor(geometry) for geometry in geometries}

    def __call__(self, batch: Batch) -> Prepared:
        started = time.perf_counter()
        good: list[tuple[Row, Pixels]] = []
        rejects = list(batch.rejects)
        for row in batch.rows:
            pixels = decode(row.image, self.policy)
            if isinstance(pixels, Bad):
                rejects.append(_reject(row, "decode", pixels))
            else:
                warnings = (*row.warnings, *pixels.warnings)
                good.append((replace(row, image=b"", warnings=warnings), pixels))
        decoded = time.perf_counter()
        crops = {geometry: self._crop(cropper, good) for geometry, cropper in self.croppers.items()}
        return Prepared(
            part_index=batch.part_index,
            k=batch.k,
            rows=tuple(row for row, _ in good),
            sizes_HW=tuple((pixels.height, pixels.width) for _, pixels in good),
            rejects=tuple(rejects),
            crops=crops,
            rows_in=batch.rows_in,
            seconds={"decode": decoded - started, "preprocess": time.perf_counter() - decoded},
        )

    def _crop(self, cropper: Preprocessor, good: Sequence[tuple[Row, Pixels]]) -> Crops:
        made = [cropper(pixels) for _, pixels in good]
        kept = tuple(i for i, crop in enumerate(made) if not isinstance(crop, Bad))
        arrays = [crop for crop in made if not isinstance(crop, Bad)]
        pixels_BHWC = np.stack(arrays) if arrays else np.empty((0, *cropper.settings.size_HW, 3), np.uint8)
        rejects = tuple(
            _reject(row, "preprocess", crop) for (row, _), crop in zip(good, made, strict=True) if isinstance(crop, Bad)
        )
        return Crops(kept, pixels_BHWC, rejects)


class Embedder:
    """The models, loaded once; then one batch after the other through backbones and outputs."""

    def __init__(self, work: Work) -> None:
        from pipeline.models import load_model

        keep_freed_memory()
        self.work = work
        self.models: list[tuple[ModelJob, Model]] = [
            (
                wanted,
                load_model(
                    wanted.model,
                    name=wanted.name,
                    dtype=work.dtype,
                    device=work.device,
                    image_size=wanted.image_size,
                    weights=wanted.weights,
                ),
            )
            for wanted in work.job.models
        ]

    def __call__(self, prepared: Prepared) -> Embedded | Failed:
        try:
            return self._batch(prepared)
        except PartFailed as error:  # features that are not finite, say: this part's failure, not the job's
            return Failed(prepared.part_index, str(error))

    def _batch(self, prepared: Prepared) -> Embedded:
        import torch

        # a setting of the calling thread; with another count the last bits of a sum may differ
        torch.set_num_threads(self.work.threads)
        started = time.perf_counter()
        tables, rejects = {}, {}
        for wanted, model in self.models:
            crops = prepared.crops[model.card.preprocess.geometry]
            tables[wanted.name] = self._embed(wanted, model, prepared, crops)
            rejects[wanted.name] = prepared.rejects + crops.rejects
        seconds = {**prepared.seconds, "embed": time.perf_counter() - started}
        return Embedded(prepared.part_index, prepared.k, tables, rejects, prepared.rows_in, seconds)

    def _embed(self, wanted: ModelJob, model: Model, prepared: Prepared, crops: Crops) -> pa.Table:
        """The result rows of one model, in source order."""
        schema = result_schema(self.work.job, wanted, model.card)
        if not crops.kept:
            return schema.empty_table()
        rows = [prepared.rows[i] for i in crops.kept]
        sizes_HW = [prepared.sizes_HW[i] for i in crops.kept]
        kept = self.work.job.input.passthrough()
        about = BatchRows(
            keys=[row.key for row in rows],
            sizes_HW=sizes_HW,
            passthrough={name: [row.passthrough.get(name) for row in rows] for name in kept.names},
        )
        arrays = _output_columns(wanted, model, crops, about)
        return pa.Table.from_arrays([*_base_columns(rows, sizes_HW, kept), *arrays], schema=schema)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them: page faults of fresh ones cost up to a third of a
    forward pass (research: models, 4.3). The process keeps its peak. Does nothing on other C libraries."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 64 << 20)


def _output_columns(wanted: ModelJob, model: Model, crops: Crops, about: BatchRows) -> list[pa.Array]:
    """The outputs' columns, from one forward pass; an output that changes what the model sees (a mask) has its own."""
    card, inputs = model.card, [output.inputs(model.card, about) for output in wanted.outputs]
    pairs = list(zip(wanted.outputs, inputs, strict=True))
    wants = frozenset[str]().union(*(output.wants(card) for output, own in pairs if not own))
    shared = model.forward_pixels(crops.pixels_BHWC, wants) if wants else {}
    arrays = []
    for output, own in pairs:
        features = model.forward_pixels(crops.pixels_BHWC, output.wants(card), **own) if own else shared
        arrays += output.columns(card, features, about)
    return arrays


def result_schema(job: JobSpec, model: ModelJob, card: Card) -> pa.Schema:
    """Columns of a result row: key, shard, width, height, warnings, the passthrough columns, the outputs'."""
    base = [pa.field(name, type_, nullable=False) for name, (type_, _) in RESERVED_COLUMNS.items()]
    outputs = [column for output in model.outputs for column in output.fields(card)]
    return pa.schema([*base, *job.input.passthrough(), *outputs])


def _base_columns(rows: Sequence[Row], sizes_HW: Sequence[tuple[int, int]], kept: pa.Schema) -> list[pa.Array]:
    values: dict[str, list[Any]] = {
        "key": [row.key for row in rows],
        "shard": [row.shard for row in rows],
        "width": [width for _, width in sizes_HW],
        "height": [height for height, _ in sizes_HW],
        "warnings": [list(row.warnings) for row in rows],
    }
    base = [pa.array(values[name], type_) for name, (type_, _) in RESERVED_COLUMNS.items()]
    return base + [pa.array([row.passthrough.get(column.name) for row in rows], column.type) for column in kept]


def _reject(row: Row, stage: str, bad: Bad) -> Reject:
    return Reject(row.row, row.key, row.shard, stage, bad.reason, bad.message, row.offset)  # type: ignore[arg-type]
