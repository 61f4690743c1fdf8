"""An image to the vector that a run would have given it: the same decoding, preprocessing, weights and dtype.

The run's record says how; a checkpoint that is not the one that the run had is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.batch import Batch, Failed, Work
from pipeline.embed import Embedder, Preparer
from pipeline.embeddings import Floats, Vectors, unit_vectors
from pipeline.errors import CheckpointError, InputError, NotFound, RunMismatch
from pipeline.job import JobSpec, ModelJob, differences, identity, parse_job
from pipeline.schema import Row


def embed_image(vectors: Vectors, image: str, checkpoint: str | None = None) -> Floats:
    """A path or URI of an image -> its unit vector, (D,). `checkpoint`: where the run's model lies now.

    Raises InputError for what is no image, RunMismatch where the model is not the run's, ModelError."""
    try:
        data = vectors.output.store.read(image)
    except NotFound:
        raise InputError(f"{image}: no such image") from None
    work = _work(vectors, checkpoint)
    prepared = Preparer(work)(Batch(0, 0, (Row(0, image, "", data),), rows_in=1))
    rejects = [*prepared.rejects, *(reject for crops in prepared.crops.values() for reject in crops.rejects)]
    if rejects:
        raise InputError(f"{image}: {rejects[0].reason}: {rejects[0].message}")
    embedded = Embedder(work)(prepared)
    if isinstance(embedded, Failed):
        raise InputError(f"{image}: {embedded.message}")
    vector_D: Floats = unit_vectors(embedded.tables[vectors.model], vectors.column)[0]
    return vector_D


def recorded_job(record: Mapping[str, Any] | None, uri: str) -> JobSpec:
    """The job as a run's record has it. Raises InputError where there is no record."""
    if record is None:
        raise InputError(f"{uri}: no _run.json, so nobody knows how its rows were made")
    return parse_job(record["job"], where=f"{uri}/_run.json")


def _work(vectors: Vectors, checkpoint: str | None) -> Work:
    """The run's own settings, for one model with one output. Its other models are only asked how they decode."""
    from pipeline.models import read_card

    record = vectors.output.run_record()
    job = recorded_job(record, vectors.output.uri)
    assert record is not None
    models = [_moved(model, checkpoint) if model.name == vectors.model else model for model in job.models]
    is_alone = job.preprocess != "fast"  # where models share a decode, all of their sizes decide
    cards = {
        model.name: read_card(model.model, name=model.name, image_size=model.image_size, weights=model.weights)
        for model in models
        if model.name == vectors.model or not is_alone
    }
    wanted = next(model for model in models if model.name == vectors.model)
    ours = identity(job, wanted, cards[wanted.name], record["dtype"], cards.values())
    _refuse_other_run(json.loads(json.dumps(ours)), vectors.plan.identities[wanted.name], vectors)
    outputs = tuple(output for output in wanted.outputs if vectors.column in output.column_names())
    alone = job.model_copy(
        update={"models": (wanted.model_copy(update={"outputs": outputs}),), "input": _no_columns(job)}
    )
    return Work(alone, cards, record["dtype"], "cpu", batch_size=1, threads=record["threads_per_worker"])


def _moved(model: ModelJob, checkpoint: str | None) -> ModelJob:
    if checkpoint is None:
        return model
    return model.model_copy(
        update={"model": str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint}
    )


def _no_columns(job: JobSpec) -> Any:
    """A query has no passthrough columns."""
    return job.input.model_copy(update={"keep": ()})  # type: ignore[attr-defined]


def _refuse_other_run(ours: Mapping[str, Any], theirs: Mapping[str, Any], vectors: Vectors) -> None:
    if ours["weights"] != theirs["weights"]:
        raise CheckpointError(
            f"the checkpoint of model `{vectors.model}` is not the one that {vectors.output.uri} was made with: its "
            f"weights' hash is {ours['weights']}, the run's {theirs['weights']}",
            hint="name the folder or URI of the run's own with --checkpoint",
        )
    lines = differences(ours, dict(theirs))
    if lines:
        raise RunMismatch(
            f"{vectors.output.uri} was made in another way than this installation would embed the query:\n  "
            + "\n  ".join(lines[:6]),
            hint="use the version of img2parquet that made it",
        )
