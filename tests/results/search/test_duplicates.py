"""Near-duplicate groups against an independent count of connected rows; the same file each time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.cli import main
from img2parquet.errors import InputError
from img2parquet.results.embeddings import open_vectors
from img2parquet.results.search import duplicates as module
from img2parquet.results.search import index as index_module
from img2parquet.results.search.duplicates import find_duplicates
from img2parquet.results.search.search import search
from tests.support.finished_outputs import make_output, rows_of

IDENTITY = {"outputs": [{"kind": "embedding", "name": "embedding"}]}
THRESHOLD = 0.97


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Three parts; rows around 12 directions, some exactly alike, of different sizes."""
    rng = np.random.default_rng(3)
    centers = rng.standard_normal((12, 24))
    tables = []
    for rows in (40, 1, 59):
        which = rng.integers(0, 12, rows)
        values = (centers[which] + 0.12 * rng.standard_normal((rows, 24))).astype(np.float32)
        values[rows // 2] = values[0]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 24)
        tables.append(pa.table({"embedding": vectors, "width": pa.array(rng.integers(5, 9, rows), pa.int32())}))
    return make_output(str(tmp_path / "out"), IDENTITY, tables)


def groups_by_search(uri: str) -> list[list[int]]:
    """Breadth first over all pairs, in float64."""
    values = np.array([row["embedding"] for row in rows_of(uri)], np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    near = values @ values.T >= THRESHOLD
    left, groups = set(range(len(values))), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {int(j) for i in edge for j in np.flatnonzero(near[i])} - group
        left -= group
        groups += [sorted(group)] if len(group) > 1 else []
    return groups


def read(path: Path) -> dict[int, list[dict[str, object]]]:
    found = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        found[row["group"]].append(row)
    return found


@pytest.mark.parametrize("block_bytes", [1, 3000, 128 << 20])
def test_groups_are_the_connected_rows(
    out: str, tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    to = tmp_path / "dups.parquet"
    found = find_duplicates(out, str(to), THRESHOLD)
    rows, expected = rows_of(out), groups_by_search(out)
    assert [sorted(str(row["key"]) for row in group) for group in read(to).values()] == [
        sorted(rows[i]["key"] for i in group) for group in expected
    ]
    assert len(expected) > 5
    assert (found.rows, found.groups, found.grouped) == (100, len(expected), sum(map(len, expected)))
    assert found.largest == max(map(len, expected)) and found.redundant == found.grouped - found.groups


def test_representatives_and_scores(out: str, tmp_path: Path) -> None:
    to = tmp_path / "dups.parquet"
    find_duplicates(out, str(to), THRESHOLD)
    rows = rows_of(out)
    by_key = {row["key"]: i for i, row in enumerate(rows)}
    values = np.array([row["embedding"] for row in rows], np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for members in read(to).values():
        ids = [by_key[row["key"]] for row in members]
        chosen = [i for i, row in zip(ids, members, strict=True) if row["is_representative"]]
        assert chosen == [max(ids, key=lambda i: (rows[i]["width"] * rows[i]["height"], -i))]
        for i, row in zip(ids, members, strict=True):
            assert row["score"] == pytest.approx(max(values[i] @ values[j] for j in ids if j != i), abs=1e-5)


def test_the_file_is_the_same_each_time_and_never_overwritten(out: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for to in (first, second):
        find_duplicates(out, str(to), THRESHOLD)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(InputError, match="is not overwritten"):
        find_duplicates(out, str(first), 0.5)
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(params=["one small segment", "small segments", "one graph", "graphs"])
def index_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Build an index of one segment or of one per part, which is compared row by row or searched through its graph."""
    if "graph" in request.param:
        monkeypatch.setattr(index_module, "EXACT_ROWS", 0)
    segment_bytes = index_module.SEGMENT_BYTES if "one" in request.param else 1
    return lambda uri: index_module.index_vectors(open_vectors(uri), segment_bytes=segment_bytes)


@pytest.mark.parametrize("pairs_at_once", [1, 1 << 20])
def test_an_index_gives_the_same_groups(
    out: str,
    tmp_path: Path,
    index_of: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
    pairs_at_once: int,
) -> None:
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", pairs_at_once)
    with pytest.raises(InputError, match="img2parquet index"):
        find_duplicates(out, str(tmp_path / "x"), THRESHOLD, index=True)
    index_of(out)
    for threshold in (1.0, 0.99, THRESHOLD):
        exact, fast = tmp_path / f"exact-{threshold}", tmp_path / f"fast-{threshold}"
        find_duplicates(out, str(exact), threshold)
        find_duplicates(out, str(fast), threshold, index=True)
        expected, found = pq.read_table(exact), pq.read_table(fast)
        assert found.drop(["score"]).equals(expected.drop(["score"]))
        np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), atol=1e-6)


@pytest.mark.parametrize("width", [3, 24, 2048])
def test_equal_rows_are_found_at_threshold_one(tmp_path: Path, width: int, index_of: Callable[[str], object]) -> None:
    """The cosine of two equal vectors is rarely exactly 1, and half precision is further away."""
    values = np.random.default_rng(width).standard_normal((12, width)).astype(np.float32)
    half = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    out = make_output(str(tmp_path / "out"), IDENTITY, [pa.table({"embedding": half})] * 2)
    index_of(out)
    for index in (False, True):
        found = find_duplicates(out, str(tmp_path / f"{index}.parquet"), 1.0, index=index)
        assert (found.groups, found.grouped, found.largest) == (12, 24, 2)


def test_pairs_at_the_threshold_are_the_same_with_an_index(tmp_path: Path, index_of: Callable[[str], object]) -> None:
    """Cosines on both sides of the threshold, closer to it than half precision can tell."""
    cosines = 0.9 + np.linspace(-2e-4, 2e-4, 21)
    directions = np.linalg.qr(np.random.default_rng(4).standard_normal((64, 64)))[0]
    first, second = directions[:21], directions[21:42]
    turned = cosines[:, None] * first + np.sqrt(1 - cosines**2)[:, None] * second
    tables = [
        pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.float32(v).reshape(-1)), 64)})
        for v in (first, turned)
    ]
    out = make_output(str(tmp_path / "out"), IDENTITY, tables)
    index_of(out)
    for index in (False, True):
        found = find_duplicates(out, str(tmp_path / f"{index}.parquet"), 0.9, index=index)
        assert found.groups == int((cosines >= 0.9 - 1e-6).sum())


def test_search_through_an_index_finds_equal_rows(tmp_path: Path, index_of: Callable[[str], object]) -> None:
    values = np.random.default_rng(5).standard_normal((12, 24)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 24)
    out = make_output(str(tmp_path / "out"), IDENTITY, [pa.table({"embedding": vectors})] * 3)
    index_of(out)
    for row in range(12):
        exact, fast = (search(out, key=f"0/{row}", k=5, exact=exact) for exact in (True, False))
        assert (exact.how, fast.how) == ("exact", "index") and exact.hits == fast.hits
        assert [hit.key for hit in fast.hits[:2]] == [f"1/{row}", f"2/{row}"]


def test_no_duplicates_and_too_many_rows(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["duplicates", out, "--threshold", "1.0", "--to", str(tmp_path / "same.parquet")])
    same = read(tmp_path / "same.parquet")
    assert len(same) == 2 and all(len(group) == 2 for group in same.values())  # each part's row that was made alike
    monkeypatch.setattr(module, "MOST_EXACT_ROWS", 99)
    with pytest.raises(InputError, match="--index"):
        find_duplicates(out, str(tmp_path / "x.parquet"), THRESHOLD)
    assert find_duplicates(out, str(tmp_path / "x.parquet"), THRESHOLD, exact=True).rows == 100
    with pytest.raises(InputError, match="--threshold"):
        find_duplicates(out, str(tmp_path / "y.parquet"), 95)
