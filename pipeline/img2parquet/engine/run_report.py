"""Count what a session does, and store the counts in the output while it works.

* The meter is stored under a new name each time, so nothing is overwritten, and readers take the last one. It is stored
  after a minute, then whenever the session has worked twice as long, when it stalls, and at its end.
* Metrics are counted here too: see `session_metrics`.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from img2parquet.batch import Embedded, Failed
from img2parquet.dataset.commit import METER, Output
from img2parquet.dataset.part_file import EncodedPart
from img2parquet.dataset.slices import WHOLE, Slice
from img2parquet.engine.stall_detector import StallDetector
from img2parquet.errors import StorageError
from img2parquet.telemetry.stage_timing import Meter, StageTime, bottleneck, retried

FIRST_SNAPSHOT_S = 60.0


@dataclass
class Tally:
    """The progress of a run; `on_change` is called with it whenever it changes, by one thread at a time."""

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


class RunReport:
    """Counts batches on the driver's thread and part files on the threads that commit them.

    `final`: the meter as JSON values, with the session that it describes; empty until the work has ended."""

    def __init__(
        self,
        output: Output,
        own: Slice,
        tally: Tally,
        stall_detector: StallDetector,
        on_change: Callable[[Tally], None],
    ) -> None:
        self.output, self.own, self.tally, self.stall_detector = output, own, tally, stall_detector
        self.on_change = on_change
        self.session = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
        self.meter, self.final = Meter({}), dict[str, Any]()
        self.lock = threading.Lock()  # of the counts below and the tally
        self.rejects, self.rows = Counter[tuple[str, str]](), Counter[str]()  # by model and reason; by model
        self.seconds: deque[tuple[str, float]] = deque(maxlen=10_000)  # of each file's stages, until metrics take them
        self.change_lock = threading.Lock()  # held while `on_change` runs
        self.snapshots, self.next_snapshot_s = 0, FIRST_SNAPSHOT_S

    def begin(self, pools: Mapping[str, int], is_fast: bool) -> None:
        """Start the meter. Called by the driver's thread, whose CPU time is counted from here on."""
        self.meter = Meter(pools, is_fast=is_fast)

    def changed(self) -> None:
        with self.change_lock:
            self.on_change(self.tally)

    def count_failure(self, result: Failed) -> None:
        self.meter.add(result.spent)

    def count_batch(self, result: Embedded) -> None:
        self.meter.add(result.spent, result.waited)
        with self.lock:
            self.tally.rows_in += result.images
            self.tally.rows_rejected += len(_rejected_rows(result))
            self.rejects.update((model, one.reason) for model, rejects in result.rejects.items() for one in rejects)
        self.changed()

    def count_file(self, model: str, encoded: EncodedPart, encode_s: float, commit_s: float) -> None:
        """Count one part file of one model."""
        counts = (encoded.rows, len(encoded.data))
        self.meter.add({"encode": StageTime(encode_s, *counts), "commit": StageTime(commit_s, *counts)})
        with self.lock:
            self.rows[model] += encoded.rows
            self.seconds.extend([("encode", encode_s), ("commit", commit_s)])

    def count_part(self) -> None:
        """Count a part whose files are all committed."""
        with self.lock:
            self.tally.parts_committed += 1
        self.changed()

    def finish(self) -> None:
        self.final = self.to_json()

    def to_json(self) -> dict[str, Any]:
        """Return the meter as of now, after what identifies the session and how far it is."""
        self.meter.add(retried())
        measured, tally = self.meter.measured(), self.tally
        parts = {"parts": tally.parts, "parts_before": tally.parts_done_before, "parts_here": tally.parts_committed}
        about: dict[str, Any] = {"session": self.session, **parts, "rows_in": tally.rows_in}
        if self.own != WHOLE:
            about["shard"] = str(self.own)
        if self.stall_detector.stalls:
            about["stalls"] = list(self.stall_detector.stalls)
        if self.stall_detector.stragglers:
            about["stragglers"] = list(self.stall_detector.stragglers)
        return {**about, "bottleneck": bottleneck(measured), **asdict(measured)}

    def is_snapshot_due(self) -> bool:
        return time.monotonic() - self.tally.working_since > self.next_snapshot_s

    def snapshot(self, report: Mapping[str, Any]) -> tuple[str, bytes]:
        """Return the report's next file name, and its bytes. Only for the driver's thread, since names are counted."""
        self.snapshots, self.next_snapshot_s = self.snapshots + 1, 2 * self.next_snapshot_s
        name = f"{METER}{self.session}-{self.snapshots:03d}.json"
        return name, json.dumps(report, indent=1, sort_keys=True).encode()

    def store(self, name: str, data: bytes) -> None:
        """Put a snapshot where `status` finds it. A store that refuses it does not end the job."""
        with suppress(StorageError):
            self.output.put_once(name, data)


def _rejected_rows(result: Embedded) -> set[int]:
    """Return the source rows that at least one model has rejected."""
    return {reject.row for rejects in result.rejects.values() for reject in rejects}
