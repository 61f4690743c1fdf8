"""Find out what a worker of this job can do: each model's card, the dtype, the device and the batch size.

This is done once, on a worker, before the first part. The answers become part of the run's identity and its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from img2parquet.inference import device_selection
from img2parquet.inference.batch_size import auto_batch_size
from img2parquet.job import JobSpec, ModelJob
from img2parquet.models import Card
from img2parquet.telemetry.logs import log_step


@dataclass(frozen=True)
class Capabilities:
    """What a worker can do, with every `auto` of the job resolved. `cards` are by model name."""

    cards: Mapping[str, Card]
    dtype: str
    device: str
    batch_size: int
    versions: Mapping[str, str]


def probe_capabilities(job: JobSpec, cluster_gpus: int = 0, gpus_each: float | None = None) -> Capabilities:
    """Read the cards of the job's models and resolve its dtype, device and batch size, in this process.

    cluster_gpus: the GPUs of the whole Ray cluster. gpus_each: the GPUs that Ray gives each worker.
    Raises ModelError when a model is unavailable or cannot give an output that the job asks for, and JobError when a
    GPU would stay idle."""
    from img2parquet.models.dtypes import resolve_dtype

    each = job.resources.gpus_per_worker if gpus_each is None else gpus_each
    device = device_selection.choose_device(job.resources.device, each, device_selection.detect_gpus(cluster_gpus))
    cards = read_cards(job)
    dtype, size = resolve_dtype(job.dtype, device), job.resources.batch_size
    batch_size = auto_batch_size(job, cards, dtype, device) if size == "auto" else size
    return Capabilities(cards, dtype, device, batch_size, _versions())


def recorded_capabilities(job: JobSpec, record: Mapping[str, Any]) -> Capabilities:
    """Return what the workers of a recorded run could do, with the cards of the job's models as they are now.

    record: of the run. Raises ModelError as `probe_capabilities` does."""
    dtype = record.get("dtype", "") if job.dtype == "auto" else job.dtype
    return Capabilities(read_cards(job), dtype, "cpu", record["batch_size"], record.get("versions", {}))


def read_cards(job: JobSpec) -> dict[str, Card]:
    """Read the cards of the job's models, by model name, and check that each model gives what its outputs need.

    Raises ModelError when a model is unavailable, or cannot give an output that the job asks for."""
    cards = {}
    for wanted in job.models:
        card = read_model_card(job, wanted)
        for output in wanted.outputs:
            output.wants(card)
        cards[wanted.name] = card
    return cards


def read_model_card(job: JobSpec, model: ModelJob) -> Card:
    """Read the card of one of the job's models. Raises ModelError when it is unavailable."""
    from img2parquet.models import read_card

    log_step("Reading the checkpoint of model `%s`", model.name)
    return read_card(job.spec_of(model))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "pyarrow", "pillow", "simplejpeg", "numpy")
    return {name: version(name) for name in names}
