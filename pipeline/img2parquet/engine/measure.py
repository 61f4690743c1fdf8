"""Time a sample of a planned job in this process, and estimate the time and cost of the whole. Nothing is written.

    measure    runs a few parts through the real steps: images/s by stage, the bottleneck, bytes of output
    estimate   scales a measurement to the whole input and to other workers: hours and cost

* The sample is spread over the plan: up to `SAMPLE_PARTS` parts, and of each as many images as the time allows. Models
  are loaded and warmed up on a few images before the clock starts.
* Stages and bottleneck are those of `telemetry.stage_timing`. There is no `commit`: part files are encoded and dropped.
* Where images can only be counted by reading a shard, their number is estimated from its bytes, and `rows_estimated`
  is set.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from img2parquet.batch import Embedded, Failed, Work
from img2parquet.dataset.part_file import PartBuffer, encode_part
from img2parquet.dataset.plan import Plan, most_rows
from img2parquet.engine.pixel_drift import describe_drift
from img2parquet.engine.sample_source import SampleSource, count_rows, spread
from img2parquet.errors import InputError, UserError
from img2parquet.inference.batch_size import auto_batch_size
from img2parquet.inference.capabilities import Capabilities
from img2parquet.job import JobSpec
from img2parquet.runners import local
from img2parquet.schema import Part
from img2parquet.telemetry.stage_timing import Measured, Meter, StageTime, bottleneck

STAGES = ("read", "decode", "preprocess", "embed", "encode")
SAMPLE_PARTS = 8
SECONDS = 20.0
ENCODERS = 2


@dataclass(frozen=True)
class Measurement:
    """The result of a sample. Images are source images: one that two models embed counts once."""

    images: int
    rejected: dict[str, int]  # of these images, by reason
    parts_sampled: int
    parts: int
    parts_failed: int
    seconds: float  # of the sample, without start-up
    startup_s: float  # loading and warming up
    images_per_s: float  # of this machine, all stages at once
    stages: dict[str, float]  # images/s of one worker (thread or device) that does only this stage
    bottleneck: str
    workers: int  # of this machine: CPU workers, or GPUs
    worker: str  # CPU | GPU
    cpu_images_per_s: float  # of one CPU that reads, decodes, preprocesses and encodes
    cpus_per_gpu: int | None  # to keep a GPU busy; None without a GPU
    batch_size: int  # of the sample
    batch_size_auto: int  # what `batch_size: auto` would choose here
    dtype: str
    device: str
    rows: int  # of the whole input
    rows_estimated: bool
    bytes_in: int
    bytes_out: dict[str, int]  # of all part files, by model
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """Time and cost of the whole input, with this many workers like the measured ones."""

    workers: int
    images_per_s: float
    eta_s: float
    machines: int  # like this one
    cost: float | None = None  # in the unit of the price


def measure(job: JobSpec, probed: Capabilities, plan: Plan, seconds: float = SECONDS) -> Measurement:
    """Run a sample for about that many seconds.

    Raises InputError when no image of it could be used, UserError for a time that is not positive, ModelError,
    StorageError."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"{seconds:g} seconds to measure: expected a number above 0")
    parts = spread(plan.parts, SAMPLE_PARTS)
    sample = SampleSource(job.input, parts, probed.batch_size)
    work = Work(
        job.model_copy(update={"input": sample}),
        probed.cards,
        probed.dtype,
        probed.device,
        batch_size=probed.batch_size,
        threads=job.resources.threads_per_worker,
        most_rows=most_rows(job, probed.cards),
    )
    started = time.perf_counter()
    with closing(local.Step(work)) as step:
        images_per_s = _warm(step, work, sample, parts)
        startup_s = time.perf_counter() - started
        sample.start(seconds, images_per_s)
        sampler = _Sampler(work, plan)
        sampler.run(step, sample.parts)
    if not sampler.images:
        why = next(iter(sampler.failed.values()), "they contain no images")
        raise InputError(f"none of the {len(parts)} parts of the sample could be measured: {why}")
    if not sampler.usable:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sampler.rejected.items())
        raise InputError(
            f"all {sampler.images} images of the sample were rejected ({reasons}), so nothing can be timed"
        )
    return _measurement(work, plan, sample, sampler, startup_s)


def estimate(found: Measurement, workers: int | None = None, price_per_hour: float | None = None) -> Estimate:
    """Estimate the whole input. Speed is assumed to grow with the workers, so storage has to keep up.

    workers: None for as many as here; price_per_hour: of one machine like this one. Raises UserError as
    `check_request` does."""
    check_request(workers, price_per_hour)
    count = workers or found.workers
    images_per_s = found.images_per_s * count / found.workers
    eta_s, machines = found.rows / images_per_s, math.ceil(count / found.workers)
    cost = None if price_per_hour is None else eta_s / 3600 * machines * price_per_hour
    return Estimate(count, images_per_s, eta_s, machines, cost)


def check_request(workers: int | None, price_per_hour: float | None) -> None:
    """Raises UserError for fewer than one worker, or a price that is negative or not finite."""
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: expected 1 or more")
    if price_per_hour is not None and not (math.isfinite(price_per_hour) and price_per_hour >= 0):
        raise UserError(f"a price of {price_per_hour:g} per hour: expected 0 or more")


def _warm(step: local.Step, work: Work, sample: SampleSource, parts: Sequence[Part]) -> float:
    """Run a few images for each worker, and return roughly how many images/s that gave.

    It runs twice: the first time loads code and allocates memory."""
    first, images_per_s = sample.parts[: local.worker_count(work.job)], 0.0
    for _ in range(2):
        started = time.perf_counter()
        images = sum(result.images for result in local.through(step, first, work) if isinstance(result, Embedded))
        images_per_s = max(images, 1) / (time.perf_counter() - started)
    return images_per_s


class _Sampler:
    """Collects the sample's results by part and encodes them, as a session does, but stores nothing."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self.work, self.plan = work, plan
        self.meter = Meter(local.LocalRunner().pools(work), is_fast=work.job.preprocess == "fast")
        self.images = self.usable = self.files = 0
        self.seconds = 0.0
        self.rejected: Counter[str] = Counter()
        self.failed: dict[int, str] = {}
        self.encoded_bytes: Counter[str] = Counter()
        self.example: Embedded | None = None  # the first batch with rows

    def run(self, step: local.Step, parts: Sequence[Part]) -> None:
        buffers = {part.index: PartBuffer(part) for part in parts}
        encoding = list[Future[dict[str, int]]]()
        started = time.perf_counter()
        with ThreadPoolExecutor(ENCODERS, "img2parquet-encode") as pool:
            for result in local.through(step, parts, self.work):
                self.meter.arrived()
                self.meter.add(result.spent, result.waited if isinstance(result, Embedded) else None)
                if isinstance(result, Failed):
                    self.failed[result.part_index] = result.message
                    continue
                self._count(result)
                buffer = buffers[result.part_index]
                buffer.add(result, self.work.batch_size)
                if buffer.is_whole and result.part_index not in self.failed:
                    encoding.append(pool.submit(self._encode, buffers.pop(result.part_index)))
            for future in encoding:
                self.encoded_bytes.update(future.result())
        self.files, self.seconds = len(encoding), time.perf_counter() - started

    def _count(self, result: Embedded) -> None:
        rejects = {reject.row: reject.reason for of_model in result.rejects.values() for reject in of_model}
        self.images += result.images
        usable = max(table.num_rows for table in result.tables.values())
        self.usable += usable
        self.example = self.example or (result if usable else None)
        self.rejected.update(rejects.values())

    def _encode(self, buffer: PartBuffer) -> dict[str, int]:
        sizes = {}
        for name, about in self.plan.identities.items():
            started = time.perf_counter()
            encoded = encode_part(buffer.part, name, self.plan.identity(name), buffer.in_order(), about)
            sizes[name] = len(encoded.data)
            self.meter.add({"encode": StageTime(time.perf_counter() - started, encoded.rows, len(encoded.data))})
        return sizes

    def bytes_out(self, rows: int, parts: int) -> dict[str, int]:
        """Estimate the bytes of all part files of each model: a file with one row, and what each further row adds."""
        sizes = {}
        for name in self.plan.identities:
            one = self._one_row_bytes(name)
            added = max(0, self.encoded_bytes[name] - self.files * one) / max(self.images - self.files, 1)
            sizes[name] = round(parts * one + max(0, rows - parts) * added)
        return sizes

    def _one_row_bytes(self, name: str) -> int:
        """Return the size of a file with one row; an empty one would lack dictionaries and statistics."""
        assert self.example
        table = self.example.tables[name].slice(0, 1)
        row = Embedded(0, 0, {name: table}, {name: ()}, rows_in=table.num_rows)
        part, identity = self.plan.parts[0], self.plan.identity(name)
        return len(encode_part(part, name, identity, [row], self.plan.identities[name]).data)


def _measurement(work: Work, plan: Plan, sample: SampleSource, sampler: _Sampler, startup_s: float) -> Measurement:
    measured, on_gpu = sampler.meter.measured(), work.device != "cpu"
    busy_s = {stage: measured.stages[stage].seconds / sampler.images for stage in STAGES}  # per image
    cpu_s = sum(busy_s[stage] for stage in STAGES if stage != "embed")
    rows, is_estimated = count_rows(plan.parts, sample.seen)
    sampled, is_auto = len(sample.originals), work.job.resources.batch_size == "auto"  # then it is known already
    shares = f"{sampled} of {len(plan.parts)} parts"
    return Measurement(
        images=sampler.images,
        rejected=dict(sampler.rejected.most_common()),
        parts_sampled=sampled,
        parts=len(plan.parts),
        parts_failed=len(sampler.failed),
        seconds=sampler.seconds,
        startup_s=startup_s,
        images_per_s=sampler.images / sampler.seconds,
        stages={stage: 1 / max(seconds, 1e-9) for stage, seconds in busy_s.items()},
        bottleneck=bottleneck(measured),
        workers=measured.pools["models"] if on_gpu else measured.pools["workers"],
        worker="GPU" if on_gpu else "CPU",
        cpu_images_per_s=1 / max(cpu_s, 1e-9),
        cpus_per_gpu=max(1, math.ceil(cpu_s / max(busy_s["embed"], 1e-9))) if on_gpu else None,
        batch_size=work.batch_size,
        batch_size_auto=work.batch_size if is_auto else auto_batch_size(work.job, work.cards, work.dtype, work.device),
        dtype=work.dtype,
        device=work.device,
        rows=rows,
        rows_estimated=is_estimated,
        bytes_in=sum(part.size_bytes for part in plan.parts),
        bytes_out=sampler.bytes_out(rows, len(plan.parts)),
        notes=tuple(_notes(measured, sampler, sample, work, shares, is_estimated)),
    )


def _notes(
    measured: Measured, sampler: _Sampler, sample: SampleSource, work: Work, shares: str, is_estimated: bool
) -> Iterator[str]:
    if is_estimated:
        yield f"the number of images is estimated from the bytes of {shares}, since only reading counts them"
    if sampler.failed:
        index, message = next(iter(sorted(sampler.failed.items())))
        yield f"{len(sampler.failed)} parts of the sample could not be done; part {index}: {message}"
    largest = max((seen.rows for seen in sample.seen.values()), default=0)
    if largest < work.batch_size and not all(seen.is_whole for seen in sample.seen.values()):
        yield f"a batch of {work.batch_size} takes too long for the sample, which has {largest} images; raise --seconds"
    yield from describe_drift(work, [part for index, part in sample.originals.items() if index not in sampler.failed])
    if measured.retries:
        yield f"{sum(measured.retries.values())} requests to the store were retried"
