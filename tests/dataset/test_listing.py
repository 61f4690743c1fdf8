"""Compact forms of plans, listings and footers answer as plain objects would, in a few bytes per part."""

from __future__ import annotations

import tracemalloc

import pytest

from img2parquet.dataset.footer import Footer, Footers
from img2parquet.dataset.generations import History
from img2parquet.dataset.listing import Listing
from img2parquet.dataset.packed_parts import Parts, joined
from img2parquet.dataset.plan import Plan, decode_plan, encode_plan
from img2parquet.schema import Part, Piece
from img2parquet.storage import Entry

COUNT, FIRST = 300, 7


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Make 300 parts of one or two pieces, whose indices continue another plan's."""
    parts = (
        Part(FIRST + n, tuple(Piece(f"s3://b/{n}-{m}.tar", 10 + m, f"e{n}", rows=5) for m in range(1 + n % 2)))
        for n in range(COUNT)
    )
    return Plan(tuple(parts), {"a": {"seed": 1}, "b": {"seed": 2}})


def test_a_stored_plan_gives_the_same_parts_and_names(plan: Plan) -> None:
    stored = decode_plan(encode_plan(plan))
    assert stored == plan and encode_plan(stored) == encode_plan(plan)
    assert [stored.parts[n] for n in (0, 299, -1, 70, 3)] == [plan.parts[n] for n in (0, 299, -1, 70, 3)]
    assert tuple(stored.parts[5:90:7]) == plan.parts[5:90:7]
    assert list(stored.names["b"]) == [plan.file_name("b", part) for part in plan.parts]
    assert stored.names["a"][2:4] == tuple(plan.file_name("a", part) for part in plan.parts[2:4])
    assert [(m, p.index, n) for m, p, n in stored.files()] == list(stored.indexed()) == list(plan.indexed())
    assert stored.rows == plan.rows and stored.by_index[FIRST + 5] == plan.parts[5]
    with pytest.raises(IndexError):
        stored.parts[COUNT]
    with pytest.raises(KeyError):
        stored.by_index[FIRST - 1]
    halves = [Parts.of(plan.parts[:100]), plan.parts[100:]]
    assert tuple(joined(halves)) == plan.parts


def test_what_is_left_is_said_by_part_and_model(plan: Plan) -> None:
    there = set(plan.names["a"][:10]) | set(plan.names["b"][5:10])
    left = plan.left(there)
    assert left[FIRST] == ("b",) and FIRST + 7 not in left and left[FIRST + 10] == ("a", "b") and len(left) == 295


def entries(plan: Plan, folder: str) -> list[Entry]:
    named = [
        *plan.names_by_part(),
        "_plan.parquet",
        "model=a/other.txt",
        "model=a/part-0000001-" + "0" * 16 + ".parquet",
    ]
    retried = plan.names["a"][0].replace(".parquet", "-retry2.parquet")
    return [Entry(f"{folder}/{name}", n, f"etag {n}") for n, name in enumerate([*named, retried])]


def test_a_listing_is_a_mapping_of_every_name_to_its_entry(plan: Plan) -> None:
    plain = {entry.uri.removeprefix("s3://b/out/"): entry for entry in entries(plan, "s3://b/out")}
    listing = Listing("s3://b/out", reversed(plain.values()))
    assert dict(listing) == plain and len(listing) == len(plain) and set(listing.keys()) == set(plain)
    parts = [name for name in listing if "/part-0000" in name and "retry" not in name and "-0000001-" not in name]
    assert parts == sorted(parts)
    for name in ("", "model=a", "model=c/part-000007-" + "0" * 16 + ".parquet", plan.names["a"][0] + "x"):
        assert name not in listing
    moved = plan.names["a"][0].replace("model=a", "model=b")
    assert moved not in listing and plan.names["a"][1].replace(".parquet", "-retry2.parquet") not in listing
    with pytest.raises(KeyError):
        listing[moved]


def test_footers_are_those_that_were_added(plan: Plan) -> None:
    footers = Footers(plan)
    made = {
        name: Footer(
            plan.identity("a"), FIRST + n, 9, 9 - n % 2, "some" if n % 2 else "none", bytes([n % 250 + 1] * 32)
        )
        for n, name in enumerate(plan.names["a"][:200])
    }
    for name, footer in made.items():
        footers.add(name, footer)
    assert dict(footers) == made and len(footers) == 200
    for name in (plan.names["a"][200], plan.names["b"][0], plan.names["a"][0].replace(".p", "-retry1.p"), "_run.json"):
        assert name not in footers


def test_a_history_knows_its_own_names(plan: Plan) -> None:
    history = History(plan)
    assert all(name in history for name in plan.names_by_part())
    other = plan.names["a"][3].replace("part-000010", "part-000011")
    assert other not in history and "model=c/" + plan.names["a"][3][8:] not in history and "_run.json" not in history


def test_a_part_costs_a_driver_few_bytes() -> None:
    """Measure a plan, its names, the listing and the footers of ten thousand parts: 2.5 kB each as plain objects."""
    count = 10_000
    made = Parts.of(Part(n, (Piece(f"s3://bucket/shards/{n:06d}.tar", 1 << 30, f"{n:032x}"),)) for n in range(count))
    data = encode_plan(Plan(made, {"a": {"seed": 1}}))
    tracemalloc.start()
    try:
        plan = decode_plan(data)
        listing = Listing("s3://b/out", (Entry(f"s3://b/out/{name}", 9, "0" * 32) for name in plan.names_by_part()))
        footers = Footers(plan)
        for n, name in enumerate(plan.names_by_part()):
            footers.add(name, Footer(plan.identity("a"), n, 9, 9, "none", b"d" * 32))
        held = tracemalloc.get_traced_memory()[0] + plan.parts.table.nbytes  # type: ignore[attr-defined]
    finally:
        tracemalloc.stop()
    assert len(listing) == len(footers) == count and held < 400 * count
