"""Rows to a Lance dataset, through Lance's own writer (`pip install img2parquet[lance]`)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.errors import MissingDependency
from pipeline.exports import Options
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source


class Lance:
    shape = "folder"
    takes: frozenset[str] = frozenset()
    last = "_versions/*"

    def __init__(self, options: Options) -> None:
        pass

    def check(self, source: Source) -> None:
        _lance()

    def write(self, source: Source, work: Workspace) -> None:
        schema = pa.schema(source.fields)
        reader = pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in source.batches(1024)))
        work.path.rmdir()  # Lance makes it
        _lance().write_dataset(reader, str(work.path), mode="create")


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise MissingDependency("`lance` needs the package pylance", hint="pip install 'img2parquet[lance]'") from None
    return lance
