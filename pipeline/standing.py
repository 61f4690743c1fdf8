"""A session -> how it stands, as samples of every metric: its meter, its tally, what is under way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipeline.meter import retried
from pipeline.metrics import Sample

if TYPE_CHECKING:
    from pipeline.session import Session


def standing(session: Session, is_running: bool) -> tuple[list[Sample], list[Sample]]:
    """Samples as of now, and what each new part file took. Called from a thread of its own: it takes copies, and none
    of them for long."""
    session.meter.add(retried())
    measured, tally = session.meter.measured(), session.tally
    with session.lock:
        rejects, rows = dict(session.rejects), dict(session.rows)
        seconds = [session.seconds.popleft() for _ in range(len(session.seconds))]
        images, committed = tally.rows_in, tally.parts_committed
    whole = len(session.whole)
    totals = {
        "img2parquet_images_total": images,
        "img2parquet_parts": tally.parts,
        "img2parquet_parts_committed": tally.parts_done_before + committed,
        "img2parquet_parts_failed": len(session.failed),
        "img2parquet_commit_blocked_seconds_total": measured.blocked_s,
        "img2parquet_driver_seconds_total": measured.driver_s,
        "img2parquet_retry_wait_seconds_total": measured.retry_wait_s,
        "img2parquet_stalls_total": len(session.watch.stalls),
        "img2parquet_idle_seconds": time.monotonic() - session.last_batch if is_running else 0.0,
        "img2parquet_running": float(is_running),
    }
    samples = [Sample(name, float(value)) for name, value in totals.items()]
    samples += [Sample("img2parquet_rejects_total", count, key) for key, count in sorted(rejects.items())]
    samples += [Sample("img2parquet_rows_total", count, (model,)) for model, count in sorted(rows.items())]
    for stage, spent in measured.stages.items():
        for what, value in (("seconds", spent.seconds), ("images", spent.images), ("bytes", spent.size_bytes)):
            samples.append(Sample(f"img2parquet_stage_{what}_total", float(value), (stage,)))
    samples += [Sample("img2parquet_waited_seconds_total", value, (pool,)) for pool, value in measured.waited.items()]
    samples += [Sample("img2parquet_workers", float(count), (pool,)) for pool, count in measured.pools.items()]
    samples += [Sample("img2parquet_retries_total", float(n), (kind,)) for kind, n in measured.retries.items()]
    depth = {"gather": len(session.gathering), "commit": max(0, whole - committed)}
    samples += [Sample("img2parquet_queue_depth", float(count), (stage,)) for stage, count in depth.items()]
    return samples, [Sample("img2parquet_part_seconds", value, (stage,)) for stage, value in seconds]
