"""Embeddings to `.npy` files with Parquet metadata, as clip-retrieval, autofaiss and embedding-reader lay them out.

`img_emb/img_emb_<n>.npy` and `metadata/metadata_<n>.parquet` have the same rows in the same order. Vectors are float32,
or float16 where they are stored so; int8 and binary ones are decoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exports import Options, needs
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source, is_labels
from pipeline.vectors import decode_vectors, is_vector

FILE_BYTES = 64 << 20  # of vectors in one file: they are gathered in memory


class Npy:
    shape = "folder"
    takes: frozenset[str] = frozenset()
    last = "*.npy"

    def __init__(self, options: Options) -> None:
        pass

    def check(self, source: Source) -> None:
        if source.vector is None:
            raise needs(source, "npy", "a column of vectors", "run the job with `outputs: [{kind: embedding}]`")

    def write(self, source: Source, work: Workspace) -> None:
        vector = source.vector
        assert vector is not None
        beside = [
            f.name for f in source.fields if not is_vector(f) and (not pa.types.is_nested(f.type) or is_labels(f))
        ]
        vectors: list[Any] = []
        tables: list[pa.RecordBatch] = []
        number = size = 0
        for batch in source.batches(4096, [vector.name, *beside]):
            vectors.append(decode_vectors(batch.column(vector.name), vector))
            tables.append(batch.select(beside))
            size += vectors[-1].nbytes
            if size >= FILE_BYTES:
                _pair(work, number, vectors, tables)
                vectors, tables, number, size = [], [], number + 1, 0
        if vectors or not number:
            if not vectors:
                vectors = [decode_vectors(pa.array([], vector.type), vector)]
                tables = [source.dataset.schema.empty_table().select(beside).to_batches()[0]]
            _pair(work, number, vectors, tables)


def _pair(work: Workspace, number: int, vectors: list[Any], tables: list[pa.RecordBatch]) -> None:
    with work.file(f"metadata/metadata_{number:04d}.parquet") as sink:
        pq.write_table(pa.Table.from_batches(tables), sink)
    with work.file(f"img_emb/img_emb_{number:04d}.npy") as sink:
        np.save(sink, np.concatenate(vectors), allow_pickle=False)
