"""Measure the recall of int8 and binary embeddings on finished outputs: `python -m infra.bench.recall OUT#MODEL`

For every row, compare its ten nearest neighbours by float32 cosine (without itself) with the ten found by the stored
codes; binary also as a first stage, where the 40 nearest by bits are ranked again by float32. Shapes: N rows, D values.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet import open_results
from img2parquet.outputs.embedding import int8_codes, sign_bits, unit_length
from img2parquet.outputs.vectors import decode_vectors

Matrix = npt.NDArray[np.float32]
K, CANDIDATES = 10, 40


def main(outputs: list[str]) -> None:
    print("| vectors | rows | values | int8 recall@10 | binary recall@10 | binary, best 40 ranked again |")
    print("|---|---|---|---|---|---|")
    for said in outputs:
        uri, _, model = said.partition("#")
        print(row(uri, model or None))


def row(uri: str, model: str | None) -> str:
    table = open_results(uri, model).to_table(columns=["embedding", "model"])
    stored = decode_vectors(table["embedding"], table.schema.field("embedding")).astype(np.float32)
    units_ND = unit_length(stored).astype(np.float32)
    exact = nearest(units_ND @ units_ND.T, K)
    steps_ND = unit_length(int8_codes(units_ND).astype(np.float32)).astype(np.float32)
    signs_ND = np.unpackbits(sign_bits(units_ND), axis=1, count=units_ND.shape[1]).astype(np.float32) * 2 - 1
    by_bits = signs_ND @ signs_ND.T
    shares = [
        recall(exact, nearest(steps_ND @ steps_ND.T, K)),
        recall(exact, nearest(by_bits, K)),
        recall(exact, nearest(by_bits, CANDIDATES)),  # neighbours found after ranking again
    ]
    name = pa.compute.unique(table["model"])[0].as_py()
    numbers = " | ".join(f"{share:.3f}" for share in shares)
    return f"| {name} | {len(units_ND):,} | {units_ND.shape[1]:,} | {numbers} |"


def nearest(scores_NN: Matrix, k: int) -> npt.NDArray[np.int64]:
    """Find the k nearest other rows of each row, (N, k); ties go to the earlier row."""
    np.fill_diagonal(scores_NN, -np.inf)
    return np.argsort(-scores_NN, axis=1, kind="stable")[:, :k]


def recall(exact: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> float:
    return float(np.mean([np.isin(wanted, got).mean() for wanted, got in zip(exact, found, strict=True)]))


if __name__ == "__main__":
    main(sys.argv[1:])
