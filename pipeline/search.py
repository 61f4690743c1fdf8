"""A vector to the rows of an output that are nearest to it: through its index, or by comparing with every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.embeddings import PART_SHIFT, Floats, Found, Nearest, Vectors
from pipeline.errors import InputError
from pipeline.index import Index, open_index

MOST_HITS = 10_000
SPARE = 5  # scores of a whole block are rounded otherwise than those of one row, by which the hits are put in order


@dataclass(frozen=True)
class Answer:
    """The nearest rows, best first. `compared`: rows that the query was compared with or that the index holds."""

    hits: tuple[Found, ...]
    how: str  # `index` or `exact`
    compared: int
    not_indexed: tuple[int, ...] = field(default=())  # parts that are committed since; compared with all the same


def search(
    vectors: Vectors, query_D: Floats, k: int = 12, *, index: str | None = None, exact: bool = False, without: int = -1
) -> Answer:
    """(D,) -> the k nearest rows by cosine. With an index, parts that it lacks are compared row by row.

    index: where it lies, default: in the output; exact: leave it aside; without: a place to leave out.
    Raises InputError, RunMismatch for an index of another run, MissingDependency."""
    if not 1 <= k <= MOST_HITS:
        raise InputError(f"-k {k}: from 1 to {MOST_HITS} rows can be asked for")
    found = None if exact else open_index(vectors, index)
    if index is not None and found is None:
        raise InputError(f"{index}: no index here", hint=f"`img2parquet index {vectors.output.uri} --to {index}`")
    more = k + (without >= 0)
    places = set(_by_index(found, vectors, query_D, more)) if found else set()
    rest = tuple(sorted(vectors.parts.keys() - (found.parts if found else set())))
    compared = (found.rows if found else 0) + _by_comparing(vectors, query_D, more, rest, places)
    hits = vectors.at(sorted(places - {without}), query_D)[:k]
    return Answer(tuple(hits), "index" if found else "exact", compared, rest if found else ())


def _by_index(index: Index, vectors: Vectors, query_D: Floats, k: int) -> Iterator[int]:
    """The k best by the index's own scores, of rows that are still committed."""
    if index.width != len(query_D):
        raise InputError(f"the query has {len(query_D)} values, the index vectors of {index.width}")
    found = index.nearest(query_D[None], k)[0]
    yield from (place for place in found if place >> PART_SHIFT in vectors.parts)


def _by_comparing(vectors: Vectors, query_D: Floats, k: int, parts: tuple[int, ...], places: set[int]) -> int:
    """Adds the k best of these parts, and SPARE more, to `places`; how many rows there were."""
    best, rows = Nearest(query_D[None], k + SPARE), 0
    for block in vectors.blocks(parts):
        best.add(block.unit_BD, block.places_B)
        rows += len(block.unit_BD)
    places |= {int(place) for place in np.asarray(best.places[0])}
    return rows
