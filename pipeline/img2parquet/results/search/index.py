"""Build a vector index of a model's committed embeddings that grows with them: immutable segments and a manifest.

    OUT/_index-<model>/segment-<sha256>.usearch   some parts' vectors, an HNSW graph by cosine, in half precision
    OUT/_index-<model>/manifest-<g>.json          the segments of generation g, which parts are in each, digests

* A segment is created once, whole, before the manifest that names it, and readers take the last manifest. So no
  partial index is ever read, and what a killed build left behind is never named.
* Each generation adds parts that no segment has: the last segment is grown under a new name while it is small,
  otherwise a new one is started. So memory is bounded by one segment, and each segment is one plain PUT.
* Segments that only manifests older than the last two name are removed.
* A segment of up to EXACT_ROWS rows is compared row by row in float32: at that size it costs little, and the result is
  the same on every CPU. The graph's half-precision kernels differ: some CPUs also add up in half precision.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from img2parquet.dataset.commit import Output
from img2parquet.dataset.sealed_json import is_sealed, seal
from img2parquet.errors import MissingDependency, NotFound, RunMismatch, StorageError
from img2parquet.outputs.embedding import unit_length
from img2parquet.results.embeddings import Floats, Nearest, Places, Vectors, open_vectors
from img2parquet.storage import join
from img2parquet.storage.backend import scheme_of

MANIFEST = re.compile(r"manifest-(\d{6,})\.json")
SEGMENT_BYTES = 512 << 20  # of vectors and graph, approximately; then the next segment starts
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 128, 128  # recall@10 of 0.99 on the demo's vectors
CHECKED_BYTES = 64 << 20  # local segments up to this size are hashed before use; larger ones are memory-mapped
RECALL_QUERIES, RECALL_ROWS = 200, 200_000
EXACT_ROWS, EXACT_BLOCK = 20_000, 4096  # 0.3 s for 20,000 vectors of 768 values; their graph takes 2 ms a query


@dataclass(frozen=True)
class Segment:
    """An immutable file of the index, and the parts that it holds."""

    file: str
    sha256: str
    size_bytes: int
    rows: int
    parts: tuple[int, ...]

    @property
    def is_small(self) -> bool:
        """Whether the segment is compared row by row, without its graph."""
        return self.rows <= EXACT_ROWS


@dataclass(frozen=True)
class Index:
    """One generation of an index; generation 0 is empty."""

    output: Output
    generation: int
    identity: str
    column: str
    width: int
    segments: tuple[Segment, ...]

    @property
    def parts(self) -> set[int]:
        return {part for segment in self.segments for part in segment.parts}

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    def nearest(self, query_QD: Floats, k: int, segments: Sequence[Segment] | None = None) -> list[list[int]]:
        """Find places of rows near each query, more than k from every segment.

        Half precision can swap neighbours; the exact scores of `Vectors.at` restore their order."""
        more = k + k // 2 + 10
        found: list[list[int]] = [[] for _ in query_QD]
        for segment in self.segments if segments is None else segments:
            if not segment.rows:
                continue
            graph = self.graph(segment)
            nearest_of = _by_comparing if segment.is_small else _by_graph
            for places, own in zip(found, nearest_of(graph, query_QD, min(more, segment.rows)), strict=True):
                places += own
        return found

    def graph(self, segment: Segment, *, to_grow: bool = False) -> Any:
        """Load a segment's graph: memory-mapped when it is a large local file, otherwise read whole and checked.

        Raises StorageError when it is damaged, or was removed since newer generations have replaced it."""
        graph_class, uri, store = _usearch(), join(self.output.uri, segment.file), self.output.store
        try:
            entry = store.stat(uri)
        except NotFound:
            raise _gone(self, uri) from None
        if entry.size_bytes != segment.size_bytes:
            raise _damaged(uri, self.output.uri)
        try:
            if not to_grow and not scheme_of(uri) and segment.size_bytes > CHECKED_BYTES:
                graph = graph_class.restore(uri, view=True)
            else:
                data = store.read(uri, expect=entry)
                if hashlib.sha256(data).hexdigest() != segment.sha256:
                    raise _damaged(uri, self.output.uri)
                graph = graph_class.restore(data)
        except (ValueError, RuntimeError):
            raise _damaged(uri, self.output.uri) from None
        graph.expansion_add, graph.expansion_search = EXPANSION_ADD, EXPANSION_SEARCH
        return graph

    def _next(self, segments: tuple[Segment, ...]) -> Index:
        return Index(self.output, self.generation + 1, self.identity, self.column, self.width, segments)

    def to_json(self) -> dict[str, Any]:
        segments = [{**vars(segment), "parts": list(segment.parts)} for segment in self.segments]
        about = {"generation": self.generation, "identity": self.identity, "column": self.column, "width": self.width}
        return {**about, "kind": "usearch", "metric": "cosine", "dtype": "float16", "segments": segments}


@dataclass(frozen=True)
class IndexSummary:
    """The result of `build_index`. `recall`: share of the ten nearest rows by brute force that the index finds too."""

    uri: str
    generation: int
    rows: int
    parts: int
    parts_added: int
    segments: int
    size_bytes: int
    recall: float | None
    recall_rows: int  # rows among which it was measured


def build_index(
    uri: str,
    model: str | None = None,
    column: str | None = None,
    *,
    to: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> IndexSummary:
    """Build a vector index of the committed embeddings of an output, or add the parts that it lacks.

    uri: the job's `output.uri`. model, column: which embedding to index, when the output has several.
    to: a folder for the index, by default `_index-<model>` in the output. storage_options: as under `output` in the
    job file.

    Raises InputError when there are no embeddings or several to choose from, RunMismatch when the folder holds the
    index of another run, MissingDependency when usearch is not installed, StorageError when the index is damaged or
    cannot be written."""
    return index_vectors(open_vectors(uri, model, column, storage_options=storage_options), to)


def index_vectors(vectors: Vectors, to: str | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> IndexSummary:
    """Add the committed parts that the index lacks, as `build_index` does."""
    _usearch()
    place = Output.at(to or default_place(vectors), vectors.output.store)
    index = open_index(vectors, place.uri) or Index(place, 0, vectors.identity, vectors.column, vectors.width, ())
    before = index.parts
    while left := sorted(vectors.parts.keys() - index.parts):
        try:
            index = _grow(index, vectors, left, segment_bytes)
        except _Outdated:
            index = open_index(vectors, place.uri) or index
            continue
        _prune(index)
    recall, rows = recall_at_10(index, vectors)
    return IndexSummary(
        uri=place.uri,
        generation=index.generation,
        rows=index.rows,
        parts=len(index.parts),
        parts_added=len(index.parts - before),
        segments=len(index.segments),
        size_bytes=sum(segment.size_bytes for segment in index.segments),
        recall=recall,
        recall_rows=rows,
    )


def default_place(vectors: Vectors) -> str:
    column = "" if vectors.column == "embedding" else f"-{vectors.column}"
    return join(vectors.output.uri, f"_index-{vectors.model}{column}")


def open_index(vectors: Vectors, uri: str | None = None) -> Index | None:
    """Open the last generation of an index, or return None when there is none.

    Raises RunMismatch when it belongs to another run or column, StorageError when it is damaged."""
    place = Output.at(uri or default_place(vectors), vectors.output.store)
    said = _last_manifest(place)
    if said is None:
        return None
    for name, wanted in (("identity", vectors.identity), ("column", vectors.column)):
        if said[name] != wanted:
            raise RunMismatch(
                f"{place.uri} indexes another run: its {name} is `{said[name]}`, not `{wanted}`; "
                "vectors of two identities cannot be compared",
                hint="use another --to, or remove that folder",
            )
    segments = tuple(Segment(**{**segment, "parts": tuple(segment["parts"])}) for segment in said["segments"])
    return Index(place, said["generation"], said["identity"], said["column"], said["width"], segments)


def _by_comparing(graph: Any, query_QD: Floats, k: int) -> list[list[int]]:
    """Find the k nearest of all vectors in the graph, as it holds them, for each query."""
    best, places_N = Nearest(query_QD, k), np.sort(np.asarray(graph.keys))
    for first in range(0, len(places_N), EXACT_BLOCK):
        places_B = places_N[first : first + EXACT_BLOCK]
        best.add(held(graph, places_B), places_B)
    return [places.tolist() for places in best.places]


def held(graph: Any, places_B: Places) -> Floats:
    """Return (B, D) unit vectors as the graph holds them: rounded to half precision, but in float32."""
    unit_BD: Floats = unit_length(np.vstack(graph.get(places_B)).astype(np.float32)).astype(np.float32, copy=False)
    return unit_BD


def _by_graph(graph: Any, query_QD: Floats, k: int) -> list[list[int]]:
    """Find approximately the k nearest for each query."""
    return [graph.search(query_D, k).keys.tolist() for query_D in query_QD]


def recall_at_10(index: Index, vectors: Vectors) -> tuple[float | None, int]:
    """Measure the share of each sampled row's ten nearest others by brute force that the index finds too.

    Returns it with the number of rows compared: those of the last segments, taken whole, up to RECALL_ROWS or more."""
    chosen, rows = list[Segment](), 0
    for segment in reversed(index.segments):
        if rows < RECALL_ROWS and vectors.parts.keys() >= set(segment.parts):  # another build may know newer parts
            chosen.append(segment)
            rows += segment.rows
    if rows < 2:
        return None, rows
    parts = [part for segment in chosen for part in segment.parts]
    query_QD, own_Q = _sample(vectors, parts, rows)
    exact = Nearest(query_QD, min(11, rows))
    for block in vectors.blocks(parts):
        exact.add(block.unit_BD, block.places_B)
    found, hits, wanted = index.nearest(query_QD, 11, chosen), 0, 0
    for q, own in enumerate(own_Q):
        others = [int(place) for place in exact.places[q] if place != own][:10]
        hits, wanted = hits + len(set(others) & set(found[q])), wanted + len(others)
    return hits / wanted, rows


def _sample(vectors: Vectors, parts: Sequence[int], rows: int) -> tuple[Floats, list[int]]:
    """Sample evenly spread rows: their vectors and places."""
    every, seen = max(1, rows // RECALL_QUERIES), 0
    queries, places = [], []
    for block in vectors.blocks(parts):
        for i in range(-seen % every, len(block.unit_BD), every):
            queries.append(block.unit_BD[i])
            places.append(int(block.places_B[i]))
        seen += len(block.unit_BD)
    return np.stack(queries), places


def _grow(index: Index, vectors: Vectors, left: Sequence[int], segment_bytes: int) -> Index:
    """Create the next generation with a new or grown segment. If another build was first, return its generation."""
    *rest, last = index.segments or (None,)
    is_small = last is not None and last.size_bytes < segment_bytes // 2
    graph = index.graph(last, to_grow=True) if last is not None and is_small else _new_graph(index.width)
    kept = tuple(segment for segment in (rest if is_small else index.segments) if segment is not None)
    parts = list(last.parts) if last is not None and is_small else []
    for part in left:
        for block in vectors.blocks([part]):
            graph.add(block.places_B, block.unit_BD)
        parts.append(part)
        if len(graph) * _row_bytes(index.width) >= segment_bytes:
            break
    data = bytes(graph.save() or b"")
    digest = hashlib.sha256(data).hexdigest()
    segment = Segment(f"segment-{digest[:32]}.usearch", digest, len(data), len(graph), tuple(parts))
    index.output.put_once(segment.file, data)
    grown = index._next((*kept, segment))
    if index.output.put_once(f"manifest-{grown.generation:06d}.json", seal(grown.to_json())) == "created":
        return grown
    return open_index(vectors, index.output.uri) or index


def _prune(index: Index) -> None:
    """Remove manifests older than the last two, which readers may still use, and the segments that only they name.

    A segment that no manifest names is left alone: another build may be about to name it."""
    numbers = {name: int(match[1]) for name in index.output.files() if (match := MANIFEST.fullmatch(name))}
    old = sorted(name for name, number in numbers.items() if number < index.generation - 1)
    named = {name: _segment_files(index.output, name) for name in numbers}
    used = {file for name, files in named.items() if name not in old for file in files}
    for name in old:
        for file in (*(named[name] - used), name):
            index.output.store.delete(join(index.output.uri, file))


def _segment_files(place: Output, name: str) -> set[str]:
    said = _manifest(place, name)
    return {segment["file"] for segment in said["segments"]} if said else set()


def _last_manifest(place: Output) -> dict[str, Any] | None:
    found = sorted((int(match[1]), name) for name in place.files() if (match := MANIFEST.fullmatch(name)))
    return _manifest(place, found[-1][1]) if found else None


def _manifest(place: Output, name: str) -> dict[str, Any] | None:
    try:
        data = place.store.read(join(place.uri, name))
    except NotFound:
        return None
    if not is_sealed(data):
        raise _damaged(join(place.uri, name), place.uri)
    said: Mapping[str, Any] = json.loads(data)
    return dict(said)


def _new_graph(width: int) -> Any:
    return _usearch()(
        ndim=width,
        metric="cos",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )


def _row_bytes(width: int) -> int:
    return 2 * width + 8 * 2 * CONNECTIVITY + 24


def _usearch() -> Any:
    try:
        from usearch.index import Index as GraphClass
    except ImportError:
        raise MissingDependency(
            "an index is built with usearch, which is not installed",
            hint="pip install 'img2parquet[search]'; `img2parquet search` also works without an index, by comparing "
            "every vector",
        ) from None
    return GraphClass


class _Outdated(StorageError):
    """Raised when another build has replaced a segment, and removed it."""


def _gone(index: Index, uri: str) -> StorageError:
    said = _last_manifest(index.output)
    if said and said["generation"] > index.generation:
        return _Outdated(f"{uri}: replaced by another build of the index", hint="run the same command again")
    return StorageError(f"{uri}: a segment of the index is gone", hint=f"remove {index.output.uri} and rebuild it")


def _damaged(uri: str, folder: str) -> StorageError:
    return StorageError(
        f"{uri}: the index is damaged: its digest does not match its bytes", hint=f"remove {folder} and rebuild it"
    )
