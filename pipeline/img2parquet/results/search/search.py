"""Find the rows of an output that are nearest to an image: through its index, or by comparing with every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from img2parquet.errors import InputError
from img2parquet.results.embeddings import PART_SHIFT, Floats, Hit, Nearest, Vectors, open_vectors
from img2parquet.results.search.index import Index, open_index

MOST_HITS = 10_000
SPARE = (
    5  # extra candidates: scores computed in blocks round differently from those of single rows, which rank the hits
)


@dataclass(frozen=True)
class SearchResult:
    """The nearest rows, best first. `compared`: rows that the query was compared with or that the index holds."""

    model: str
    column: str
    hits: tuple[Hit, ...]
    how: str  # `index` or `exact`
    compared: int
    not_indexed: tuple[int, ...] = field(default=())  # parts committed since the index was built; compared row by row


def search(
    uri: str,
    image: str | None = None,
    *,
    key: str | None = None,
    shard: str | None = None,
    model: str | None = None,
    column: str | None = None,
    k: int = 12,
    index: str | None = None,
    exact: bool = False,
    checkpoint: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Find the rows of an output that look most like an image, by the cosine of their embeddings.

    The output's index is used when there is one; parts that it lacks are compared row by row.

    uri: the job's `output.uri`. image: path or URI of an image, embedded as the run embedded its own.
    key: the key of a row to search with instead of an image, and shard: its shard, when several have this key; the row
    itself is left out of the result. model, column: which embedding to compare, when the output has several.
    k: number of rows, 1 to 10,000. index: the folder of an index that is not in the output. exact: compare with every
    row and use no index. checkpoint: where the run's model is now, when it was moved. storage_options: as under
    `output` in the job file.

    Raises InputError unless exactly one of image and key is given, when the image cannot be decoded, the key is not
    found, or there are several embeddings to choose from; CheckpointError when the checkpoint is not the run's;
    RunMismatch when the index or the output belongs to another run; MissingDependency, StorageError."""
    if (image is None) == (key is None):
        raise InputError("a search needs an image or a key, and not both")
    vectors = open_vectors(uri, model, column, storage_options=storage_options)
    own = -1
    if key is not None:
        own, query_D = vectors.vector(key, shard)
    else:
        from img2parquet.results.search.query_image import embed_image

        query_D = embed_image(vectors, str(image), checkpoint)
    return search_vectors(vectors, query_D, k, index=index, exact=exact, without=own)


def search_vectors(
    vectors: Vectors, query_D: Floats, k: int = 12, *, index: str | None = None, exact: bool = False, without: int = -1
) -> SearchResult:
    """Find the k nearest rows to a (D,) unit vector, as `search` does. without: the place of a row to leave out."""
    if not 1 <= k <= MOST_HITS:
        raise InputError(f"-k {k}: expected 1 to {MOST_HITS} rows")
    found = None if exact else open_index(vectors, index)
    if index is not None and found is None:
        raise InputError(f"{index}: no index here", hint=f"run `img2parquet index {vectors.output.uri} --to {index}`")
    more = k + (without >= 0)
    places = set(_by_index(found, vectors, query_D, more)) if found else set()
    rest = tuple(sorted(vectors.parts.keys() - (found.parts if found else set())))
    compared = (found.rows if found else 0) + _by_comparing(vectors, query_D, more, rest, places)
    hits = vectors.at(sorted(places - {without}), query_D)[:k]
    how = "index" if found else "exact"
    return SearchResult(vectors.model, vectors.column, tuple(hits), how, compared, rest if found else ())


def _by_index(index: Index, vectors: Vectors, query_D: Floats, k: int) -> Iterator[int]:
    """Yield the k best rows by the index's own scores, of those that are still committed."""
    if index.width != len(query_D):
        raise InputError(f"the query has {len(query_D)} values, but the index holds vectors of {index.width}")
    found = index.nearest(query_D[None], k)[0]
    yield from (place for place in found if place >> PART_SHIFT in vectors.parts)


def _by_comparing(vectors: Vectors, query_D: Floats, k: int, parts: tuple[int, ...], places: set[int]) -> int:
    """Add the k best rows of these parts, and SPARE more, to `places`. Returns how many rows were compared."""
    best, rows = Nearest(query_D[None], k + SPARE), 0
    for block in vectors.blocks(parts):
        best.add(block.unit_BD, block.places_B)
        rows += len(block.unit_BD)
    places |= {int(place) for place in np.asarray(best.places[0])}
    return rows
