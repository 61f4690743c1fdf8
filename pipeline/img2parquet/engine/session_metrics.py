"""Turn the counts of a session into samples of every metric."""

from __future__ import annotations

import time
from typing import Protocol

from img2parquet.engine.part_collector import PartCollector
from img2parquet.engine.run_report import RunReport
from img2parquet.telemetry.prometheus import Sample
from img2parquet.telemetry.stage_timing import retried


class MeasuredSession(Protocol):
    """The parts of a session that its metrics are read from."""

    run_report: RunReport
    collector: PartCollector


def session_samples(session: MeasuredSession, is_running: bool) -> tuple[list[Sample], list[Sample]]:
    """Return samples as of now, and the seconds that each new part file took since the last call.

    Called by a thread of its own: it copies what it reads, and holds locks only for that."""
    report, collector = session.run_report, session.collector
    report.meter.add(retried())
    measured, tally = report.meter.measured(), report.tally
    with report.lock:
        rejects, rows = dict(report.rejects), dict(report.rows)
        seconds = [report.seconds.popleft() for _ in range(len(report.seconds))]
        images, committed = tally.rows_in, tally.parts_committed
    complete = len(collector.complete)
    totals = {
        "img2parquet_images_total": images,
        "img2parquet_parts": tally.parts,
        "img2parquet_parts_committed": tally.parts_done_before + committed,
        "img2parquet_parts_failed": len(collector.failed),
        "img2parquet_commit_blocked_seconds_total": measured.blocked_s,
        "img2parquet_driver_seconds_total": measured.driver_s,
        "img2parquet_retry_wait_seconds_total": measured.retry_wait_s,
        "img2parquet_stalls_total": len(report.stall_detector.stalls),
        "img2parquet_idle_seconds": time.monotonic() - collector.last_batch_at if is_running else 0.0,
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
    depth = {"gather": len(collector.buffers), "commit": max(0, complete - committed)}
    samples += [Sample("img2parquet_queue_depth", float(count), (stage,)) for stage, count in depth.items()]
    return samples, [Sample("img2parquet_part_seconds", value, (stage,)) for stage, value in seconds]
