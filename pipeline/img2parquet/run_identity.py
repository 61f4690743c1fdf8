"""Compute the run identity of a model, which holds everything that changes its results, and compare two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from img2parquet.images import decode, jpeg_scaling, preprocess
from img2parquet.job import JobSpec, ModelJob
from img2parquet.models import Card
from img2parquet.outputs.labels import Labels
from img2parquet.outputs.loss import Loss

RESULT_VERSION = 1  # increase by hand when the same job would give other numbers
# settings of an input that change where it lies and how fast it is read, but not the results
PLACES_AND_SPEED = {"uris", "storage_options", "shards_per_part", "split_above_bytes"}


def identity(job: JobSpec, model: ModelJob, card: Card, dtype: str, beside: Iterable[Card] = ()) -> dict[str, Any]:
    """Return everything that changes this model's rows, as JSON values: two runs with equal identities are the same.

    beside: the cards of the job's models; with `preprocess: fast` all of them decide how images are decoded."""
    fast = (
        {"shrink": jpeg_scaling.describe([one.preprocess for one in (card, *beside)])}
        if job.preprocess == "fast"
        else {}
    )
    return {
        "result_version": RESULT_VERSION,
        "family": card.family,
        "weights": card.weights_hash,
        "config": json.loads(json.dumps(card.config, sort_keys=True, default=str)),
        "preprocess": {"mode": job.preprocess, **preprocess.describe(card.preprocess), **fast},
        "decode": decode.describe(job.decode.policy()),
        "input": _plain(job.input, exclude=PLACES_AND_SPEED),
        "outputs": [_plain(output) for output in model.outputs],
        "dtype": dtype,
        **({"reduces_labels": True} if card.reduces_labels else {}),
        **_score_functions(model, card),
        **_auxiliary_loss(model, card),
        **({"prompts": card.prompts} if card.prompts else {}),
        **({"implementation": card.implementation} if card.implementation != "native" else {}),
    }


def _score_functions(model: ModelJob, card: Card) -> dict[str, Any]:
    """Return how labels are scored where it is not by a softmax, as it always was in earlier versions."""
    labels = [output for output in model.outputs if isinstance(output, Labels) and output.feature in card.gives]
    functions = {output.score_function(card) for output in labels} - {"softmax"}
    return {"scores": min(functions)} if functions else {}


def _auxiliary_loss(model: ModelJob, card: Card) -> dict[str, Any]:
    """Return the weight of an auxiliary head's loss, which earlier versions left out."""
    losses = [output for output in model.outputs if isinstance(output, Loss)]
    weights = {weight for output in losses if (weight := output.auxiliary_weight(card)) is not None}
    return {"auxiliary_loss_weight": min(weights)} if weights else {}


def identity_hash(run_identity: Mapping[str, Any]) -> str:
    """Hash a run identity to 32 hex digits."""
    return hashlib.sha256(json.dumps(run_identity, sort_keys=True).encode()).hexdigest()[:32]


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """List the differences between two identities, one line each: `dtype: "bfloat16", was "float32"`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        return [line for k in keys for line in differences(ours.get(k), theirs.get(k), f"{place}.{k}".lstrip("."))]
    return [] if ours == theirs else [f"{place}: {json.dumps(ours)}, was {json.dumps(theirs)}"]


def _plain(settings: object, exclude: Iterable[str] = ()) -> dict[str, Any]:
    assert isinstance(settings, BaseModel)
    return settings.model_dump(mode="json", exclude=set(exclude))
