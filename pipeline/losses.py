"""The committed files of an output -> the mean of each loss that its job asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.commit import Output
from pipeline.job import JobSpec


def mean_losses(job: JobSpec, output: Output, names: Mapping[str, Iterable[str]]) -> dict[str, float | None]:
    """`model.column` -> the mean over the rows that have a loss; None where none has. Reads those columns only.

    names: of each model's files, in the order of the sum."""
    return {
        f"{model.name}.{column}": _mean(output, names[model.name], column)
        for model in job.models
        for wanted in model.outputs
        if wanted.kind == "loss"
        for column in wanted.column_names()
    }


def _mean(output: Output, names: Iterable[str], column: str) -> float | None:
    """Summed in float64, batch by batch in the files' order, so that a run gives the same mean each time."""
    filesystem, root = output.store.arrow_filesystem(output.uri)
    dataset = ds.dataset([f"{root}/{name}" for name in names], format="parquet", filesystem=filesystem)
    total, count = 0.0, 0
    for batch in dataset.scanner(columns=[column]).to_batches():
        losses = batch.column(column)
        total += pc.sum(losses.cast(pa.float64())).as_py() or 0.0
        count += len(losses) - losses.null_count
    return total / count if count else None
