"""Commits create each object exactly once, whatever the store answers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from img2parquet.dataset import commit
from img2parquet.dataset.commit import PUT_TRIES, Output
from img2parquet.dataset.listing import parse_name
from img2parquet.dataset.plan import Plan, decode_plan, encode_plan, plan_hash
from img2parquet.errors import AccessDenied, AlreadyExists, NotFound, OutcomeUnknown, RunMismatch, StorageError
from img2parquet.schema import Part, Piece
from img2parquet.storage import Entry, Store, join


@dataclass(frozen=True)
class Flaky(Store):
    """An in-memory store whose next creations answer as `script` says."""

    script: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def create(self, uri: str, data: bytes) -> None:
        self.calls.append("create")
        told = self.script.pop(0) if self.script else "ok"
        if told == "down":
            raise StorageError("503 SlowDown")
        if told == "denied":
            raise AccessDenied("403")
        if told == "lost_before":
            raise OutcomeUnknown("timed out")
        if uri in self.objects and told != "lost_after":
            raise AlreadyExists("412")
        self.objects.setdefault(uri, data)
        if told == "lost_after":
            raise OutcomeUnknown("the reply was lost")

    def exists(self, uri: str) -> bool:
        self.calls.append("exists")
        return uri in self.objects

    def read(self, uri: str, start: int = 0, stop: int | None = None, *, expect: Entry | None = None) -> bytes:
        if uri not in self.objects:
            raise NotFound(uri)
        return self.objects[uri][start:stop]

    def scan(self, uri: str) -> Iterator[Entry]:
        return (Entry(name, len(data), "e") for name, data in sorted(self.objects.items()) if name.startswith(uri))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit.time, "sleep", lambda seconds: None)


def output(*script: str) -> Output:
    return Output(Flaky(script=list(script)), "memory://out")


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ([], "created"),
        (["lost_after"], "done"),
        (["lost_before"], "created"),
        (["down", "down", "lost_before", "lost_after"], "done"),
        (["down"] * (PUT_TRIES - 1), "created"),
    ],
)
def test_put_once(script: list[str], outcome: str) -> None:
    out = output(*script)
    assert out.put_once("a", b"1") == outcome
    assert out.store.read("memory://out/a") == b"1"


@pytest.mark.parametrize("earlier", [None, b"another driver's"])
def test_an_unknown_outcome_is_looked_up_before_the_next_try(earlier: bytes | None) -> None:
    """Where every reply is lost, no try would ever hear that the object exists."""
    out = output(*["lost_after"] * PUT_TRIES)
    if earlier:
        out.store.objects["memory://out/a"] = earlier  # type: ignore[attr-defined]
    assert out.put_once("a", b"1") == "done"
    assert out.store.calls == ["create", "exists"]  # type: ignore[attr-defined]
    assert out.create_or_read("a", b"2") == earlier or b"1"


def test_tries_wait_longer_each_time_and_not_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr(commit.time, "sleep", waits.append)
    monkeypatch.setattr(commit.random, "random", lambda: 0.75)
    with pytest.raises(OutcomeUnknown):
        output(*["down"] * PUT_TRIES).put_once("a", b"1")
    assert len(waits) == PUT_TRIES and waits == sorted(waits)
    assert 0 < waits[0] < 0.1 and 1 < waits[-1] < 2 and 4 * waits[0] == pytest.approx(waits[2])


def test_a_look_that_fails_is_not_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(store: Store, uri: str) -> bool:
        raise StorageError("503 SlowDown")

    monkeypatch.setattr(Flaky, "exists", down)
    assert output("lost_before", "down").put_once("a", b"1") == "created"
    assert output("lost_before", "lost_after").put_once("a", b"1") == "done"


def test_what_is_there_is_never_written_over() -> None:
    out = output()
    out.put_once("a", b"first")
    assert out.put_once("a", b"second") == "done"
    assert out.store.read("memory://out/a") == b"first"


def test_a_store_that_never_answers_is_an_error_that_says_so() -> None:
    with pytest.raises(OutcomeUnknown, match="503 SlowDown"):
        output(*["down"] * PUT_TRIES).put_once("a", b"1")


def test_forbidden_is_not_tried_again() -> None:
    out = output("denied")
    with pytest.raises(AccessDenied):
        out.put_once("a", b"1")
    assert out.store.calls == ["create"]  # type: ignore[attr-defined]


def test_many_writers_one_winner(output_root: str) -> None:
    """On real stores, 12 threads create one name."""
    out = Output.at(output_root)
    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(lambda n: out.put_once("part", str(n).encode() * 1000), range(12)))
    assert sorted(outcomes) == ["created"] + ["done"] * 11
    winner = outcomes.index("created")
    assert out.store.read(join(out.uri, "part")) == str(winner).encode() * 1000


def test_what_killed_writers_left_on_a_disk_is_removed_after_a_day(tmp_path: Path) -> None:
    out = Output.at(str(tmp_path / "out"))
    out.put_once("model=m/part", b"1")
    old, new = (tmp_path / "out" / "model=m" / f".part.tmp-{c * 32}" for c in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 25 * 3600))
    out.check_store()
    assert sorted(path.name for path in old.parent.iterdir()) == [new.name, "part"]


def plan(seed: int = 0, parts: int = 3) -> Plan:
    return Plan(
        tuple(Part(i, (Piece(f"s3://b/{seed}/{i}.tar", 10 + i, f"e{i}", 0, None, 5),)) for i in range(parts)),
        {"m": {"dtype": "float32", "seed": seed}},
    )


def test_a_plan_survives_its_file() -> None:
    data = encode_plan(plan())
    assert decode_plan(data) == plan()
    assert encode_plan(plan()) == data
    assert plan_hash(data) != plan_hash(encode_plan(plan(1)))


def test_a_part_is_named_by_what_it_covers_and_the_identity() -> None:
    first, other = plan(), plan(1)
    assert first.file_name("m", first.parts[0]) != other.file_name("m", first.parts[0])
    moved = Part(9, first.parts[0].pieces)
    assert moved.covers == first.parts[0].covers
    assert parse_name(first.file_name("m", first.parts[2])) == ("m", 2, first.parts[2].id(first.identity("m")))
    assert parse_name("model=m/part-1.parquet") is None


def test_the_first_plan_wins() -> None:
    out = output()
    kept, digest = out.begin(plan().identities, plan)
    again, same = out.begin(plan().identities, lambda: pytest.fail("planned again"))
    assert (kept, digest) == (again, same) == (plan(), digest)


def test_a_driver_that_loses_the_race_takes_the_winners_plan() -> None:
    out = output()
    winner = plan(parts=2)

    def slow_planner() -> Plan:
        out.put_once("_plan.parquet", encode_plan(winner))
        return plan(parts=3)

    assert out.begin(plan().identities, slow_planner)[0] == winner


def test_a_plan_of_another_identity_is_refused() -> None:
    out = output()
    out.begin(plan().identities, plan)
    with pytest.raises(RunMismatch, match="seed: 1, was 0"):
        out.begin(plan(1).identities, lambda: plan(1))


def test_a_run_record_of_another_plan_is_refused() -> None:
    out = output()
    _, digest = out.begin(plan().identities, plan)
    record = {"plan_sha256": digest, "batch_size": 8}
    assert out.record_run(record) == record
    assert out.record_run({**record, "batch_size": 16})["batch_size"] == 8  # the first record's value is reused
    with pytest.raises(RunMismatch):
        out.record_run({**record, "plan_sha256": "0"})


@pytest.fixture
def listing() -> Iterator[Output]:
    yield output()


def test_files_of_partitions_count_that_some_reader_sees(listing: Output) -> None:
    store = listing.store
    for name in (
        "_plan.parquet",
        "model=m/part-000000-0123456789abcdef.parquet",
        "model=m/.part.tmp-1",
        "model=m/.y.parquet",
        "model=m/_deep/y.parquet",
        "_other/y.parquet",
        "model=m/_x",
        "y",
    ):
        store.create(f"memory://out/{name}", b"1")
    assert list(listing.part_files()) == [
        "model=m/.y.parquet",
        "model=m/_deep/y.parquet",
        "model=m/part-000000-0123456789abcdef.parquet",
    ]
