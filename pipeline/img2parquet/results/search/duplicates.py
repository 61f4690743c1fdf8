"""Group near-duplicates among committed embeddings, and write the groups as one Parquet file.

A group holds the rows that a chain of pairs connects; the cosine of each pair is at least the threshold.

* Without an index every pair is compared, in blocks of bounded memory, with 16 bytes per row besides. The same rows
  give the same file, byte for byte. N rows cost N^2 / 2 comparisons: minutes, up to a few 1e5 rows.
* With an index each row is compared with the neighbours that the index finds; scores and tolerance are the same, and
  pairs that the index misses are missing. A segment small enough to be compared row by row misses none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import Output
from img2parquet.errors import InputError
from img2parquet.results.embeddings import PART_SHIFT, Floats, VectorBlock, Vectors, open_vectors
from img2parquet.results.search.index import Index, Segment, held, open_index
from img2parquet.storage import resolve

BLOCK_BYTES = 128 << 20  # of vectors that are compared with all later ones at once
MOST_EXACT_ROWS = 400_000  # beyond this, the user must ask for it with --exact
NEIGHBOURS = 64  # neighbours of each row to ask an index for
TOLERANCE = 1e-6  # float32 gives 0.9999999 for the cosine of equal vectors
HALF_ERROR = 1e-3  # more than the cosine of two vectors changes when one is rounded to half precision
PAIRS_AT_ONCE = 1 << 20  # found by an index, before their exact scores are computed
SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("is_representative", pa.bool_(), nullable=False),
    ]
)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DuplicateSummary:
    """The result of `find_duplicates`: where the groups were written, and counts of rows and groups."""

    uri: str
    rows: int
    groups: int
    grouped: int  # rows that are in a group
    largest: int  # rows of the largest group

    @property
    def redundant(self) -> int:
        """Rows that are not their group's representative."""
        return self.grouped - self.groups


def find_duplicates(
    uri: str,
    to: str,
    threshold: float = 0.95,
    *,
    model: str | None = None,
    column: str | None = None,
    index: bool = False,
    exact: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> DuplicateSummary:
    """Find groups of near-duplicates in an output, and write them to one Parquet file.

    The file has, in the order of the rows: group, key, shard, score (cosine to the nearest other row of the group) and
    is_representative (the image with the most pixels of its group, the first of equals).

    uri: the job's `output.uri`. to: path or URI of the Parquet file, where nothing exists yet.
    threshold: least cosine of a pair, above -1 and up to 1. model, column: which embedding to compare, when the output
    has several. index: compare each row with the neighbours that the output's index finds, instead of with all rows.
    exact: compare all rows, even when there are more than 400,000. storage_options: as under `output` in the job file.

    Raises InputError when `to` exists, the threshold is out of range, the index is missing or incomplete, or there are
    too many rows to compare unasked; RunMismatch, MissingDependency, StorageError."""
    vectors = open_vectors(uri, model, column, storage_options=storage_options)
    return group_duplicates(vectors, to, threshold, index=index, exact=exact)


def group_duplicates(
    vectors: Vectors, to: str, threshold: float = 0.95, *, index: bool = False, exact: bool = False
) -> DuplicateSummary:
    """Write the groups of these vectors to `to`, as `find_duplicates` does."""
    if not -1 < threshold <= 1:
        raise InputError(f"--threshold {threshold:g}: expected a cosine above -1 and up to 1")
    store = vectors.output.store
    if store.exists(to):
        raise InputError(f"{to} already exists and is not overwritten", hint="choose another --to")
    rows = _Rows.of(vectors)
    if index:
        _by_index(_opened(vectors), vectors, rows, threshold)
    elif rows.count > MOST_EXACT_ROWS and not exact:
        raise InputError(
            f"comparing {rows.count:,} rows with each other takes {rows.count**2 / 2:.1e} comparisons",
            hint="use --index to query the output's index instead, or --exact to compare all pairs anyway",
        )
    else:
        _by_comparing(vectors, rows, threshold)
    group_N = rows.groups()
    data, found = _encode(vectors, rows, group_N, threshold)
    if Output.at(to.rpartition("/")[0] or ".", store).create_or_read(to.rpartition("/")[2], data) != data:
        raise InputError(f"{to} already exists and is not overwritten", hint="choose another --to")
    return DuplicateSummary(resolve(to), rows.count, *found)


class _Rows:
    """All rows by number, counted over the parts: a union-find forest of groups, and each row's best score."""

    def __init__(self, firsts: dict[int, int], count: int) -> None:
        self.firsts, self.count = firsts, count
        self.parent_N = np.arange(count, dtype=np.int64 if count > 2**31 else np.int32)
        self.score_N = np.full(count, -2, np.float32)

    @classmethod
    def of(cls, vectors: Vectors) -> _Rows:
        firsts, count = {}, 0
        for part in sorted(vectors.parts):
            firsts[part] = count
            count += vectors.rows([part])
        return cls(firsts, count)

    def numbers(self, block: VectorBlock) -> Ints:
        start = self.firsts[block.part] + block.first
        return np.arange(start, start + len(block.unit_BD), dtype=np.int64)

    def parts_from(self, number: int) -> list[int]:
        """List the parts that hold this row or later ones."""
        parts = sorted(self.firsts)
        last = max(i for i, part in enumerate(parts) if self.firsts[part] <= number)
        return parts[last:]

    def parts_of(self, numbers: Ints) -> list[int]:
        """List the parts that hold these rows."""
        parts = np.array(sorted(self.firsts), np.int64)
        firsts = np.array([self.firsts[part] for part in parts.tolist()], np.int64)
        found: list[int] = np.unique(parts[np.searchsorted(firsts, numbers, side="right") - 1]).tolist()
        return found

    def join(self, a: int, b: int, score: float) -> None:
        self.score_N[a], self.score_N[b] = max(self.score_N[a], score), max(self.score_N[b], score)
        a, b = self._root(a), self._root(b)
        if a != b:  # the first row of a group is its root
            self.parent_N[max(a, b)] = min(a, b)

    def _root(self, row: int) -> int:
        parent = self.parent_N
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    def groups(self) -> Ints:
        """Return the root of each row that is in a group of two or more, and -1 for the others."""
        roots_N = self.parent_N.astype(np.int64)
        while (roots_N != roots_N[roots_N]).any():
            roots_N = roots_N[roots_N]
        sizes_N = np.bincount(roots_N, minlength=self.count)
        return np.where(sizes_N[roots_N] > 1, roots_N, -1)


def _by_comparing(vectors: Vectors, rows: _Rows, threshold: float) -> None:
    """Compare each block with itself and all later ones."""
    for numbers_A, unit_AD in _large_blocks(vectors, rows):
        for block in vectors.blocks(rows.parts_from(int(numbers_A[0]))):
            numbers_B = rows.numbers(block)
            if len(numbers_B) and numbers_B[-1] > numbers_A[0]:
                _join_pairs(rows, numbers_A, numbers_B, unit_AD @ block.unit_BD.T, threshold)


def _join_pairs(rows: _Rows, numbers_A: Ints, numbers_B: Ints, scores_AB: Floats, threshold: float) -> None:
    for i, j in zip(*np.nonzero(scores_AB >= threshold - TOLERANCE), strict=True):
        a, b = int(numbers_A[i]), int(numbers_B[j])
        if a < b:
            rows.join(a, b, min(1.0, float(scores_AB[i, j])))


def _large_blocks(vectors: Vectors, rows: _Rows, parts: Collection[int] | None = None) -> Iterator[tuple[Ints, Floats]]:
    """Join the row groups of these parts, by default all, into blocks of up to BLOCK_BYTES."""
    numbers, units, size = list[Ints](), list[Floats](), 0
    for block in vectors.blocks(parts):
        if units and size + block.unit_BD.nbytes > BLOCK_BYTES:
            yield np.concatenate(numbers), np.concatenate(units)
            numbers, units, size = [], [], 0
        if len(block.unit_BD):
            numbers.append(rows.numbers(block))
            units.append(block.unit_BD)
            size += block.unit_BD.nbytes
    if units:
        yield np.concatenate(numbers), np.concatenate(units)


def _opened(vectors: Vectors) -> Index:
    index = open_index(vectors)
    missing = len(vectors.parts.keys() - (index.parts if index else set()))
    if index is None or missing:
        what = f"lacks {missing} parts" if index else "does not exist"
        raise InputError(
            f"the index of {vectors.output.uri} {what}", hint=f"run `img2parquet index {vectors.output.uri}`"
        )
    return index


def _by_index(index: Index, vectors: Vectors, rows: _Rows, threshold: float) -> None:
    """Compare all rows with each small segment, and with the neighbours that the graph of each large one finds."""
    for segment in index.segments:
        if segment.is_small:
            _by_comparing_with(segment, vectors, rows, threshold)
        else:
            _by_graph(index.graph(segment), segment, vectors, rows, threshold)


def _by_comparing_with(segment: Segment, vectors: Vectors, rows: _Rows, threshold: float) -> None:
    for numbers_A, unit_AD in _large_blocks(vectors, rows, vectors.parts.keys() & set(segment.parts)):
        for block in vectors.blocks():
            numbers_B, scores_AB = rows.numbers(block), unit_AD @ block.unit_BD.T
            _join_pairs(rows, numbers_A, numbers_B, scores_AB, threshold)
            _join_pairs(rows, numbers_B, numbers_A, scores_AB.T, threshold)


def _by_graph(graph: Any, segment: Segment, vectors: Vectors, rows: _Rows, threshold: float) -> None:
    pairs = set[tuple[int, int]]()
    for block in vectors.blocks():
        for number, query_D in zip(rows.numbers(block).tolist(), block.unit_BD, strict=True):
            places_B = graph.search(query_D, min(NEIGHBOURS, segment.rows)).keys
            # the graph's own scores depend on the CPU: some add up in half precision
            near_B = held(graph, places_B) @ query_D >= threshold - HALF_ERROR
            for place in places_B[near_B].tolist():
                first = rows.firsts.get(place >> PART_SHIFT)
                if first is not None and (other := first + (place & 0xFFFFFFFF)) != number:
                    pairs.add((min(number, other), max(number, other)))
        if len(pairs) >= PAIRS_AT_ONCE:
            _join_near(vectors, rows, pairs, threshold)
            pairs.clear()
    _join_near(vectors, rows, pairs, threshold)


def _join_near(vectors: Vectors, rows: _Rows, pairs: set[tuple[int, int]], threshold: float) -> None:
    """Join the pairs of rows, smaller number first, whose stored vectors are near enough."""
    pairs_P2 = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    for numbers_A, unit_AD in _large_blocks(vectors, rows, rows.parts_of(pairs_P2[:, 0])):
        own_P2 = pairs_P2[np.isin(pairs_P2[:, 0], numbers_A)]
        for block in vectors.blocks(rows.parts_of(own_P2[:, 1])):
            numbers_B = rows.numbers(block)
            here_P2 = own_P2[np.isin(own_P2[:, 1], numbers_B)]
            in_A, in_B = np.searchsorted(numbers_A, here_P2[:, 0]), np.searchsorted(numbers_B, here_P2[:, 1])
            for (a, b), i, j in zip(here_P2.tolist(), in_A, in_B, strict=True):
                score = float(unit_AD[i] @ block.unit_BD[j])
                if score >= threshold - TOLERANCE:
                    rows.join(a, b, min(1.0, score))


def _encode(vectors: Vectors, rows: _Rows, group_N: Ints, threshold: float) -> tuple[bytes, tuple[int, int, int]]:
    """Encode the file. Returns it with the numbers of groups, of rows in groups, and of rows in the largest group."""
    representative_N = _representatives(vectors, rows, group_N)
    about: dict[str, Any] = {
        "img2parquet.model": vectors.model,
        "img2parquet.identity": vectors.identity,
        "img2parquet.threshold": f"{threshold:g}",
    }
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA.with_metadata(about), compression="zstd") as writer:
        for first, table in _columns(vectors, rows, ["key", "shard"]):
            own_B = group_N[first : first + table.num_rows]
            inside_B = own_B >= 0
            chosen = table.filter(pa.array(inside_B))
            numbers_B = np.arange(first, first + table.num_rows)[inside_B]
            arrays = [
                pa.array(own_B[inside_B]),
                chosen.column("key"),
                chosen.column("shard"),
                pa.array(rows.score_N[numbers_B]),
                pa.array(representative_N[own_B[inside_B]] == numbers_B),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(about)))
    sizes = np.bincount(group_N[group_N >= 0])
    return bytes(sink.getvalue()), (int((sizes > 0).sum()), int(sizes.sum()), int(sizes.max(initial=0)))


def _representatives(vectors: Vectors, rows: _Rows, group_N: Ints) -> Ints:
    """Choose each group's representative, by its root: the row with the most pixels, the first of equals."""
    best_N = np.arange(rows.count, dtype=np.int64)
    pixels_N = np.full(rows.count, -1, np.int64)
    for first, table in _columns(vectors, rows, ["width", "height"]):
        width_B, height_B = (table.column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
        for i in np.flatnonzero(group_N[first : first + table.num_rows] >= 0):
            root, pixels = group_N[first + i], width_B[i] * height_B[i]
            if pixels > pixels_N[root]:
                pixels_N[root], best_N[root] = pixels, first + i
    return best_N


def _columns(vectors: Vectors, rows: _Rows, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield row groups without their vectors, each with the number of its first row."""
    for part in sorted(vectors.parts):
        first = rows.firsts[part]
        with vectors.open(part) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                yield first, table
                first += table.num_rows
