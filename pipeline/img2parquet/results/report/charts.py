"""Draw numbers as inline SVG: no style attributes, so that a strict policy allows it, and every text escaped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

Float = npt.NDArray[np.float64]


def bar(share: float, label: str = "", kind: str = "") -> Markup:
    """Draw a horizontal bar that fills a share of the width available on the page."""
    width = 100 * min(1.0, max(0.0, share))
    svg = Markup(
        '<svg class="bar {}" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect class="track" width="100" height="8"/><rect class="fill" width="{}" height="8"/></svg>'
    )
    return svg.format(kind, label or f"{width:.0f} %", f"{width:.2f}")


def histogram(values: Sequence[float], low: float, high: float, bins: int, what: str) -> Markup:
    """Draw a histogram with bins of equal width between low and high."""
    counts, edges = np.histogram(np.clip(np.asarray(values, np.float64), low, high), bins, (low, high))
    peak, parts = max(1, int(counts.max())), []
    for i, count in enumerate(counts):
        height = 100 * int(count) / peak
        title = f"{edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,}"
        parts.append(Markup('<rect x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            f"{4 * i + 0.3:.1f}", f"{100 - height:.2f}", 3.4, f"{height:.2f}", title))  # fmt: skip
    return Markup('<svg class="columns" viewBox="0 0 {} 100" preserveAspectRatio="none" role="img" aria-label="{}">'
                  "{}</svg>").format(4 * bins, what, Markup("").join(parts))  # fmt: skip


def steps(points: Sequence[tuple[float, float, float]], what: str) -> Markup:
    """Draw spans of (from, to, height) as the area under steps."""
    start, end = points[0][0], max(stop for _, stop, _ in points)
    peak, width = max(height for _, _, height in points) or 1.0, max(end - start, 1e-9)
    parts = []
    for left, right, height in points:
        y = 100 - 92 * height / peak
        place = (f"{200 * (left - start) / width:.2f}", f"{y:.2f}")
        wide = f"{max(0.5, 200 * (right - left) / width - 0.4):.2f}"
        title = f"{_clock(left)} to {_clock(right)}: {height:,.0f} images/s"
        parts.append(Markup('<rect x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            *place, wide, f"{100 - y:.2f}", title))  # fmt: skip
    return Markup('<svg class="columns" viewBox="0 0 200 100" preserveAspectRatio="none" role="img" aria-label="{}">'
                  "{}</svg>").format(what, Markup("").join(parts))  # fmt: skip


def confusion(names: Sequence[str], counts: npt.NDArray[np.int64]) -> Markup:
    """Draw a confusion matrix: true classes down, predicted across, a cell's strength being its share of the row.

    Rows have names, columns the numbers of these rows. Counts that do not fit their cells become percent of the row."""
    side, cell = len(names), 26
    margin = 46 + 6 * min(18, max(map(len, names)))
    rows = counts / np.maximum(1, counts.sum(1, keepdims=True))
    numbers = counts if fits(counts) else np.rint(100 * rows).astype(np.int64)
    parts = []
    for i in range(side):
        middle = (i + 1) * cell + cell / 2 + 4
        name = names[i] if len(names[i]) <= 18 else names[i][:17] + "…"
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{} <tspan class="dim">{}</tspan></text>').format(
            margin - 8, middle, name, i + 1))  # fmt: skip
        parts.append(Markup('<text class="dim" x="{}" y="18" text-anchor="middle">{}</text>').format(
            margin + (i + 0.5) * cell, i + 1))  # fmt: skip
        for j in range(side):
            share, kind = float(rows[i, j]), "hit" if i == j else "miss"
            title = f"{names[i]} predicted as {names[j]}: {counts[i, j]:,} of {counts[i].sum():,}"
            parts.append(Markup('<g><rect class="cell {}" x="{}" y="{}" width="{}" height="{}" rx="3" '
                                'fill-opacity="{}"/>{}<title>{}</title></g>').format(
                kind, margin + j * cell + 1, (i + 1) * cell + 1, cell - 2, cell - 2,
                f"{0.05 + 0.95 * share if counts[i, j] else 0.04:.3f}",
                _count(numbers[i, j], i, j, cell, margin, share), title))  # fmt: skip
    size = (margin + side * cell, (side + 1) * cell)
    return Markup('<svg class="confusion" viewBox="0 0 {} {}" width="{}" role="img" aria-label="confusion matrix">'
                  "{}</svg>").format(*size, size[0], Markup("").join(parts))  # fmt: skip


def fits(counts: npt.NDArray[np.int64]) -> bool:
    """Whether the cells of a confusion matrix have room for its counts."""
    return bool(counts.max(initial=0) <= 9999)


def _count(count: int, i: int, j: int, cell: int, margin: int, share: float) -> Markup:
    if not count:
        return Markup("")
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        "on" if share > 0.55 else "off", margin + (j + 0.5) * cell, (i + 1) * cell + cell / 2 + 4, int(count)
    )


def reliability(bins: Sequence[tuple[float, float, int]]) -> Markup:
    """Draw accuracy over confidence, where the diagonal is perfect calibration."""
    most = max(rows for _, _, rows in bins)
    parts = [Markup('<path class="grid" d="M0 100H100V0"/><path class="diagonal" d="M0 100L100 0"/>')]
    line = " ".join(f"{100 * x:.1f},{100 - 100 * y:.1f}" for x, y, _ in bins)
    parts.append(Markup('<polyline points="{}"/>').format(line))
    for x, y, rows in bins:
        title = f"confidence {x:.2f}: {100 * y:.0f} % of {rows:,} correct"
        parts.append(Markup('<circle cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            f"{100 * x:.1f}", f"{100 - 100 * y:.1f}", f"{1.2 + 2.4 * (rows / most) ** 0.5:.1f}", title))  # fmt: skip
    return Markup('<svg class="reliability" viewBox="-4 -4 108 108" role="img" aria-label="{}">{}</svg>').format(
        "reliability diagram: accuracy over confidence", Markup("").join(parts)
    )


def swatch(code: str) -> Markup:
    return Markup('<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true"><rect width="10" height="10" rx="2.5" '
                  'fill="{}"/></svg>').format(escape(code))  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
