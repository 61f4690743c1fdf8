"""Define what a runner and its result stream offer to the engine.

Runner         where the steps of a job run: this process, or a Ray cluster
ResultStream   the results of one pass over some parts, with what is known of the workers behind them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from img2parquet.batch import Embedded, Failed, Work
from img2parquet.inference.capabilities import Capabilities
from img2parquet.job import JobSpec
from img2parquet.schema import Part
from img2parquet.telemetry.prometheus import Sink

Result = Embedded | Failed


class WorkersLost(Exception):
    """Raised by a result stream whose workers died or hung more often than the runner can replace them.

    The parts that it has not finished can be given to a new stream."""


class Runner(Protocol):
    def start(self, job: JobSpec, address: str | None = None) -> Capabilities:
        """Get ready for a job, and return what a worker can do. `address` names a cluster to join."""

    def stream(self, parts: Iterable[Part], work: Work) -> ResultStream:
        """Start to work on the parts."""

    def pools(self, work: Work) -> Mapping[str, int]:
        """Return the number of workers by pool: `readers`, and `workers` or `preparers` and `models`."""

    def metric_sinks(self) -> Sequence[Sink]:
        """Return where metrics go besides the sinks of this process."""


class ResultStream(Iterator[Result], Protocol):
    """Iterated and closed by one thread; another one asks about its workers, and may abandon it."""

    can_abandon: bool  # whether `abandon` ends its workers, so that its parts can be run again

    def close(self) -> None:
        """Release what the stream holds. Called by the thread that iterates over it."""

    def abandon(self) -> None:
        """End the stream with all of its workers, from another thread."""

    def is_outgrown(self) -> bool:
        """Return whether a new stream of the same parts would have more workers."""

    def is_shrunken(self) -> bool:
        """Return whether it has lost workers that cannot be replaced, because the cluster has no room for them."""

    def idle_workers(self) -> int:
        """Count the workers without a task now or later while others have some; 0 where that is not known."""

    def beside(self, parts: list[Part]) -> ResultStream:
        """Start a second stream of these parts on the idle workers' machines."""

    def where(self) -> str:
        """Name the stages that are under way, for a message about work that hangs."""

    def stacks(self) -> str:
        """Return the stacks of workers in other processes, as lines of text; empty where there are none."""
