"""Find the rows of an output that are nearest to an image or to words: by its index, or by comparing every row.

Shapes: D values of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from img2parquet.errors import InputError
from img2parquet.outputs.embedding import unit_length
from img2parquet.results.embeddings import PART_SHIFT, Floats, Hit, Nearest, Vectors, open_vectors
from img2parquet.results.search.index import Index, open_index
from img2parquet.results.search.row_filter import RowFilter, parse_filter

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
    query: str = ""  # in words


def search(
    uri: str,
    image: str | None = None,
    *,
    key: str | None = None,
    shard: str | None = None,
    text: str | Sequence[str] = (),
    without: str | Sequence[str] = (),
    where: str | None = None,
    model: str | None = None,
    column: str | None = None,
    k: int = 12,
    index: str | None = None,
    exact: bool = False,
    checkpoint: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Find the rows of an output that are most like an image or what words say, by the cosine of their embeddings.

    The query is the mean direction of the image or row and of the texts, less that of the texts of `without`. The
    output's index is used when there is one; parts that it lacks, and all rows where there is a filter, are compared
    row by row.

    uri: the job's `output.uri`. image: path or URI of an image, embedded as the run embedded its own.
    key: the key of a row to search with instead of an image, and shard: its shard, when several have this key; the row
    itself is left out of the result. text: one or several texts, for vectors of CLIP and SigLIP, alone or beside an
    image or a key. without: texts of what is not wanted. where: a filter over plain columns, as `width > 512 and label
    == "cat"` (`row_filter.py` has its syntax). model, column: which embedding to compare, when the output has several.
    k: number of rows, 1 to 10,000. index: the folder of an index that is not in the output. exact: compare with every
    row and use no index. checkpoint: where the run's model is now, when it was moved. storage_options: as under
    `output` in the job file.

    Raises InputError unless an image, a key or a text is given, and for an image and a key at once; when the image
    cannot be decoded, the key is not found, a text cannot be read, the filter has a mistake, or there are several
    embeddings to choose from; OutputUnavailable when texts cannot be compared with these vectors; CheckpointError when
    the checkpoint is not the run's; RunMismatch when the index or the output belongs to another run; MissingDependency,
    StorageError."""
    wanted, unwanted = _texts(text), _texts(without)
    if image is not None and key is not None:
        raise InputError("a search takes an image or a key, and not both")
    if image is None and key is None and not wanted:
        raise InputError("a search needs an image or a key, or a text", hint="add one, as `--text 'a red car'`")
    vectors = open_vectors(uri, model, column, storage_options=storage_options)
    rows = parse_filter(where, vectors.schema) if where is not None else None
    own, like, unlike = -1, list[Floats](), list[Floats]()
    if wanted or unwanted:
        from img2parquet.results.search.query_text import embed_texts

        of_texts = list(embed_texts(vectors, [*wanted, *unwanted], checkpoint))
        like, unlike = of_texts[: len(wanted)], of_texts[len(wanted) :]
    if key is not None:
        own, vector_D = vectors.vector(key, shard)
        like.append(vector_D)
    elif image is not None:
        from img2parquet.results.search.query_image import embed_image

        like.append(embed_image(vectors, image, checkpoint))
    query_D = like[0] if len(like) == 1 and not unlike else _direction(like, unlike)
    found = search_vectors(vectors, query_D, k, index=index, exact=exact, without=own, rows=rows)
    return replace(found, query=_in_words(image or key, wanted, unwanted, where))


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _direction(like: Sequence[Floats], unlike: Sequence[Floats]) -> Floats:
    """Return the mean of unit vectors less the mean of others, of length 1, (D,)."""
    mean_D = np.mean(like, axis=0) - (np.mean(unlike, axis=0) if unlike else 0)
    query_D: Floats = unit_length(mean_D[None].astype(np.float64))[0].astype(np.float32)
    if not query_D.any():
        raise InputError("what is wanted and what is not are the same, so nothing is left to look for")
    return query_D


def _in_words(picture: str | None, wanted: Sequence[str], unwanted: Sequence[str], where: str | None) -> str:
    parts = [picture] if picture else []
    parts += [f"“{text}”" for text in wanted] + [f"not “{text}”" for text in unwanted]
    return ", ".join(parts) + (f", where {where}" if where else "")


def search_vectors(
    vectors: Vectors,
    query_D: Floats,
    k: int = 12,
    *,
    index: str | None = None,
    exact: bool = False,
    without: int = -1,
    rows: RowFilter | None = None,
) -> SearchResult:
    """Find the k nearest rows to a (D,) unit vector, as `search` does. without: the place of a row to leave out. rows:
    which others to leave out."""
    if not 1 <= k <= MOST_HITS:
        raise InputError(f"-k {k}: expected 1 to {MOST_HITS} rows")
    found = None if exact or rows else open_index(vectors, index)
    if index is not None and found is None and not rows:
        raise InputError(f"{index}: no index here", hint=f"run `img2parquet index {vectors.output.uri} --to {index}`")
    more = k + (without >= 0)
    places = set(_by_index(found, vectors, query_D, more)) if found else set()
    rest = tuple(sorted(vectors.parts.keys() - (found.parts if found else set())))
    compared = (found.rows if found else 0) + _by_comparing(vectors, query_D, more, rest, places, rows)
    hits = vectors.at(sorted(places - {without}), query_D)[:k]
    how = "index" if found else "exact"
    return SearchResult(vectors.model, vectors.column, tuple(hits), how, compared, rest if found else ())


def _by_index(index: Index, vectors: Vectors, query_D: Floats, k: int) -> Iterator[int]:
    """Yield the k best rows by the index's own scores, of those that are still committed."""
    if index.width != len(query_D):
        raise InputError(f"the query has {len(query_D)} values, but the index holds vectors of {index.width}")
    found = index.nearest(query_D[None], k)[0]
    yield from (place for place in found if place >> PART_SHIFT in vectors.parts)


def _by_comparing(
    vectors: Vectors, query_D: Floats, k: int, parts: tuple[int, ...], places: set[int], rows: RowFilter | None
) -> int:
    """Add the k best rows of these parts, and SPARE more, to `places`. Returns how many rows were compared."""
    best, compared = Nearest(query_D[None], k + SPARE), 0
    for block in vectors.blocks(parts, rows.columns if rows else ()):
        kept = rows.passes(block.columns) if rows else slice(None)
        best.add(block.unit_BD[kept], block.places_B[kept])
        compared += len(block.unit_BD[kept])
    places |= {int(place) for place in np.asarray(best.places[0])}
    return compared
