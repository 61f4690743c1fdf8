"""Parts to results as a Ray Data graph: read tasks -> embedding actors (-> the driver, who commits).

    CPU only    read (tasks) -> prepare and embed (actors): pixels never cross the object store
    with GPUs   read (tasks) -> prepare (tasks) -> embed (GPU actors)

A row of the dataset is one whole batch, pickled, so Ray may cut and merge its blocks as it likes.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import stacks
from pipeline.actors import Attempts, Read, Step, job_name
from pipeline.batch import Embedded, Failed, Work, WorkersLost
from pipeline.device import LANES
from pipeline.errors import Img2ParquetError, JobFailed
from pipeline.job import JobSpec
from pipeline.logs import is_json, repeat
from pipeline.metrics import Sink
from pipeline.probe import Probe, probe
from pipeline.ray_metrics import RayExporter
from pipeline.schema import Part

log = logging.getLogger(__name__)

# Logical CPUs: an actor takes less than its core, so that reading always finds a slot. A pool that holds every CPU
# while the read waits for one hangs for ever, without a word (seen on 2 cores).
ACTOR_CPUS, READ_CPUS = 0.75, 0.25
BLOCK_BYTES = 16 << 20  # Ray's default of 128 MiB would be a thousand images, one worker's work for half a minute
IMAGE_BYTES = 64 << 10  # typical: a part of a list has the list's own size
BLOCKS_EACH = 8  # at least, of a small job to each worker: one that has the last block works alone
MAX_READ_TASKS = 1000
WAITS_S = 20.0  # for a first answer of a worker, until we say what it may wait for
WORKER_TRIES = 3
READ_TRIES = 8  # of a part's task: from the second on it reads in a process apart, so these are for nodes that go
GROWN, GROWN_FOR_S = 1.25, 30.0  # how much larger a cluster must be, and stay, for a graph to begin anew
STACKS_S, MOST_NODES = 10.0, 32  # for nodes to say where their workers are
log = logging.getLogger(__name__)
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
)


def start(job: JobSpec, address: str | None = None) -> Probe:
    """Join the cluster of `address` or RAY_ADDRESS, or start one here; then ask a worker what it can do."""
    if not ray.is_initialized():
        _init(address)
    gpus = _gpus_per_worker(job)
    task = ray.remote(num_cpus=READ_CPUS, num_gpus=gpus)(_probe)
    try:
        asked = task.remote(job, int(_resource("GPU")), gpus)
        if not ray.wait([asked], timeout=WAITS_S)[0] and _resource("GPU") < gpus:
            log.warning("waiting for a node with a GPU: a worker of this job gets %g, the cluster has none yet", gpus)
        result: Probe = ray.get(asked)
    except ray.exceptions.RayError as error:
        if isinstance(error, LOST):
            said = str(error).partition("\n")[0]
            raise JobFailed(
                f"the Ray cluster was lost while the job began: {said}",
                hint="its logs say why; nothing is lost: run the same command again",
            ) from None
        raise _cause(error) from None
    return result


def _probe(job: JobSpec, cluster_gpus: int, gpus_each: float) -> Probe:
    return probe(job, cluster_gpus, gpus_each)


def _init(address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning on CPU-only machines
    joined = address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {}
    if not joined:
        own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        # every pool of restartable actors logs an "error" that is none, in the middle of the progress display
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:  # not None, which would join whatever `ray start` left on this machine
        with nullcontext() if joined else _silent_stderr():
            ray.init(address=joined or "local", logging_level=logging.ERROR, log_to_driver=is_json(), **own)
            _take_workers_lines()
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "version mismatch" in str(error).lower():
            raise JobFailed(
                f"the Ray cluster at `{joined}` runs other versions than this process: {' '.join(str(error).split())}",
                hint="use the cluster's Ray and Python here, or `img2parquet submit`, which runs the job with its own",
            ) from None
        raise JobFailed(
            f"no Ray cluster at `{joined}`: {error}", hint="leave out the address to start one here"
        ) from None
    except Exception as error:  # no class of its own: Ray's processes are not up within the 30 s that it gives them
        raise JobFailed(
            f"Ray did not start: {' '.join(str(error).split())}",
            hint="run the same command again when this machine is less busy, or with `--runner local`",
        ) from None


def _take_workers_lines() -> None:
    """Workers' lines to our stderr as they are, where lines are JSON; Ray would put words before each."""
    if not is_json():
        return
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as lines

        lines.remove_handler("ray_print_logs")
        lines.add_handler("img2parquet", _repeat)
    except Exception as error:  # inner names of Ray's: then they stay in the nodes' log files, which are JSON too
        log.warning("the workers' lines stay in Ray's log files: %s", error)


def _repeat(data: Mapping[str, Any]) -> None:
    if data.get("pid") != "autoscaler":  # which tells its state every few seconds
        repeat(data.get("lines", ()))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's C++ half announces its log level to file descriptor 2, out of Python's reach; exceptions still arrive."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def stream(parts: Iterable[Part], work: Work) -> Stream:
    """Results as batches are finished, in any order. Raises WorkersLost where workers or nodes died more often than Ray
    replaces them; what a worker raised, as our own error where it is one; else JobFailed."""
    return Stream(list(parts), work)


class Stream:
    """One graph and its results, for `rounds`: taken by one thread, abandoned by another."""

    def __init__(self, parts: list[Part], work: Work, count: int | None = None) -> None:
        """count: of workers, if not as many as there is room for."""
        self.parts, self.work, self.workers = parts, work, count or workers(work.job)
        self.executor: Any = None
        self.is_abandoned = False
        self.grown_since: float | None = None
        self.results = self._results()

    def __iter__(self) -> Iterator[Embedded | Failed]:
        return self

    def __next__(self) -> Embedded | Failed:
        return next(self.results)

    def close(self) -> None:
        self.results.close()

    def abandon(self) -> None:
        """Kill the graph's tasks and actors. Who waits for its results is told that there are no more."""
        self.is_abandoned = True
        if self.executor:
            self.executor.shutdown(force=True)

    def at_work(self) -> dict[str, int]:
        if self.executor:
            with suppress(Exception):  # inner names of Ray's, for a message only
                return {_stage(op.name): op.num_active_tasks() for op in list(self.executor._topology)}
        return {}

    def is_outgrown(self) -> bool:
        """Whether the cluster has had room for more workers for a while: a graph keeps the number it began with."""
        if workers(self.work.job) < GROWN * self.workers:
            self.grown_since = None
            return False
        self.grown_since = self.grown_since or time.monotonic()
        return time.monotonic() - self.grown_since >= GROWN_FOR_S

    def is_shrunken(self) -> bool:
        """Whether actors wait for room that there is no more; not where only idle ones have gone, with their nodes."""
        if workers(self.work.job) < self.workers:
            with suppress(Exception):  # inner names of Ray's, as below
                pools = [pool for op in self.executor._topology for pool in op.get_autoscaling_actor_pools()]
                return any(pool.num_restarting_actors() or pool.num_pending_actors() for pool in pools)
        return False

    def idle_workers(self) -> int:
        """A pool gives idle actors back once its input has ended, so there is room for others where they were."""
        with suppress(Exception):  # inner names of Ray's; tests/test_stragglers.py holds them
            op, state = list(self.executor._topology.items())[-1]
            (pool,) = op.get_autoscaling_actor_pools()
            busy: int = pool.num_active_actors()
            if busy and op._inputs_complete and not state.total_enqueued_input_blocks():
                return max(0, min(self.workers, workers(self.work.job)) - busy)
        return 0

    def beside(self, parts: list[Part]) -> Stream:
        return Stream(parts, self.work, max(1, self.idle_workers()))

    def stacks(self) -> str:
        """Of the workers on each node, as far as they say so in time."""
        ask = ray.remote(num_cpus=0, max_retries=0)(stacks.of_machine)
        asked = {}
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        for node in [node for node in nodes if node["Alive"]][:MOST_NODES]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[ask.options(scheduling_strategy=there).remote(job_name())] = node["NodeManagerAddress"]
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=STACKS_S)
        told = {}
        for answer in answered:
            with suppress(ray.exceptions.RayError):
                told.update({f"  {title} on {asked[answer]}": threads for title, threads in ray.get(answer)})
        return "\n".join(f"{title}\n{threads}" for title, threads in told.items())

    def _results(self) -> Generator[Embedded | Failed]:
        dataset = _graph(self.parts, self.work, self.workers)
        _STARTING.stream = self
        try:
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                assert isinstance(block, pa.Table)
                for payload in block.column("payload"):
                    yield pickle.loads(payload.as_buffer())
        except ray.exceptions.RayError as error:
            raise _cause(error) from None
        finally:
            del _STARTING.stream


_STARTING = threading.local()  # `stream`: the one whose graph this thread starts


class _Started(ExecutionCallback):  # type: ignore[misc, unused-ignore]
    """Tells a stream of its executor before anything can hang; the dataset itself knows it after its first block."""

    def before_execution_starts(self, executor: Any) -> None:
        if stream := getattr(_STARTING, "stream", None):
            stream.executor = executor
            if stream.is_abandoned:
                raise ray.exceptions.RayError("not wanted any more")


def _stage(name: str) -> str:
    return "reading" if "Read" in name else "the workers' batches" if "Step" in name else name


def _graph(parts: list[Part], work: Work, count: int) -> ray.data.Dataset:
    handle = ray.put(work)
    batches = _batches(parts, work, handle, count)
    gpus = _gpus_per_worker(work.job)
    if not prepares_apart(work):
        cpus = 0 if gpus else min(ACTOR_CPUS * work.threads, ACTOR_CPUS * _cpus() / count)
        return _actors(batches, ["both", handle], count, cpus, gpus)
    prepared = _actors(batches, ["prepare", handle], _preparers(work), cpus=ACTOR_CPUS, gpus=0)
    cpus = 0 if gpus else ACTOR_CPUS
    return _actors(prepared, ["embed", handle], count, cpus, gpus, calls=LANES + 1)  # one more to fetch its blocks


def _batches(parts: list[Part], work: Work, handle: ray.ObjectRef[Work], count: int) -> ray.data.Dataset:
    """Read, one batch a row."""
    _tune_context(_block_bytes(parts, count))
    items = [{"payload": pickle.dumps(part)} for part in parts]
    source = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_READ_TASKS))
    return source.map_batches(
        Read(handle, ray.remote(num_cpus=0)(Attempts).remote()), batch_size=1, batch_format="pyarrow",
        num_cpus=READ_CPUS, compute=TaskPoolStrategy(size=_read_tasks(work)), max_retries=READ_TRIES,
    )  # fmt: skip


def pools(work: Work) -> dict[str, int]:
    """How many work at once, by what they do: for the meter."""
    if not prepares_apart(work):
        return {"readers": _read_tasks(work), "workers": workers(work.job)}
    return {"readers": _read_tasks(work), "preparers": _preparers(work), "models": workers(work.job)}


def metric_sinks() -> list[Sink]:
    """Ray's own exporter, where it can be had: no job fails for its metrics."""
    try:
        return [RayExporter()]
    except Exception as error:
        log.warning("no metrics through Ray's exporter: %s: %s", type(error).__name__, error)
        return []


def prepares_apart(work: Work) -> bool:
    """Whether decoding is a stage of its own: with a GPU, whose worker would otherwise wait for its own core."""
    return work.device != "cpu"


def _actors(
    dataset: ray.data.Dataset, arguments: list[Any], count: int, cpus: float, gpus: float, calls: int = 1
) -> ray.data.Dataset:
    """`calls` of one actor at a time, each in a thread of its own."""
    # without these bounds Ray restarts for ever; 2.60 knows them only among its deprecated `ray_remote_args`
    return dataset.map_batches(
        Step,
        fn_constructor_args=arguments,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=count, max_concurrent_calls_per_actor=calls, enable_true_multi_threading=calls > 1
        ),
        num_cpus=cpus,
        num_gpus=gpus or None,
        max_restarts=WORKER_TRIES,
        max_task_retries=WORKER_TRIES,
    )


def workers(job: JobSpec) -> int:
    if job.resources.workers != "auto":
        return job.resources.workers
    gpus = _gpus_per_worker(job)
    if gpus:
        return max(1, int(_resource("GPU") / gpus))
    return max(1, int(_cpus()) // job.resources.threads_per_worker)


def _preparers(work: Work) -> int:
    models = 0.0 if _gpus_per_worker(work.job) else workers(work.job) * ACTOR_CPUS
    return max(1, int(_cpus() * ACTOR_CPUS - models))


def _gpus_per_worker(job: JobSpec) -> float:
    wanted = job.resources.gpus_per_worker
    if wanted != "auto":
        return wanted
    return 1.0 if job.resources.device != "cpu" and _resource("GPU") >= 1 else 0.0


def _cpus() -> float:
    return _resource("CPU")


def _resource(name: str) -> float:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return total.get(name, 0.0)


def _read_tasks(work: Work) -> int:
    return max(1, int(_cpus() * (1 - ACTOR_CPUS) / READ_CPUS))


def _block_bytes(parts: list[Part], count: int) -> int:
    """What Ray may gather before it hands batches on; a block is never less than a batch."""
    size_bytes = sum(max(part.size_bytes, (part.rows or 0) * IMAGE_BYTES) for part in parts)
    return max(1, min(BLOCK_BYTES, size_bytes // (BLOCKS_EACH * count)))


def _tune_context(block_bytes: int) -> None:
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    warnings.filterwarnings("ignore", message=r"The (min|max)imum number of concurrent")  # a job of few parts
    context = DataContext.get_current()
    context.target_max_block_size = block_bytes
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if _Started not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_Started)
    context.execution_no_progress_timeout_s = 24 * 3600  # a GPU queue may be long; our own watchdog looks at parts
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _cause(error: BaseException) -> Img2ParquetError | WorkersLost:
    """The error a worker raised, ours if it is one of ours, without Ray's wrapping."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, Img2ParquetError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    if isinstance(error, LOST):
        return WorkersLost(f"workers were lost, more often than they are replaced: {error}".splitlines()[0])
    return JobFailed(f"a worker failed: {error}")
