"""Rows that kill a scripted child process are rejected, and their neighbours are not."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from img2parquet.batch import Batch, Embedded, Failed, Prepared, Work, split_into_batches
from img2parquet.dataset.plan import make_plan
from img2parquet.errors import JobFailed, PartFailed
from img2parquet.inference.capabilities import probe_capabilities
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.isolation.child_process import ChildProcess, Died
from img2parquet.isolation.isolated_steps import IsolatedReader, IsolatedSteps, only, without
from img2parquet.schema import Part, Piece, Reject, Row
from tests.support.small_job import make_checkpoint, make_shards, small_job


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("isolated")
    make_shards(folder / "in", shards=2)
    job = small_job(f"{folder}/in/*.tar", make_checkpoint(folder / "model"), str(folder / "out"))
    found = probe_capabilities(job)
    return Work(job, found.cards, found.dtype, found.device, batch_size=10, threads=1)


@pytest.fixture(scope="module")
def part(work: Work) -> Part:
    return make_plan(work.job, work.cards, work.dtype).parts[0]


@pytest.fixture(scope="module")
def batch(work: Work, part: Part) -> Batch:
    """Return the first batch of its part, with a row that is rejected anyway (`tests.support.small_job.BROKEN`)."""
    first = next(split_into_batches(work.job.input, part, work.batch_size))
    assert isinstance(first, Batch)
    return first


class Scripted:
    """Stands in for a child process: works in this process, and dies where `kills` names a culprit."""

    def __init__(self, work: Work, kills: Callable[[str, list[int]], int | None], code: int = -signal.SIGSEGV) -> None:
        self.steps: dict[str, Any] = {"prepare": Preparer(work), "embed": Embedder(work)}
        self.kills, self.code, self.requests = kills, code, list[list[int]]()

    def request(self, task: str, item: Batch | Prepared) -> Iterator[object]:
        rows = [row.row for row in item.rows]
        self.requests.append(rows)
        culprit = self.kills(task, rows)
        if culprit is not None:
            raise Died(self.code, culprit if task == "prepare" else None)
        yield self.steps[task](item)


def isolated(work: Work, guilty: set[int], code: int = -signal.SIGSEGV) -> IsolatedSteps:
    made = IsolatedSteps(work)
    made.child = Scripted(work, lambda _, rows: next((row for row in rows if row in guilty), None), code)  # type: ignore[assignment]
    return made


def same(one: Prepared, other: Prepared) -> None:
    assert (one.rows, one.sizes_HW, one.rows_in) == (other.rows, other.sizes_HW, other.rows_in)
    assert sorted(one.rejects, key=lambda r: r.row) == sorted(other.rejects, key=lambda r: r.row)
    assert one.crops.keys() == other.crops.keys()
    for geometry, crops in one.crops.items():
        assert crops.kept == other.crops[geometry].kept and crops.rejects == other.crops[geometry].rejects
        assert np.array_equal(crops.pixels_BHWC, other.crops[geometry].pixels_BHWC)


@pytest.mark.parametrize("suspects", [set(), {4}, {0, 3, 9}, set(range(10))])
def test_innocents_are_what_they_would_have_been(work: Work, batch: Batch, suspects: set[int]) -> None:
    here = Preparer(work)
    same(isolated(work, set()).prepare(batch, suspects), here(batch))
    same(isolated(work, set()).prepare(batch, suspects, here), here(batch))


@pytest.mark.parametrize("guilty", [{4}, {0, 9}, {1, 2, 3}, set(range(10))])
def test_the_guilty_are_rejected_and_their_neighbours_are_not(work: Work, batch: Batch, guilty: set[int]) -> None:
    isolated_steps = isolated(work, guilty)
    prepared = isolated_steps.prepare(batch)
    left = replace(batch, rows=tuple(row for row in batch.rows if row.row not in guilty))
    rejects = [reject for reject in prepared.rejects if reject.row in guilty]
    same(replace(prepared, rejects=tuple(r for r in prepared.rejects if r.row not in guilty)), Preparer(work)(left))
    assert {(r.row, r.stage, r.reason, r.message) for r in rejects} == {
        (row, "decode", "worker_died", "decoding it ended its process twice (SIGSEGV)") for row in guilty
    }
    requests = Counter(rows[0] for rows in isolated_steps.child.requests if len(rows) == 1)  # type: ignore[attr-defined]
    assert all(requests[row] <= 2 for row in guilty)


def test_what_is_said_does_not_depend_on_who_suspected(work: Work, batch: Batch) -> None:
    found = isolated(work, {4}).prepare(batch)
    same(isolated(work, {4}).prepare(batch, {4}, Preparer(work)), found)
    same(isolated(work, {4}).prepare(batch, {3, 4, 5}), found)


def test_late_is_another_reason(work: Work, batch: Batch) -> None:
    (reject,) = [r for r in isolated(work, {4}, -signal.SIGALRM).prepare(batch).rejects if r.row == 4]
    assert (reject.reason, reject.message) == ("timed_out", "decoding it took longer than 60 s, twice")


def test_one_death_is_no_proof(work: Work, batch: Batch) -> None:
    deaths = iter([4, None, 7])
    isolated_steps = IsolatedSteps(work)
    isolated_steps.child = Scripted(work, lambda _, rows: next(deaths, None))  # type: ignore[assignment]
    same(isolated_steps.prepare(batch), Preparer(work)(batch))


def test_an_embedding_is_halved_down_to_its_culprits(work: Work, batch: Batch) -> None:
    prepared = Preparer(work)(batch)
    guilty = {prepared.rows[0].row, prepared.rows[5].row}
    embedded = isolated(work, guilty).embed(prepared)
    assert isinstance(embedded, Embedded)
    rejects = {r.row: r for r in embedded.rejects["tiny"] if r.stage == "embed"}
    assert rejects.keys() == guilty and rejects[min(guilty)].message == "embedding it ended its process twice (SIGSEGV)"
    # the same bits as beside an ordinary reject: the others in one batch
    beside = Embedder(work)(only(prepared, [n for n, row in enumerate(prepared.rows) if row.row not in guilty]))
    assert isinstance(beside, Embedded) and embedded.tables["tiny"].equals(beside.tables["tiny"])
    assert embedded.images == 10


def test_a_batch_that_dies_only_as_a_whole_fails_its_part(work: Work, batch: Batch) -> None:
    isolated_steps = IsolatedSteps(work)
    isolated_steps.child = Scripted(work, lambda task, rows: 0 if task == "embed" and len(rows) > 5 else None)  # type: ignore[assignment]
    failed = isolated_steps.embed(Preparer(work)(batch))
    assert isinstance(failed, Failed) and "none of its rows does so alone" in failed.message


def test_a_row_that_one_model_could_not_crop_is_counted_once(work: Work, batch: Batch) -> None:
    prepared = Preparer(work)(batch)
    (geometry,) = prepared.crops
    row = prepared.rows[2]
    uncropped = Reject(row.row, row.key, row.shard, "preprocess", "aspect_ratio", "thin")
    crops = replace(only(prepared, [0, 1]).crops[geometry], rejects=(uncropped,))
    guilty = Reject(row.row, row.key, row.shard, "embed", "worker_died", "")
    left = without(replace(prepared, crops={geometry: crops}), {2: guilty})
    rejects = [*left.rejects, *left.crops[geometry].rejects]
    assert [reject for reject in rejects if reject.row == row.row] == [guilty]


# ---- reading -----------------------------------------------------------------------------------------------------


class Reader:
    """Stands in for a child that reads; its nth attempt at a file dies after `dies_after[n]` rows of it."""

    def __init__(self, work: Work, dies_after: list[int | None]) -> None:
        self.work, self.dies_after, self.attempts = work, iter(dies_after), 0

    def request(self, task: str, part: Part) -> Iterator[object]:
        self.attempts += 1
        after = next(self.dies_after, None)
        for n, item in enumerate(self.work.job.input.read(part)):
            if n == after:
                raise Died(-signal.SIGABRT, None)
            yield item


def read(work: Work, part: Part, dies_after: list[int | None]) -> tuple[list[Row | Reject], int]:
    source = IsolatedReader(work)
    source.child = reader = Reader(work, dies_after)  # type: ignore[assignment]
    return list(source.read(part)), reader.attempts


def test_a_file_that_kills_its_reader_keeps_the_rows_before_it(work: Work, part: Part) -> None:
    whole = list(work.job.input.read(part))
    items, attempts = read(work, part, [7, 7])
    fault = items.pop()
    assert items == whole[:7] and attempts == 2
    assert isinstance(fault, Reject)
    assert (fault.row, fault.key, fault.stage, fault.reason) == (7, "row 7", "read", "worker_died")
    assert fault.message == (
        "reading this file ended its process 2 times (SIGABRT), at the furthest at row 7 of it, after `000/0006`; "
        "what follows was not read"
    )


@pytest.mark.parametrize(
    ("dies_after", "rows", "attempts"),
    [
        ([7], 20, 2),
        ([7, 3, 12], 20, 4),
        ([7, 12, 12], 12, 3),
        ([12, 7, 12], 12, 3),
        ([0, 0], 0, 2),
        ([5, 4, 3, 2, 1, 0], 5, 6),
    ],
)
def test_no_row_that_any_attempt_read_is_lost(
    work: Work, part: Part, dies_after: list[int | None], rows: int, attempts: int
) -> None:
    whole = list(work.job.input.read(part))
    items, made = read(work, part, dies_after)
    assert items[:rows] == whole[:rows] and made == attempts
    assert len(items) == rows + (rows < len(whole))


def test_the_next_file_of_the_part_is_read(work: Work, part: Part) -> None:
    other = make_plan(work.job, work.cards, work.dtype).parts[1].pieces[0]
    second = list(work.job.input.read(Part(0, (other,))))
    items, _ = read(work, Part(0, (*part.pieces, other)), [7, 7])
    assert [item.row for item in items] == list(range(8 + len(second)))
    assert [item.key for item in items[8:]] == [item.key for item in second]


def test_where_the_plan_has_counted_each_row_is_a_fault(work: Work, part: Part) -> None:
    counted = replace(part.pieces[0], rows=20)
    items, _ = read(work, Part(0, (counted,)), [17, 17])
    assert [(item.row, item.key) for item in items[17:]] == [(17, "row 17"), (18, "row 18"), (19, "row 19")]
    *_, last = split_into_batches(_source(work, [17, 17]), Part(0, (counted,)), 10)
    assert isinstance(last, Batch) and last.rows_in == 20


def _source(work: Work, dies_after: list[int | None]) -> IsolatedReader:
    source = IsolatedReader(work)
    source.child = Reader(work, dies_after)  # type: ignore[assignment]
    return source


# ---- the process itself ------------------------------------------------------------------------------------------


def test_a_real_child_does_what_its_owner_would(work: Work, part: Part, batch: Batch) -> None:
    isolated_steps, source = IsolatedSteps(work), IsolatedReader(work)
    try:
        prepared = isolated_steps.prepare(batch)
        same(prepared, Preparer(work)(batch))
        embedded, here = isolated_steps.embed(prepared), Embedder(work)(prepared)
        assert isinstance(embedded, Embedded) and isinstance(here, Embedded)
        assert embedded.tables["tiny"].equals(here.tables["tiny"])
        assert list(source.read(part)) == list(work.job.input.read(part))
        with pytest.raises(PartFailed):
            list(source.read(Part(0, (Piece("/nowhere.tar", 10, "etag"),))))
        assert len(list(source.read(part))) == 20  # an error is an answer too: the process lives on
    finally:
        isolated_steps.close()
        source.close()


def test_a_child_that_was_killed_is_restarted(work: Work, part: Part) -> None:
    child = ChildProcess(work)
    try:
        rows = child.request("read", part)
        next(rows)
        assert child.process
        child.process.kill()
        with pytest.raises(Died, match="SIGKILL"):
            list(rows)
        assert len(list(child.request("read", part))) == 20
        next(child.request("read", part))  # not read to its end
        assert child.process is None
    finally:
        child.close()


def test_a_child_that_cannot_begin_is_nobodys_fault(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2parquet.isolation.child_process.sys.executable", "/bin/false")
    with pytest.raises(JobFailed, match="died 3 times before it was given any work: exit code 1"):
        list(ChildProcess(work).request("prepare", None))


def test_a_child_ends_with_its_owner(work: Work, part: Part, tmp_path: Path) -> None:
    child = ChildProcess(work)
    next(child.request("read", part), None)
    list(child.request("read", part))
    assert child.process and child.process.stdin
    process = child.process
    process.stdin.close()  # as its owner's death does
    assert process.wait(30) == 0
    child.process = None
