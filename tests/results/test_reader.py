"""What readers get: pyarrow, DuckDB, Polars and pandas read the vectors and labels as they lie there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.dataset.commit import Output
from img2parquet.dataset.plan import Plan
from img2parquet.errors import InputError, StorageError
from img2parquet.results.reader import open_results
from tests.support.finished_outputs import copy_of, make_output
from tests.support.small_job import GOOD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(finished: Path) -> pa.Table:
    return open_results(str(finished)).to_table().sort_by("key")


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


def test_duckdb(finished: Path, table: pa.Table) -> None:
    rows = duckdb.sql(
        f"select key, model, labels[1].name, embedding from '{finished}/model=*/*.parquet' order by key"
    ).fetchall()
    assert len(rows) == GOOD
    first = table.slice(0, 1).to_pylist()[0]
    assert rows[0][:3] == (first["key"], "tiny", first["labels"][0]["name"])
    np.testing.assert_array_equal(np.float32(rows[0][3]), np.float32(first["embedding"]))


def test_the_documented_line_reads_models_with_different_columns_and_widths(tmp_path: Path) -> None:
    for name, width, labels in (("a", 8, None), ("b", 16, [[{"id": 1, "name": "cat", "score": 0.5}]])):
        values = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * width, pa.float32()), width)
        columns = {"key": [name], "embedding": values} | ({"labels": pa.array(labels)} if labels else {})
        (tmp_path / f"model={name}").mkdir()
        pq.write_table(pa.table(columns), tmp_path / f"model={name}" / "part-0.parquet")
    for page in ("README.md", "infra/docs/results.md"):
        (query,) = re.findall(r'`duckdb -c "(.*)"`', (ROOT / page).read_text())
        rows = duckdb.sql(query.replace("OUT/", f"{tmp_path}/")).fetchall()
        assert sorted(rows) == [("a", None, None), ("b", "cat", 0.5)]


def test_polars(finished: Path, table: pa.Table) -> None:
    frame = pl.read_parquet(f"{finished}/model=*/*.parquet").sort("key")
    np.testing.assert_array_equal(np.stack(frame["embedding"].to_list()), np.stack(table["embedding"].to_pylist()))


def test_pandas(finished: Path, table: pa.Table) -> None:
    frame = pd.read_parquet(finished / "model=tiny").sort_values("key")
    np.testing.assert_array_equal(np.stack(list(frame["embedding"])), np.stack(table["embedding"].to_numpy()))


def test_pyarrow_finds_only_parts_below_the_output(finished: Path, table: pa.Table) -> None:
    """Names with `_` are skipped, so a folder read as a dataset is the rows and nothing else."""
    assert pq.read_table(finished).num_rows == table.num_rows == GOOD


def test_a_dataset_is_projected_and_filtered(finished: Path) -> None:
    import pyarrow.compute as pc

    rows = open_results(str(finished), "tiny").to_table(columns=["key"], filter=pc.field("label") == 0)
    assert rows.column_names == ["key"]
    assert 0 < rows.num_rows < GOOD


def test_an_unknown_model_names_the_nearest(finished: Path) -> None:
    with pytest.raises(InputError, match="did you mean `tiny`"):
        open_results(str(finished), "tinny")


def test_files_that_are_not_committed_are_not_read(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished, tmp_path / "out")
    pq.write_table(pa.table({"x": [1]}), Path(out) / "model=tiny" / "stray.parquet")
    assert open_results(out).count_rows() == GOOD


def joined_output(folder: Path, **fields: list[pa.Field]) -> str:
    """An output whose models have these columns besides `key`, with one row of zeros each."""
    folder.mkdir()
    outs = {}
    for model, own in fields.items():
        table = pa.Table.from_arrays(
            [pa.array([[0] * field.type.list_size], field.type) for field in own], schema=pa.schema(own)
        )
        outs[model] = make_output(str(folder / f"of-{model}"), {"outputs": [], "of": model}, [table], model)
    plans = {model: Output.at(uri).stored_plan() for model, uri in outs.items()}
    parts = next(plan.parts for plan in plans.values() if plan)
    identities = {model: plan.identities[model] for model, plan in plans.items() if plan}
    Output.at(str(folder / "out")).begin(identities, lambda: Plan(parts, identities))
    for model, uri in outs.items():
        shutil.copytree(Path(uri) / f"model={model}", folder / "out" / f"model={model}")
    return str(folder / "out")


def vector_field(name: str, width: int, kind: pa.DataType | None = None, **metadata: str) -> pa.Field:
    return pa.field(name, pa.list_(kind or pa.float32(), width), nullable=False, metadata=metadata or None)


def test_models_with_different_columns_open_together(tmp_path: Path) -> None:
    a, b = vector_field("embedding", 2, note="a"), vector_field("embedding", 2, note="b")
    uri = joined_output(tmp_path / "x", a=[a], b=[b, vector_field("logits", 3)])
    table = open_results(uri).to_table().sort_by("model")
    assert table["model"].to_pylist() == ["a", "b"]
    assert table["embedding"].to_pylist() == [[0, 0], [0, 0]]
    assert table["logits"].to_pylist() == [None, [0, 0, 0]]
    assert not table.schema.field("embedding").metadata  # the models differ on it
    assert table.schema.field("logits").nullable and not table.schema.field("embedding").nullable
    assert open_results(uri, "b").schema.field("embedding").metadata == {b"note": b"b"}


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (
            vector_field("embedding", 2),
            vector_field("embedding", 3),
            "of 2 values .float. in model `a`, and a vector of 3",
        ),
        (
            vector_field("embedding", 2),
            vector_field("embedding", 2, pa.float16()),
            "2 values .float.*2 values .halffloat",
        ),
        (
            vector_field("embedding", 2, pa.uint8(), encoding="binary", shape="[16]"),
            vector_field("embedding", 2, pa.uint8(), encoding="binary", shape="[15]"),
            "of 16 values .binary. .* 15 values",
        ),
    ],
)
def test_vectors_of_different_width_say_how_to_open_them(tmp_path: Path, a: pa.Field, b: pa.Field, said: str) -> None:
    uri = joined_output(tmp_path / "x", a=[a], b=[b])
    with pytest.raises(InputError, match=rf'`embedding` is a vector .*{said}(.|\n)*`open_results\(uri, "a"\)`'):
        open_results(uri)
    for model in ("a", "b"):
        assert open_results(uri, model).to_table().num_rows == 1
    assert len(duckdb.sql(f"from read_parquet('{uri}/model=*/part-*.parquet', union_by_name=true)")) == 2


def test_documented_globs_leave_hidden_and_foreign_files_out(finished: Path, tmp_path: Path) -> None:
    """A name that begins with `_` or `.` is hidden to pyarrow and Spark, but not to the globs of DuckDB and Polars."""
    out = copy_of(finished, tmp_path / "out")
    part = next(Path(out, "model=tiny").glob("part-*.parquet"))
    for name in ("_y.parquet", ".y.parquet", f"_{part.name}", f".{part.name}"):
        Path(out, "model=tiny", name).write_bytes(part.read_bytes())
    for page in ("README.md", "infra/docs/results.md"):
        text = (ROOT / page).read_text()
        for query in re.findall(r"from (?:read_parquet\()?'([^']*model=[^']*)'", text):
            assert len(duckdb.sql(f"from '{out}/model=tiny/{query.rpartition('/')[2]}'")) == GOOD
        (frame,) = re.findall(r'`pl\.read_parquet\("(OUT[^"]*)"\)`', text)
        (folder,) = re.findall(r'`pd\.read_parquet\("(OUT[^"]*)"\)`', text)
        frame, folder = (one.replace("OUT/", f"{out}/").replace("NAME", "tiny") for one in (frame, folder))
        assert len(pl.read_parquet(frame)) == len(pd.read_parquet(folder)) == GOOD


def test_a_damaged_first_file_of_any_model_is_named(tmp_path: Path) -> None:
    uri = joined_output(tmp_path / "x", a=[vector_field("embedding", 2)], b=[vector_field("logits", 2)])
    for model in ("a", "b"):
        part = next(Path(uri, f"model={model}").glob("part-*"))
        data = part.read_bytes()
        part.write_bytes(data[:-9])
        with pytest.raises(StorageError, match=part.name):
            open_results(uri)
        part.write_bytes(data)
