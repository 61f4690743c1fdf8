"""Encode complete parts and commit their files, on a few threads.

* At most MAX_PARTS_TO_COMMIT parts wait: the driver stops taking results until there is room, so its memory is bounded.
* The footer of a committed file is kept, so that the end of the job need not read it back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import PLAN, Output
from img2parquet.dataset.footer import Footers, parse_footer
from img2parquet.dataset.generations import of_generation
from img2parquet.dataset.part_file import EncodedPart, PartBuffer
from img2parquet.dataset.plan import Plan
from img2parquet.engine.graceful_stop import StopSignals
from img2parquet.engine.result_consumer import TICK_S
from img2parquet.engine.run_report import RunReport
from img2parquet.engine.stall_detector import LEFT_BEHIND
from img2parquet.telemetry.logs import at_part

log = logging.getLogger(__name__)

COMMIT_THREADS = 4
MAX_PARTS_TO_COMMIT = 8  # encoded or being encoded
KEPT_REJECT_BYTES = 64 << 20  # compressed; footers with rejects beyond that are read back at the end
LAST_SNAPSHOT_S = 2.0  # of the grace period after a signal


class Committer:
    """models: by part index, those that still lack a file of the part. encode: (model, part) to the file's bytes.

    `footers` holds the footers of the files that this session has created, by file name."""

    def __init__(
        self,
        output: Output,
        plan: Plan,
        models: Mapping[int, Sequence[str]],
        encode: Callable[[str, PartBuffer], EncodedPart],
        report: RunReport,
    ) -> None:
        self.output, self.plan, self.models, self.encode, self.report = output, plan, models, encode, report
        self.footers, self.kept_bytes = Footers(plan), 0
        self.lock = threading.Lock()  # of the footers
        self.pool = ThreadPoolExecutor(COMMIT_THREADS, "img2parquet-commit")
        self.pending = set[Future[None]]()

    def commit(self, buffer: PartBuffer, signals: StopSignals) -> None:
        """Commit a part in the background. Waits until there is room, or a signal arrives. Raises what an earlier
        commit raised."""
        with self.report.meter.blocked():
            while len(self.pending) >= MAX_PARTS_TO_COMMIT and not signals.received:
                finished, self.pending = wait(self.pending, timeout=TICK_S, return_when=FIRST_COMPLETED)
                _raise_first(finished)
        self.pending.add(self.pool.submit(self._commit, buffer))

    def store_report(self) -> Future[None]:
        """Store a snapshot of the report in the background."""
        future = self.pool.submit(self.report.store, *self.report.snapshot(self.report.to_json()))
        self.pending.add(future)
        return future

    def raise_failures(self) -> None:
        """Wait for all commits, and raise what one of them raised."""
        _raise_first(self.pending)

    def finish_before(self, deadline: float) -> None:
        """After a signal: commit what is complete and store the report, as far as time allows. Raises what a commit
        raised.

        deadline: of the monotonic clock."""
        done, late = wait(self.pending, timeout=max(0.0, deadline - LAST_SNAPSHOT_S - time.monotonic()))
        self.report.finish()
        snapshot = self.store_report()
        late |= wait([snapshot], timeout=max(LAST_SNAPSHOT_S, deadline - time.monotonic())).not_done
        LEFT_BEHIND.append(lambda: not all(future.done() for future in late))
        _raise_first(done)

    def close(self, is_stopped: bool) -> None:
        """Wait for the threads; after a signal, drop what has not been started."""
        self.pool.shutdown(wait=not is_stopped, cancel_futures=is_stopped)

    def _commit(self, buffer: PartBuffer) -> None:
        """Encode and create the part's file for every model that lacks it.

        Raises StorageError when the output was removed in the meantime: nothing could use the file."""
        part = buffer.part
        at_part(part.index)
        self.output.check_record(of_generation(PLAN, self.plan.generation))
        for model in self.models[part.index]:
            started = time.perf_counter()
            encoded = self.encode(model, buffer)
            encoded_at = time.perf_counter()
            name = self.plan.file_name(model, part)
            if self.output.put_once(name, encoded.data) == "created":
                self._keep_footer(name, encoded)
            encode_s, commit_s = encoded_at - started, time.perf_counter() - encoded_at
            self.report.count_file(model, encoded, encode_s, commit_s)
            _log_file(model, name, encoded, encode_s, commit_s)
        self.report.count_part()

    def _keep_footer(self, name: str, encoded: EncodedPart) -> None:
        """Remember the footer of a file that we created. Others are read back at the end."""
        footer = parse_footer(pq.read_metadata(pa.BufferReader(encoded.data)))
        with self.lock:
            if encoded.rejects:
                self.kept_bytes += len(footer.packed_rejects)
            if not encoded.rejects or self.kept_bytes <= KEPT_REJECT_BYTES:
                self.footers.add(name, footer)


def _log_file(model: str, name: str, encoded: EncodedPart, encode_s: float, commit_s: float) -> None:
    fields = {
        "event": "part_committed", "model": model, "file": name, "rows": encoded.rows,
        "rejects": len(encoded.rejects), "bytes": len(encoded.data),
        "encode_s": round(encode_s, 3), "commit_s": round(commit_s, 3),
    }  # fmt: skip
    log.info("%s is committed", name, extra={"fields": fields})


def _raise_first(futures: set[Future[None]]) -> None:
    for future in futures:
        future.result()
