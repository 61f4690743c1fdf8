"""`python -m tests.harness.chaos.on_extend`: kill an extension at every step of every object that it creates.

The options and the checks are those of `on_retry`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tests.harness.chaos.warm  # noqa: F401 - before anything that reads it

# isort: split
from img2parquet.engine.driver import Summary, run
from img2parquet.job import parse_job
from img2parquet.storage import Store, join
from tests.harness.chaos.on_retry import UNLIKE, Subject, main
from tests.support.small_job import BROKEN, job_dict, make_checkpoint, make_shards

SHARDS, PER_SHARD, FIRST = 7, 4, 3
ADDED = rf"part-00000[{FIRST}-{SHARDS - 1}]"
RECORD = "_run-1"  # holds the job, and so where its output lies, which is another place in each run
BAD = sum(shard < SHARDS and row < PER_SHARD for shard, row in BROKEN)


def _document(root: str, uri: str, folder: str) -> dict[str, Any]:
    document = job_dict(join(root, "in/*.tar"), folder, uri, reject_limit=1.0)
    document["models"].append({**document["models"][0], "name": "twin", "outputs": [{"kind": "logits"}]})
    return document


def _model_of(root: str) -> str:
    return (Store().read(join(root, "model.txt"))).decode()


def _make(folder: Path, root: str) -> None:
    """The input, the job's output on the last of the shards, and then the others, which sort before them."""
    store, model = Store(), make_checkpoint(folder / "model")
    store.create(join(root, "model.txt"), str(model).encode())
    shards = make_shards(folder / "shards", SHARDS, PER_SHARD)
    for path in shards[-FIRST:]:
        store.create(join(root, "in", path.name), path.read_bytes())
    run(parse_job(_document(root, join(root, "base"), str(model))), "local")
    for path in shards[:-FIRST]:
        store.create(join(root, "in", path.name), path.read_bytes())


def _extend(root: str, uri: str) -> Summary:
    return run(parse_job(_document(root, uri, _model_of(root))), "local", extend=True)


if __name__ == "__main__":
    sys.exit(main(Subject("extend", _make, _extend, ADDED, SHARDS * PER_SHARD - BAD, (*UNLIKE, RECORD))))
