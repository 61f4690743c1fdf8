"""Compute the mean of each loss column over the committed files of an output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from img2parquet.dataset.commit import Output
from img2parquet.job import JobSpec


def mean_losses(job: JobSpec, output: Output, names: Mapping[str, Iterable[str]]) -> dict[str, float | None]:
    """Return the mean loss by `model.column`, over the rows that have one; None when no row has.

    Only the loss columns are read. names: each model's files, in the order of the sum."""
    return {
        f"{model.name}.{column}": _mean(output, names[model.name], column)
        for model in job.models
        for wanted in model.outputs
        if wanted.kind == "loss"
        for column in wanted.column_names()
    }


def _mean(output: Output, names: Iterable[str], column: str) -> float | None:
    """Sum in float64, batch by batch in the order of the files, so that the same rows always give the same mean."""
    filesystem, root = output.store.arrow_filesystem(output.uri)
    dataset = ds.dataset([f"{root}/{name}" for name in names], format="parquet", filesystem=filesystem)
    total, count = 0.0, 0
    for batch in dataset.scanner(columns=[column]).to_batches():
        losses = batch.column(column)
        total += pc.sum(losses.cast(pa.float64())).as_py() or 0.0
        count += len(losses) - losses.null_count
    return total / count if count else None
