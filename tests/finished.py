"""Outputs to ask something of: a small job's, run once and copied for each test; and ones made of given tables."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch import Embedded
from pipeline.commit import Output
from pipeline.driver import run
from pipeline.plan import Plan
from pipeline.schema import Part, Piece
from pipeline.write import encode_part
from tests.small import make_checkpoint, make_shards, small_job

MODEL = "tiny"


@functools.cache
def small_run(seed: int = 0) -> Path:
    """The output of `tests/small.py`'s job with a checkpoint of this seed. Not to be written to, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="img2parquet-finished-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_shards(folder / "shards")
    make_checkpoint(folder / "tiny", seed)
    run(small_job(str(folder / "shards" / "*.tar"), folder / "tiny", str(folder / "out")), "local")
    return folder / "out"


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
