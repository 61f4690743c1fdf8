"""Run the job as a hand-written script: a torch `DataLoader` reads, decodes and preprocesses; one loop runs the model.

python torch_loader.py '{"shards": [...], "model": FOLDER, "dtype": ..., "out": FOLDER, "workers": 2, ...}'
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers_model import Embedder


class Shards(IterableDataset[Any]):
    """Yield keys and preprocessed pixels; each worker reads every n-th shard."""

    def __init__(self, paths: list[str], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        for path in self.paths[worker.id :: worker.num_workers] if worker else self.paths:
            with tarfile.open(path) as tar:
                for member in tar:
                    image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
                    yield Path(member.name).stem, self.processor(image, return_tensors="pt")["pixel_values"][0]


def main(job: dict[str, Any]) -> None:
    embedder = Embedder(job["model"], job["dtype"], job["threads"])
    loader = DataLoader(Shards(job["shards"], embedder.processor), batch_size=job["batch"], num_workers=job["workers"])
    Path(job["out"]).mkdir(parents=True)
    writer = None
    for keys, pixels_BCHW in loader:
        vectors_BD = embedder.embed(pixels_BCHW)
        column = pa.FixedSizeListArray.from_arrays(vectors_BD.ravel(), vectors_BD.shape[1])
        table = pa.table({"key": list(keys), "embedding": column})
        writer = writer or pq.ParquetWriter(Path(job["out"]) / "part.parquet", table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
