"""Export rows as a Lance dataset, through Lance's own writer (`pip install img2parquet[lance]`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from img2parquet.errors import Img2ParquetError, MissingDependency
from img2parquet.results.exports import ExportOptions
from img2parquet.results.exports.arrow_types import with_children
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.rows import ExportRows


class Lance:
    shape = "folder"
    takes: frozenset[str] = frozenset()
    last = "_versions/*"

    def __init__(self, options: ExportOptions) -> None:
        pass

    def check(self, source: ExportRows) -> None:
        _lance()

    def write(self, source: ExportRows, work: Workspace) -> None:
        schema = pa.schema([field.with_type(stored_type(field.type)) for field in source.fields])
        errors: list[Img2ParquetError] = []

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from (batch.cast(schema) for batch in source.batches(1024))
            except Img2ParquetError as error:
                errors.append(error)
                raise

        work.path.rmdir()  # Lance creates it
        try:
            _lance().write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(work.path), mode="create")
        except OSError:
            if errors:  # which Lance would report as text, with a traceback
                raise errors[0] from None
            raise


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the nearest type that Lance reads back: it loses count of fixed-size lists of structs."""
    if pa.types.is_fixed_size_list(kind) and pa.types.is_struct(kind.value_type):
        return pa.list_(kind.value_field.with_type(stored_type(kind.value_type)))
    return with_children(kind, stored_type)


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise MissingDependency("`lance` needs the package pylance", hint="pip install 'img2parquet[lance]'") from None
    return lance
