"""Outputs to ask something of: a small job's, run once and copied for each test; and ones made of given tables."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.batch import Embedded
from img2parquet.dataset.commit import Output
from img2parquet.dataset.part_file import encode_part
from img2parquet.dataset.plan import Plan
from img2parquet.engine.driver import run
from img2parquet.schema import Part, Piece
from tests.support.small_job import small_job, small_set

MODEL = "tiny"


@functools.cache
def small_run(seed: int = 0) -> Path:
    """Run the job of `tests/support/small_job.py` once, beside its inputs; return its output, which tests only read."""
    folder = small_set(seed)
    run(small_job(str(folder / "in" / "*.tar"), folder / "model", str(folder / "finished")), "local")
    return folder / "finished"


def copy_of(run: Path, to: Path) -> str:
    shutil.copytree(run, to)
    return str(to)


def part_paths(uri: str, model: str = MODEL) -> list[Path]:
    return sorted(Path(uri, f"model={model}").glob("*.parquet"))


def rows_of(uri: str, model: str = MODEL) -> list[dict[str, Any]]:
    """Every row in the parts' order, read by pyarrow alone."""
    return [row for path in part_paths(uri, model) for row in pq.read_table(path, partitioning=None).to_pylist()]


def make_output(uri: str, identity: Mapping[str, Any], tables: Sequence[pa.Table], model: str = MODEL) -> str:
    """An output of one model whose parts hold these tables; key, shard and sizes are added."""
    output = Output.at(uri)
    parts = tuple(Part(i, (Piece(f"/shards/{i}.tar", 1, "etag"),)) for i in range(len(tables)))
    plan, digest = output.begin({model: identity}, lambda: Plan(parts, {model: dict(identity)}))
    output.record_run({"plan_sha256": digest, "identities": {}, "job": {}})
    for part, table in zip(parts, tables, strict=True):
        base = {
            "key": pa.array([f"{part.index}/{row}" for row in range(table.num_rows)]),
            "shard": pa.array([part.pieces[0].uri] * table.num_rows),
            "width": pa.array([10] * table.num_rows, pa.int32()),
            "height": pa.array([10] * table.num_rows, pa.int32()),
        }
        given = {name: table.column(name) for name in table.column_names}
        whole = pa.table({**base, **given})
        fields = [table.schema.field(f.name) if f.name in given else f for f in whole.schema]  # with their metadata
        whole = pa.Table.from_arrays(whole.columns, schema=pa.schema(fields))
        batch = Embedded(part.index, 0, {model: whole}, {model: ()}, whole.num_rows)
        output.put_once(
            plan.file_name(model, part), encode_part(part, model, plan.identity(model), [batch], identity).data
        )
    return uri
