"""Embed a query image as a run embedded its own: with the same decoding, preprocessing, weights and dtype.

The run's record says how; a checkpoint other than the run's is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2parquet.batch import Batch, Failed, Work
from img2parquet.errors import CheckpointError, InputError, NotFound, OutputUnavailable, RunMismatch
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.job import JobSpec, ModelJob, parse_job
from img2parquet.results.embeddings import Floats, Vectors, unit_vectors
from img2parquet.run_identity import differences, identity
from img2parquet.schema import Row

if TYPE_CHECKING:
    from img2parquet.models.model import Model


def embed_image(vectors: Vectors, image: str, checkpoint: str | None = None) -> Floats:
    """Embed the image at a path or URI as a (D,) unit vector. checkpoint: where the run's model is now.

    Raises InputError when the image cannot be read or decoded, CheckpointError when the weights are not the run's,
    RunMismatch when this installation would embed it differently."""
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


def model_of_vectors(vectors: Vectors, checkpoint: str | None = None) -> Model:
    """Load the run's model in float32 on the CPU; its text tower is loaded with the first prompt.

    checkpoint: where it is now. Raises OutputUnavailable when it has no text tower, and otherwise as `embed_image`
    does."""
    from img2parquet.models import load_model

    work = _work(vectors, checkpoint)
    card = work.cards[vectors.model]
    if not card.has_text:
        message = f"model `{vectors.model}` ({card.family}) has no text tower, so it knows no words"
        raise OutputUnavailable(
            message, hint="run the job with a whole CLIP or SigLIP: `img2parquet models` lists them"
        )
    return load_model(work.job.spec_of(work.job.models[0]))


def recorded_job(record: Mapping[str, Any] | None, uri: str) -> JobSpec:
    """Parse the job in a run's record. Raises InputError when there is no record."""
    if record is None:
        raise InputError(f"{uri}: no _run.json, so it is unknown how its rows were made")
    return parse_job(record["job"], where=f"{uri}/_run.json")


def _work(vectors: Vectors, checkpoint: str | None) -> Work:
    """Rebuild the run's settings for one model with one output. The other models only matter for decoding."""
    from img2parquet.models import read_card

    record = vectors.output.run_record()
    job = recorded_job(record, vectors.output.uri)
    assert record is not None
    models = [_moved(model, checkpoint) if model.name == vectors.model else model for model in job.models]
    is_alone = job.preprocess != "fast"  # models that share a decode decide its size together
    cards = {
        model.name: read_card(job.spec_of(model)) for model in models if model.name == vectors.model or not is_alone
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
    """Drop the passthrough columns, which a query does not have."""
    return job.input.model_copy(update={"keep": ()})  # type: ignore[attr-defined]


def _refuse_other_run(ours: Mapping[str, Any], theirs: Mapping[str, Any], vectors: Vectors) -> None:
    if ours["weights"] != theirs["weights"]:
        raise CheckpointError(
            f"the checkpoint of model `{vectors.model}` is not the one that {vectors.output.uri} was made with: its "
            f"weights' hash is {ours['weights']}, the run's is {theirs['weights']}",
            hint="name the folder or URI of the run's checkpoint with --checkpoint",
        )
    lines = differences(ours, dict(theirs))
    if lines:
        raise RunMismatch(
            f"{vectors.output.uri} was made in a different way than this installation would embed the query:\n  "
            + "\n  ".join(lines[:6]),
            hint="use the version of img2parquet that made it",
        )
