"""Compute images per second over time, and each stage's share of the last session, from a run's meters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from img2parquet.telemetry.stage_timing import POOL_STAGES, STAGES

Meter = Mapping[str, Any]


@dataclass(frozen=True)
class StageSpeed:
    """One stage of the last session."""

    name: str
    seconds: float  # busy, summed over workers
    images: int
    size_bytes: int
    share: float  # of all stages' busy time
    is_bottleneck: bool

    @property
    def images_per_s(self) -> float:
        """Images per second of one busy worker."""
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Speed:
    """A run's speed. `steps`: (from_s, to_s, images/s), with the time between sessions left out."""

    bottleneck: str
    images_per_s: float
    sessions: int
    steps: list[tuple[float, float, float]]
    stages: list[StageSpeed]
    pools: list[tuple[str, int, float]]  # name, number of workers, share of their time spent waiting
    startup_s: float
    seconds: float
    retries: int


def speed(meters: Sequence[Meter]) -> Speed | None:
    """Summarize the meters, or return None when no session has measured anything."""
    sessions: dict[str, list[Meter]] = {}
    for meter in meters:
        sessions.setdefault(str(meter.get("session")), []).append(meter)
    last_of = [snapshots[-1] for snapshots in sessions.values()]
    if not last_of:
        return None
    last = last_of[-1]
    seconds = sum(_number(meter, "seconds") for meter in last_of)
    rows = sum(_number(meter, "rows_in") for meter in last_of)
    return Speed(
        bottleneck=str(last.get("bottleneck", "")),
        images_per_s=rows / seconds if seconds else 0.0,
        sessions=len(sessions),
        steps=_steps(list(sessions.values())),
        stages=_stages(last),
        pools=_pools(last),
        startup_s=_number(last, "startup_s"),
        seconds=seconds,
        retries=int(sum(sum(dict(meter.get("retries", {})).values()) for meter in last_of)),
    )


def _steps(sessions: Sequence[Sequence[Meter]]) -> list[tuple[float, float, float]]:
    points, at_s = [], 0.0
    for snapshots in sessions:
        before_s = before_rows = 0.0
        for snapshot in snapshots:
            seconds, rows = _number(snapshot, "seconds"), _number(snapshot, "rows_in")
            if seconds > before_s:
                rate = (rows - before_rows) / (seconds - before_s)
                points.append((at_s + before_s, at_s + seconds, max(0.0, rate)))
                before_s, before_rows = seconds, rows
        at_s += before_s
    return points


def _stages(meter: Meter) -> list[StageSpeed]:
    said = {name: dict(meter["stages"].get(name) or {}) for name in STAGES}
    total = sum(_number(spent, "seconds") for spent in said.values()) or 1.0
    cause = str(meter.get("bottleneck", "")).split("-bound")[0]
    blamed = {"model": "embed", "commit": "commit", "read": "read", "decode": "decode"}.get(cause)
    return [
        StageSpeed(
            name, _number(spent, "seconds"), int(_number(spent, "images")), int(_number(spent, "size_bytes")),
            _number(spent, "seconds") / total, name == blamed,
        )
        for name, spent in said.items()
    ]  # fmt: skip


def _pools(meter: Meter) -> list[tuple[str, int, float]]:
    pools = []
    for name, count in dict(meter.get("pools", {})).items():
        if name not in meter.get("waited", {}):
            continue
        waited = _number(meter["waited"], name)
        busy = sum(_number(dict(meter["stages"].get(s) or {}), "seconds") for s in POOL_STAGES.get(name, ()))
        pools.append((str(name), int(count), waited / max(waited + busy, 1e-9)))
    return pools


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0
