"""What a worker of this job can do: its device, the dtype after `auto`, batch size, and each model's card.

Asked once, on a worker, before the first part; what it says goes into the run's identity and record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import gpus
from pipeline.batch_size import auto_batch_size
from pipeline.job import JobSpec
from pipeline.models import Card


@dataclass(frozen=True)
class Probe:
    cards: Mapping[str, Card]
    dtype: str
    device: str
    batch_size: int
    versions: Mapping[str, str]


def probe(job: JobSpec, cluster_gpus: int = 0, gpus_each: float | None = None) -> Probe:
    """cluster_gpus: all that Ray has, gpus_each: what it gives each worker. Raises ModelError where a model, or an
    output that the job asks of it, cannot be had; JobError where a GPU would lie idle."""
    from pipeline.models import read_card

    each = job.resources.gpus_per_worker if gpus_each is None else gpus_each
    device = gpus.choose_device(job.resources.device, each, gpus.find(cluster_gpus))
    cards = {}
    for wanted in job.models:
        card = read_card(wanted.model, name=wanted.name, image_size=wanted.image_size, weights=wanted.weights)
        for output in wanted.outputs:
            output.wants(card)
        cards[wanted.name] = card
    dtype, size = resolve_dtype(job.dtype, device), job.resources.batch_size
    batch_size = auto_batch_size(job, cards, dtype, device) if size == "auto" else size
    return Probe(cards, dtype, device, batch_size, _versions())


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 where the processor multiplies matrices in it, float32 elsewhere."""
    import torch

    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "pyarrow", "pillow", "simplejpeg", "numpy")
    return {name: version(name) for name in names}
