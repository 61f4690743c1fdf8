"""Lay out a sample's embeddings in two dimensions, and find nearest neighbours and near-duplicate pairs.

Shapes: N rows, D width, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.outputs.vectors import decode_vectors

Float = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
NEAR_DUPLICATE = 0.98  # cosine similarity
PAIRS, QUERIES, NEIGHBOURS = 12, 6, 6
MOST_WIDTH = 4096  # longer vectors are truncated: the map is a picture, and memory is bounded
BLOCK_ROWS = 1024
LEAST_FOR_UMAP = 15  # rows: UMAP looks at as many neighbours


@dataclass(frozen=True)
class EmbeddingMap:
    """`maps`: name -> (N, 2) in [0, 1]. `pairs`: (row, row, cosine), most alike first, each row once.
    `neighbours`: (query row, [(row, cosine), ...])."""

    maps: dict[str, Float]
    explained: float  # share of the variance that the two principal components hold
    pairs: list[tuple[int, int, float]]
    pairs_near: int  # pairs at NEAR_DUPLICATE or above, in the whole sample
    neighbours: list[tuple[int, list[tuple[int, float]]]]
    width: int
    not_finite: int


def vectors(column: pa.ChunkedArray, field: pa.Field | None = None) -> Float:
    """Read a column of lists as (N, D) float32; lists of varying length are accepted when they all have one length.

    With a `field` whose metadata names an encoding, values are decoded first: packed bits and 8-bit steps cannot be
    compared as they are stored."""
    if field is not None and b"encoding" in (field.metadata or {}):
        return decode_vectors(column, field)[:, :MOST_WIDTH].astype(np.float32, copy=False)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    rows_ND: Float = flat.reshape(len(array), -1)[:, :MOST_WIDTH]
    return rows_ND


def map_embeddings(x_ND: Float, groups: list[str], seed: int = 0) -> EmbeddingMap | None:
    """Compute maps, neighbours and pairs, or None when fewer than three rows have finite vectors.

    `groups`: N names to spread the queries over."""
    finite_N: Flags = np.isfinite(x_ND).all(axis=1)  # type: ignore[assignment]
    if finite_N.sum() < 3 or x_ND.shape[1] < 1:
        return None
    x_ND = np.where(finite_N[:, None], x_ND, 0).astype(np.float32)
    map_N2, explained = pca(x_ND)
    maps = {"PCA": map_N2}
    if find_spec("umap") is not None and len(x_ND) > LEAST_FOR_UMAP:
        maps["UMAP"] = umap(x_ND, seed)
    norms = np.linalg.norm(x_ND, axis=1, keepdims=True)
    unit_ND = x_ND / np.maximum(norms, 1e-12)
    pairs, near = nearest_pairs(unit_ND, finite_N)
    queries = _queries(groups, finite_N, seed)
    return EmbeddingMap(
        maps, explained, pairs, near, _neighbours(unit_ND, queries, finite_N), x_ND.shape[1], int((~finite_N).sum())
    )


def pca(x_ND: Float) -> tuple[Float, float]:
    """Project onto two principal components, (N, 2) in [0, 1]; signs are fixed, so the same data gives the same map."""
    centred_ND = x_ND.astype(np.float64) - x_ND.mean(0, dtype=np.float64)
    values, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND) if x_ND.shape[1] <= len(x_ND) else _dual(centred_ND)
    axes_D2 = axes_DD[:, ::-1][:, :2]
    if axes_D2.shape[1] < 2:
        axes_D2 = np.concatenate([axes_D2, np.zeros_like(axes_D2)], axis=1)
    axes_D2 = axes_D2 * np.where(axes_D2[np.abs(axes_D2).argmax(0), [0, 1]] < 0, -1, 1)
    total = float(values.clip(0).sum())
    explained = float(values[::-1][:2].clip(0).sum() / total) if total > 0 else 0.0
    return _to_unit_square(centred_ND @ axes_D2), explained


def _dual(centred_ND: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Find eigenvectors through the N x N products, for vectors that are wider than there are rows."""
    values, left_NN = np.linalg.eigh(centred_ND @ centred_ND.T)
    axes_DN = centred_ND.T @ left_NN
    return values, axes_DN / np.maximum(np.linalg.norm(axes_DN, axis=0), 1e-12)


def umap(x_ND: Float, seed: int) -> Float:
    """Compute a seeded UMAP layout, with the `umap` extra."""
    made: Any = import_module("umap").UMAP(n_neighbors=15, min_dist=0.1, metric="cosine", random_state=seed, n_jobs=1)
    return _to_unit_square(np.asarray(made.fit_transform(x_ND), np.float64))


def _to_unit_square(xy_N2: npt.NDArray[np.float64]) -> Float:
    """Centre the points and scale both directions alike. Far outliers are moved to the edge, since they would shrink
    all other points to a dot."""
    low, high = xy_N2.min(0), xy_N2.max(0)
    inner_low, inner_high = np.percentile(xy_N2, 0.5, axis=0), np.percentile(xy_N2, 99.5, axis=0)
    if ((high - low) > 2 * (inner_high - inner_low)).any():
        low, high = inner_low, inner_high
    side = max(float((high - low).max()), 1e-12)
    square_N2: Float = (0.5 + (xy_N2.clip(low, high) - (low + high) / 2) / side).astype(np.float32)
    return square_N2


def nearest_pairs(unit_ND: Float, finite_N: Flags) -> tuple[list[tuple[int, int, float]], int]:
    """Find the most similar pairs, each row in at most one, and count near-duplicates. Blocks of rows bound memory."""
    found: list[tuple[float, int, int]] = []
    near = 0
    for start in range(0, len(unit_ND), BLOCK_ROWS):
        cosines = unit_ND[start : start + BLOCK_ROWS] @ unit_ND.T
        rows, columns = np.arange(len(cosines))[:, None], np.arange(len(unit_ND))[None, :]
        cosines[(columns <= rows + start) | ~finite_N[None, :] | ~finite_N[start : start + BLOCK_ROWS, None]] = -2
        near += int((cosines >= NEAR_DUPLICATE).sum())
        best = np.argpartition(cosines, -min(512, cosines.size), axis=None)[-min(512, cosines.size) :]
        found += [(float(cosines.flat[i]), start + int(i) // len(unit_ND), int(i) % len(unit_ND)) for i in best]
    pairs: list[tuple[int, int, float]] = []
    used: set[int] = set()
    for cosine, i, j in sorted(found, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if cosine > -2 and not used & {i, j}:
            used |= {i, j}
            pairs.append((i, j, cosine))
    return pairs[:PAIRS], near


def _queries(groups: list[str], finite_N: Flags, seed: int) -> list[int]:
    """Choose query rows from different groups first, then at random."""
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(finite_N)) if finite_N[i]]
    first_of: dict[str, int] = {}
    for i in order:
        first_of.setdefault(groups[i] if groups else "", i)
    chosen = list(first_of.values())[:QUERIES]
    return chosen + [i for i in order if i not in chosen][: QUERIES - len(chosen)]


def _neighbours(unit_ND: Float, queries: list[int], finite_N: Flags) -> list[tuple[int, list[tuple[int, float]]]]:
    cosines_QN = unit_ND[queries] @ unit_ND.T
    cosines_QN[:, ~finite_N] = -2
    sheets = []
    for query, cosines_N in zip(queries, cosines_QN, strict=True):
        cosines_N[query] = -2
        best = np.argsort(-cosines_N, kind="stable")[:NEIGHBOURS]
        sheets.append((query, [(int(i), float(cosines_N[i])) for i in best if cosines_N[i] > -2]))
    return sheets
