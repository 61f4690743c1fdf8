"""A planned job to what it would take: a few parts through the real steps of this process, and nothing written.

    measure    (job, probe, plan) -> Measurement: images/s by stage, the bottleneck, bytes out
    estimate   (Measurement, workers, price) -> Estimate: hours and cost of the whole input

* The sample is spread over the plan: up to `SAMPLE_PARTS` parts, of each no more images than the time allows. Models
  are loaded, and warmed on a few images, before the clock starts.
* Stages and bottleneck are `meter.py`'s. There is no `commit`: each part's file is encoded, and let go.
* Where only reading counts a shard's images, their number is estimated from its bytes, and `rows_estimated` says so.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from pipeline import local
from pipeline.batch import Embedded, Failed, Work
from pipeline.batch_size import auto_batch_size
from pipeline.errors import InputError, UserError
from pipeline.job import JobSpec
from pipeline.meter import Measured, Meter, Spent, bottleneck
from pipeline.plan import Plan, most_rows
from pipeline.probe import Probe
from pipeline.sample import Sample, count_rows, spread
from pipeline.schema import Part
from pipeline.write import Gathering, encode_part

STAGES = ("read", "decode", "preprocess", "embed", "encode")
SAMPLE_PARTS = 8
SECONDS = 20.0
ENCODERS = 2


@dataclass(frozen=True)
class Measurement:
    """What the sample showed. Images are source images, rows in: an image that two models embed counts once."""

    images: int
    rejected: dict[str, int]  # of them, by reason
    parts_sampled: int
    parts: int
    parts_failed: int
    seconds: float  # of the sample, without loading and warming
    startup_s: float  # loading and warming
    images_per_s: float  # of this machine, all stages at once
    stages: dict[str, float]  # images/s of one worker (thread, or device) that does nothing but this stage
    bottleneck: str
    workers: int  # that were at work here: CPU workers, or GPUs
    worker: str  # CPU | GPU
    cpu_images_per_s: float  # read, decode, preprocess and encode by one CPU
    cpus_per_gpu: int | None  # so that no GPU waits; None where there is none to measure
    batch_size: int  # that was used
    batch_size_auto: int  # that `batch_size: auto` takes here
    dtype: str
    device: str
    rows: int  # of the whole input
    rows_estimated: bool
    bytes_in: int
    bytes_out: dict[str, int]  # of all part files of a model
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """The whole input by so many workers like those that were measured."""

    workers: int
    images_per_s: float
    eta_s: float
    machines: int  # like this one
    cost: float | None = None  # in the unit of the price


def measure(job: JobSpec, probed: Probe, plan: Plan, seconds: float = SECONDS) -> Measurement:
    """Run a sample for about so many seconds. Raises InputError where no image of it could be used, UserError for a
    time that is none, ModelError, StorageError."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"{seconds:g} seconds to measure: say a number above 0")
    parts = spread(plan.parts, SAMPLE_PARTS)
    sample = Sample(job.input, parts, probed.batch_size)
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
        sample.begin(seconds, images_per_s)
        taken = _Taken(work, plan)
        taken.take(step, sample.parts)
    if not taken.images:
        why = next(iter(taken.failed.values()), "they hold no images")
        raise InputError(f"none of the {len(parts)} parts of the sample could be measured: {why}")
    if not taken.usable:
        reasons = ", ".join(f"{reason} {count}" for reason, count in taken.rejected.items())
        raise InputError(f"all {taken.images} images of the sample were rejected ({reasons}): there is nothing to time")
    return _measurement(work, plan, sample, taken, startup_s)


def estimate(found: Measurement, workers: int | None = None, price_per_hour: float | None = None) -> Estimate:
    """workers: as many as here where None. Speed is taken to grow with them: input has to keep up. price_per_hour: of
    one machine like this one. Raises UserError."""
    check_wishes(workers, price_per_hour)
    count = workers or found.workers
    images_per_s = found.images_per_s * count / found.workers
    eta_s, machines = found.rows / images_per_s, math.ceil(count / found.workers)
    cost = None if price_per_hour is None else eta_s / 3600 * machines * price_per_hour
    return Estimate(count, images_per_s, eta_s, machines, cost)


def check_wishes(workers: int | None, price_per_hour: float | None) -> None:
    """Raises UserError for what no estimate can be made of."""
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: say 1 or more")
    if price_per_hour is not None and not (math.isfinite(price_per_hour) and price_per_hour >= 0):
        raise UserError(f"a price of {price_per_hour:g} per hour: say 0 or more")


def _warm(step: local.Step, work: Work, sample: Sample, parts: Sequence[Part]) -> float:
    """A few images for each worker -> images/s, about. Twice: the first time loads code and takes memory."""
    some, images_per_s = sample.parts[: local.workers(work.job)], 0.0
    for _ in range(2):
        started = time.perf_counter()
        images = sum(result.images for result in local.through(step, some, work) if isinstance(result, Embedded))
        images_per_s = max(images, 1) / (time.perf_counter() - started)
    return images_per_s


class _Taken:
    """The sample's results: gathered by part and encoded, as a session does it, but not stored."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self.work, self.plan = work, plan
        self.meter = Meter(local.pools(work), is_fast=work.job.preprocess == "fast")
        self.images = self.usable = self.files = 0
        self.seconds = 0.0
        self.rejected: Counter[str] = Counter()
        self.failed: dict[int, str] = {}
        self.encoded_bytes: Counter[str] = Counter()
        self.some: Embedded | None = None  # the first batch with rows

    def take(self, step: local.Step, parts: Sequence[Part]) -> None:
        gathering = {part.index: Gathering(part) for part in parts}
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
                gathered = gathering[result.part_index]
                gathered.add(result, self.work.batch_size)
                if gathered.is_whole and result.part_index not in self.failed:
                    encoding.append(pool.submit(self._encode, gathering.pop(result.part_index)))
            for future in encoding:
                self.encoded_bytes.update(future.result())
        self.files, self.seconds = len(encoding), time.perf_counter() - started

    def _count(self, result: Embedded) -> None:
        rejects = {reject.row: reject.reason for of_model in result.rejects.values() for reject in of_model}
        self.images += result.images
        usable = max(table.num_rows for table in result.tables.values())
        self.usable += usable
        self.some = self.some or (result if usable else None)
        self.rejected.update(rejects.values())

    def _encode(self, gathered: Gathering) -> dict[str, int]:
        sizes = {}
        for name, about in self.plan.identities.items():
            started = time.perf_counter()
            encoded = encode_part(gathered.part, name, self.plan.identity(name), gathered.in_order(), about)
            sizes[name] = len(encoded.data)
            self.meter.add({"encode": Spent(time.perf_counter() - started, encoded.rows, len(encoded.data))})
        return sizes

    def bytes_out(self, rows: int, parts: int) -> dict[str, int]:
        """Of all part files of each model: what a file takes with one row, and what each further row adds."""
        sizes = {}
        for name in self.plan.identities:
            one = self._one_row_bytes(name)
            added = max(0, self.encoded_bytes[name] - self.files * one) / max(self.images - self.files, 1)
            sizes[name] = round(parts * one + max(0, rows - parts) * added)
        return sizes

    def _one_row_bytes(self, name: str) -> int:
        """Dictionaries and statistics come with the first row: a file without any would say too little."""
        assert self.some
        table = self.some.tables[name].slice(0, 1)
        row = Embedded(0, 0, {name: table}, {name: ()}, rows_in=table.num_rows)
        part, identity = self.plan.parts[0], self.plan.identity(name)
        return len(encode_part(part, name, identity, [row], self.plan.identities[name]).data)


def _measurement(work: Work, plan: Plan, sample: Sample, taken: _Taken, startup_s: float) -> Measurement:
    measured, on_gpu = taken.meter.measured(), work.device != "cpu"
    busy_s = {stage: measured.stages[stage].seconds / taken.images for stage in STAGES}  # of one image
    cpu_s = sum(busy_s[stage] for stage in STAGES if stage != "embed")
    rows, is_estimated = count_rows(plan.parts, sample.seen)
    sampled, is_auto = len(sample.originals), work.job.resources.batch_size == "auto"  # found already
    shares = f"{sampled} of {len(plan.parts)} parts"
    return Measurement(
        images=taken.images,
        rejected=dict(taken.rejected.most_common()),
        parts_sampled=sampled,
        parts=len(plan.parts),
        parts_failed=len(taken.failed),
        seconds=taken.seconds,
        startup_s=startup_s,
        images_per_s=taken.images / taken.seconds,
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
        bytes_out=taken.bytes_out(rows, len(plan.parts)),
        notes=tuple(_notes(measured, taken, sample, work, shares, is_estimated)),
    )


def _notes(
    measured: Measured, taken: _Taken, sample: Sample, work: Work, shares: str, is_estimated: bool
) -> Iterator[str]:
    if is_estimated:
        yield f"only reading counts these images: their number is estimated from the bytes of {shares}"
    if taken.failed:
        index, message = next(iter(sorted(taken.failed.items())))
        yield f"{len(taken.failed)} parts of the sample could not be done; part {index}: {message}"
    largest = max((seen.rows for seen in sample.seen.values()), default=0)
    if largest < work.batch_size and not all(seen.is_whole for seen in sample.seen.values()):
        yield f"a batch of {work.batch_size} takes too long for the sample, which has {largest}; --seconds gives more"
    if measured.retries:
        yield f"{sum(measured.retries.values())} requests to the store were sent again"
