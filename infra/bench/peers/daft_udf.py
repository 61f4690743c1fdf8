"""Run the job the way Daft documents: `read_webdataset`, a `@daft.cls` with a batch method, `write_parquet`.

    python daft_udf.py '{"shards": [...], "model": FOLDER, "dtype": ..., "out": FOLDER, "workers": 2, ...}'

`decode: engine` decodes with Daft's own function, in its own threads; `decode: model` with Pillow, beside the model.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import daft
from daft import DataType, Series
from daft.functions import decode_image_file
from PIL import Image
from transformers import AutoConfig
from transformers_model import Embedder

JOB = json.loads(sys.argv[1])  # here, since the decorators below need it


def width(folder: str) -> int:
    config = AutoConfig.from_pretrained(folder)
    return int(config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size)


@daft.cls(max_concurrency=JOB["workers"], use_process=JOB["workers"] > 1)
class Embed:
    def __init__(self, job: dict[str, Any]) -> None:
        self.embedder = Embedder(job["model"], job["dtype"], job["threads"])

    @daft.method.batch(
        return_dtype=DataType.embedding(DataType.float32(), width(JOB["model"])), batch_size=JOB["batch"]
    )
    def vectors(self, images: Series) -> Any:
        return self.embedder([image(item) for item in images.to_pylist()])


def image(item: Any) -> Image.Image:
    if not isinstance(item, daft.File):
        return Image.fromarray(item)
    with item.open() as file:
        return Image.open(file).convert("RGB")


def main(job: dict[str, Any]) -> None:
    # by default 8 shards are listed at once, and on 2 cores two that are listed at once deadlock (0.7.26)
    daft.set_execution_config(scantask_max_parallel=1)
    rows = daft.read_webdataset(job["shards"])
    images = decode_image_file(rows["jpg"], mode="RGB") if job["decode"] == "engine" else rows["jpg"]
    vectors = Embed(job).vectors(images).alias("embedding")
    rows.select(rows["__key__"].alias("key"), vectors).write_parquet(job["out"])


if __name__ == "__main__":
    main(JOB)
