"""Export embeddings as `.npy` files with Parquet metadata, in the layout of clip-retrieval and embedding-reader.

autofaiss reads it too. `img_emb/img_emb_<n>.npy` and `metadata/metadata_<n>.parquet` have the same rows in the same
order. Vectors are float32, or float16 where they are stored so; int8 and binary ones are decoded. Columns of other
vectors and of whole maps are left out, which a note says; masks are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.outputs.vectors import decode_vectors
from img2parquet.results.exports import ExportOptions, needs
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.rows import ExportRows

FILE_BYTES = 64 << 20  # of vectors in one file, which are gathered in memory


class Npy:
    shape = "folder"
    takes: frozenset[str] = frozenset()
    last = "*.npy"

    def __init__(self, options: ExportOptions) -> None:
        pass

    def check(self, source: ExportRows) -> None:
        if source.vector is None:
            raise needs(source, "npy", "a column of vectors", "run the job with `outputs: [{kind: embedding}]`")

    def write(self, source: ExportRows, work: Workspace) -> None:
        vector = source.vector
        assert vector is not None
        outputs = {name for name, kind in source.kinds.items() if kind != "labels"}
        beside = [
            f.name for f in source.fields if not (f.name in outputs and pa.types.is_nested(f.type)) and f != vector
        ]
        if left_out := [f"`{name}`" for name in source.names if name not in beside and name != vector.name]:
            work.note(f"left out of the metadata, since they are vectors or maps: {', '.join(left_out)}")
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
                fields = [field for field in source.fields if field.name in beside]
                tables = [pa.RecordBatch.from_pylist([], pa.schema(fields))]
            _pair(work, number, vectors, tables)


def _pair(work: Workspace, number: int, vectors: list[Any], tables: list[pa.RecordBatch]) -> None:
    with work.file(f"metadata/metadata_{number:04d}.parquet") as sink:
        pq.write_table(pa.Table.from_batches(tables), sink)
    with work.file(f"img_emb/img_emb_{number:04d}.npy") as sink:
        np.save(sink, np.concatenate(vectors), allow_pickle=False)
