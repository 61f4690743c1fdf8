"""Embed words as the text tower of a run's model does, after checking that its vectors are of the space of text.

Shapes: n texts, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from img2parquet.errors import OutputUnavailable
from img2parquet.outputs.embedding import unit_length
from img2parquet.results.embeddings import Floats, Vectors
from img2parquet.results.search.query_image import model_of_vectors

if TYPE_CHECKING:
    from img2parquet.models.model import Model


def embed_texts(vectors: Vectors, texts: Sequence[str], checkpoint: str | None = None) -> Floats:
    """Embed texts as (n, D) unit vectors. checkpoint: where the run's model is now.

    Raises InputError, naming the text, for one that is empty or longer than the model reads, and as
    `model_with_text` does."""
    return unit_length(model_with_text(vectors, checkpoint).text_features(texts).numpy()).astype(np.float32)


def model_with_text(vectors: Vectors, checkpoint: str | None = None) -> Model:
    """Load the run's model, whose texts can be compared with these vectors. checkpoint: where it is now.

    Raises OutputUnavailable when it has no text tower, or the vectors are not of the space that it shares with images;
    CheckpointError when the weights are not the run's."""
    outputs = vectors.plan.identities[vectors.model].get("outputs", ())
    output = next(output for output in outputs if output["kind"] == "embedding" and output["name"] == vectors.column)
    where = f"column `{vectors.column}` of model `{vectors.model}`"
    if output.get("pool", "model") != "model":
        message = f"{where} has vectors of `pool: {output['pool']}`, which are not in the space shared with text"
        raise OutputUnavailable(message, hint="run a job with `{kind: embedding}`, whose vectors are projected into it")
    if output.get("dtype") == "binary":
        message = f"{where} has only the signs of its vectors, which are too coarse to compare with words"
        raise OutputUnavailable(message, hint="run a job with `dtype: int8`, `float16` or `float32`")
    model = model_of_vectors(vectors, checkpoint)
    width = model.card.gives["pooled"][0]
    if width != vectors.width:
        message = f"{where} has {vectors.width} values, and the model's texts {width}: they are not of one space"
        raise OutputUnavailable(message, hint="run the job anew with this model")
    return model
