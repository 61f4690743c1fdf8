"""The index: grown part by part, never half, never of two runs; what it finds against brute force."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import img2parquet.results.search.index
from img2parquet.errors import InputError, MissingDependency, RunMismatch, StorageError
from img2parquet.results.embeddings import open_vectors
from img2parquet.results.search.index import _grow, build_index, index_vectors, open_index
from img2parquet.results.search.search import search_vectors
from img2parquet.storage import Store, join
from tests.support.finished_outputs import copy_of, part_paths, rows_of, small_run


@pytest.fixture
def out(tmp_path: Path) -> str:
    return copy_of(small_run(), tmp_path / "out")


@pytest.fixture
def by_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small segments are asked as large ones are."""
    monkeypatch.setattr(img2parquet.results.search.index, "EXACT_ROWS", 0)


def index_files(uri: str) -> list[str]:
    return sorted(path.name for path in Path(uri, "_index-tiny").iterdir())


def test_build_measures_recall_and_a_second_build_does_nothing(out: str) -> None:
    built = build_index(out)
    assert (built.generation, built.rows, built.parts, built.parts_added) == (1, len(rows_of(out)), 6, 6)
    assert built.recall == 1.0 and built.recall_rows == built.rows
    before = index_files(out)
    again = build_index(out)
    assert (again.generation, again.parts_added) == (1, 0) and index_files(out) == before


def test_new_parts_are_added_and_searched_before_they_are(out: str, tmp_path: Path) -> None:
    late = part_paths(out)[4:]
    for path in late:
        shutil.move(path, tmp_path / path.name)
    assert build_index(out).parts == 4
    for path in late:
        shutil.move(tmp_path / path.name, path)
    vectors = open_vectors(out)
    _, query_D = vectors.vector(rows_of(out)[-1]["key"])
    fresh = search_vectors(vectors, query_D, 5)
    assert fresh.how == "index" and fresh.not_indexed == (4, 5) and fresh.hits[0].score == pytest.approx(1, abs=1e-6)
    built = index_vectors(vectors)
    assert (built.generation, built.parts, built.parts_added, built.segments) == (2, 6, 2, 1)
    assert search_vectors(vectors, query_D, 5).hits == fresh.hits
    index = open_index(vectors)
    assert index and sorted(index.parts) == [0, 1, 2, 3, 4, 5] and index.rows == len(rows_of(out))


def test_many_segments_find_what_brute_force_finds(out: str) -> None:
    vectors = open_vectors(out)
    built = index_vectors(vectors, segment_bytes=1)
    assert built.segments == 6 and built.generation == 6 and built.recall == 1.0
    for row in rows_of(out)[::23]:
        place, query_D = vectors.vector(row["key"])
        found, exact = search_vectors(vectors, query_D, 7), search_vectors(vectors, query_D, 7, exact=True)
        assert found.how == "index" and exact.how == "exact" and found.hits == exact.hits
        assert exact.hits[0].key == row["key"] and place >= 0


def test_the_graph_finds_nearly_all_that_brute_force_finds(out: str, by_graph: None) -> None:
    """Not all of it on every CPU: these vectors lie close together, and some kernels add up in half precision."""
    vectors = open_vectors(out)
    built = index_vectors(vectors, segment_bytes=30_000)
    assert (
        built.segments > 1 and built.recall is not None and built.recall > 0.9
    )  # what kernels in half precision reach
    for row in rows_of(out)[::23]:
        hits = search_vectors(vectors, vectors.vector(row["key"])[1], 7).hits
        assert len(hits) == 7 and hits[0].score == pytest.approx(1, abs=2e-3)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_up_to_so_many_rows_a_segment_is_compared_and_beyond_them_its_graph_asked(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, asked, by_graph = open_vectors(out), list[int](), img2parquet.results.search.index._by_graph
    index_vectors(vectors, segment_bytes=1)  # a segment for each part
    rows = [pq.read_metadata(path).num_rows for path in part_paths(out)]
    query_D = vectors.vector(rows_of(out)[0]["key"])[1]
    monkeypatch.setattr(
        img2parquet.results.search.index, "_by_graph", lambda *given: asked.append(given[2]) or by_graph(*given)
    )
    monkeypatch.setattr(img2parquet.results.search.index, "EXACT_ROWS", max(rows))
    monkeypatch.setattr(img2parquet.results.search.index, "EXACT_BLOCK", 7)  # no divisor of a segment's rows
    assert (
        search_vectors(vectors, query_D, 7).hits == search_vectors(vectors, query_D, 7, exact=True).hits and not asked
    )
    monkeypatch.setattr(img2parquet.results.search.index, "EXACT_ROWS", max(rows) - 1)
    search_vectors(vectors, query_D, 2)
    assert asked == [2 + 1 + 10] * rows.count(max(rows)) and len(asked) < len(rows)


def test_only_the_last_two_manifests_stay_with_what_they_name(out: str) -> None:
    index_vectors(open_vectors(out), segment_bytes=30_000)  # some parts to a segment, several generations
    names = index_files(out)
    manifests = [name for name in names if name.startswith("manifest")]
    assert len(manifests) == 2
    said = [json.loads(Path(out, "_index-tiny", name).read_text()) for name in manifests]
    assert {s["file"] for one in said for s in one["segments"]} == set(names) - set(manifests)


def test_of_two_builders_one_is_first_and_the_other_takes_its_index(out: str) -> None:
    vectors = open_vectors(out)
    index_vectors(vectors, segment_bytes=1)
    stale = open_index(vectors)
    assert stale
    before = json.loads(Path(out, "_index-tiny", "manifest-000006.json").read_text())
    object.__setattr__(stale, "generation", 5)  # it has not seen the sixth
    taken = _grow(stale, vectors, [5], 1)
    assert taken.generation == 6 and json.loads(Path(out, "_index-tiny", "manifest-000006.json").read_text()) == before


def test_what_a_killed_build_left_is_not_read(out: str) -> None:
    Path(out, "_index-tiny").mkdir()
    Path(out, "_index-tiny", f"segment-{'0' * 32}.usearch").write_bytes(b"half a segment")
    vectors = open_vectors(out)
    assert open_index(vectors) is None
    assert search_vectors(vectors, vectors.vector(rows_of(out)[0]["key"])[1], 3).how == "exact"
    assert index_vectors(vectors).rows == len(rows_of(out))


@pytest.mark.parametrize("kind", ["segment", "manifest"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_index_is_refused(out: str, kind: str, damage: str) -> None:
    build_index(out)
    path = next(path for path in Path(out, "_index-tiny").iterdir() if path.name.startswith(kind))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-100] if damage == "cut" else data)
    vectors = open_vectors(out)
    with pytest.raises(StorageError, match="digest does not match its bytes"):
        search_vectors(vectors, vectors.vector(rows_of(out)[0]["key"])[1], 3)


def test_mixed_identities_are_refused(out: str) -> None:
    shutil.copy(part_paths(str(small_run(1)))[0], part_paths(out)[2])
    with pytest.raises(RunMismatch, match="two identities"):
        build_index(out)
    assert not list(Path(out).glob("_index*/manifest*"))


def test_files_of_another_run_are_refused(out: str) -> None:
    shutil.copy(part_paths(str(small_run(1)))[0], Path(out, "model=tiny"))
    with pytest.raises(RunMismatch, match="files of another run"):
        open_vectors(out)


def test_a_folder_of_its_own_and_that_of_another_run(out: str, tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    built = build_index(out, to=place)
    assert built.uri == place and not Path(out, "_index-tiny").exists()
    vectors = open_vectors(out)
    query_D = vectors.vector(rows_of(out)[0]["key"])[1]
    assert search_vectors(vectors, query_D, 3, index=place).how == "index"
    other = open_vectors(copy_of(small_run(1), tmp_path / "other"))
    with pytest.raises(RunMismatch, match="indexes another run"):
        index_vectors(other, place)
    with pytest.raises(RunMismatch, match="indexes another run"):
        search_vectors(other, query_D, 3, index=place)
    with pytest.raises(InputError, match="no index here"):
        search_vectors(vectors, query_D, 3, index=str(tmp_path / "none"))


def test_without_usearch_the_error_names_the_extra_and_search_works(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(MissingDependency, match=r"img2parquet\[search\]"):
        build_index(out)
    vectors = open_vectors(out)
    assert search_vectors(vectors, vectors.vector(rows_of(out)[3]["key"])[1], 3).how == "exact"


def test_on_an_object_store(out: str, s3_bucket: str) -> None:
    store, uri = Store(), f"{s3_bucket}/out"
    for path in Path(out).rglob("*"):
        if path.is_file():
            store.create(join(uri, str(path.relative_to(out))), path.read_bytes())
    vectors = open_vectors(uri)
    assert index_vectors(vectors).recall == 1.0
    here = open_vectors(out)
    _, query_D = here.vector(rows_of(out)[0]["key"])
    found = search_vectors(vectors, query_D, 4)
    assert found.how == "index" and found.hits == search_vectors(here, query_D, 4).hits


def test_vectors_are_those_of_the_files(out: str) -> None:
    table = np.array([row["embedding"] for row in rows_of(out)], np.float32)
    blocks = [block.unit_BD for block in open_vectors(out).blocks()]
    np.testing.assert_allclose(np.concatenate(blocks), table, atol=1e-6)  # the job has normalised them


def test_what_cannot_be_indexed_is_told(out: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an output of img2parquet"):
        open_vectors(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no model `tinny`"):
        open_vectors(out, "tinny")
    with pytest.raises(InputError, match="`labels` is not an embedding"):
        open_vectors(out, column="labels")
    for path in part_paths(out):
        path.unlink()
    with pytest.raises(InputError, match="no rows of model `tiny` are committed yet"):
        open_vectors(out)
