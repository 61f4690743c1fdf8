"""Every kind of output, read by everything people use, from a folder and from an S3 server; vectors without a copy."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from img2parquet import decode_vectors, open_results
from img2parquet.engine.driver import run
from img2parquet.job import parse_job
from img2parquet.outputs import OUTPUTS
from img2parquet.outputs.vectors import is_vector, stored_vectors
from img2parquet.storage import Store
from tests.support.small_job import make_shards

PHOTOS, TEXTURES = (
    str(Path(__file__).parents[2] / "infra" / "demo" / "checkpoints" / name)
    for name in ("levit-photos", "beit-textures")
)
SHARDS, PER_SHARD = 2, 4
ROWS = SHARDS * PER_SHARD
OUTPUTS_OF: dict[str, list[dict[str, Any]]] = {
    "photos": [
        {"kind": "embedding", "normalize": "l2"},
        {"kind": "embedding", "dtype": "float16", "name": "half"},
        {"kind": "embedding", "normalize": "l2", "dtype": "int8", "name": "steps"},
        {"kind": "embedding", "dtype": "binary", "name": "bits"},
        {"kind": "labels"},
        {"kind": "logits"},
        {"kind": "attentions", "layers": [5]},
        {"kind": "loss", "truth": "label"},
    ],
    "textures": [
        {"kind": "segmentation"},
        {"kind": "segmentation", "encoding": "rle", "name": "runs"},
        {"kind": "feature_maps", "stages": ["stage5"]},
    ],
    "masked": [{"kind": "visual_tokens", "top_k": 2}, {"kind": "tokens"}],
}


def masked_image_model(folder: Path) -> Path:
    """A BEiT with a head over visual tokens, for 32 pixels, as transformers saves it."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    from tests.models.oracle import saved

    config = BeitConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=64, use_mask_token=True, use_mean_pooling=False,
    )  # fmt: skip
    folder.mkdir(parents=True)
    saved(BeitForMaskedImageModeling(config), folder, 0)
    size = {"height": 32, "width": 32}
    geometry = {"image_processor_type": "BeitImageProcessor", "size": size, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(geometry))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of three models with every kind of column."""
    made = tmp_path_factory.mktemp("anywhere")
    make_shards(made / "in", SHARDS, PER_SHARD, broken=False)
    models = {"photos": PHOTOS, "textures": TEXTURES, "masked": str(masked_image_model(made / "masked"))}
    job = {
        "input": {"kind": "webdataset", "uris": [f"{made}/in/*.tar"], "keep": ["label:int64"], "shards_per_part": 1},
        "models": [{"model": models[name], "name": name, "outputs": outs} for name, outs in OUTPUTS_OF.items()],
        "output": {"uri": str(made / "out")},
        "dtype": "float32",
        "resources": {"workers": 1, "batch_size": 4},
    }
    run(parse_job(job), "local")
    return made / "out"


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, folder: Path) -> str:
    """The output's URI: the folder, or the same files on an S3 server."""
    if request.param == "disk":
        return str(folder)
    bucket = request.getfixturevalue("s3_bucket")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            Store().create(f"{bucket}/out/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"{bucket}/out"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by model, in the parts' order, as pyarrow reads one file after the other."""
    tables = {m: [pq.ParquetFile(f).read() for f in sorted((folder / f"model={m}").iterdir())] for m in OUTPUTS_OF}
    return {model: pa.concat_tables(parts).to_pylist() for model, parts in tables.items()}


def plain(value: Any) -> Any:
    """Values of any reader as those of Python; floats narrowed to what was stored, NaN as null."""
    if isinstance(value, np.ndarray | list | tuple | pl.Series):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else float(np.float32(value))
    return value.item() if isinstance(value, np.generic) else bytes(value) if isinstance(value, bytearray) else value


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    by_key = {row["key"]: row for row in found}
    assert len(by_key) == len(found) == len(expected) == ROWS
    for row in expected:
        ours = {name: plain(value) for name, value in by_key[row["key"]].items() if name != "model"}
        assert ours == {name: plain(value) for name, value in row.items()}


def test_every_kind_of_output_is_here() -> None:
    assert {output["kind"] for outputs in OUTPUTS_OF.values() for output in outputs} == set(OUTPUTS)


@pytest.mark.parametrize("model", OUTPUTS_OF)
def test_pyarrow(place: str, expected: dict[str, Any], model: str) -> None:
    assert_same(open_results(place, model).to_table().to_pylist(), expected[model])
    filesystem = s3_of_pyarrow() if place.startswith("s3:") else None
    path = f"{place.removeprefix('s3://')}/model={model}"
    assert_same(pq.read_table(path, filesystem=filesystem).to_pylist(), expected[model])


@pytest.mark.parametrize("model", OUTPUTS_OF)
def test_pandas(place: str, expected: dict[str, Any], model: str) -> None:
    assert_same(pd.read_parquet(f"{place}/model={model}").to_dict("records"), expected[model])


@pytest.mark.parametrize("model", OUTPUTS_OF)
def test_polars(place: str, expected: dict[str, Any], model: str) -> None:
    options = {
        "aws_endpoint_url": os.environ["AWS_ENDPOINT_URL"], "aws_allow_http": "true",
        "aws_access_key_id": "testing", "aws_secret_access_key": "testing", "aws_region": "us-east-1",
    }  # fmt: skip
    found = pl.read_parquet(
        f"{place}/model={model}/*.parquet", storage_options=options if place.startswith("s3:") else None
    )
    assert_same(found.to_dicts(), expected[model])


@pytest.mark.parametrize("model", OUTPUTS_OF)
def test_duckdb(place: str, expected: dict[str, Any], model: str) -> None:
    """On S3 through fsspec: DuckDB's own httpfs is an extension that it fetches from the network."""
    with duckdb.connect() as connection:
        if place.startswith("s3:"):
            connection.register_filesystem(fsspec.filesystem("s3"))
        said = connection.execute(f"select * from read_parquet('{place}/model={model}/*.parquet')")
        names = [column[0] for column in said.description]
        rows = [dict(zip(names, row, strict=True)) for row in said.fetchall()]
    assert_same(rows, expected[model])


@pytest.mark.parametrize("model", OUTPUTS_OF)
def test_torch_gets_tensors(place: str, expected: dict[str, Any], model: str) -> None:
    """What a training loop does with the table: no reader between it and the columns."""
    table = open_results(place, model).to_table()
    vectors = [field for field in table.schema if is_vector(field)]
    for field in vectors:
        found = torch.from_numpy(np.array(stored_vectors(table[field.name], field)))
        assert plain(found.tolist()) == [plain(row[field.name]) for row in expected[model]]


def test_lance(place: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """Lance takes the dataset as it is, and searches it."""
    lance = pytest.importorskip("lance")
    dataset = lance.write_dataset(open_results(place, "photos").to_table(), str(tmp_path / "x.lance"))
    assert_same(dataset.to_table().to_pylist(), expected["photos"])
    query = np.float32(expected["photos"][5]["embedding"])
    found = dataset.to_table(nearest={"column": "embedding", "q": query, "k": 1})
    assert found["key"].to_pylist() == [expected["photos"][5]["key"]]


def test_faiss(place: str, expected: dict[str, Any]) -> None:
    """Float vectors without a copy, and packed bits as FAISS's binary index has them."""
    faiss = pytest.importorskip("faiss")
    table = open_results(place, "photos").to_table().combine_chunks()
    vectors_ND = decode_vectors(table["embedding"], table.field("embedding"))
    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    index.add(vectors_ND)
    assert index.search(vectors_ND, 1)[1][:, 0].tolist() == list(range(ROWS))
    bits_NB = stored_vectors(table["bits"], table.field("bits"))
    binary = faiss.IndexBinaryFlat(8 * bits_NB.shape[1])
    binary.add(bits_NB)
    assert (binary.search(bits_NB, 1)[0][:, 0] == 0).all()


def test_spark(place: str, expected: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("pyspark") is None or shutil.which("java") is None:
        pytest.skip("needs a JVM and `pip install pyspark`, which is 450 MB")
    if place.startswith("s3:"):
        pytest.skip("Spark reads s3a:// with hadoop-aws, a jar that it fetches from the network")
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.sql.warehouse.dir", str(tmp_path)).getOrCreate()
    try:
        for model in OUTPUTS_OF:
            reader, known = spark.read, expected[model]
            if model == "photos":  # Spark has no float16, and reads a file that holds one by naming the other columns
                names = "key string, width int, label bigint, embedding array<float>, logits array<float>, loss float"
                names += ", steps array<tinyint>, bits array<smallint>"
                reader = reader.schema(names)
                known = [{n: v for n, v in row.items() if f"{n} " in names} for row in known]
            rows = [row.asDict(recursive=True) for row in reader.parquet(f"{place}/model={model}").collect()]
            assert_same(rows, known)
    finally:
        spark.stop()


@pytest.mark.parametrize("column", ["embedding", "half", "logits", "steps", "bits"])
def test_vectors_are_numpy_without_a_copy(place: str, column: str) -> None:
    """The array's memory is Arrow's own; pyarrow would raise where it had to copy."""
    dataset = open_results(place, "photos")
    [batch, *_] = dataset.to_batches(columns=[column])
    values = batch.column(0).flatten()
    stored_ND = stored_vectors(batch.column(0), dataset.schema.field(column))
    assert stored_ND.ctypes.data == values.to_numpy(zero_copy_only=True).ctypes.data
    assert stored_ND.shape == (batch.num_rows, dataset.schema.field(column).type.list_size)


@pytest.mark.parametrize("column", ["steps", "bits"])
def test_readers_are_told_how_to_decode(place: str, expected: dict[str, Any], column: str) -> None:
    """What the field's metadata says, done by hand, is what `decode_vectors` does."""
    table = open_results(place, "photos").to_table()
    said = {name.decode(): value.decode() for name, value in table.schema.field(column).metadata.items()}
    assert (json.loads(said["shape"]), said["encoding"]) == ([128], "int8" if column == "steps" else "binary")
    by_hand = []
    for row in expected["photos"]:
        if column == "steps":
            value_D = np.array(row["steps"]) * float(said["scale"])
            by_hand.append(value_D / np.linalg.norm(value_D))
        else:
            bits = [byte >> (7 - bit) & 1 for byte in row["bits"] for bit in range(8)]
            by_hand.append((2 * np.array(bits) - 1) / 128**0.5)
    np.testing.assert_allclose(decode_vectors(table[column], table.schema.field(column)), by_hand, atol=1e-6)


def s3_of_pyarrow() -> Any:
    from pyarrow import fs

    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    return fs.S3FileSystem(access_key="testing", secret_key="testing", endpoint_override=host, scheme="http")
