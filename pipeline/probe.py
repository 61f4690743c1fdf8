"""What a worker of this job can do: its device, the dtype after `auto`, batch size, and each model's card.

Asked once, on a worker, before the first part; what it says goes into the run's identity and record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.job import JobSpec
from pipeline.models import Card

BATCH_SIZE_CPU = 32  # 16 to 64 is the plateau of every family on a CPU (research: models, 4.5)
BATCH_SIZE_GPU = 256


@dataclass(frozen=True)
class Probe:
    cards: Mapping[str, Card]
    dtype: str
    device: str
    batch_size: int
    versions: Mapping[str, str]


def probe(job: JobSpec) -> Probe:
    """Raises ModelError where a model, or an output that the job asks of it, cannot be had."""
    import torch

    from pipeline.models import read_card

    device = "cuda" if torch.cuda.is_available() and job.resources.gpus_per_worker != 0 else "cpu"
    cards = {}
    for wanted in job.models:
        card = read_card(wanted.model, name=wanted.name, image_size=wanted.image_size, weights=wanted.weights)
        for output in wanted.outputs:
            output.wants(card)
        cards[wanted.name] = card
    size = job.resources.batch_size
    batch_size = size if size != "auto" else (BATCH_SIZE_GPU if device == "cuda" else BATCH_SIZE_CPU)
    return Probe(cards, resolve_dtype(job.dtype, device), device, batch_size, _versions())


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
