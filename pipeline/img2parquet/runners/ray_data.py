"""Turn parts into results as a Ray Data graph, whose last stage sends them to the driver.

    CPU only    read (tasks), then prepare and embed (actors): pixels never cross the object store
    with GPUs   read (tasks), then prepare (actors), then embed (GPU actors)

A row of the dataset is one whole batch, pickled, so Ray may split and merge its blocks as it likes.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from img2parquet.batch import Work
from img2parquet.errors import Img2ParquetError, JobFailed
from img2parquet.inference.capabilities import Capabilities, probe_capabilities
from img2parquet.inference.device import LANES
from img2parquet.job import JobSpec
from img2parquet.runners.base import Result, WorkersLost
from img2parquet.runners.ray_import_path import own_code_only
from img2parquet.runners.ray_metrics import RayExporter
from img2parquet.runners.ray_pools import (
    ACTOR_CPUS,
    READ_CPUS,
    SHARE_HINT,
    Pools,
    gpus_per_worker,
    pools_of,
    resource,
    wait_for_room,
    weakest_gpu,
    worker_count,
)
from img2parquet.runners.ray_workers import Attempts, Read, Step, job_name
from img2parquet.schema import Part
from img2parquet.telemetry import stack_dumps
from img2parquet.telemetry.logs import is_json, log_step, repeat
from img2parquet.telemetry.prometheus import Sink

log = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20  # Ray's default of 128 MiB would be a thousand images: half a minute of work for one worker
IMAGE_BYTES = 64 << 10  # typical: the size of a part of a list is that of the list, not of its images
BLOCKS_EACH = 8  # per worker, at least: in a small job, the worker with the last block works alone
MAX_READ_TASKS = 1000
FIRST_ANSWER_S = 20.0  # from a worker, before we log what it may be waiting for
WORKER_TRIES = 3
READ_TRIES = (
    8  # of a part's task: the second and later ones read in an isolated process, so only lost nodes use them up
)
GROWN, GROWN_FOR_S = 1.25, 30.0  # how much larger a cluster must be, and for how long, before the graph is restarted
STACKS_S, MAX_NODES = 10.0, 32  # how long to wait for workers' stacks, and from how many nodes
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
)


class RayRunner:
    """Works on the cluster of `address` or RAY_ADDRESS, or else on a Ray that it starts on this machine."""

    def start(self, job: JobSpec, address: str | None = None) -> Capabilities:
        """Join the cluster or start one, then ask a worker what it can do.

        Raises JobFailed when there is no cluster, or it is lost meanwhile, and what the worker raised."""
        if not ray.is_initialized():
            joined = address or os.environ.get("RAY_ADDRESS")
            log_step("Joining the Ray cluster at %s" if joined else "Starting Ray on this machine%s", joined or "")
            _init(address)
        log_step("Starting a worker to read the checkpoints")
        found = _probe_on_a_worker(job)
        wait_for_room(job)
        return found

    def stream(self, parts: Iterable[Part], work: Work) -> RayStream:
        """Start a graph; results come in any order, as batches are finished.

        The stream raises WorkersLost when workers or nodes died more often than Ray replaces them; what a worker
        raised, where that is an error of our own; else JobFailed."""
        return RayStream(list(parts), work)

    def pools(self, work: Work) -> dict[str, int]:
        """Return the number of tasks and actors that work at the same time, by what they do."""
        pools = pools_of(work.job, prepares_separately(work))
        if not pools.preparers:
            return {"readers": pools.readers, "workers": pools.workers}
        return {"readers": pools.readers, "preparers": pools.preparers, "models": pools.workers}

    def metric_sinks(self) -> list[Sink]:
        """Return Ray's own exporter, or nothing where it cannot be created: no job fails for its metrics."""
        try:
            return [RayExporter()]
        except Exception as error:
            log.warning("no metrics through Ray's exporter: %s: %s", type(error).__name__, error)
            return []


def _probe_on_a_worker(job: JobSpec) -> Capabilities:
    gpus = gpus_per_worker(job)
    kind = weakest_gpu() if gpus else None
    task = ray.remote(num_cpus=READ_CPUS, num_gpus=gpus)(_probe).options(accelerator_type=kind)
    try:
        pending = task.remote(job, int(resource("GPU")), gpus)
        if gpus and not ray.wait([pending], timeout=FIRST_ANSWER_S)[0]:
            if resource("GPU") < gpus:
                log.warning("waiting for a node with a GPU: each worker of this job needs %g, and the cluster has none "
                            "yet; `resources.device: cpu` does without", gpus)  # fmt: skip
            elif ray.available_resources().get("GPU", 0.0) < gpus:  # type: ignore[no-untyped-call]
                log.warning("waiting: other drivers use the cluster's %g GPUs; %s", resource("GPU"), SHARE_HINT)
        result: Capabilities = ray.get(pending)
    except ray.exceptions.RayError as error:
        if isinstance(error, LOST):
            reason = str(error).partition("\n")[0]
            raise JobFailed(
                f"the Ray cluster was lost while the job started: {reason}",
                hint="its logs say why; no results are lost: run the same command again",
            ) from None
        raise _cause(error) from None
    return result


def _probe(job: JobSpec, cluster_gpus: int, gpus_each: float) -> Capabilities:
    return probe_capabilities(job, cluster_gpus, gpus_each)


def _init(address: str | None) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning on CPU-only machines
    joined = address or os.environ.get("RAY_ADDRESS")
    # each pool of restartable actors logs an "error" that is not one, in the middle of the progress display
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    own: dict[str, Any] = {}
    if not joined:
        own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    try:  # not None, which would join whatever cluster `ray start` has left on this machine
        with _silent_stderr():
            ray.init(
                address=joined or "local", logging_level=logging.ERROR, log_to_driver=is_json(),
                **own_code_only(joined), **own,
            )  # fmt: skip
            _take_workers_lines()
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "version mismatch" in str(error).lower():
            details = " ".join(str(error).split())
            raise JobFailed(
                f"the Ray cluster at `{joined}` runs other versions than this process: {details}",
                hint="use the cluster's Ray and Python here, or `img2parquet submit`, which runs the job with them",
            ) from None
        raise JobFailed(
            f"no Ray cluster at `{joined}`: {error}", hint="leave out the address to start one here"
        ) from None
    except Exception as error:  # a bare Exception: Ray's processes were not up within its limit of 30 s
        raise JobFailed(
            f"Ray did not start: {' '.join(str(error).split())}",
            hint="run the same command again when this machine is less busy, or with `--runner local`",
        ) from None


def _take_workers_lines() -> None:
    """Pass the workers' lines to our stderr unchanged where logs are JSON; Ray would put a prefix before each."""
    if not is_json():
        return
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as lines

        lines.remove_handler("ray_print_logs")
        lines.add_handler("img2parquet", _repeat)
    except (
        Exception
    ) as error:  # private names of Ray's; without them the lines stay in the nodes' log files, which are JSON too
        log.warning("log lines of workers are only in Ray's log files: %s", error)


def _repeat(data: Mapping[str, Any]) -> None:
    if data.get("pid") != "autoscaler":  # which logs its state every few seconds
        repeat(data.get("lines", ()))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence file descriptor 2, where the C++ half of Ray announces its log level. Exceptions still arrive."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


class RayStream:
    """One graph and its results: a `ResultStream`."""

    can_abandon = True

    def __init__(self, parts: list[Part], work: Work, count: int | None = None) -> None:
        """count: the number of workers; None for as many as the cluster has room for."""
        self.parts, self.work = parts, work
        self.workers = count or self.pools.workers
        self.executor: Any = None
        self.is_abandoned = False
        self.grown_since: float | None = None
        self.results = self._results()

    @cached_property
    def pools(self) -> Pools:
        """The pools that the cluster had room for when the stream began."""
        return pools_of(self.work.job, prepares_separately(self.work))

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        return next(self.results)

    def close(self) -> None:
        self.results.close()

    def abandon(self) -> None:
        """Kill the graph's tasks and actors. A thread that waits for results finds that there are no more."""
        self.is_abandoned = True
        if self.executor:
            self.executor.shutdown(force=True)

    def where(self) -> str:
        """Name the stages that have tasks under way."""
        tasks = {}
        if self.executor:
            with suppress(Exception):  # private names of Ray's, for a message only
                tasks = {_stage(op.name): op.num_active_tasks() for op in list(self.executor._topology)}
        working = ", ".join(f"{stage} ({count} under way)" for stage, count in tasks.items() if count)
        return working or "the runner, which has no task under way"

    def is_outgrown(self) -> bool:
        """Return whether there has been room for more actors for a while: a graph keeps the number it started with."""
        if not self.pools.is_outgrown_by(pools_of(self.work.job, prepares_separately(self.work)), GROWN):
            self.grown_since = None
            return False
        self.grown_since = self.grown_since or time.monotonic()
        return time.monotonic() - self.grown_since >= GROWN_FOR_S

    def is_shrunken(self) -> bool:
        """Return whether actors wait for room that is gone. Idle actors that went with their nodes do not count."""
        if worker_count(self.work.job) < self.workers:
            with suppress(Exception):  # private names of Ray's, as below
                pools = [pool for op in self.executor._topology for pool in op.get_autoscaling_actor_pools()]
                return any(pool.num_restarting_actors() or pool.num_pending_actors() for pool in pools)
        return False

    def idle_workers(self) -> int:
        """Count the idle actors that the last pool has released, as it does once its input has ended."""
        with suppress(Exception):  # private names of Ray's; tests/engine/test_stragglers.py checks that they exist
            op, state = list(self.executor._topology.items())[-1]
            (pool,) = op.get_autoscaling_actor_pools()
            busy: int = pool.num_active_actors()
            if busy and op._inputs_complete and not state.total_enqueued_input_blocks():
                return max(0, min(self.workers, worker_count(self.work.job)) - busy)
        return 0

    def beside(self, parts: list[Part]) -> RayStream:
        return RayStream(parts, self.work, max(1, self.idle_workers()))

    def stacks(self) -> str:
        """Return the stacks of the workers on each node that answers within STACKS_S."""
        task = ray.remote(num_cpus=0, max_retries=0)(stack_dumps.of_machine)
        nodes_of = {}
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        for node in [node for node in nodes if node["Alive"]][:MAX_NODES]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            nodes_of[task.options(scheduling_strategy=strategy).remote(job_name())] = node["NodeManagerAddress"]
        answered, _ = ray.wait(list(nodes_of), num_returns=len(nodes_of), timeout=STACKS_S)
        stacks = {}
        for answer in answered:
            with suppress(ray.exceptions.RayError):
                stacks.update({f"  {title} on {nodes_of[answer]}": threads for title, threads in ray.get(answer)})
        return "\n".join(f"{title}\n{threads}" for title, threads in stacks.items())

    def _results(self) -> Generator[Result]:
        dataset = _graph(self.parts, self.work, replace(self.pools, workers=self.workers))
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


_STARTING = threading.local()  # `stream`: the one whose graph this thread is starting


class _Started(ExecutionCallback):  # type: ignore[misc, unused-ignore]
    """Gives a stream its executor before anything can hang; the dataset itself has it only after its first block."""

    def before_execution_starts(self, executor: Any) -> None:
        if stream := getattr(_STARTING, "stream", None):
            stream.executor = executor
            if stream.is_abandoned:
                raise ray.exceptions.RayError("the stream was abandoned")


def _stage(name: str) -> str:
    return "reading" if "Read" in name else "the workers' batches" if "Step" in name else name


def _graph(parts: list[Part], work: Work, pools: Pools) -> ray.data.Dataset:
    handle, count = ray.put(work), pools.workers
    batches = _batches(parts, work, handle, pools)
    gpus = gpus_per_worker(work.job)
    if not pools.preparers:
        cpus = 0 if gpus else min(ACTOR_CPUS * work.threads, ACTOR_CPUS * resource("CPU") / count)
        return _actors(batches, ["both", handle], count, cpus, gpus)
    prepared = _actors(batches, ["prepare", handle], pools.preparers, cpus=ACTOR_CPUS, gpus=0)
    cpus = 0 if gpus else ACTOR_CPUS
    return _actors(prepared, ["embed", handle], count, cpus, gpus, calls=LANES + 1)  # one more, to fetch its blocks


def _batches(parts: list[Part], work: Work, handle: ray.ObjectRef[Work], pools: Pools) -> ray.data.Dataset:
    """Read the parts into a dataset with one batch per row."""
    _tune_context(_block_bytes(parts, pools.workers))
    items = [{"payload": pickle.dumps(part)} for part in parts]
    source = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_READ_TASKS))
    return source.map_batches(
        Read(handle, _attempts()), batch_size=1, batch_format="pyarrow",
        num_cpus=READ_CPUS, compute=TaskPoolStrategy(size=pools.readers), max_retries=READ_TRIES,
    )  # fmt: skip


def _attempts() -> Any:
    """Start the actor that counts attempts, on the driver's node: it then lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0)(Attempts).options(scheduling_strategy=here).remote()


def prepares_separately(work: Work) -> bool:
    """Return whether decoding is a stage of its own, as it is with a GPU, which would otherwise wait for one core."""
    return work.device != "cpu"


def _actors(
    dataset: ray.data.Dataset, arguments: list[Any], count: int, cpus: float, gpus: float, calls: int = 1
) -> ray.data.Dataset:
    """Run a step on a pool of actors. Each actor runs `calls` at a time, on threads."""
    # without these bounds Ray restarts for ever; 2.60 takes them only among its deprecated `ray_remote_args`
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


def _block_bytes(parts: list[Part], count: int) -> int:
    """Return how many bytes Ray may collect before it hands batches on. A block holds at least one batch."""
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
    context.execution_no_progress_timeout_s = (
        24 * 3600
    )  # the wait for a GPU may be long; our stall detector watches the parts
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs tracebacks of what we report in a line


def _cause(error: BaseException) -> Img2ParquetError | WorkersLost:
    """Return what a worker raised, without Ray's wrapping: our own error, WorkersLost for a death, else JobFailed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, Img2ParquetError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    if isinstance(error, LOST):
        return WorkersLost(f"workers were lost more often than Ray replaces them: {error}".splitlines()[0])
    return JobFailed(f"a worker failed: {error}")
