"""The small job of tens of parts, and what an undisturbed run of it wrote."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import Output, model_of
from img2parquet.engine.driver import run
from img2parquet.job import parse_job
from img2parquet.storage import Store, join
from tests.support.small_job import BROKEN, job_dict, make_checkpoint, make_shards

SHARDS, PER_SHARD = 20, 4
MODELS = ("tiny", "twin")
Key = tuple[str, str, str]  # model, shard, key


@dataclass(frozen=True)
class Undisturbed:
    digests: Mapping[str, str]  # by a part's name, whose bytes hold its rejects too
    keys: frozenset[Key]
    bad: int  # images, which each model rejects


@dataclass(frozen=True)
class Bed:
    """shards: of each kind of store, `disk` and perhaps `s3`, the input's URI pattern."""

    folder: Path
    shards: Mapping[str, str]
    undisturbed: Mapping[str, Undisturbed]
    seconds: float = 1.0  # that an undisturbed run takes here

    def document(self, kind: str, uri: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return document(self.folder, self.shards[kind], uri, options)


def document(folder: Path, shards: str, uri: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Two models, so that a part may be done for one and not for the other."""
    made = job_dict(shards, folder / "model", uri, resources={"workers": 2, "batch_size": 3})
    tiny = made["models"][0]
    twin = {**tiny, "name": "twin", "outputs": [{"kind": "logits"}]}
    made["models"] = [tiny, twin]
    if options:
        made["input"]["storage_options"] = made["output"]["storage_options"] = dict(options)
    return made


def make_input(folder: Path, shards: int = SHARDS, per_shard: int = PER_SHARD) -> str:
    """Tars with bad images among them, and a checkpoint; the tars' pattern."""
    make_shards(folder / "in", shards, per_shard)
    make_checkpoint(folder / "model")
    return f"{folder}/in/*.tar"


def upload(folder: Path, bucket: str) -> str:
    for path in sorted((folder / "in").glob("*.tar")):
        Store().create(join(bucket, "in", path.name), path.read_bytes())
    return f"{bucket}/in/*.tar"


def run_undisturbed(folder: Path, pattern: str, uri: str, shards: int = SHARDS, rows: int = PER_SHARD) -> Undisturbed:
    """rows: of each shard, good or bad."""
    run(parse_job(document(folder, pattern, uri, {})), "local")
    files = read_parts(uri)
    counts = count_keys(files)
    bad = sum(shard < shards and row < rows for shard, row in BROKEN)
    assert len(files) == shards * len(MODELS) and set(counts.values()) == {1}
    assert len(counts) == (shards * rows - bad) * len(MODELS)
    return Undisturbed({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, frozenset(counts), bad)


def read_parts(uri: str) -> dict[str, bytes]:
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


def count_keys(files: Mapping[str, bytes]) -> Counter[Key]:
    counts: Counter[Key] = Counter()
    for name, data in files.items():
        table = pq.read_table(pa.BufferReader(data), columns=["shard", "key"])
        columns = (table.column(column).to_pylist() for column in ("shard", "key"))
        counts.update((model_of(name), shard, key) for shard, key in zip(*columns, strict=True))
    return counts
