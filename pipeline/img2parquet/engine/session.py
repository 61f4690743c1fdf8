"""Do the unfinished parts of a plan in one call: schedule them, collect their batches, commit complete parts.

A signal ends the session gracefully: parts that are complete by then are committed, and the rest is dropped, as a kill
would drop it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from signal import SIGINT
from typing import Any

from img2parquet.batch import Failed, Work
from img2parquet.dataset.commit import Output
from img2parquet.dataset.footer import Footers
from img2parquet.dataset.part_file import EncodedPart, PartBuffer, encode_part
from img2parquet.dataset.plan import Plan
from img2parquet.dataset.slices import WHOLE, Slice
from img2parquet.engine.committer import Committer
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.engine.part_collector import PartCollector
from img2parquet.engine.run_report import RunReport, Tally
from img2parquet.engine.scheduler import Scheduler
from img2parquet.engine.session_metrics import session_samples
from img2parquet.engine.stall_detector import StallDetector
from img2parquet.errors import JobFailed, Stopped
from img2parquet.runners.base import Runner
from img2parquet.storage import Entry
from img2parquet.telemetry.prometheus import SINKS, Publisher


class Session:
    """Does the unfinished parts of a plan, or of a slice of it.

    files: what is in the output already. own: the slice."""

    def __init__(
        self,
        output: Output,
        plan: Plan,
        work: Work,
        files: Mapping[str, Entry],
        on_change: Callable[[Tally], None],
        own: Slice = WHOLE,
    ) -> None:
        self.output, self.plan, self.work, self.own = output, plan, work, own
        self.left = {index: models for index, models in plan.left(files).items() if index in own}
        parts, rows = own.count_of(plan)
        tally = Tally(output.uri, parts, parts - len(self.left), rows_planned=rows)
        self.signals, self.stall_detector = StopSignals(), StallDetector(work.job.resources.stall_s)
        self.collector = PartCollector(plan.by_index, self.left, work.batch_size)
        self.run_report = RunReport(output, own, tally, self.stall_detector, on_change)
        self.committer = Committer(output, plan, self.left, self._encode, self.run_report)

    @property
    def tally(self) -> Tally:
        return self.run_report.tally

    @property
    def report(self) -> dict[str, Any]:
        """The meter at the end of the work, as in the manifest's metadata; empty where there was nothing to do."""
        return self.run_report.final

    @property
    def footers(self) -> Footers:
        """The footers of the files that this session has created, by file name."""
        return self.committer.footers

    def run(self, runner: Runner, signals: StopSignals | None = None) -> None:
        """Do the parts that are left. Raises JobFailed when some could not be done, StorageError, and Stopped after
        the first of the `signals`."""
        self.run_report.changed()
        if not self.left:
            return
        self.output.check_store()
        pools = runner.pools(self.work)
        readers = min(pools["readers"], len(self.left))
        self.run_report.begin({**pools, "readers": readers}, is_fast=self.work.job.preprocess == "fast")
        self.signals = signals or self.signals
        with self._publisher(runner):
            self._work(runner)
        self.committer.raise_failures()
        self.run_report.finish()
        self.run_report.store(*self.run_report.snapshot(self.report))
        if self.collector.failed:
            raise self._failure()

    def _work(self, runner: Runner) -> None:
        try:
            with self.signals.graceful():
                for buffer in self._complete_parts(runner):
                    self.committer.commit(buffer, self.signals)
                    if self.run_report.is_snapshot_due():
                        self.committer.store_report()
                if self.signals.received:
                    self._stop()
        finally:
            self.committer.close(is_stopped=self.signals.received is not None)

    def _publisher(self, runner: Runner) -> Publisher:
        sinks = [*SINKS, *runner.metric_sinks()]
        return Publisher(self.work.log_as.run, sinks, lambda is_running: session_samples(self, is_running))

    def _complete_parts(self, runner: Runner) -> Iterator[PartBuffer]:
        self.tally.working_since = time.monotonic()
        scheduler = Scheduler(
            runner, self.work, self.signals, self.collector, self.stall_detector, self.committer.store_report
        )
        for result in scheduler.results(self.plan.by_index):
            self.run_report.meter.arrived(scheduler.cpu_s)
            if isinstance(result, Failed):
                self.run_report.count_failure(result)
                self.collector.fail(result)
            elif self.collector.add(result):
                self.stall_detector.progress()
                self.run_report.count_batch(result)
                if buffer := self.collector.take_complete(result.part_index):
                    yield buffer

    def _encode(self, model: str, buffer: PartBuffer) -> EncodedPart:
        """Encode one model's file of a part. Called by the threads that commit."""
        identity = self.plan.identity(model)
        return encode_part(buffer.part, model, identity, buffer.in_order(), self.plan.identities[model])

    def _stop(self) -> None:
        """Commit complete parts in what is left of the grace period, then raise Stopped, which says how far the job
        is."""
        received = self.signals.received
        assert received
        self.committer.finish_before(self.signals.received_at + self.work.job.resources.grace_s)
        tally, cause = self.tally, "Ctrl-C" if received == SIGINT else received.name
        raise Stopped(
            f"stopped by {cause}: {tally.parts_done_before + tally.parts_committed} of {tally.parts} parts are "
            "committed; run the same command again to resume",
            exit_code=self.signals.exit_code,
        )

    def _failure(self) -> JobFailed:
        failed = self.collector.failed
        shown = [f"  part {index}: {message}" for index, message in sorted(failed.items())[:5]]
        more = f"\n  and {len(failed) - 5} more" if len(failed) > 5 else ""
        return JobFailed(
            f"{len(failed)} of {self.tally.parts} parts could not be done:\n" + "\n".join(shown) + more,
            hint="the other parts are committed; once the cause is gone, run the same command again to do the rest",
        )
