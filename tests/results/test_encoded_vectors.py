"""Embeddings stored as 8-bit steps or as bits: everything that asks vectors something compares what they stand for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import img2parquet
from img2parquet.outputs.embedding import int8_codes, int8_scale, sign_bits, unit_length
from img2parquet.outputs.vectors import decode_vectors
from img2parquet.results.embeddings import open_vectors
from img2parquet.results.probe.linear_probe import fit_probe
from img2parquet.results.search.duplicates import find_duplicates
from img2parquet.results.search.index import index_vectors
from img2parquet.results.search.search import search_vectors
from tests.support.finished_outputs import make_output, rows_of

D, SIDES = 20, ("left", "right")  # not a multiple of eight: the last byte of bits has room


def encoded(values_ND: np.ndarray, dtype: str) -> pa.Table:
    unit_ND = unit_length(values_ND)
    codes = int8_codes(unit_ND) if dtype == "int8" else sign_bits(unit_ND)
    column = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
    metadata = {"shape": f"[{D}]", "encoding": dtype, "scale": repr(int8_scale(D))}
    schema = pa.schema([pa.field("embedding", column.type, nullable=False, metadata=metadata)])
    return pa.table([column], schema=schema)


@pytest.fixture(params=["int8", "binary"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, np.ndarray]:
    """Two parts around two directions, with a row that is there twice; and what the stored values stand for."""
    rng = np.random.default_rng(8)
    centers = rng.standard_normal((2, D))
    tables = []
    for rows in (30, 20):
        values = centers[np.arange(rows) % 2] + 0.4 * rng.standard_normal((rows, D))
        values[7] = values[2]
        tables.append(encoded(values.astype(np.float32), request.param))
    identity = {"outputs": [{"kind": "embedding", "name": "embedding", "dtype": request.param}]}
    decoded = [decode_vectors(table["embedding"], table.schema.field(0)) for table in tables]
    return make_output(str(tmp_path / "out"), identity, tables), np.concatenate(decoded)


def test_search_with_and_without_an_index(out: tuple[str, np.ndarray]) -> None:
    uri, values_ND = out
    vectors = open_vectors(uri)
    place, query_D = vectors.vector("0/2")
    assert place == 2 and np.allclose(query_D, values_ND[2], atol=1e-6)
    expected = np.sort(values_ND @ values_ND[2])[::-1][:6]
    exact = search_vectors(vectors, query_D, 6, exact=True)
    assert [hit.score for hit in exact.hits] == pytest.approx(expected.tolist(), abs=1e-5)
    assert {hit.key for hit in exact.hits[:2]} == {"0/2", "0/7"}
    assert index_vectors(vectors).rows == 50
    assert [hit.score for hit in search_vectors(vectors, query_D, 6).hits] == pytest.approx(expected.tolist(), abs=1e-5)


def test_duplicates_are_those_of_the_decoded_vectors(out: tuple[str, np.ndarray], tmp_path: Path) -> None:
    uri, values_ND = out
    find_duplicates(uri, str(tmp_path / "d.parquet"), 0.9999)
    found = {row["key"] for row in pq.read_table(tmp_path / "d.parquet").to_pylist()}
    near = values_ND @ values_ND.T - 2 * np.eye(50) >= 0.9999 - 1e-6
    keys = [row["key"] for row in rows_of(uri)]
    assert found == {keys[i] for i in np.flatnonzero(near.any(1))} and {"0/2", "0/7", "1/2", "1/7"} <= found


def test_a_probe_learns_from_them(out: tuple[str, np.ndarray], tmp_path: Path) -> None:
    uri, _ = out
    keys = [row["key"] for row in rows_of(uri)]
    side = {key: SIDES[int(key.split("/")[1]) % 2] for key in keys}
    side["0/7"] = side["1/7"] = SIDES[0]  # they have the values of 0/2 and 1/2
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "label"), *((key, side[key]) for key in keys[::2] + keys[1::4])])
    fit_probe(uri, str(tmp_path / "labels.csv"))
    labelled = rows_of(uri, "tiny+probe")
    right = [row["labels"][0]["name"] == side[row["key"]] for row in labelled]
    assert len(right) == 50 and np.mean(right) >= 0.9


def test_npy_holds_what_they_stand_for(out: tuple[str, np.ndarray], tmp_path: Path) -> None:
    uri, values_ND = out
    img2parquet.export(uri, "npy", str(tmp_path / "n"))
    np.testing.assert_allclose(np.load(tmp_path / "n/img_emb/img_emb_0000.npy"), values_ND, atol=1e-6)
