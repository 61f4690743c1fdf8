"""Trace a region as polygons along the edges of its pixels; filled by the even-odd rule they give the region again.

* There is one polygon for each piece connected by the sides of pixels. COCO has no holes, so a hole is reached by a cut
  of no width from above, which every fill rule that counts crossings ignores.
* Corners are at whole numbers: (0, 0) is the upper left corner of the first pixel, as in COCO.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Point = tuple[int, int]  # x, y
Ring = list[Point]  # every lattice point on the ring; the last is joined to the first


def polygons(region_HW: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Return [x0, y0, x1, y1, ...] for each piece, upper left first; [] for an empty region."""
    rings = _rings(region_HW)
    outer = [ring for ring in rings if _doubled_area(ring) > 0]
    holes = [ring for ring in rings if _doubled_area(ring) < 0]
    below = {edge: ring for ring in outer for edge in _level_edges(ring)}  # horizontal edge -> its ring
    for hole in sorted(holes, key=lambda ring: min((y, x) for x, y in ring)):
        _cut_to(hole, below)
    return [[value for point in _corners(ring) for value in point] for ring in outer]


def _rings(region_HW: npt.NDArray[np.bool_]) -> list[Ring]:
    """Trace borders with the region on the right: clockwise around pieces, counterclockwise around holes."""
    padded = np.pad(region_HW, 1).astype(np.int8)
    down = np.diff(padded, axis=0)[:, 1:-1]  # (H + 1, W): 1 where the pixel below is inside and that above is not
    right = np.diff(padded, axis=1)[1:-1]  # (H, W + 1)
    onward: dict[Point, list[Point]] = {}
    for steps, sign, (x0, y0), (x1, y1) in (
        (down, 1, (0, 0), (1, 0)),  # along a top, to the right
        (down, -1, (1, 0), (0, 0)),  # along a bottom, to the left
        (right, 1, (0, 1), (0, 0)),  # along a left side, up
        (right, -1, (0, 0), (0, 1)),  # along a right side, down
    ):
        rows, columns = np.nonzero(steps == sign)
        for y, x in zip(rows.tolist(), columns.tolist(), strict=True):
            onward.setdefault((x + x0, y + y0), []).append((x + x1, y + y1))
    rings = []
    for start in sorted(onward, key=lambda point: (point[1], point[0])):
        while onward.get(start):
            rings.append(_ring(start, onward))
    return rings


def _ring(start: Point, onward: dict[Point, list[Point]]) -> Ring:
    ring, here = [start], onward[start].pop()
    while here != start or _turns_on(ring, here, onward):
        ring.append(here)
        here = _next(ring[-2], here, onward[here])
    return ring


def _next(came: Point, here: Point, ways: list[Point]) -> Point:
    """Choose the next edge. Where two pixels touch at a corner there are two; turning right keeps the pieces apart."""
    if len(ways) == 1:
        return ways.pop()
    dx, dy = here[0] - came[0], here[1] - came[1]
    right = (here[0] - dy, here[1] + dx)
    return ways.pop(ways.index(right))


def _turns_on(ring: Ring, here: Point, onward: dict[Point, list[Point]]) -> bool:
    """Return whether a border that is back at its start passes it once more, at a corner that two pixels share."""
    if not onward.get(here):
        return False
    dx, dy = here[0] - ring[-1][0], here[1] - ring[-1][1]
    return (here[0] - dy, here[1] + dx) != ring[1]


def _cut_to(hole: Ring, below: dict[Point, Ring]) -> None:
    """Join a hole to the ring above it: up from its highest edge, through the piece, to the next horizontal edge."""
    y, x = min((y, x) for x, y in hole)
    top = y - 1
    while (x, top) not in below:
        top -= 1
    ring = below[(x, top)]
    at, start = ring.index((x, top)), hole.index((x, y))
    way = [(x, between) for between in range(top + 1, y)]
    ring[at + 1 : at + 1] = [*way, *hole[start:], *hole[: start + 1], *reversed(way), (x, top)]
    below.update(dict.fromkeys(_level_edges(hole), ring))


def _level_edges(ring: Ring) -> list[Point]:
    """Return the left ends of a ring's horizontal edges."""
    pairs = zip(ring, ring[1:] + ring[:1], strict=True)
    return [min(a, b) for a, b in pairs if a[1] == b[1]]


def _corners(ring: Ring) -> Ring:
    """Drop the points in the middle of straight lines."""
    around = zip(ring[-1:] + ring[:-1], ring, ring[1:] + ring[:1], strict=True)
    return [b for a, b, c in around if (b[0] - a[0], b[1] - a[1]) != (c[0] - b[0], c[1] - b[1])]


def _doubled_area(ring: Ring) -> int:
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
