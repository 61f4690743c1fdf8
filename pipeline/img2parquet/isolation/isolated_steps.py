"""Run the steps of a batch or part that may kill its process in a child process, and reject the rows that do.

    IsolatedSteps     prepares and embeds; rows that kill the child twice are rejected, their neighbours are unaffected
    IsolatedReader    a source that the child reads; where it dies twice at one row, the rest of the file is rejected

* A row has to kill the child twice, since the first death may come from memory that others used up. The reject of a row
  is the same whichever process found it.
* A batch that kills the child in `embed` is halved down to the rows that do it. The others are then embedded together,
  as they would be beside any other reject, so that their numbers are the same bits.
* A file whose reader dies at different rows is read again from its start, without yielding rows twice. It ends at the
  furthest row that any attempt reached, so no readable row is lost.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from img2parquet.batch import Batch, Crops, Embedded, Failed, Prepared, Work
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.inference.steps import Preparer
from img2parquet.isolation.child_process import ChildProcess, Died
from img2parquet.read import PartLimits
from img2parquet.schema import Part, Piece, Reason, Reject, Row
from img2parquet.storage import Entry
from img2parquet.telemetry.stage_timing import StageTime

TRIES = 2
READ_TRIES = 6  # of one file whose reader dies at a different row each time


class IsolatedSteps:
    """Prepares and embeds batches in a child process. Threads may share it; they take turns."""

    def __init__(self, work: Work) -> None:
        self.work, self.child, self.lock = work, ChildProcess(work), threading.Lock()
        self.geometries = tuple({card.preprocess.geometry for card in work.cards.values()})

    def close(self) -> None:
        self.child.close()

    def prepare(self, batch: Batch, suspects: Collection[int] = (), here: Preparer | None = None) -> Prepared:
        """Decode and crop a batch.

        suspects: rows that are decoded alone in the child; here: decodes the others, which else go to the child too."""
        prepared = list[Prepared]()
        for run in _split_into_runs(batch, suspects):
            if run.rows[0].row in suspects:
                prepared.append(self._alone(run))
            elif here:
                prepared.append(here(run))
            else:
                prepared += self._together(run)
        return join_runs(batch, prepared, self.geometries)

    def _together(self, run: Batch) -> list[Prepared]:
        waiting, done = [run], list[tuple[int, Prepared]]()
        while waiting:
            batch = waiting.pop()
            if not batch.rows:
                continue
            try:
                done.append((batch.rows[0].row, self._request("prepare", batch)))
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
                prepared: Prepared = self._request("prepare", single)
                return prepared
            except Died as death:
                deaths += 1
                if deaths == TRIES:
                    reject = _reject(row, "decode", death, self.work.job.resources.image_timeout_s)
                    return Prepared(single.part_index, single.k, (), (), (reject,), {}, None, {})

    def embed(self, prepared: Prepared) -> Embedded | Failed:
        """Embed a batch without the rows that kill the child. Return Failed when it dies, but of no single row."""
        try:
            return self._embed(prepared)
        except Died:
            guilty = self._find_guilty(prepared, range(len(prepared.rows)))
        try:
            return self._embed(without(prepared, guilty))
        except Died as death:
            message = f"batch {prepared.k} killed its process twice ({death.cause}), but none of its rows does so alone"
            return Failed(prepared.part_index, message)

    def _find_guilty(self, prepared: Prepared, places: Sequence[int]) -> dict[int, Reject]:
        """Return rejects for the rows of a batch that kill the child alone as well, by place in the batch."""
        if len(places) == 1:
            return self._check_row(prepared, places[0])
        found: dict[int, Reject] = {}
        for half in (places[: len(places) // 2], places[len(places) // 2 :]):
            try:
                self._embed(only(prepared, half))
            except Died:
                found |= self._find_guilty(prepared, half)
        return found

    def _check_row(self, prepared: Prepared, place: int) -> dict[int, Reject]:
        """Try a single row that has killed the child once."""
        try:
            self._embed(only(prepared, [place]))
        except Died as death:
            limit_s = self.work.job.resources.image_timeout_s
            return {place: _reject(prepared.rows[place], "embed", death, limit_s)}
        return {}

    def _embed(self, prepared: Prepared) -> Embedded | Failed:
        embedded: Embedded | Failed = self._request("embed", prepared)
        return embedded

    def _request(self, task: Literal["prepare", "embed"], item: object) -> Any:
        with self.lock:
            (answer,) = self.child.request(task, item)
            return answer


class IsolatedReader:
    """Reads parts in a child process, as a `Source`; one part at a time."""

    def __init__(self, work: Work) -> None:
        self.source, self.child = work.job.input, ChildProcess(work)
        self.kind = self.source.kind

    def close(self) -> None:
        self.child.close()

    def plan(self, limits: PartLimits, known: Container[Entry] = ()) -> Iterator[tuple[Piece, ...]]:
        return self.source.plan(limits, known)

    def passthrough(self) -> pa.Schema:
        return self.source.passthrough()

    def read(self, part: Part) -> Iterator[Row | Reject]:
        """Yield the rows and rejects of a part. Raises what the source's own `read` raises."""
        first = 0
        for piece in part.pieces:
            for item in self._read_piece(part, piece, first):
                yield item
                first = item.row + 1

    def _read_piece(self, part: Part, piece: Piece, first: int) -> Iterator[Row | Reject]:
        """Yield the rows of one file, numbered from `first`, and rejects for the rest where the child dies of it."""
        given, last, deaths = 0, "", Counter[int]()  # by the row that was next
        while True:
            reached = 0
            try:
                for item in self.child.request("read", Part(part.index, (piece,))):
                    reached += 1
                    if reached > given:
                        given, last = reached, f", after `{item.key}`"
                        yield replace(item, row=first + reached - 1)
                return
            except Died as death:
                deaths[reached] += 1
                if deaths[given] == TRIES or deaths.total() == READ_TRIES:
                    where = f"{deaths.total()} times ({death.cause}), at the furthest at row {given} of it{last}"
                    yield from _faults(piece, first, given, where)
                    return


def _faults(piece: Piece, first: int, given: int, where: str) -> Iterator[Reject]:
    """Yield one reject, or as many as the plan counts rows that are left."""
    message = f"reading this file ended its process {where}; what follows was not read"
    for row in range(given, max(piece.rows or 0, given + 1)):
        yield Reject(first + row, f"row {piece.start + row}", piece.uri, "read", "worker_died", message)


def _reject(row: Row, stage: Literal["decode", "embed"], death: Died, limit_s: float) -> Reject:
    verb = {"decode": "decoding", "embed": "embedding"}[stage]
    reason: Reason = "timed_out" if death.is_late else "worker_died"
    what = f"took longer than {limit_s:g} s, twice" if death.is_late else f"ended its process twice ({death.cause})"
    message = f"{verb} it {what}"
    return Reject(row.row, row.key, row.shard, stage, reason, message, row.offset)


# ---- splitting and joining batches -------------------------------------------------------------------------------


def _split_into_runs(batch: Batch, suspects: Collection[int]) -> Iterator[Batch]:
    """Split a batch into runs, each suspect in one of its own, without what belongs to the batch as a whole."""
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


def join_runs(batch: Batch, parts: Sequence[Prepared], geometries: Sequence[PreprocessSettings]) -> Prepared:
    """Join prepared runs into what a Preparer makes of the whole batch."""
    firsts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    crops = {}
    for geometry in geometries:
        made = [(first, part.crops[geometry]) for first, part in zip(firsts, parts, strict=False) if part.crops]
        empty = np.empty((0, *geometry.shape_HWC), np.uint8)
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


def _sum(spents: Sequence[Mapping[str, StageTime]]) -> dict[str, StageTime]:
    total: dict[str, StageTime] = {}
    for spent in spents:
        for stage, what in spent.items():
            total[stage] = total.get(stage, StageTime()) + what
    return total


def only(prepared: Prepared, places: Sequence[int]) -> Prepared:
    """Keep only the rows at these places in the batch."""
    crops = {}
    for geometry, each in prepared.crops.items():
        kept = [(places.index(index), n) for n, index in enumerate(each.kept) if index in places]
        pixels_BHWC = each.pixels_BHWC[[n for _, n in kept]]
        crops[geometry] = replace(each, kept=tuple(index for index, _ in kept), pixels_BHWC=pixels_BHWC)
    rows, sizes_HW = tuple(prepared.rows[n] for n in places), tuple(prepared.sizes_HW[n] for n in places)
    return replace(prepared, rows=rows, sizes_HW=sizes_HW, crops=crops)


def without(prepared: Prepared, rejects: Mapping[int, Reject]) -> Prepared:
    """Remove the rows at these places, and reject them for every model."""
    left = only(prepared, [n for n in range(len(prepared.rows)) if n not in rejects])
    gone = {reject.row for reject in rejects.values()}  # a model that could not crop such a row has rejected it already
    crops = {
        geometry: replace(each, rejects=tuple(reject for reject in each.rejects if reject.row not in gone))
        for geometry, each in left.crops.items()
    }
    return replace(left, rejects=(*prepared.rejects, *rejects.values()), crops=crops)
