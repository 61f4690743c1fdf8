"""What readers get: pyarrow, DuckDB, Polars and pandas read the vectors and labels as they lie there."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.driver import run
from pipeline.errors import InputError
from pipeline.results import open_results
from tests.small import GOOD, make_checkpoint, make_shards, small_job


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_shards(folder / "in")
    run(small_job(f"{folder}/in/*.tar", make_checkpoint(folder / "model"), str(folder / "out")), "local")
    return folder / "out"


@pytest.fixture(scope="module")
def table(output: Path) -> pa.Table:
    return open_results(str(output)).to_table().sort_by("key")


def test_columns_have_plain_types(table: pa.Table) -> None:
    types = {f.name: str(f.type) for f in table.schema}
    assert types == {
        "key": "string", "shard": "string", "width": "int32", "height": "int32", "warnings": "list<element: string>",
        "label": "int64", "caption": "string",
        "embedding": "fixed_size_list<element: float>[32]",
        "labels": types["labels"],
        "logits": "fixed_size_list<element: float>[5]",
        "model": "string",
    }  # fmt: skip
    assert types["labels"].startswith("list<element: struct<id: int32 not null, name: string not null, score: float")


def test_duckdb(output: Path, table: pa.Table) -> None:
    rows = duckdb.sql(
        f"select key, model, labels[1].name, embedding from '{output}/model=*/*.parquet' order by key"
    ).fetchall()
    assert len(rows) == GOOD
    first = table.slice(0, 1).to_pylist()[0]
    assert rows[0][:3] == (first["key"], "tiny", first["labels"][0]["name"])
    np.testing.assert_array_equal(np.float32(rows[0][3]), np.float32(first["embedding"]))


def test_polars(output: Path, table: pa.Table) -> None:
    frame = pl.read_parquet(f"{output}/model=*/*.parquet").sort("key")
    np.testing.assert_array_equal(np.stack(frame["embedding"].to_list()), np.stack(table["embedding"].to_pylist()))


def test_pandas(output: Path, table: pa.Table) -> None:
    frame = pd.read_parquet(output / "model=tiny").sort_values("key")
    np.testing.assert_array_equal(np.stack(list(frame["embedding"])), np.stack(table["embedding"].to_numpy()))


def test_pyarrow_finds_only_parts_below_the_output(output: Path, table: pa.Table) -> None:
    """Names with `_` are skipped, so a folder read as a dataset is the rows and nothing else."""
    assert pq.read_table(output).num_rows == table.num_rows == GOOD


def test_a_dataset_is_projected_and_filtered(output: Path) -> None:
    import pyarrow.compute as pc

    rows = open_results(str(output), "tiny").to_table(columns=["key"], filter=pc.field("label") == 0)
    assert rows.column_names == ["key"]
    assert 0 < rows.num_rows < GOOD


def test_an_unknown_model_names_the_nearest(output: Path) -> None:
    with pytest.raises(InputError, match="did you mean `tiny`"):
        open_results(str(output), "tinny")


def test_files_that_are_not_committed_are_not_read(output: Path) -> None:
    stray = output / "model=tiny" / "stray.parquet"
    pq.write_table(pa.table({"x": [1]}), stray)
    try:
        assert open_results(str(output)).count_rows() == GOOD
    finally:
        stray.unlink()
