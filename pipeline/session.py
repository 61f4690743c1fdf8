"""One call of `run`: the runner's results gathered by part, whole parts encoded and committed by a few threads.

* The stream waits for the commits, so that the driver's memory is bounded; what it keeps of a committed part is its
  footer, so that the end of the job need not read it back.
* While it works, the session leaves its meter in the output, each time under a new name: after a minute, then each time
  that it has worked twice as long, when nothing comes from its workers, and at its end. Readers take the last; nothing
  is overwritten.
* A signal ends it: what is whole by then is committed, the rest is dropped, as a kill would drop it.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from signal import SIGINT
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch import Embedded, Failed, Work
from pipeline.commit import METER, Footers, Output, parse_footer
from pipeline.errors import JobFailed, Stopped, StorageError
from pipeline.logs import at_part
from pipeline.meter import Meter, Spent, bottleneck, retried
from pipeline.metrics import SINKS, Publisher
from pipeline.plan import Plan
from pipeline.pump import TICK_S
from pipeline.rounds import Rounds
from pipeline.signals import Signals
from pipeline.slices import WHOLE, Slice
from pipeline.standing import standing
from pipeline.storage import Entry
from pipeline.watch import LEFT_BEHIND, Outstanding, Watch
from pipeline.write import EncodedPart, Gathering, encode_part

log = logging.getLogger(__name__)

COMMIT_THREADS = 4
MAX_PARTS_TO_COMMIT = 8  # encoded or being encoded
KEPT_REJECT_BYTES = 64 << 20  # compressed; footers with rejects beyond that are read back at the end
FIRST_SNAPSHOT_S = 60.0
LAST_SNAPSHOT_S = 2.0  # of the grace that a signal leaves


@dataclass
class Tally:
    """What a run has done so far; `on_change` is called with it whenever it changes, by one thread at a time."""

    output_uri: str
    parts: int = 0
    parts_done_before: int = 0
    parts_committed: int = 0
    rows_planned: int | None = None
    rows_in: int = 0  # of this session
    rows_rejected: int = 0
    started: float = field(default_factory=time.monotonic)
    working_since: float = 0.0

    @property
    def images_per_s(self) -> float:
        seconds = time.monotonic() - self.working_since
        return self.rows_in / seconds if self.working_since and seconds > 0 else 0.0


class Session:
    """`files`: what lies in the output; `own`: the slice of the plan that is ours. Afterwards `footers` has those that
    this session made, by file name."""

    def __init__(
        self,
        output: Output,
        plan: Plan,
        work: Work,
        files: Mapping[str, Entry],
        on_change: Callable[[Tally], None],
        own: Slice = WHOLE,
    ) -> None:
        self.output, self.plan, self.work, self.on_change, self.own = output, plan, work, on_change, own
        self.left = {index: models for index, models in plan.left(files).items() if index in own}
        parts, rows = own.count_of(plan)
        self.tally = Tally(output.uri, parts, parts - len(self.left), rows_planned=rows)
        self.gathering: dict[int, Gathering] = {}
        self.last_batch = time.monotonic()
        self.heard: dict[int, float] = {}  # when the last batch of a part came that is being gathered
        self.whole: set[int] = set()  # parts given to the committing threads
        self.failed: dict[int, str] = {}
        self.footers = Footers(plan)
        self.kept_bytes = 0
        self.lock = threading.Lock()  # of the tally's and the footers' changes by the committing threads
        self.telling = threading.Lock()  # of `on_change`, which is called by one thread at a time
        self.name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
        self.snapshots, self.next_snapshot_s = 0, FIRST_SNAPSHOT_S
        self.meter, self.signals, self.watch = Meter({}), Signals(), Watch(work.job.resources.stall_s)
        self.pool = ThreadPoolExecutor(COMMIT_THREADS, "img2parquet-commit")
        self.commits = set[Future[None]]()
        # for metrics: rejects by model and reason, rows by model, seconds of each file's stages not told yet
        self.rejects, self.rows = Counter[tuple[str, str]](), Counter[str]()
        self.seconds: deque[tuple[str, float]] = deque(maxlen=10_000)
        self.report: dict[str, Any] = {}  # the meter as JSON values, with whose it is, at the end of the work

    def run(self, runner: ModuleType, signals: Signals | None = None) -> None:
        """Do what is left. Raises JobFailed when parts could not be done, StorageError, Stopped by one of `signals`."""
        self._changed()
        if not self.left:
            return
        self.output.check_store()
        pools = runner.pools(self.work)
        readers = min(pools["readers"], len(self.left))
        self.meter = Meter({**pools, "readers": readers}, is_fast=self.work.job.preprocess == "fast")
        self.signals = signals or self.signals
        with self._published(runner):
            self._work(runner)
        _raise_first(self.commits)
        self.report = self._report()
        self._leave(*self._snapshot(self.report))
        if self.failed:
            raise self._failure()

    def _work(self, runner: ModuleType) -> None:
        try:
            with self.signals.patience():
                for whole in self._whole_parts(runner):
                    self._make_room()
                    self.commits.add(self.pool.submit(self._commit, whole))
                    if time.monotonic() - self.tally.working_since > self.next_snapshot_s:
                        self._leave_soon()
                if self.signals.came:
                    self._stop()
        finally:
            self.pool.shutdown(wait=not self.signals.came, cancel_futures=self.signals.came is not None)

    def _published(self, runner: ModuleType) -> Publisher:
        offered = getattr(runner, "metric_sinks", None)
        sinks = [*SINKS, *(offered() if offered else ())]
        return Publisher(self.work.log_as.run, sinks, lambda is_running: standing(self, is_running))

    # ---- what the rounds ask: rounds.Ledger ----------------------------------------------------------------------

    def undone(self) -> list[int]:
        return [index for index in self.left if index not in self.whole and index not in self.failed]

    def begun(self) -> set[int]:
        return set(self.gathering)

    def outstanding(self, index: int) -> Outstanding:
        came = self.gathering[index].batches if index in self.gathering else {}
        missing_k = next(k for k in itertools.count() if k not in came)
        return Outstanding(index, len(came), missing_k, time.monotonic() - self.heard.get(index, self.tally.started))

    def stalled(self) -> None:
        self._leave_soon()

    def _stop(self) -> None:
        """Commit what is whole, within what is left of the grace; then say how far the job is."""
        came = self.signals.came
        assert came
        deadline = self.signals.came_at + self.work.job.resources.grace_s
        done, late = wait(self.commits, timeout=max(0.0, deadline - LAST_SNAPSHOT_S - time.monotonic()))
        self.report = self._report()
        meter = self._leave_soon()
        late |= wait([meter], timeout=max(LAST_SNAPSHOT_S, deadline - time.monotonic())).not_done
        LEFT_BEHIND.append(lambda: not all(future.done() for future in late))
        _raise_first(done)
        tally, word = self.tally, "Ctrl-C" if came == SIGINT else came.name
        raise Stopped(
            f"stopped by {word}: {tally.parts_done_before + tally.parts_committed} of {tally.parts} parts are "
            "committed; run the same command again",
            exit_code=self.signals.exit_code,
        )

    def _report(self) -> dict[str, Any]:
        self.meter.add(retried())
        measured, tally = self.meter.measured(), self.tally
        parts = {"parts": tally.parts, "parts_before": tally.parts_done_before, "parts_here": tally.parts_committed}
        whose = {"session": self.name, **parts, "rows_in": tally.rows_in}
        if self.own != WHOLE:
            whose["shard"] = str(self.own)
        if self.watch.stalls:
            whose["stalls"] = list(self.watch.stalls)
        if self.watch.stragglers:
            whose["stragglers"] = list(self.watch.stragglers)
        return {**whose, "bottleneck": bottleneck(measured), **asdict(measured)}

    def _whole_parts(self, runner: ModuleType) -> Iterator[Gathering]:
        parts = self.plan.by_index
        self.tally.working_since = time.monotonic()
        rounds = Rounds(runner, self.work, self.signals, self, self.watch)
        for result in rounds.results(parts):
            self.meter.arrived(rounds.cpu_s)
            if isinstance(result, Failed):
                self.meter.add(result.spent)
                if result.part_index not in self.whole:  # as one may be that came from elsewhere
                    self.failed[result.part_index] = result.message
                    self.gathering.pop(result.part_index, None)
                continue
            index = result.part_index
            if index in self.failed or index in self.whole:
                continue
            gathering = self.gathering.setdefault(index, Gathering(parts[index]))
            if result.k in gathering.batches:  # of a part that is run again
                continue
            gathering.add(result, self.work.batch_size)
            self.heard[index] = self.last_batch = time.monotonic()
            self.watch.progress()
            self._count(result)
            if gathering.is_whole:
                self.whole.add(index)
                del self.heard[index]
                yield self.gathering.pop(index)

    def _count(self, result: Embedded) -> None:
        self.meter.add(result.spent, result.waited)
        with self.lock:
            self.tally.rows_in += result.images
            self.tally.rows_rejected += len(_images(result))
            self.rejects.update((model, one.reason) for model, rejects in result.rejects.items() for one in rejects)
        self._changed()

    def _changed(self) -> None:
        with self.telling:
            self.on_change(self.tally)

    def _make_room(self) -> None:
        """Wait until there is room for one more commit, or a signal came. Raises what a commit raised."""
        with self.meter.blocked():
            while len(self.commits) >= MAX_PARTS_TO_COMMIT and not self.signals.came:
                finished, self.commits = wait(self.commits, timeout=TICK_S, return_when=FIRST_COMPLETED)
                _raise_first(finished)

    def _commit(self, gathering: Gathering) -> None:
        """Encode and create a part's file of every model that lacks it."""
        part = gathering.part
        at_part(part.index)
        for model in self.left[part.index]:
            started = time.perf_counter()
            encoded = self._encode(model, gathering)
            encoded_at = time.perf_counter()
            name = self.plan.file_name(model, part)
            if self.output.put_once(name, encoded.data) == "created":
                self._keep(name, encoded)
            stored_s, what = time.perf_counter() - encoded_at, (encoded.rows, len(encoded.data))
            self.meter.add({"encode": Spent(encoded_at - started, *what), "commit": Spent(stored_s, *what)})
            self._told(model, name, encoded, encoded_at - started, stored_s)
        with self.lock:
            self.tally.parts_committed += 1
        self._changed()

    def _told(self, model: str, name: str, encoded: EncodedPart, encode_s: float, stored_s: float) -> None:
        with self.lock:
            self.rows[model] += encoded.rows
            self.seconds.extend([("encode", encode_s), ("commit", stored_s)])
        about = {
            "event": "part_committed", "model": model, "file": name, "rows": encoded.rows,
            "rejects": len(encoded.rejects), "bytes": len(encoded.data),
            "encode_s": round(encode_s, 3), "commit_s": round(stored_s, 3),
        }  # fmt: skip
        log.info("%s is committed", name, extra={"fields": about})

    def _encode(self, model: str, gathering: Gathering) -> EncodedPart:
        identity = self.plan.identity(model)
        return encode_part(gathering.part, model, identity, gathering.in_order(), self.plan.identities[model])

    def _keep(self, name: str, encoded: EncodedPart) -> None:
        """Remember what the file says of itself. One that somebody else created is read back at the end."""
        footer = parse_footer(pq.read_metadata(pa.BufferReader(encoded.data)))
        with self.lock:
            if encoded.rejects:
                self.kept_bytes += len(footer.packed_rejects)
            if not encoded.rejects or self.kept_bytes <= KEPT_REJECT_BYTES:
                self.footers.add(name, footer)

    def _snapshot(self, report: Mapping[str, Any]) -> tuple[str, bytes]:
        """The meter under its next name. Only by the driver's thread: names are counted."""
        self.snapshots, self.next_snapshot_s = self.snapshots + 1, 2 * self.next_snapshot_s
        name = f"{METER}{self.name}-{self.snapshots:03d}.json"
        return name, json.dumps(report, indent=1, sort_keys=True).encode()

    def _leave_soon(self) -> Future[None]:
        future = self.pool.submit(self._leave, *self._snapshot(self._report()))
        self.commits.add(future)
        return future

    def _leave(self, name: str, data: bytes) -> None:
        """Put the meter where `status` finds it. A store that refuses it does not end the job."""
        with suppress(StorageError):
            self.output.put_once(name, data)

    def _failure(self) -> JobFailed:
        shown = [f"  part {index}: {message}" for index, message in sorted(self.failed.items())[:5]]
        more = f"\n  and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        return JobFailed(
            f"{len(self.failed)} of {self.tally.parts} parts could not be done:\n" + "\n".join(shown) + more,
            hint="the other parts are committed; run the same command again to do what is left",
        )


def _raise_first(futures: set[Future[None]]) -> None:
    for future in futures:
        future.result()


def _images(result: Embedded) -> set[int]:
    """Source rows that at least one model rejected."""
    return {reject.row for rejects in result.rejects.values() for reject in rejects}
