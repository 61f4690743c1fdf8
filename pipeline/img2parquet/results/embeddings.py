"""Read a model's committed embeddings as unit vectors, part by part, and look up rows by place.

Shapes: B rows of a block, D values of a vector, Q queries, k neighbours.

* A row's place is one number: its file's number times 2^32, plus its row in that file. It never changes.
* Files of two run identities are refused, since their vectors cannot be compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import PLAN, Output, is_part_file, model_of
from img2parquet.dataset.footer import parse_footer
from img2parquet.dataset.generations import History, RetryPlan, read_history, read_newer
from img2parquet.dataset.plan import Plan
from img2parquet.errors import InputError, RunMismatch, StorageError, nearest
from img2parquet.outputs.embedding import unit_length
from img2parquet.outputs.vectors import decode_vectors, length
from img2parquet.storage import Entry, Store

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.uint64]
PART_SHIFT = 32
GENERATION_SHIFT = 24  # in a file's number


@dataclass(frozen=True)
class VectorBlock:
    """Consecutive rows of one part: (B, D) unit vectors, and the other columns that were asked for."""

    part: int
    first: int
    unit_BD: Floats
    columns: pa.Table

    @property
    def places_B(self) -> Places:
        start = (self.part << PART_SHIFT) + self.first
        return np.arange(start, start + len(self.unit_BD), dtype=np.uint64)


@dataclass(frozen=True)
class Hit:
    """A row that a search found. `score` is its cosine to the query: 1 for the same direction."""

    key: str
    shard: str
    score: float
    part: int
    row: int


@dataclass(frozen=True)
class Vectors:
    """The embeddings of one model in one output.

    `parts` maps the number of each committed file to its name: the part's index, plus the generation times 2^24 for a
    file that a retry added."""

    output: Output
    history: History
    model: str
    column: str
    files: Mapping[str, Entry]

    @cached_property
    def parts(self) -> dict[int, str]:
        return {number: name for number, name in _numbered(self.history, self.model) if name in self.files}

    @property
    def plan(self) -> Plan:
        return self.history.plan

    @property
    def parts_left(self) -> int:
        """Parts of the plan that are not committed yet, not counting those of retries."""
        return len(self.plan.parts) - sum(name in self.files for name in self.plan.names[self.model])

    @property
    def identity(self) -> str:
        return self.plan.identity(self.model)

    def open(self, part: int) -> pq.ParquetFile:
        """Open a part's file. Raises RunMismatch when its footer names another run, StorageError when it is damaged."""
        entry = self.files[self.parts[part]]
        try:
            file = pq.ParquetFile(self.output.store.open(entry.uri, expect=entry))
            identity = parse_footer(file.metadata).identity
        except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise StorageError(f"{entry.uri}: cannot be read: {str(error).splitlines()[0]}") from None
        if identity != self.identity:
            raise RunMismatch(
                f"{entry.uri} belongs to another run than the plan: vectors of two identities cannot be compared",
                hint=f"run `img2parquet verify {self.output.uri}`",
            )
        return file

    def blocks(self, parts: Collection[int] | None = None, columns: Sequence[str] = ()) -> Iterator[VectorBlock]:
        """Yield the vectors of these parts, by default all, in the order of the plan, one row group at a time."""
        for part in sorted(self.parts if parts is None else parts):
            with self.open(part) as file:
                first = 0
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=[self.column, *columns])
                    unit_BD = unit_vectors(table, self.column)
                    yield VectorBlock(part, first, unit_BD, table.select(list(columns)))
                    first += table.num_rows

    def rows(self, parts: Collection[int] | None = None) -> int:
        """Count rows from the footers."""
        return sum(self._rows_of(part) for part in (self.parts if parts is None else parts))

    def _rows_of(self, part: int) -> int:
        with self.open(part) as file:
            return int(file.metadata.num_rows)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of a committed file."""
        with self.open(next(iter(self.parts))) as file:
            return file.schema_arrow

    @property
    def width(self) -> int:
        """The number of values of a vector, D."""
        return length(self.schema.field(self.column))

    def at(self, places: Sequence[int], query_D: Floats) -> list[Hit]:
        """Fetch the rows at these places with exact scores, best first. At most one row group is read for each."""
        found = []
        for part in sorted({place >> PART_SHIFT for place in places}):
            wanted = sorted(place & 0xFFFFFFFF for place in places if place >> PART_SHIFT == part)
            with self.open(part) as file:
                for row, table in _pick(file, wanted, ["key", "shard", self.column]):
                    score = float(unit_vectors(table, self.column)[0] @ query_D)
                    key, shard = table.column("key")[0].as_py(), table.column("shard")[0].as_py()
                    found.append(Hit(key, shard, min(1.0, max(-1.0, score)), part, row))
        return sorted(found, key=lambda hit: (-hit.score, hit.part, hit.row))

    def vector(self, key: str, shard: str | None = None) -> tuple[int, Floats]:
        """Return place and unit vector of the row with this key. Raises InputError unless there is exactly one."""
        hits: list[tuple[int, str, Floats]] = []
        for block in self._blocks_that_may_hold(key):
            keys, shards = (block.columns.column(name).to_pylist() for name in ("key", "shard"))
            hits += [
                (int(block.places_B[i]), shards[i], block.unit_BD[i])
                for i, other in enumerate(keys)
                if other == key and shard in (None, shards[i])
            ]
        if not hits:
            where = f" of shard `{shard}`" if shard else ""
            raise InputError(f"{self.output.uri}: model `{self.model}` has no row with the key `{key}`{where}")
        if len(hits) > 1:
            raise InputError(
                f"{len(hits)} rows have the key `{key}`",
                known=[s for _, s, _ in hits],
                hint="name its shard with --shard",
            )
        return hits[0][0], hits[0][2]

    def _blocks_that_may_hold(self, key: str) -> Iterator[VectorBlock]:
        """Yield the row groups whose smallest and greatest key leave room for this one."""
        for part in sorted(self.parts):
            with self.open(part) as file:
                first, at = 0, file.schema_arrow.names.index("key")
                for group in range(file.num_row_groups):
                    said = file.metadata.row_group(group)
                    limits = said.column(at).statistics
                    if limits is None or not limits.has_min_max or limits.min <= key <= limits.max:
                        table = file.read_row_group(group, columns=["key", "shard", self.column])
                        yield VectorBlock(part, first, unit_vectors(table, self.column), table)
                    first += said.num_rows


def open_vectors(
    uri: str,
    model: str | None = None,
    column: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Vectors:
    """Open the committed embeddings of an output.

    Raises InputError when there are none, or several to choose from; RunMismatch when files of another run lie among
    them."""
    output = Output.at(uri, Store(storage_options or {}))
    plan = output.stored_plan()
    if plan is None:
        raise InputError(f"{output.uri}: no {PLAN} here, so this is not an output of img2parquet")
    model, column = _choose(plan, output.uri, model, column)
    there = output.files()
    files = {name: entry for name, entry in there.items() if is_part_file(name) and model_of(name) == model}
    history = read_history(output, plan, there)
    if files.keys() - set(history.names[model]):  # another generation may have started while we listed
        history = read_newer(output, history, output.files())
    foreign = sorted(files.keys() - set(history.names[model]))
    if foreign:
        raise RunMismatch(
            f"{output.uri} holds files of another run: {foreign[0]} ({len(foreign)} in all); "
            "vectors of two identities cannot be compared",
            hint="move them away",
        )
    if not files:
        raise InputError(f"{output.uri}: no rows of model `{model}` are committed yet")
    return Vectors(output, history, model, column, files)


def _numbered(history: History, model: str) -> Iterator[tuple[int, str]]:
    for plan in (history.plan, *history.retries):
        generation = plan.generation if isinstance(plan, RetryPlan) else 0
        for of, index, name in plan.indexed():
            if of == model:
                yield (generation << GENERATION_SHIFT) + index, name


def part_index(number: int) -> int:
    """Return the index in the plan of the part that a file's number stands for."""
    return number & ((1 << GENERATION_SHIFT) - 1)


def _choose(plan: Plan, uri: str, model: str | None, column: str | None) -> tuple[str, str]:
    """Choose the model and the embedding column, or say why the choice is not clear."""
    there = {name: _columns(identity) for name, identity in plan.identities.items()}
    if model is not None and model not in there:
        raise InputError(f"{uri}: no model `{model}`", known=sorted(there), hint=nearest(model, there))
    with_some = sorted(name for name in there if there[name] and model in (None, name))
    if not with_some:
        raise InputError(
            f"{uri}: " + (f"model `{model}` has no embeddings" if model else "no model has embeddings"),
            known=sorted(name for name in there if there[name]),
            hint="add `{kind: embedding}` to the job's outputs",
        )
    if len(with_some) > 1:
        raise InputError(f"{uri}: several models have embeddings", known=with_some, hint="choose one with --model")
    columns = there[with_some[0]]
    if column is None and len(columns) > 1 and "embedding" not in columns:
        raise InputError(
            f"{uri}: model `{with_some[0]}` has several embeddings", known=columns, hint="choose one with --column"
        )
    chosen = column or ("embedding" if "embedding" in columns else columns[0])
    if chosen not in columns:
        message = f"{uri}: `{chosen}` is not an embedding of model `{with_some[0]}`"
        raise InputError(message, known=columns, hint=nearest(chosen, columns))
    return with_some[0], chosen


def _columns(identity: Mapping[str, Any]) -> list[str]:
    return [output["name"] for output in identity.get("outputs", ()) if output["kind"] == "embedding"]


def unit_vectors(table: pa.Table, column: str) -> Floats:
    """Decode a column of vectors, however it is stored, to (B, D) of length 1; zero vectors stay zero.

    Raises InputError when the column holds no vectors."""
    return unit_length(decode_vectors(table.column(column), table.schema.field(column))).astype(np.float32, copy=False)


def _pick(file: pq.ParquetFile, rows: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield single rows of a file in ascending order, reading each row group once."""
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in rows if first <= row < first + count]
        if inside:
            table = file.read_row_group(group, columns=list(columns))
            yield from ((row, table.slice(row - first, 1)) for row in inside)
        first += count


class Nearest:
    """Keeps the k nearest rows among all that are added, for each of Q queries: (Q, D) unit vectors.

    Among equal scores the first place is kept, so the result does not depend on how rows are split into blocks."""

    def __init__(self, query_QD: Floats, k: int) -> None:
        self.query_QD, self.k = query_QD, k
        self.scores = [np.empty(0, np.float32) for _ in query_QD]
        self.places = [np.empty(0, np.uint64) for _ in query_QD]

    def add(self, unit_BD: Floats, places_B: Places) -> None:
        for q, scores_B in enumerate(self.query_QD @ unit_BD.T):
            if len(self.scores[q]) == self.k:
                better_B = scores_B > self.scores[q][-1]
                if not better_B.any():
                    continue
                scores_B, own = scores_B[better_B], places_B[better_B]
            else:
                own = places_B
            scores = np.concatenate([self.scores[q], scores_B])
            places = np.concatenate([self.places[q], own])
            order = np.lexsort((places, -scores))[: self.k]
            self.scores[q], self.places[q] = scores[order], places[order]
