"""Compute the classifiers of models whose classes are prompts once for an output, and store them in it.

`OUT/_prompts-<model>.safetensors` holds one: workers, other drivers and later sessions all score with the same numbers,
and a thousand classes of 80 prompts are not embedded again by every worker.
"""

from __future__ import annotations

from collections.abc import Mapping

from img2parquet.dataset.commit import Output
from img2parquet.errors import StorageError
from img2parquet.job import JobSpec
from img2parquet.models import Card, load_model
from img2parquet.models.prompts import ClassWeights, decode_weights, encode_weights, weights_file
from img2parquet.storage import join
from img2parquet.telemetry.logs import log_step


def stored_class_weights(job: JobSpec, cards: Mapping[str, Card], output: Output) -> dict[str, ClassWeights]:
    """Return the classifiers of the job's models by name; compute and store those that are not there.

    Raises StorageError when a stored one is damaged."""
    found = {}
    for model in job.models:
        if model.class_prompts is None:
            continue
        name, digest = weights_file(model.name), cards[model.name].prompts
        data = output.read(name)
        if data is None:
            log_step("Embedding the %d prompts of model `%s`", len(model.class_prompts.all), model.name)
            weights = model.class_prompts.weights(load_model(job.spec_of(model)).text)
            data = output.create_or_read(name, encode_weights(weights, digest))
        try:
            found[model.name] = decode_weights(data, digest)
        except ValueError as error:
            hint = "remove the file, and it is made again"
            raise StorageError(f"{join(output.uri, name)}: {error}", hint=hint) from None
    return found
