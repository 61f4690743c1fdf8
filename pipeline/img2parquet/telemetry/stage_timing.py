"""Measure what each stage of a job did and how long its workers waited, and name the bottleneck in one line.

    StageTime    the work of one stage on one batch; it travels with the batch, and the driver adds it up
    IdleClock    measures how long one worker waited for its next batch
    Meter        adds up a session as it goes
    Measured     the sums of a session
    bottleneck   turn them into the line

Bytes are those that a stage passed on: compressed images from `read`, pixels from `decode` and `preprocess`, columns
from `embed`, a file from `encode` and `commit`. From `embed` on, an image counts once for each model.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from img2parquet.storage.retry_counters import RETRIES

STAGES = ("read", "decode", "preprocess", "embed", "encode", "commit")
RETRY = "retry "  # followed by the kind of fault: how a process reports its retries, among the times of its stages


@dataclass(frozen=True, slots=True)
class StageTime:
    """The work of one stage: busy seconds, images and bytes passed on."""

    seconds: float = 0.0
    images: int = 0
    size_bytes: int = 0

    def __add__(self, other: StageTime) -> StageTime:
        return StageTime(self.seconds + other.seconds, self.images + other.images, self.size_bytes + other.size_bytes)


def retried() -> dict[str, StageTime]:
    """Return this process's retried requests since the last call: seconds waited, and their number as `images`."""
    return {RETRY + kind: StageTime(waited_s, times) for kind, (times, waited_s) in RETRIES.take().items()}


class IdleClock:
    """Measure, for one worker, the seconds from the end of one batch to the start of the next.

    The wait for the first batch does not count: it is start-up time and says nothing about the rate."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self) -> None:
        """Start the clock when a batch is done."""
        self._since = time.perf_counter()

    def end(self) -> float:
        """Return the seconds waited for the batch that has just arrived."""
        return 0.0 if self._since is None else time.perf_counter() - self._since


@dataclass(frozen=True)
class Measured:
    """The sums of one session. `seconds` start at its first result; the time before is `startup_s`."""

    seconds: float
    startup_s: float = 0.0
    stages: Mapping[str, StageTime] = field(default_factory=dict)  # summed over workers
    waited: Mapping[str, float] = field(default_factory=dict)  # seconds between batches by pool, summed over workers
    pools: Mapping[str, int] = field(default_factory=dict)  # how many work at once: readers, workers, ...
    blocked_s: float = 0.0  # the time that the driver waited for parts to be encoded and committed
    driver_s: float = 0.0  # CPU seconds of the driver's own thread, which collects results
    is_fast: bool = False  # the job already has `preprocess: fast`
    retries: Mapping[str, int] = field(default_factory=dict)  # requests to stores that were retried, by kind of fault
    retry_wait_s: float = 0.0  # back-off before them, summed over threads

    def busy_s(self, pool: str) -> float:
        return sum(self.stages[stage].seconds for stage in POOL_STAGES[pool] if stage in self.stages)

    def idle(self, pool: str) -> float:
        """Return the share of its time that a pool waited for input, or for its results to be taken."""
        waited_s = self.waited.get(pool, 0.0)
        return waited_s / max(waited_s + self.busy_s(pool), 1e-9)

    def load(self, pool: str) -> float:
        """Return the share of the wall time that a pool was busy, for pools whose waiting cannot be measured."""
        return min(1.0, self.busy_s(pool) / max(self.seconds * self.pools.get(pool, 1), 1e-9))

    def per_wall(self, seconds: float) -> float:
        return min(1.0, seconds / max(self.seconds, 1e-9))


class Meter:
    """Add up a session as it goes, from any thread."""

    def __init__(self, pools: Mapping[str, int], is_fast: bool = False) -> None:
        self.pools, self.is_fast, self.lock = dict(pools), is_fast, threading.Lock()
        self.stages = {stage: StageTime() for stage in STAGES}
        self.waited: Counter[str] = Counter()
        self.blocked_s = 0.0
        self.started, self.first_result = time.monotonic(), 0.0
        self.cpu_started, self.driver_s = time.thread_time(), 0.0

    def add(self, spent: Mapping[str, StageTime], waited: Mapping[str, float] | None = None) -> None:
        with self.lock:
            for stage, more in spent.items():
                self.stages[stage] = self.stages.get(stage, StageTime()) + more
            self.waited.update(waited or {})

    def arrived(self, taking_s: float = 0.0) -> None:
        """Count a result that reached the driver.

        Called by the thread that made this meter: its CPU time is the driver's, with `taking_s` of the thread that took
        the result from the runner."""
        self.first_result = self.first_result or time.monotonic()
        self.driver_s = time.thread_time() - self.cpu_started + taking_s

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Count the time inside as time that the driver waits for commits."""
        started = time.perf_counter()
        yield
        self.blocked_s += time.perf_counter() - started

    def measured(self) -> Measured:
        now = time.monotonic()
        first = self.first_result or now
        with self.lock:
            again = {name: spent for name, spent in self.stages.items() if name.startswith(RETRY)}
            return Measured(
                seconds=now - first,
                startup_s=first - self.started,
                stages={name: spent for name, spent in self.stages.items() if name not in again},
                waited=dict(self.waited),
                pools=self.pools,
                blocked_s=self.blocked_s,
                driver_s=self.driver_s,
                is_fast=self.is_fast,
                retries={name.removeprefix(RETRY): spent.images for name, spent in sorted(again.items())},
                retry_wait_s=sum(spent.seconds for spent in again.values()),
            )


# ---- the rule ----------------------------------------------------------------------------------------------------

POOL_STAGES = {
    "readers": ("read",),
    "workers": ("decode", "preprocess", "embed"),  # one process prepares and embeds
    "preparers": ("decode", "preprocess"),  # with GPUs, separate processes do
    "models": ("embed",),
}
NOTICEABLE = 0.1  # a smaller share of idle time is not worth mentioning
SATURATED = 0.5  # readers or a driver busier than this can be what the others wait for


def bottleneck(measured: Measured) -> str:
    """Say in one line what limited a session and what would help; an empty string when nothing was done.

    Workers that hardly wait are the bottleneck themselves, and the line says which of their work is. Workers that wait
    are held up downstream (by commits) or upstream: by preparers, readers, or the runner between them."""
    pool = "models" if "models" in measured.pools else "workers"
    if not measured.busy_s(pool):
        return ""
    if measured.idle(pool) < NOTICEABLE:
        return _by_work(measured, pool)
    found = (rule(measured, pool) for rule in (_by_commits, _by_driver, _by_preparers, _by_readers))
    return next(filter(None, found), _by_runner(measured, pool))


def _by_work(measured: Measured, pool: str) -> str:
    if pool == "models":
        return f"model-bound: the model was busy {_percent(1 - measured.idle(pool))} of its time; more GPUs"
    model, preparing = (measured.busy_s(part) / measured.busy_s(pool) for part in ("models", "preparers"))
    if preparing > model:
        shares = f"decoding and cropping took {_percent(preparing)} of the workers' time, the model {_percent(model)}"
        fast = "" if measured.is_fast else ", and `preprocess: fast` where images are large"
        return f"decode-bound: {shares}; more CPUs help in proportion{fast}"
    shares = f"the model took {_percent(model)} of the workers' time, decoding and cropping {_percent(preparing)}"
    return f"model-bound: {shares}; more CPUs help in proportion, or a GPU"


def _by_commits(measured: Measured, pool: str) -> str:
    """Applies when the driver waited for commits at least half as long as the workers waited."""
    blocked = measured.per_wall(measured.blocked_s)
    if blocked < measured.idle(pool) / 2:
        return ""
    encode_s, commit_s = (measured.stages.get(stage, StageTime()).seconds for stage in ("encode", "commit"))
    slow, help_ = (
        ("encoding", "fewer or narrower columns (`dtype: float16`)")
        if encode_s > commit_s
        else ("storing", "a nearer or faster store for `output.uri`")
    )
    return f"commit-bound: the driver waited {_percent(blocked)} for parts to be stored, mostly for {slow}; {help_}"


def _by_driver(measured: Measured, pool: str) -> str:
    load = measured.per_wall(measured.driver_s)
    if load < SATURATED:
        return ""
    return (
        f"driver-bound: {_waited(measured, pool)} while the driver's thread was busy {_percent(load)} with gathering "
        "results; fewer or narrower columns, or several jobs over disjoint inputs"
    )


def _by_preparers(measured: Measured, pool: str) -> str:
    """Estimate how many more CPUs would keep the models busy, from the busy times of both for the same images."""
    if "preparers" not in measured.pools or measured.idle("preparers") > measured.idle(pool) / 2:
        return ""
    models, preparers = measured.pools["models"], measured.pools["preparers"]
    needed = preparers * (1 - measured.idle("preparers")) / (1 - measured.idle(pool))
    more = max(1, math.ceil((needed - preparers) / models))
    return f"decode-bound: the model was idle {_percent(measured.idle(pool))}; {more} more CPUs per GPU"


def _by_readers(measured: Measured, pool: str) -> str:
    if measured.load("readers") < SATURATED:
        return ""
    readers = measured.pools.get("readers", 1)
    more = "`--runner ray` reads with several" if readers == 1 else "more CPUs or nodes, which read with more"
    tasks = "1 reader was" if readers == 1 else f"{readers} readers were"
    return (
        f"read-bound: {_waited(measured, pool)} for input; {tasks} busy {_percent(measured.load('readers'))} of the "
        f"time: {more}, or a nearer store"
    )


def _by_runner(measured: Measured, pool: str) -> str:
    readers = _percent(measured.load("readers"))
    return (
        f"overhead-bound: {_waited(measured, pool)} though readers were busy only {readers} of the time: handing "
        "batches over costs more than the work on them; a larger `resources.batch_size`, or more parts than workers"
    )


def _waited(measured: Measured, pool: str) -> str:
    return f"{'the model' if pool == 'models' else 'workers'} waited {_percent(measured.idle(pool))}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
