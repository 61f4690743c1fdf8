"""A worker's two steps, the same code in every runner.

    Preparer   Batch -> Prepared      decode each image once, crop it once for each geometry
    Embedder   Prepared -> Embedded   backbones and outputs

On CPU-only machines both run in one process, so that pixels never cross the object store; with GPUs the first is a
stage of CPU tasks. A reject leaves a hole in its batch and shifts nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import flight
from pipeline.allocator import keep_freed_memory
from pipeline.batch import Batch, Crops, Embedded, Failed, Prepared, Work
from pipeline.decode import DecodePolicy, Shrink, decode
from pipeline.device import Device, Lane, open_device
from pipeline.errors import PartFailed
from pipeline.forward import Forward
from pipeline.job import JobSpec, ModelJob
from pipeline.meter import Spent
from pipeline.models import Card
from pipeline.outputs import BatchRows
from pipeline.preprocess import Preprocessor
from pipeline.schema import RESERVED_COLUMNS, Bad, Pixels, Reject, Row
from pipeline.shrink import shrink_for

EMBED_LEAST_S = 60.0  # the first batch compiles and warms up, whatever one image may take


class Preparer:
    """Decode and crop. Loads no model."""

    def __init__(self, work: Work) -> None:
        self.policy = work.job.decode.policy()
        geometries = tuple({card.preprocess.geometry for card in work.cards.values()})
        self.croppers = [Preprocessor(geometry) for geometry in geometries]
        self.shrink = partial(shrink_for, geometries) if work.job.preprocess == "fast" else None
        self.image_timeout_s = work.job.resources.image_timeout_s

    def __call__(self, batch: Batch) -> Prepared:
        slot = flight.here()
        try:
            return self._prepared(batch, slot)
        finally:
            slot.end()

    def _prepared(self, batch: Batch, slot: flight.Slot) -> Prepared:
        rows, sizes_HW, rejects = list[Row](), list[tuple[int, int]](), list(batch.rejects)
        cropping = [_Cropping(cropper, len(batch.rows)) for cropper in self.croppers]
        started, decoder = time.perf_counter(), _Decoding(self.policy, self.shrink)
        for row in batch.rows:
            slot.begin(flight.DECODE, batch.part_index, batch.k, row.row, self.image_timeout_s)
            pixels = decoder(row)
            if isinstance(pixels, Bad):
                rejects.append(_reject(row, "decode", pixels))
                continue
            for crops in cropping:  # at once, while the pixels are in the processor's cache; then they are let go
                crops.add(len(rows), row, pixels)
            rows.append(replace(row, image=b"", warnings=(*row.warnings, *pixels.warnings)))
            sizes_HW.append((pixels.height, pixels.width))
        made = {crops.cropper.settings: crops.made() for crops in cropping}
        preprocess_s = time.perf_counter() - started - decoder.seconds
        return Prepared(
            part_index=batch.part_index,
            k=batch.k,
            rows=tuple(rows),
            sizes_HW=tuple(sizes_HW),
            rejects=tuple(rejects),
            crops=made,
            rows_in=batch.rows_in,
            spent={
                **batch.spent,
                "decode": Spent(decoder.seconds, len(rows), decoder.size_bytes),
                "preprocess": Spent(
                    preprocess_s,
                    sum(len(crops.kept) for crops in made.values()),
                    sum(crops.pixels_BHWC.nbytes for crops in made.values()),
                ),
            },
        )


class _Decoding:
    """A batch's decoder, which knows how long it took and how many bytes it gave."""

    def __init__(self, policy: DecodePolicy, shrink: Shrink | None) -> None:
        self.policy, self.shrink, self.seconds, self.size_bytes = policy, shrink, 0.0, 0

    def __call__(self, row: Row) -> Pixels | Bad:
        started = time.perf_counter()
        pixels = decode(row.image, self.policy, self.shrink)
        self.seconds += time.perf_counter() - started
        self.size_bytes += 0 if isinstance(pixels, Bad) else pixels.rgb_HWC.nbytes
        return pixels


class _Cropping:
    """A batch's crops of one geometry, each made where it stays."""

    def __init__(self, cropper: Preprocessor, most: int) -> None:
        self.cropper, self.kept, self.rejects = cropper, list[int](), list[Reject]()
        self.pixels_BHWC = np.empty((most, *cropper.settings.size_HW, 3), np.uint8)

    def add(self, index: int, row: Row, pixels: Pixels) -> None:
        crop = self.cropper(pixels, out=self.pixels_BHWC[len(self.kept)])
        if isinstance(crop, Bad):
            self.rejects.append(_reject(row, "preprocess", crop))
        else:
            self.kept.append(index)

    def made(self) -> Crops:
        return Crops(tuple(self.kept), self.pixels_BHWC[: len(self.kept)], tuple(self.rejects))


class Embedder:
    """The models, loaded once; then batches through backbones and outputs. Threads may share it: on a GPU they have
    to, for one batch's encoding to overlap with the next one's computing."""

    def __init__(self, work: Work, device: Device | None = None) -> None:
        from pipeline.models import load_model

        keep_freed_memory()
        self.work, self.device = work, device or open_device(work.device)
        self.models: list[tuple[ModelJob, Forward]] = []
        for wanted in work.job.models:
            model = load_model(
                wanted.model,
                name=wanted.name,
                dtype=work.dtype,
                device=work.device,
                image_size=wanted.image_size,
                weights=wanted.weights,
            )
            self.models.append((wanted, Forward(model, wanted.outputs, work.batch_size, self.device)))

    def __call__(self, prepared: Prepared) -> Embedded | Failed:
        slot = flight.here()
        limit_s = max(EMBED_LEAST_S, self.work.job.resources.image_timeout_s * len(prepared.rows))
        slot.begin(flight.EMBED, prepared.part_index, prepared.k, limit_s=limit_s)
        try:
            return self._batch(prepared)
        except PartFailed as error:  # features that are not finite, say: this part's failure, not the job's
            return Failed(prepared.part_index, str(error))
        finally:
            slot.end()

    def _batch(self, prepared: Prepared) -> Embedded:
        import torch

        # a setting of the calling thread; with another count the last bits of a sum may differ
        torch.set_num_threads(self.work.threads)
        started = time.perf_counter()
        with self.device.lane() as lane:
            tables, clock = self._tables(prepared, lane), lane.clock
        while tables is None:  # memory ran out: again, in halves, and without other batches beside it
            with self.device.alone() as lane:
                tables, clock = self._tables(prepared, lane), lane.clock
        busy_s, waited = time.perf_counter() - started, dict(prepared.waited)
        if clock:  # only the device knows when it was busy, and that it waited: threads wait for it
            busy_s, waited["models"] = clock.busy_s, clock.idle_s
        rejects = {
            wanted.name: prepared.rejects + self._crops(forward, prepared).rejects for wanted, forward in self.models
        }
        rows, size_bytes = sum(table.num_rows for table in tables.values()), sum(t.nbytes for t in tables.values())
        spent = {**prepared.spent, "embed": Spent(busy_s, rows, size_bytes)}
        if clock and (clock.trying_s or clock.replayed):
            spent["graphs"] = Spent(clock.trying_s, clock.replayed)
        return Embedded(prepared.part_index, prepared.k, tables, rejects, prepared.rows_in, spent, waited)

    def _tables(self, prepared: Prepared, lane: Lane) -> dict[str, pa.Table] | None:
        """The result rows of each model, in source order; None where memory ran out."""
        tables = {}
        for wanted, forward in self.models:
            table = self._embed(wanted, forward, prepared, lane)
            if table is None:
                return None
            tables[wanted.name] = table
        return tables

    def _embed(self, wanted: ModelJob, forward: Forward, prepared: Prepared, lane: Lane) -> pa.Table | None:
        schema, crops = result_schema(self.work.job, wanted, forward.model.card), self._crops(forward, prepared)
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
        arrays = forward.columns(lane, crops.pixels_BHWC, about)
        if arrays is None:
            return None
        return _in_arrow_memory(pa.Table.from_arrays([*_base_columns(rows, sizes_HW, kept), *arrays], schema=schema))

    def _crops(self, forward: Forward, prepared: Prepared) -> Crops:
        return prepared.crops[forward.model.card.preprocess.geometry]


def result_schema(job: JobSpec, model: ModelJob, card: Card) -> pa.Schema:
    """Columns of a result row: key, shard, width, height, warnings, the passthrough columns, the outputs'."""
    base = [pa.field(name, type_, nullable=False) for name, (type_, _) in RESERVED_COLUMNS.items()]
    outputs = [column for output in model.outputs for column in output.fields(card)]
    return pa.schema([*base, *job.input.passthrough(), *outputs])


def _in_arrow_memory(table: pa.Table) -> pa.Table:
    """A copy whose buffers Arrow allocated. Columns may lie where torch put them, among the blocks of a forward pass;
    held until their part is whole, they would keep glibc from joining those again, and each batch would take new
    memory (20 MB of it at 224 px: ten gigabytes before a part of 16,384 rows was done)."""
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
    return base + [pa.array([row.passthrough.get(column.name) for row in rows], column.type) for column in kept]


def _reject(row: Row, stage: str, bad: Bad) -> Reject:
    return Reject(row.row, row.key, row.shard, stage, bad.reason, bad.message, row.offset)  # type: ignore[arg-type]


class _CallableModule(ModuleType):
    """`pipeline.embed` names this file once it is imported, and is to be called like the public function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from pipeline.embed_images import embed

        return embed(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
