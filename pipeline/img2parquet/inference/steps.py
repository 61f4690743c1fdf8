"""Run the two steps of a worker. Every runner uses this code.

    Preparer   Batch -> Prepared      decode each image once, crop it once for each geometry
    Embedder   Prepared -> Embedded   run the models and compute the columns of their outputs

Without GPUs both steps run in one process, so that pixels never cross the object store; with GPUs the first is a stage
of CPU tasks. A reject leaves a hole in its batch and shifts no other row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from img2parquet.batch import Batch, Crops, Embedded, Failed, Prepared, Work
from img2parquet.errors import PartFailed
from img2parquet.images.decode import DecodePolicy, Shrink, decode
from img2parquet.images.jpeg_scaling import shrink_for
from img2parquet.images.preprocess import Preprocessor
from img2parquet.inference.allocator import keep_freed_memory
from img2parquet.inference.device import Device, Lane, open_device
from img2parquet.inference.forward import ModelExecutor
from img2parquet.job import JobSpec, ModelJob
from img2parquet.models import Card
from img2parquet.outputs import BatchRows
from img2parquet.read.passthrough import column_of
from img2parquet.schema import RESERVED_COLUMNS, Pixels, Reject, Rejection, Row
from img2parquet.telemetry import flight_recorder
from img2parquet.telemetry.stage_timing import StageTime

MIN_EMBED_TIMEOUT_S = 60.0  # the first batch compiles and warms up, however little one image takes


class Preparer:
    """Decode and crop the images of a batch. Loads no model."""

    def __init__(self, work: Work) -> None:
        self.policy = work.job.decode.policy()
        geometries = tuple({card.preprocess.geometry for card in work.cards.values()})
        self.croppers = [Preprocessor(geometry) for geometry in geometries]
        self.shrink = partial(shrink_for, geometries) if work.job.preprocess == "fast" else None
        self.with_alpha = any(geometry.channels == 4 for geometry in geometries)
        self.image_timeout_s = work.job.resources.image_timeout_s

    def __call__(self, batch: Batch) -> Prepared:
        slot = flight_recorder.here()
        try:
            return self._prepared(batch, slot)
        finally:
            slot.end()

    def _prepared(self, batch: Batch, slot: flight_recorder.Slot) -> Prepared:
        rows, sizes_HW, rejects = list[Row](), list[tuple[int, int]](), list(batch.rejects)
        cropping = [_CropBuffer(cropper, len(batch.rows)) for cropper in self.croppers]
        started, decoder = time.perf_counter(), _TimedDecoder(self.policy, self.shrink, self.with_alpha)
        for row in batch.rows:
            slot.begin(flight_recorder.DECODE, batch.part_index, batch.k, row.row, self.image_timeout_s)
            pixels = decoder(row)
            if isinstance(pixels, Rejection):
                rejects.append(_reject(row, "decode", pixels))
                continue
            for crops in cropping:  # at once, while the pixels are in the processor's cache; then they are freed
                crops.add(len(rows), row, pixels)
            rows.append(replace(row, image=b"", warnings=(*row.warnings, *pixels.warnings)))
            sizes_HW.append((pixels.height, pixels.width))
        finished = {crops.cropper.settings: crops.finished() for crops in cropping}
        preprocess_s = time.perf_counter() - started - decoder.seconds
        return Prepared(
            part_index=batch.part_index,
            k=batch.k,
            rows=tuple(rows),
            sizes_HW=tuple(sizes_HW),
            rejects=tuple(rejects),
            crops=finished,
            rows_in=batch.rows_in,
            spent={
                **batch.spent,
                "decode": StageTime(decoder.seconds, len(rows), decoder.size_bytes),
                "preprocess": StageTime(
                    preprocess_s,
                    sum(len(crops.kept) for crops in finished.values()),
                    sum(crops.pixels_BHWC.nbytes for crops in finished.values()),
                ),
            },
        )


class _TimedDecoder:
    """Decode a batch's images, and measure the time this takes and the bytes of pixels it gives."""

    def __init__(self, policy: DecodePolicy, shrink: Shrink | None, with_alpha: bool) -> None:
        self.policy, self.shrink, self.with_alpha = policy, shrink, with_alpha
        self.seconds, self.size_bytes = 0.0, 0

    def __call__(self, row: Row) -> Pixels | Rejection:
        started = time.perf_counter()
        pixels = decode(row.image, self.policy, self.shrink, self.with_alpha)
        self.seconds += time.perf_counter() - started
        self.size_bytes += 0 if isinstance(pixels, Rejection) else pixels.rgb_HWC.nbytes
        return pixels


class _CropBuffer:
    """Collect a batch's crops of one geometry, each written in place."""

    def __init__(self, cropper: Preprocessor, capacity: int) -> None:
        self.cropper, self.kept, self.rejects = cropper, list[int](), list[Reject]()
        self.pixels_BHWC = np.empty((capacity, *cropper.settings.shape_HWC), np.uint8)

    def add(self, index: int, row: Row, pixels: Pixels) -> None:
        crop = self.cropper(pixels, out=self.pixels_BHWC[len(self.kept)])
        if isinstance(crop, Rejection):
            self.rejects.append(_reject(row, "preprocess", crop))
        else:
            self.kept.append(index)

    def finished(self) -> Crops:
        return Crops(tuple(self.kept), self.pixels_BHWC[: len(self.kept)], tuple(self.rejects))


class Embedder:
    """Load the models once, then run them and their outputs on batches.

    Threads may share it. On a GPU they must, so that encoding one batch overlaps with computing the next."""

    def __init__(self, work: Work, device: Device | None = None) -> None:
        from img2parquet.models import load_model

        keep_freed_memory()
        self.work, self.device = work, device or open_device(work.device)
        self.models: list[tuple[ModelJob, ModelExecutor]] = []
        for wanted in work.job.models:
            spec = replace(work.job.spec_of(wanted), class_weights=work.class_weights.get(wanted.name))
            model = load_model(spec, dtype=work.dtype, device=work.device)
            self.models.append((wanted, ModelExecutor(model, wanted.outputs, work.batch_size, self.device)))

    def __call__(self, prepared: Prepared) -> Embedded | Failed:
        slot = flight_recorder.here()
        limit_s = max(MIN_EMBED_TIMEOUT_S, self.work.job.resources.image_timeout_s * len(prepared.rows))
        slot.begin(flight_recorder.EMBED, prepared.part_index, prepared.k, limit_s=limit_s)
        try:
            return self._batch(prepared)
        except PartFailed as error:  # ground truth that cannot be interpreted fails the part, not the job
            return Failed(prepared.part_index, str(error))
        finally:
            slot.end()

    def _batch(self, prepared: Prepared) -> Embedded:
        import torch

        # set per calling thread; another count may change the last bits of a sum
        torch.set_num_threads(self.work.threads)
        started = time.perf_counter()
        with self.device.lane() as lane:
            made, clock = self._rows(prepared, lane), lane.clock
        while made is None:  # memory ran out: try again in halves, without other batches on the device
            with self.device.alone() as lane:
                made, clock = self._rows(prepared, lane), lane.clock
        tables = {name: table for name, (table, _) in made.items()}
        busy_s, waited = time.perf_counter() - started, dict(prepared.waited)
        if clock:  # threads wait for the device, so only its own clock tells when it was busy or idle
            busy_s, waited["models"] = clock.busy_s, clock.idle_s
        rejects = {
            wanted.name: prepared.rejects + self._crops(executor, prepared).rejects + made[wanted.name][1]
            for wanted, executor in self.models
        }
        rows, size_bytes = sum(table.num_rows for table in tables.values()), sum(t.nbytes for t in tables.values())
        spent = {**prepared.spent, "embed": StageTime(busy_s, rows, size_bytes)}
        if clock and (clock.trying_s or clock.replayed):
            spent["graphs"] = StageTime(clock.trying_s, clock.replayed)
        return Embedded(prepared.part_index, prepared.k, tables, rejects, prepared.rows_in, spent, waited)

    def _rows(self, prepared: Prepared, lane: Lane) -> dict[str, tuple[pa.Table, tuple[Reject, ...]]] | None:
        """Compute the result rows of each model, in source order, and reject rows that are not finite.

        Returns None when memory ran out."""
        made = {}
        for wanted, executor in self.models:
            rows = self._embed(wanted, executor, prepared, lane)
            if rows is None:
                return None
            made[wanted.name] = rows
        return made

    def _embed(
        self, wanted: ModelJob, executor: ModelExecutor, prepared: Prepared, lane: Lane
    ) -> tuple[pa.Table, tuple[Reject, ...]] | None:
        schema, crops = result_schema(self.work.job, wanted, executor.model.card), self._crops(executor, prepared)
        if not crops.kept:
            return schema.empty_table(), ()
        rows = [prepared.rows[i] for i in crops.kept]
        sizes_HW = [prepared.sizes_HW[i] for i in crops.kept]
        kept = self.work.job.input.passthrough()
        wanted_columns = {name for output in wanted.outputs for name in output.columns_read()}
        about = BatchRows(
            keys=[row.key for row in rows],
            sizes_HW=sizes_HW,
            passthrough={field.name: _kept(rows, field).to_pylist() for field in kept if field.name in wanted_columns},
        )
        columns = executor.columns(lane, crops.pixels_BHWC, about)
        if columns is None:
            return None
        rejects = tuple(
            _reject(rows[i], "embed", Rejection("not_finite", message))
            for i, message in sorted(columns.not_finite.items())
        )
        if rejects:
            there = [i for i in range(len(rows)) if i not in columns.not_finite]
            rows, sizes_HW = [rows[i] for i in there], [sizes_HW[i] for i in there]
        base = _base_columns(rows, sizes_HW, kept)
        return _in_arrow_memory(pa.Table.from_arrays([*base, *columns.arrays], schema=schema)), rejects

    def _crops(self, executor: ModelExecutor, prepared: Prepared) -> Crops:
        return prepared.crops[executor.model.card.preprocess.geometry]


def result_schema(job: JobSpec, model: ModelJob, card: Card) -> pa.Schema:
    """Return the columns of a result row: key, shard, width, height, warnings, passthrough columns, output columns."""
    base = [pa.field(name, type_, nullable=False) for name, (type_, _) in RESERVED_COLUMNS.items()]
    outputs = [column for output in model.outputs for column in output.fields(card)]
    return pa.schema([*base, *job.input.passthrough(), *outputs])


def _in_arrow_memory(table: pa.Table) -> pa.Table:
    """Copy a table into buffers that Arrow allocates.

    Columns may lie where torch put them, among the blocks of a forward pass. Held until their part is complete, they
    would keep glibc from joining those blocks again, and each batch would take new memory (20 MB at 224 px: ten
    gigabytes before a part of 16,384 rows was done)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _base_columns(rows: Sequence[Row], sizes_HW: Sequence[tuple[int, int]], kept: pa.Schema) -> list[pa.Array]:
    values: dict[str, list[Any]] = {
        "key": [row.key for row in rows],
        "shard": [row.shard for row in rows],
        "width": [width for _, width in sizes_HW],
        "height": [height for height, _ in sizes_HW],
        "warnings": [list(row.warnings) for row in rows],
    }
    base = [pa.array(values[name], type_) for name, (type_, _) in RESERVED_COLUMNS.items()]
    return base + [_kept(rows, field) for field in kept]


def _kept(rows: Sequence[Row], field: pa.Field) -> pa.Array:
    return column_of([row.passthrough.get(field.name) for row in rows], field.type)


def _reject(row: Row, stage: Literal["decode", "preprocess", "embed"], rejection: Rejection) -> Reject:
    return Reject(row.row, row.key, row.shard, stage, rejection.reason, rejection.message, row.offset)
