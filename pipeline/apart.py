"""Batches and parts that may kill a process -> their results, with a reject for each row that did.

    Apart         prepares and embeds in a child; rows that kill it twice are rejected, their neighbours are not touched
    ReadApart     a source that a child reads; where it dies twice at the same row, the rest of that file is a fault

* Twice, since the first death may be of another's memory. What is said of a row does not depend on who found it.
* A batch that kills its process in `embed` is halved down to the rows that do it; the others are then embedded
  together, as they are beside any other reject, so that their numbers are the same bits.
* A file that its reader dies of at different rows is begun again, and the rows that were had are not given twice. It
  ends at the furthest row that was reached: nothing that any attempt could read is lost.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.batch import Batch, Crops, Embedded, Failed, Prepared, Work
from pipeline.child import Child, Died
from pipeline.embed import Preparer
from pipeline.meter import Spent
from pipeline.preprocess import PreprocessSettings
from pipeline.read import PartLimits
from pipeline.schema import Part, Piece, Reason, Reject, Row
from pipeline.storage import Entry

TRIES = 2
READ_TRIES = 6  # of one file, whose reader dies at another row each time


class Apart:
    """Threads may share it; they take turns."""

    def __init__(self, work: Work) -> None:
        self.work, self.child, self.lock = work, Child(work), threading.Lock()
        self.geometries = tuple({card.preprocess.geometry for card in work.cards.values()})

    def close(self) -> None:
        self.child.close()

    def prepare(self, batch: Batch, suspects: Collection[int] = (), here: Preparer | None = None) -> Prepared:
        """suspects: rows that are decoded alone; the others by `here`, or together in the child."""
        prepared = list[Prepared]()
        for run in _runs(batch, suspects):
            if run.rows[0].row in suspects:
                prepared.append(self._alone(run))
            elif here:
                prepared.append(here(run))
            else:
                prepared += self._together(run)
        return joined(batch, prepared, self.geometries)

    def _together(self, run: Batch) -> list[Prepared]:
        waiting, done = [run], list[tuple[int, Prepared]]()
        while waiting:
            batch = waiting.pop()
            if not batch.rows:
                continue
            try:
                done.append((batch.rows[0].row, self._one("prepare", batch)))
            except Died as death:
                at = next((n for n, row in enumerate(batch.rows) if row.row == death.row), 0)
                alone = replace(batch, rows=batch.rows[at : at + 1])
                done.append((alone.rows[0].row, self._alone(alone, deaths=1)))
                waiting += [replace(batch, rows=batch.rows[:at]), replace(batch, rows=batch.rows[at + 1 :])]
        return [prepared for _, prepared in sorted(done, key=lambda item: item[0])]

    def _alone(self, single: Batch, deaths: int = 0) -> Prepared:
        (row,) = single.rows
        while True:
            try:
                prepared: Prepared = self._one("prepare", single)
                return prepared
            except Died as death:
                deaths += 1
                if deaths == TRIES:
                    reject = _reject(row, "decode", death, self.work.job.resources.image_timeout_s)
                    return Prepared(single.part_index, single.k, (), (), (reject,), {}, None, {})

    def embed(self, prepared: Prepared) -> Embedded | Failed:
        """Failed where the batch kills its process and none of its rows alone does."""
        try:
            return self._embed(prepared)
        except Died:
            guilty = self._guilty(prepared, range(len(prepared.rows)))
        try:
            return self._embed(without(prepared, guilty))
        except Died as death:
            message = f"batch {prepared.k} ended its process twice ({death.how}), and none of its rows alone does"
            return Failed(prepared.part_index, message)

    def _guilty(self, prepared: Prepared, places: Sequence[int]) -> dict[int, Reject]:
        """Of a batch that killed its process, the rows that do it alone as well."""
        if len(places) == 1:
            return self._is_guilty(prepared, places[0])
        found: dict[int, Reject] = {}
        for half in (places[: len(places) // 2], places[len(places) // 2 :]):
            try:
                self._embed(only(prepared, half))
            except Died:
                found |= self._guilty(prepared, half)
        return found

    def _is_guilty(self, prepared: Prepared, place: int) -> dict[int, Reject]:
        """It has died of it once."""
        try:
            self._embed(only(prepared, [place]))
        except Died as death:
            limit_s = self.work.job.resources.image_timeout_s
            return {place: _reject(prepared.rows[place], "embed", death, limit_s)}
        return {}

    def _embed(self, prepared: Prepared) -> Embedded | Failed:
        embedded: Embedded | Failed = self._one("embed", prepared)
        return embedded

    def _one(self, task: Literal["prepare", "embed"], item: object) -> Any:
        with self.lock:
            (answer,) = self.child.ask(task, item)
            return answer


class ReadApart:
    """A Source. One part at a time."""

    def __init__(self, work: Work) -> None:
        self.source, self.child = work.job.input, Child(work)
        self.kind = self.source.kind

    def close(self) -> None:
        self.child.close()

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        return self.source.plan(limits, known)

    def passthrough(self) -> pa.Schema:
        return self.source.passthrough()

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Raises what the source's own `read` raises."""
        first = 0
        for piece in part.pieces:
            for item in self._read_piece(part, piece, first):
                yield item
                first = item.row + 1

    def _read_piece(self, part: Part, piece: Piece, first: int) -> Iterator[Row | Reject]:
        """Its rows, numbered from `first`; and its faults, where the child dies of it."""
        given, last, deaths = 0, "", Counter[int]()  # by the row that was to come
        while True:
            reached = 0
            try:
                for item in self.child.ask("read", Part(part.index, (piece,))):
                    reached += 1
                    if reached > given:
                        given, last = reached, f", after `{item.key}`"
                        yield replace(item, row=first + reached - 1)
                return
            except Died as death:
                deaths[reached] += 1
                if deaths[given] == TRIES or deaths.total() == READ_TRIES:
                    where = f"{deaths.total()} times ({death.how}), at the furthest at row {given} of it{last}"
                    yield from _faults(piece, first, given, where)
                    return


def _faults(piece: Piece, first: int, given: int, where: str) -> Iterator[Reject]:
    """One, or as many as the plan counted."""
    message = f"reading this file ended its process {where}; what follows was not read"
    for row in range(given, max(piece.rows or 0, given + 1)):
        yield Reject(first + row, f"row {piece.start + row}", piece.uri, "read", "worker_died", message)


def _reject(row: Row, stage: Literal["decode", "embed"], death: Died, limit_s: float) -> Reject:
    verb = {"decode": "decoding", "embed": "embedding"}[stage]
    reason: Reason = "timed_out" if death.is_late else "worker_died"
    said = f"ended its process twice ({death.how})"
    message = f"{verb} it took longer than {limit_s:g} s, twice" if death.is_late else f"{verb} it {said}"
    return Reject(row.row, row.key, row.shard, stage, reason, message, row.offset)


# ---- batches cut and joined --------------------------------------------------------------------------------------


def _runs(batch: Batch, suspects: Collection[int]) -> Iterator[Batch]:
    """The batch's rows in order, each suspect in a batch of its own; without what belongs to the batch as a whole."""
    bare, run = replace(batch, rejects=(), rows_in=None, spent={}), list[Row]()
    for row in batch.rows:
        if row.row in suspects:
            if run:
                yield replace(bare, rows=tuple(run))
            yield replace(bare, rows=(row,))
            run = []
        else:
            run.append(row)
    if run:
        yield replace(bare, rows=tuple(run))


def joined(batch: Batch, parts: Sequence[Prepared], geometries: Sequence[PreprocessSettings]) -> Prepared:
    """What a Preparer makes of a batch, from what it made of its runs."""
    firsts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    crops = {}
    for geometry in geometries:
        made = [(first, part.crops[geometry]) for first, part in zip(firsts, parts, strict=False) if part.crops]
        empty = np.empty((0, *geometry.size_HW, 3), np.uint8)
        crops[geometry] = Crops(
            tuple(first + index for first, each in made for index in each.kept),
            np.concatenate([empty, *(each.pixels_BHWC for _, each in made)]),
            tuple(reject for _, each in made for reject in each.rejects),
        )
    return Prepared(
        batch.part_index,
        batch.k,
        tuple(row for part in parts for row in part.rows),
        tuple(size for part in parts for size in part.sizes_HW),
        (*batch.rejects, *(reject for part in parts for reject in part.rejects)),
        crops,
        batch.rows_in,
        _sum([batch.spent, *(part.spent for part in parts)]),
    )


def _sum(spents: Sequence[Mapping[str, Spent]]) -> dict[str, Spent]:
    total: dict[str, Spent] = {}
    for spent in spents:
        for stage, what in spent.items():
            total[stage] = total.get(stage, Spent()) + what
    return total


def only(prepared: Prepared, places: Sequence[int]) -> Prepared:
    """Some of a batch's rows."""
    crops = {}
    for geometry, each in prepared.crops.items():
        kept = [(places.index(index), n) for n, index in enumerate(each.kept) if index in places]
        pixels_BHWC = each.pixels_BHWC[[n for _, n in kept]]
        crops[geometry] = replace(each, kept=tuple(index for index, _ in kept), pixels_BHWC=pixels_BHWC)
    rows, sizes_HW = tuple(prepared.rows[n] for n in places), tuple(prepared.sizes_HW[n] for n in places)
    return replace(prepared, rows=rows, sizes_HW=sizes_HW, crops=crops)


def without(prepared: Prepared, rejects: Mapping[int, Reject]) -> Prepared:
    """Without the rows at these places: every model rejects them."""
    left = only(prepared, [n for n in range(len(prepared.rows)) if n not in rejects])
    gone = {reject.row for reject in rejects.values()}  # a model that could not crop one has it among its own
    crops = {
        geometry: replace(each, rejects=tuple(reject for reject in each.rejects if reject.row not in gone))
        for geometry, each in left.crops.items()
    }
    return replace(left, rejects=(*prepared.rejects, *rejects.values()), crops=crops)
