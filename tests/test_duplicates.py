"""Near-duplicate groups against an independent count of connected rows; the same file each time."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import duplicates as module
from pipeline.cli import main
from pipeline.duplicates import duplicates
from pipeline.embeddings import open_vectors
from pipeline.errors import InputError
from pipeline.index import build
from tests.finished import make_output, rows_of

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
    found = duplicates(open_vectors(out), str(to), THRESHOLD)
    rows, expected = rows_of(out), groups_by_search(out)
    assert [sorted(str(row["key"]) for row in group) for group in read(to).values()] == [
        sorted(rows[i]["key"] for i in group) for group in expected
    ]
    assert len(expected) > 5
    assert (found.rows, found.groups, found.grouped) == (100, len(expected), sum(map(len, expected)))
    assert found.largest == max(map(len, expected)) and found.redundant == found.grouped - found.groups


def test_representatives_and_scores(out: str, tmp_path: Path) -> None:
    to = tmp_path / "dups.parquet"
    duplicates(open_vectors(out), str(to), THRESHOLD)
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
        duplicates(open_vectors(out), str(to), THRESHOLD)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(InputError, match="nothing is overwritten"):
        duplicates(open_vectors(out), str(first), 0.5)
    assert first.read_bytes() == second.read_bytes()


def test_by_the_index(out: str, tmp_path: Path) -> None:
    exact, fast = tmp_path / "exact.parquet", tmp_path / "fast.parquet"
    with pytest.raises(InputError, match="img2parquet index"):
        duplicates(open_vectors(out), str(fast), THRESHOLD, index=True)
    build(open_vectors(out))
    duplicates(open_vectors(out), str(exact), THRESHOLD)
    duplicates(open_vectors(out), str(fast), THRESHOLD, index=True)
    assert pq.read_table(fast).column("key").equals(pq.read_table(exact).column("key"))
    assert pq.read_table(fast).column("group").equals(pq.read_table(exact).column("group"))


def test_no_duplicates_and_too_many_rows(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["duplicates", out, "--threshold", "1.0", "--to", str(tmp_path / "same.parquet")])
    same = read(tmp_path / "same.parquet")
    assert len(same) == 2 and all(len(group) == 2 for group in same.values())  # each part's row that was made alike
    monkeypatch.setattr(module, "MOST_EXACT_ROWS", 99)
    with pytest.raises(InputError, match="--index"):
        duplicates(open_vectors(out), str(tmp_path / "x.parquet"), THRESHOLD)
    assert duplicates(open_vectors(out), str(tmp_path / "x.parquet"), THRESHOLD, exact=True).rows == 100
    with pytest.raises(InputError, match="--threshold"):
        duplicates(open_vectors(out), str(tmp_path / "y.parquet"), 95)
