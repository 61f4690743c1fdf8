"""Measure how well one GPU is kept busy: the model alone, fed from memory, fed from shards; with NVML's utilisation.

    python -m infra.bench gpu [--minutes 8] [--device cuda] [--only levit-128S ...] [--out FOLDER]     make bench-gpu

    tests         tests/inference/test_gpu.py, first: numbers of a wrong result are of no use
    card          what it measures for a plain product of matrices, and copies on it, to it and from it
    model only    uint8 crops already on the device, batch after batch, as a CUDA graph where that is faster
    decoding      JPEG bytes in memory -> uint8 crops, by all workers, without a model
    memory        JPEG bytes in memory -> crops -> columns of the result, by the local runner's own threads
    processes     the same, decoded by processes: what Ray does, without its object store
    shards        tars -> committed Parquet, a whole job of the local runner

* bfloat16 and channels last, random weights; batch sizes as `batch_size: auto` finds them.
* A GPU is fed where decoding is faster than the model: the floor is 90 % of the slower of both.
* It ends in time: each way gets its share of the minutes that are left, and the page is written after every model, with
  what was not measured named.
* `TFLOP/s` is what the model alone computes: two operations for each of the multiplications that its authors count.
* `--device cpu` runs the same code without a GPU, to see that it works.
* A machine without this project needs torch, pyarrow, numpy, Pillow, scikit-image, scikit-learn, fsspec, PyYAML and
  safetensors, and as wheels, with what they depend on, pydantic and simplejpeg: `pip download --only-binary :all:` for
  its Python, there `pip install --no-index --find-links FOLDER --target SITE`, and SITE in PYTHONPATH. Neither Ray nor
  s3fs is needed. `python -m infra.bench.gpu` imports no other suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from img2parquet.batch import Batch, Embedded, Failed, Prepared, Work, split_into_batches
from img2parquet.job import JobSpec, parse_job
from img2parquet.read import PartLimits
from img2parquet.schema import Part, Piece, Reject, Row
from infra.bench import machine
from infra.bench.jpegs import ImageSet, describe, generate
from infra.bench.report import Bar, Report

if TYPE_CHECKING:
    from torch import Tensor

    from img2parquet.models.model import Model

FLOOR = 0.9
TOLERANCE = 0.15  # of the largest value, from float32 on the CPU: bfloat16 moves a random BiT by a tenth
IMAGES = ImageSet("imagenet-like", 512, (420, 375), 0.2, 10.0, (85, 96))
COLUMNS = (
    "model", "batch", "way", "images/s", "x model only", "x slower of model, decoding", "GPU busy", "TFLOP/s",
    "difference",
)  # fmt: skip
WAYS = 5
BESIDE_S = 12.0  # of a model, besides its ways: loading it six times, and finding its batch size
LEAST_S = 1.0  # of a way
TESTS_S = 120.0
ROOT = Path(__file__).parents[2]
LOOK_S = 0.1  # between two looks at the GPU


@dataclass(frozen=True)
class Subject:
    repo: str
    output: str = "embedding"

    @property
    def name(self) -> str:
        return self.repo.split("/")[-1]


SUBJECTS = (
    Subject("facebook/levit-128S"),
    Subject("google/bit-50"),
    Subject("facebook/vit-msn-small"),
    Subject("microsoft/beit-base-patch16-224"),
    Subject("microsoft/beit-large-patch16-384"),
    Subject("microsoft/beit-base-finetuned-ade-640-640", "segmentation"),
)


@dataclass(frozen=True)
class Settings:
    device: str = "cuda"
    dtype: str = "bfloat16"
    seconds: float = 10.0  # of each way, at most, and hardly less while there is time
    minutes: float = 8.0  # of everything
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    images: int = IMAGES.count  # distinct


@dataclass(frozen=True)
class Rate:
    images_per_s: float
    busy: float | None = None  # share of the time in which the GPU computed, by NVML


@dataclass(frozen=True)
class Measured:
    batch_size: int
    rates: Mapping[str, Rate]  # by way
    difference: float  # largest, from float32 on the CPU, relative to the largest value

    def share(self, way: str, *of: str) -> float:
        """Compute the share of the slowest of some other ways."""
        return self.rates[way].images_per_s / min(self.rates[other].images_per_s for other in of)


class TimeIsUp(BaseException):
    """Raised in the main thread at the deadline, past whatever handles exceptions."""


class Deadline:
    """Divide the time that is left among the models that are left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def seconds_of_a_way(self, models_left: int, most: float) -> float | None:
        """Return how long each way of the next model may take; None where it cannot be measured in time."""
        seconds = (self.left_s / models_left - BESIDE_S) / WAYS
        if seconds < LEAST_S:  # a few models well, rather than all of them badly
            seconds = min(LEAST_S, (self.left_s - BESIDE_S) / WAYS)
        return None if seconds < LEAST_S else min(most, seconds)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Raise TimeIsUp inside when the time is over, also where something hangs."""

        def over(*_: object) -> None:
            raise TimeIsUp

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left_s))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it works")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="it ends within them")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="of each way, at most")
    parser.add_argument("--images", type=int, default=Settings.images, help="distinct JPEGs")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the results")
    options = parser.parse_args(arguments)
    known = [subject.name for subject in SUBJECTS]
    if unknown := sorted(set(options.only) - set(known)):
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(known)}")
    subjects = [subject for subject in SUBJECTS if not options.only or subject.name in options.only]
    settings = Settings(options.device, seconds=options.seconds, minutes=options.minutes, images=options.images)
    made = None
    for made in reports(settings, subjects):
        written = made.write(options.out)
    assert made
    print(made.markdown())
    print(f"written: {', '.join(map(str, written))}", flush=True)
    if threading.active_count() > 1 and not made.agrees:  # one may hang in a driver
        os._exit(1)
    return 0 if made.agrees else 1


def reports(settings: Settings, subjects: Sequence[Subject] = SUBJECTS) -> Iterator[Report]:
    """Yield the page of what is measured so far: of the card, then after each model."""
    deadline = Deadline(settings.minutes)
    passed, said = run_tests(settings, deadline)
    rows, bars, agrees, missing = list[Sequence[str]](), list[Bar](), passed, [subject.name for subject in subjects]
    about = [
        f"{device_name(settings.device)}; {machine.cpu()}; {settings.workers} decoding workers",
        machine.versions(("torch", "pyarrow", "numpy")),
        f"tests: {said}",
    ]

    def page() -> Report:
        left = [f"**not measured in {settings.minutes:g} minutes: {', '.join(missing)}**"] if missing else []
        title = f"One worker's models, fed: {settings.device}"
        return Report("gpu", title, [*about, *left], COLUMNS, list(rows), list(bars), agrees)

    yield page()
    try:
        with deadline.kept():
            about.append(card(settings))
            files = generate(IMAGES, settings.images)
            about += [
                f"{settings.dtype}, random weights; each way at most {settings.seconds:g} s; {describe(files)}",
                "the floor is for the slower of the model alone and decoding alone: who outruns decoding cannot be fed",
                "`difference`: the largest, of one batch, from float32 on the CPU, relative to the largest value",
            ]
            for number, subject in enumerate(subjects):
                seconds = deadline.seconds_of_a_way(len(subjects) - number, settings.seconds)
                if seconds is None:
                    break
                measured = measure(subject, replace(settings, seconds=seconds), files)
                print(f"{subject.name}: {measured}", file=sys.stderr, flush=True)
                missing.remove(subject.name)
                rows += table(subject, measured)
                bars += bars_of(subject, measured)
                agrees = agrees and measured.difference <= TOLERANCE
                yield page()
    except TimeIsUp:
        print(f"the {settings.minutes:g} minutes are over", file=sys.stderr, flush=True)
    agrees = agrees and bool(rows)
    yield page()


def run_tests(settings: Settings, deadline: Deadline) -> tuple[bool, str]:
    """Run the tests that need a GPU; return whether none failed, and pytest's last line."""
    if settings.device == "cpu":
        return True, "none, without a GPU"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/inference/test_gpu.py"]
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=min(TESTS_S, deadline.left_s / 3)
        )
    except subprocess.TimeoutExpired:
        return False, "tests/inference/test_gpu.py did not end in time"
    print(ran.stdout[-4000:], ran.stderr[-1000:], file=sys.stderr, flush=True)
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    return ran.returncode == 0, lines[-1] if lines else f"pytest ended with {ran.returncode}: {ran.stderr[-200:]}"


def card(settings: Settings, side: int = 8192, copied_bytes: int = 1 << 28) -> str:
    """Measure what the device itself gives: a product of matrices, and copies on it, to it and from it."""
    import torch

    from img2parquet.inference.device import open_device

    api = open_device(settings.device).api
    side, copied_bytes = (side, copied_bytes) if api else (256, 1 << 20)
    x = torch.ones((side, side), dtype=getattr(torch, settings.dtype), device=settings.device)
    there = torch.empty(copied_bytes, dtype=torch.uint8, device=settings.device)
    host = torch.empty(copied_bytes, dtype=torch.uint8, pin_memory=api is not None)
    other = torch.empty_like(there)

    def per_s(call: Callable[[], Any]) -> float:
        call()
        wait = api.synchronize if api else lambda: None
        wait()
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < min(1.0, settings.seconds):
            for _ in range(4):
                call()
            wait()
            calls += 4
        return calls / (time.perf_counter() - started)

    gigabytes = copied_bytes / 1e9
    return (
        f"card: {2 * side**3 * per_s(lambda: x @ x) / 1e12:,.1f} TFLOP/s in {settings.dtype}; copies of "
        f"{2 * gigabytes * per_s(lambda: other.copy_(there)):,.0f} GB/s on it (read and written), "
        f"{gigabytes * per_s(lambda: there.copy_(host, non_blocking=True)):,.1f} GB/s to it, "
        f"{gigabytes * per_s(lambda: host.copy_(there, non_blocking=True)):,.1f} GB/s from it"
    )


def measure(subject: Subject, settings: Settings, files: Sequence[bytes]) -> Measured:
    """Measure every way with the batch size found by trying."""
    from img2parquet.inference.batch_size import auto_batch_size
    from img2parquet.models import ModelSpec, read_card

    job = job_of(subject, settings, InMemory(tuple(files)))
    cards = {subject.name: read_card(ModelSpec(subject.repo, weights=WEIGHTS))}
    batch_size = auto_batch_size(job, cards, settings.dtype, settings.device)
    work = Work(job, cards, settings.dtype, settings.device, batch_size, threads=1)
    rates = {
        "model only": model_only(work, settings),
        "decoding": decoding(work, settings),
        "memory": from_memory(work, settings),
        "processes": from_processes(work, settings),
    }
    most = min(rate.images_per_s for rate in rates.values())
    rates["shards"] = from_shards(subject, settings, files, batch_size, int(most * settings.seconds))
    return Measured(batch_size, rates, difference(work, settings))


# ---- the ways ----------------------------------------------------------------------------------------------------


def model_only(work: Work, settings: Settings) -> Rate:
    """Run the model alone, in groups of batches, so that synchronising and reading the clock cost nothing."""
    from img2parquet.inference.cuda_graphs import TRY_AFTER, CudaGraphs
    from img2parquet.inference.device import open_device

    api = open_device(settings.device).api
    model, pixels, wants = loaded(work, settings.dtype, settings.device, work.batch_size)
    forward = partial(CudaGraphs(api, work.batch_size), model) if api else model.forward_pixels
    wait = api.synchronize if api else lambda: None
    for _ in range(TRY_AFTER + 1 if api else 1):
        forward(pixels, wants)
    wait()
    started, count, group = time.perf_counter(), 0, 1
    with utilisation(settings.device) as busy:
        while time.perf_counter() - started < settings.seconds:
            for _ in range(group):
                forward(pixels, wants)
            wait()
            count, group = count + group, min(group * 2, 16)
        return Rate(count * work.batch_size / (time.perf_counter() - started), busy())


def decoding(work: Work, settings: Settings) -> Rate:
    from img2parquet.inference.steps import Preparer

    with ThreadPoolExecutor(settings.workers) as pool:
        return counted(ahead(pool, Preparer(work), batches(work), settings.workers), settings)


def from_memory(work: Work, settings: Settings) -> Rate:
    from img2parquet.runners.local import local_results

    return counted(local_results([EVERYTHING], work), settings)


def from_processes(work: Work, settings: Settings) -> Rate:
    """Decode in processes, with threads to feed the device."""
    from img2parquet.inference.device import LANES
    from img2parquet.inference.steps import Embedder

    embed, bare = Embedder(work), replace(work, job=work.job.model_copy(update={"input": InMemory(())}))
    decoders = ProcessPoolExecutor(settings.workers, get_context("spawn"), initializer=_start, initargs=(bare,))
    with decoders, ThreadPoolExecutor(LANES + 1) as pool:
        prepared = ahead(decoders, _prepare, batches(work), settings.workers)
        return counted(ahead(pool, embed, prepared, LANES + 1), settings)


def from_shards(subject: Subject, settings: Settings, files: Sequence[bytes], batch_size: int, images: int) -> Rate:
    """Run a whole job of about this many images; its rate is counted from its first result."""
    import img2parquet

    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), files, 2 * batch_size, images)
        source = {"kind": "webdataset", "uris": [f"{folder}/*.tar"], "shards_per_part": 1}
        job = job_of(subject, settings, source, f"{folder}/out", batch_size)
        with utilisation(settings.device) as busy:
            summary = img2parquet.run(job, runner="local")
            return Rate(summary.images_per_s, busy())


def difference(work: Work, settings: Settings, images: int = 2) -> float:
    """Compute the largest difference from float32 on the CPU, relative to the largest value; infinite if not finite."""
    import torch

    (model, pixels, wants), (reference, same, _) = (
        loaded(work, dtype, device, images) for dtype, device in ((settings.dtype, settings.device), ("float32", "cpu"))
    )
    ours, theirs = model.forward_pixels(pixels, wants), reference.forward_pixels(same, wants)
    shares = [float((ours[name].cpu() - theirs[name]).abs().max() / theirs[name].abs().max()) for name in wants]
    return max(share if torch.tensor(share).isfinite() else float("inf") for share in shares)


# ---- what they share ---------------------------------------------------------------------------------------------

WEIGHTS = "random(0)"
EVERYTHING = Part(0, (Piece("memory", 0, ""),))


@dataclass(frozen=True)
class InMemory:
    """Yield the same files endlessly under new keys."""

    files: tuple[bytes, ...]
    kind: str = "memory"

    def plan(self, limits: PartLimits) -> Iterator[tuple[Piece, ...]]:
        yield EVERYTHING.pieces

    def read(self, part: Part) -> Iterator[Row | Reject]:
        for number, file in enumerate(cycle(self.files)):
            yield Row(number, f"{number:09d}", "memory", file)

    def passthrough(self) -> pa.Schema:
        return pa.schema([])


def job_of(
    subject: Subject, settings: Settings, source: Any, output: str = "out", batch_size: int | None = None
) -> JobSpec:

    resources = {"workers": settings.workers, "device": settings.device, "batch_size": batch_size or "auto"}
    job = parse_job(
        {
            "input": source if isinstance(source, dict) else {"kind": "folder", "uris": ["unused"]},
            "models": [{"model": subject.repo, "weights": WEIGHTS, "outputs": [{"kind": subject.output}]}],
            "output": {"uri": output},
            "dtype": settings.dtype,
            "resources": resources,
        }
    )
    return job if isinstance(source, dict) else job.model_copy(update={"input": source})


def loaded(work: Work, dtype: str, device: str, images: int) -> tuple[Model, Tensor, frozenset[str]]:
    """Load the model and some random crops on its device; return these and the wanted features."""
    import torch

    from img2parquet.models import load_model

    (wanted,) = work.job.models
    model = load_model(wanted.model, weights=WEIGHTS, dtype=dtype, device=device)
    torch.set_num_threads(work.threads)
    shape, random = (images, *model.card.preprocess.shape_HWC), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(model.device)
    return model, pixels, frozenset[str]().union(*(output.wants(model.card) for output in wanted.outputs))


def batches(work: Work) -> Iterator[Batch]:
    for batch in split_into_batches(work.job.input, EVERYTHING, work.batch_size):
        assert isinstance(batch, Batch), batch
        yield batch


def ahead(pool: Executor, call: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield results in order, two calls ahead for each worker."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()


def counted(results: Iterator[Any], settings: Settings) -> Rate:
    """Count images per second from the time every worker has delivered something."""
    for result in islice(results, settings.workers):
        assert not isinstance(result, Failed), result
    started, images = time.perf_counter(), 0
    with utilisation(settings.device) as busy:
        for result in results:
            images += result.images if isinstance(result, Embedded) else len(result.rows)
            if time.perf_counter() - started >= settings.seconds:
                break
        return Rate(images / (time.perf_counter() - started), busy())


def _start(work: Work) -> None:
    from img2parquet.inference.allocator import keep_freed_memory
    from img2parquet.inference.steps import Preparer

    global _prepare_here
    keep_freed_memory()
    _prepare_here = Preparer(work)


_prepare_here: Callable[[Batch], Prepared]  # of a decoding process


def _prepare(batch: Batch) -> Prepared:
    return _prepare_here(batch)


def write_shards(folder: Path, files: Sequence[bytes], per_shard: int, images: int) -> None:
    """Write one tar of `per_shard` images, under as many names as needed for this many images."""
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number, file in enumerate(islice(cycle(files), per_shard)):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(file)
            tar.addfile(member, BytesIO(file))
    for copy in range(1, max(1, images // per_shard)):
        os.link(first, folder / f"{copy:05d}.tar")


@contextmanager
def utilisation(device: str) -> Iterator[Callable[[], float | None]]:
    """Sample NVML's utilisation meanwhile; None without a GPU or without its Python package."""
    seen, stop = list[int](), threading.Event()

    def look() -> None:
        import torch

        with suppress(ModuleNotFoundError):
            while not stop.wait(LOOK_S):
                seen.append(torch.cuda.utilization(device))

    thread = threading.Thread(target=look, daemon=True)
    if device != "cpu":
        thread.start()
    try:
        yield lambda: statistics.fmean(seen) / 100 if seen else None
    finally:
        stop.set()


def device_name(device: str) -> str:
    import torch

    return "no GPU" if device == "cpu" else torch.cuda.get_device_name(device)


# ---- the page ----------------------------------------------------------------------------------------------------


def table(subject: Subject, measured: Measured) -> list[Sequence[str]]:
    return [
        (
            f"**{subject.name}**",
            str(measured.batch_size),
            way,
            f"{rate.images_per_s:,.0f}",
            f"{measured.share(way, 'model only'):.2f}",
            f"{measured.share(way, 'model only', 'decoding'):.2f}",
            "" if rate.busy is None else f"{rate.busy:.0%}",
            f"{rate.images_per_s * 2 * gmacs(subject) / 1e3:,.2f}" if way == "model only" else "",
            f"{measured.difference:.1e}" if way == "model only" else "",
        )
        for way, rate in measured.rates.items()
    ]


def gmacs(subject: Subject) -> float:
    from img2parquet.models import published

    return next(entry.gmacs for _, entry in published() if entry.repo == subject.repo)


def bars_of(subject: Subject, measured: Measured) -> list[Bar]:
    fed = ("memory", "processes", "shards")
    return [Bar(f"{subject.name}, {way}", measured.share(way, "model only", "decoding"), FLOOR) for way in fed]


if __name__ == "__main__":
    sys.exit(main())
