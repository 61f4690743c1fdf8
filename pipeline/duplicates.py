"""Committed embeddings to groups of near-duplicates, as one Parquet file: rows that a chain of pairs connects, each
pair's cosine at least the threshold.

* Exact: every pair is compared, in blocks of bounded memory; 16 bytes a row are held besides. The same rows give the
  same file, byte for byte. N rows cost N^2 / 2 comparisons: minutes up to a few 1e5 rows.
* With an index each row is compared with the neighbours that the index finds: what it misses is missed here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import Output
from pipeline.embeddings import PART_SHIFT, Block, Floats, Vectors
from pipeline.errors import InputError
from pipeline.index import Index, held, open_index
from pipeline.storage import resolve

BLOCK_BYTES = 128 << 20  # of vectors that are compared with all that come after them
MOST_EXACT_ROWS = 400_000  # beyond, somebody has to say that they want to wait
NEIGHBOURS = 64  # of each row that an index is asked for
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
class Duplicates:
    """What was found and written. `redundant`: rows that are not their group's representative."""

    uri: str
    rows: int
    groups: int
    grouped: int
    largest: int

    @property
    def redundant(self) -> int:
        return self.grouped - self.groups


def duplicates(
    vectors: Vectors, to: str, threshold: float = 0.95, *, index: bool = False, exact: bool = False
) -> Duplicates:
    """Write the groups to `to`: group, key, shard, score (cosine to the nearest other of the group) and whether it is
    the representative (the image with most pixels, of equal ones the first), in the order of the rows.

    index: ask the output's index; exact: however many rows there are. Raises InputError, also where `to` exists."""
    if not -1 < threshold <= 1:
        raise InputError(f"--threshold {threshold:g}: a cosine above -1 and up to 1")
    store = vectors.output.store
    if store.exists(to):
        raise InputError(f"{to} is there already, and nothing is overwritten", hint="give another --to")
    rows = _Rows.of(vectors)
    if index:
        _by_index(_opened(vectors), vectors, rows, threshold)
    elif rows.count > MOST_EXACT_ROWS and not exact:
        raise InputError(
            f"{rows.count:,} rows would be compared with each other, {rows.count**2 / 2:.1e} pairs",
            hint="--index asks the output's index instead; --exact compares all the same",
        )
    else:
        _by_comparing(vectors, rows, threshold)
    group_N = rows.groups()
    data, found = _encode(vectors, rows, group_N, threshold)
    if Output.at(to.rpartition("/")[0] or ".", store).put_once(to.rpartition("/")[2], data) == "done":
        raise InputError(f"{to} is there already, and nothing is overwritten", hint="give another --to")
    return Duplicates(resolve(to), rows.count, *found)


class _Rows:
    """Every row by its number, counted over the parts; a forest of what belongs together; each row's best score."""

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

    def numbers(self, block: Block) -> Ints:
        start = self.firsts[block.part] + block.first
        return np.arange(start, start + len(block.unit_BD), dtype=np.int64)

    def parts_from(self, number: int) -> list[int]:
        """Parts that hold this row or later ones."""
        parts = sorted(self.firsts)
        last = max(i for i, part in enumerate(parts) if self.firsts[part] <= number)
        return parts[last:]

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
        """The root of each row that is in a group of two or more, else -1."""
        roots_N = self.parent_N.astype(np.int64)
        while (roots_N != roots_N[roots_N]).any():
            roots_N = roots_N[roots_N]
        sizes_N = np.bincount(roots_N, minlength=self.count)
        return np.where(sizes_N[roots_N] > 1, roots_N, -1)


def _by_comparing(vectors: Vectors, rows: _Rows, threshold: float) -> None:
    """Each block with itself and with all that come after it."""
    for numbers_A, unit_AD in _large_blocks(vectors, rows):
        for block in vectors.blocks(rows.parts_from(int(numbers_A[0]))):
            numbers_B = rows.numbers(block)
            if len(numbers_B) and numbers_B[-1] > numbers_A[0]:
                _join_pairs(rows, numbers_A, numbers_B, unit_AD @ block.unit_BD.T, threshold)


def _join_pairs(rows: _Rows, numbers_A: Ints, numbers_B: Ints, scores_AB: Floats, threshold: float) -> None:
    for i, j in zip(*np.nonzero(scores_AB >= threshold - 1e-6), strict=True):  # float32 gives 0.9999999 for 1
        a, b = int(numbers_A[i]), int(numbers_B[j])
        if a < b:
            rows.join(a, b, min(1.0, float(scores_AB[i, j])))


def _large_blocks(vectors: Vectors, rows: _Rows) -> Iterator[tuple[Ints, Floats]]:
    """Row groups put together up to BLOCK_BYTES."""
    numbers, units, size = list[Ints](), list[Floats](), 0
    for block in vectors.blocks():
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
        what = f"lacks {missing} parts" if index else "is not there"
        raise InputError(f"the index of {vectors.output.uri} {what}", hint=f"`img2parquet index {vectors.output.uri}`")
    return index


def _by_index(index: Index, vectors: Vectors, rows: _Rows, threshold: float) -> None:
    """Neighbours that the index names, with scores of the vectors that it holds (half precision). Its own scores are
    the CPU's: some add up in half precision."""
    for segment in index.segments:
        if not segment.rows:
            continue
        graph = index.graph(segment)
        for block in vectors.blocks():
            for number, query_D in zip(rows.numbers(block).tolist(), block.unit_BD, strict=True):
                places_B = graph.search(query_D, min(NEIGHBOURS, segment.rows)).keys
                scores_B = held(graph, places_B) @ query_D
                for place, score in zip(places_B.tolist(), scores_B.tolist(), strict=True):
                    other = rows.firsts[place >> PART_SHIFT] + (place & 0xFFFFFFFF)
                    if other != number and score >= threshold:
                        rows.join(min(number, other), max(number, other), min(1.0, score))


def _encode(vectors: Vectors, rows: _Rows, group_N: Ints, threshold: float) -> tuple[bytes, tuple[int, int, int]]:
    """The file, and how many groups, rows in groups, and rows in the largest there are."""
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
    """By a group's root: the row with most pixels, of equal ones the first."""
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
    """Row groups without their vectors, each with its first row's number."""
    for part in sorted(vectors.parts):
        first = rows.firsts[part]
        with vectors.open(part) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                yield first, table
                first += table.num_rows
