"""Finished outputs with everything that an export may meet: hostile keys, nulls, every kind of column it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.engine.driver import run
from img2parquet.job import parse_job
from img2parquet.results.reader import open_results
from tests.support.small_job import jpeg

CHECKPOINTS = Path(__file__).parents[3] / "infra" / "demo" / "checkpoints"
HOSTILE = [
    "plain",
    "two\nlines\r\nand\ttabs",
    """'"; drop table images; --""",
    "<script>alert(1)</script> & ]]> {key} {shard}",
    "../../etc/passwd",
    "nul\0 bell\a escape\x1b[31m",
    r"back\slash \. \N \u0000",
    "=cmd|' /C calc'!A0",
    "zwölf 猫 🐈 ‮",
    "a,b;c|d",
    "https://example/?a=1&b=2#c",
    "$(reboot) `id` %s %00",
]
PARTS = 3


def make_input(folder: Path) -> None:
    """Three Parquet files of four images each; `caption` is hostile too, and null for some."""
    folder.mkdir()
    for part in range(PARTS):
        keys = HOSTILE[part * 4 : part * 4 + 4]
        n = len(keys)
        columns = {
            "image": [jpeg(part * 10 + i) for i in range(n)],
            "key": keys,
            "caption": [None if i == 1 else "" if i == 2 else f"{key}!" for i, key in enumerate(keys)],
            "truth": pa.array([None if i == 3 else part * 100 + i for i in range(n)], pa.int64()),
            "weight": pa.array([None if i == 2 else i / 7 for i in range(n)], pa.float64()),
        }
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")


def job(folder: Path, output: str, **more: Any) -> Any:
    photos, textures = str(CHECKPOINTS / "levit-photos"), str(CHECKPOINTS / "beit-textures")
    vectors = [
        {"kind": "embedding", "normalize": "l2"},
        {"kind": "embedding", "normalize": "l2", "dtype": "float16", "name": "half"},
        {"kind": "embedding", "normalize": "l2", "dtype": "int8", "name": "steps"},
        {"kind": "embedding", "dtype": "binary", "name": "bits"},
    ]
    masks = [{"kind": "segmentation"}]
    small_masks = [{"kind": "segmentation", "encoding": "rle", "size": "model", "name": "regions"}]
    return parse_job(
        {
            "input": {
                "kind": "parquet",
                "uris": [f"{folder}/*.parquet"],
                "key": "key",
                "keep": ["caption", "truth", "weight"],
            },
            "models": [
                {"model": photos, "name": "photos", "outputs": [{"kind": "labels", "top_k": 3}]},
                {"model": photos, "name": "vectors", "outputs": vectors},
                {"model": textures, "name": "masks", "outputs": masks},
                {"model": textures, "name": "small-masks", "outputs": small_masks},
            ],
            "output": {"uri": output, "rows_per_part": 4},
            "dtype": "float32",
            "resources": {"workers": 1, "batch_size": 4},
            **more,
        }
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in` and the finished output `out`."""
    folder = tmp_path_factory.mktemp("exports")
    make_input(folder / "in")
    run(job(folder / "in", str(folder / "out")), "local")
    return folder


@pytest.fixture(scope="session")
def out(made: Path) -> str:
    return str(made / "out")


@pytest.fixture(scope="session")
def rows(out: str) -> dict[str, list[dict[str, Any]]]:
    """What the Parquet files hold, by model, in the order of the parts: what every export is compared with."""
    names = ("photos", "vectors", "masks", "small-masks")
    return {name: open_results(out, name).to_table().to_pylist() for name in names}
