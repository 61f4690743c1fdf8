"""Run the job the way Ray Data documents: `read_webdataset`, `map_batches` with actors, `write_parquet`.

    python ray_data.py '{"shards": [...], "model": FOLDER, "dtype": ..., "out": FOLDER, "cores": 2, "workers": 2, ...}'

`decode: reader` is the reader's default; `decode: model` asks for bytes and decodes in the actor, so that pixels stay
out of the object store. The actors leave one CPU to reading: without one it never finishes.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import ray
from PIL import Image
from transformers_model import Embedder


class Embed:
    def __init__(self, job: dict[str, Any]) -> None:
        self.embedder = Embedder(job["model"], job["dtype"], job["threads"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"key": batch["__key__"], "embedding": self.embedder([image(item) for item in batch["jpg"]])}


def image(item: Any) -> Image.Image:
    return (Image.open(io.BytesIO(item)) if isinstance(item, bytes) else Image.fromarray(item)).convert("RGB")


def main(job: dict[str, Any]) -> None:
    ray.init("local", num_cpus=job["cores"], include_dashboard=False)  # not a cluster left by `ray start`
    ray.data.DataContext.get_current().enable_progress_bars = False
    images = ray.data.read_webdataset(
        job["shards"], decoder=True if job["decode"] == "reader" else None, override_num_blocks=len(job["shards"])
    )
    vectors = images.map_batches(
        Embed,
        fn_constructor_args=[job],
        batch_size=job["batch"],
        compute=ray.data.ActorPoolStrategy(size=job["workers"]),
        num_cpus=(job["cores"] - 1) / job["workers"] or 0.5,
    )
    vectors.write_parquet(job["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
