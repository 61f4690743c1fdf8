"""Maps, pairs and neighbours, on vectors whose answer is known."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

from img2parquet.results.report.embedding_map import map_embeddings, nearest_pairs, pca, vectors


def cloud(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize(("rows", "width"), [(200, 8), (20, 300), (3, 1)])
def test_pca_keeps_the_two_widest_directions(rows: int, width: int) -> None:
    x_ND = cloud(rows, width)
    x_ND[:, 0] *= 30
    map_N2, explained = pca(x_ND)
    assert map_N2.shape == (rows, 2) and map_N2.min() >= 0 and map_N2.max() <= 1
    assert abs(np.corrcoef(map_N2[:, 0], x_ND[:, 0])[0, 1]) > 0.99
    centred = x_ND - x_ND.mean(0)
    spectrum = np.linalg.svd(centred.astype(np.float64), compute_uv=False) ** 2
    assert explained == pytest.approx(spectrum[:2].sum() / spectrum.sum(), abs=1e-6)


def test_pca_of_equal_vectors_is_a_point() -> None:
    map_N2, explained = pca(np.ones((5, 4), np.float32))
    assert np.isfinite(map_N2).all() and explained == 0


def test_pairs_are_the_most_alike_and_each_row_once() -> None:
    x_ND = cloud(2500, 16)  # more than two blocks of rows
    x_ND[7], x_ND[2400] = x_ND[1900], x_ND[3] + 1e-3
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    pairs, near = nearest_pairs(unit_ND, np.ones(len(x_ND), bool))
    assert {(i, j) for i, j, _ in pairs[:2]} == {(7, 1900), (3, 2400)} and near == 2
    rows = [row for i, j, _ in pairs for row in (i, j)]
    assert len(rows) == len(set(rows))


def test_neighbours_are_those_of_brute_force_and_not_the_query() -> None:
    x_ND = cloud(60, 5)
    found = map_embeddings(x_ND, ["a", "b"] * 30)
    assert found is not None
    unit = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    for query, near in found.neighbours:
        best = [i for i in np.argsort(-(unit @ unit[query])) if i != query][: len(near)]
        assert [i for i, _ in near] == best
    assert len({query % 2 for query, _ in found.neighbours[:2]}) == 2  # one of each group first


def test_vectors_that_are_not_finite_are_nobodys_neighbour() -> None:
    x_ND = cloud(30, 4)
    x_ND[5] = np.nan
    found = map_embeddings(x_ND, [])
    assert found is not None and found.not_finite == 1
    assert 5 not in {row for query, near in found.neighbours for row in (query, *(i for i, _ in near))}
    assert 5 not in {row for i, j, _ in found.pairs for row in (i, j)}
    assert all(np.isfinite(map_N2).all() for map_N2 in found.maps.values())
    assert map_embeddings(np.full((9, 4), np.inf, np.float32), []) is None


def test_the_umap_extra_gives_a_second_map(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layout:
        def __init__(self, **settings: object) -> None:
            assert settings["random_state"] == 3 and settings["metric"] == "cosine"

        def fit_transform(self, x_ND: np.ndarray) -> np.ndarray:
            return x_ND[:, :2] * 100

    module = ModuleType("umap")
    module.UMAP = Layout  # type: ignore[attr-defined]
    module.__spec__ = __import__("importlib").machinery.ModuleSpec("umap", None)
    monkeypatch.setitem(sys.modules, "umap", module)
    found = map_embeddings(cloud(40, 6), [], seed=3)
    assert found is not None and list(found.maps) == ["PCA", "UMAP"]
    assert found.maps["UMAP"].min() >= 0 and found.maps["UMAP"].max() <= 1


@pytest.mark.slow
def test_the_real_umap() -> None:
    pytest.importorskip("umap", reason="the `umap` extra")
    x_ND = np.concatenate([cloud(40, 8), cloud(40, 8, 1) + 12])
    found = map_embeddings(x_ND, [])
    assert found is not None
    map_N2 = found.maps["UMAP"]
    assert np.linalg.norm(map_N2[:40].mean(0) - map_N2[40:].mean(0)) > 0.3


def test_vectors_of_a_half_precision_column_that_is_sliced() -> None:
    values = np.arange(24, dtype=np.float16)
    array = pa.FixedSizeListArray.from_arrays(pa.array(values), 4).slice(2, 3)
    x_ND = vectors(pa.chunked_array([array]))
    assert x_ND.dtype == np.float32 and x_ND.tolist() == values.reshape(6, 4)[2:5].tolist()
