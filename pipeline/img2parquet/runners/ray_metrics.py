"""Export samples through Ray: each node offers them to Prometheus beside Ray's metrics, as `ray_img2parquet_...`.

Only the driver exports: what workers measure reaches it with their batches. Ray's counters take increments, so the last
sums are kept. Without the packages of `ray[default]` a node exports nothing, and says so itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.util import metrics as ray_metrics

from img2parquet.telemetry.prometheus import METRICS, PART_SECONDS, Sample


class RayExporter:
    def __init__(self) -> None:
        self.metrics = {name: _make(name) for name in METRICS}
        self.exported: dict[tuple[str, str, tuple[str, ...]], float] = {}

    def update(self, run: str, samples: Sequence[Sample], observed: Sequence[Sample]) -> None:
        for one in samples:
            tags, metric = _tags(run, one), self.metrics[one.name]
            if METRICS[one.name].kind == "gauge":
                metric.set(one.value, tags=tags)
                continue
            key = (run, one.name, one.labels)
            increment = one.value - self.exported.get(key, 0.0)
            if increment > 0:
                metric.inc(increment, tags=tags)
                self.exported[key] = one.value
        for one in observed:
            self.metrics[one.name].observe(one.value, tags=_tags(run, one))


def _make(name: str) -> Any:
    metric = METRICS[name]
    options: dict[str, Any] = {"description": metric.help, "tag_keys": ("run", *metric.labels)}
    if metric.kind == "histogram":
        return ray_metrics.Histogram(name, boundaries=list(PART_SECONDS), **options)
    return (ray_metrics.Gauge if metric.kind == "gauge" else ray_metrics.Counter)(name, **options)


def _tags(run: str, one: Sample) -> dict[str, str]:
    return dict(zip(("run", *METRICS[one.name].labels), (run, *one.labels), strict=True))
