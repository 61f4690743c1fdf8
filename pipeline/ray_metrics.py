"""Samples -> Ray's own exporter, which each node offers to Prometheus beside Ray's metrics, as `ray_img2parquet_...`.

Only the driver tells: what workers did travels to it with their batches. Ray takes counters as what is added, so the
sums of the last time are kept. Without the packages of `ray[default]` a node exports nothing, and says so itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.util import metrics as ray_metrics

from pipeline.metrics import METRICS, PART_SECONDS, Sample


class RayExporter:
    def __init__(self) -> None:
        self.metrics = {name: _make(name) for name in METRICS}
        self.told: dict[tuple[str, str, tuple[str, ...]], float] = {}

    def tell(self, run: str, samples: Sequence[Sample], seen: Sequence[Sample]) -> None:
        for one in samples:
            tags, metric = _tags(run, one), self.metrics[one.name]
            if METRICS[one.name].kind == "gauge":
                metric.set(one.value, tags=tags)
                continue
            key = (run, one.name, one.labels)
            more = one.value - self.told.get(key, 0.0)
            if more > 0:
                metric.inc(more, tags=tags)
                self.told[key] = one.value
        for one in seen:
            self.metrics[one.name].observe(one.value, tags=_tags(run, one))


def _make(name: str) -> Any:
    metric = METRICS[name]
    how: dict[str, Any] = {"description": metric.help, "tag_keys": ("run", *metric.labels)}
    if metric.kind == "histogram":
        return ray_metrics.Histogram(name, boundaries=list(PART_SECONDS), **how)
    return (ray_metrics.Gauge if metric.kind == "gauge" else ray_metrics.Counter)(name, **how)


def _tags(run: str, one: Sample) -> dict[str, str]:
    return dict(zip(("run", *METRICS[one.name].labels), (run, *one.labels), strict=True))
