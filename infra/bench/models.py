"""Compare each family's forward pass with transformers: same weights, pixels and threads; images per second.

Both get normalised pixels in the dtype and memory layout of normal use, made before the clock starts: transformers
those of its processor, ours those of `normalize_on_device`. Weights are seeded so that each number in them affects the
output (a batch norm with statistics 0 and 1 would not).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from infra.bench import machine
from infra.bench.contest import HOW, Array, Call, Record, Rules, compete, progress
from infra.bench.report import Bar, Report


@dataclass(frozen=True)
class Contestant:
    name: str
    ours: bool
    dtype: str
    keeps_memory: bool  # the allocator settings of our workers


@dataclass(frozen=True)
class Subject:
    """A published model, and the least factor by which ours must beat transformers float32, by dtype."""

    repo: str
    floors: Mapping[str, float]
    size: int = 224
    changes: Mapping[str, Any] = field(default_factory=dict)  # to its config

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


CONTESTANTS = (
    Contestant("transformers float32", ours=False, dtype="float32", keeps_memory=False),
    Contestant("transformers float32, our allocator settings", ours=False, dtype="float32", keeps_memory=True),
    Contestant("transformers bfloat16, our allocator settings", ours=False, dtype="bfloat16", keeps_memory=True),
    Contestant("ours float32", ours=True, dtype="float32", keeps_memory=True),
    Contestant("ours bfloat16", ours=True, dtype="bfloat16", keeps_memory=True),
)
BASELINE, TUNED = CONTESTANTS[0].name, CONTESTANTS[1].name
SUBJECTS = (  # floors: what prototypes had reached beforehand
    Subject("facebook/levit-128S", {"float32": 1.9, "bfloat16": 4.3}),
    Subject("facebook/levit-256", {"float32": 1.7, "bfloat16": 5.3}),
    Subject("google/bit-50", {"float32": 2.2, "bfloat16": 9.0}),
    Subject("facebook/vit-msn-small", {"float32": 1.05, "bfloat16": 4.8}),
    Subject("microsoft/beit-base-patch16-224", {"float32": 1.1, "bfloat16": 5.3}),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of the output's largest value
COLUMNS = (
    "model",
    "images/s",
    "CPU ms/image",
    "x transformers float32",
    "x the same, our allocator settings",
    "x in CPU time",
    "floor",
    "largest difference",
    "turns",
)


def report(rules: Rules, threads: int, only: Sequence[str], subjects: Sequence[Subject] = SUBJECTS) -> Report:
    batch = 2 if rules.quick else 32
    load_at_start, rows, bars, agrees = machine.load(), list[Sequence[str]](), list[Bar](), True
    for subject in subjects:
        if only and subject.name not in only:
            continue
        measured = measure(subject, rules, batch, threads)
        rows += table(subject, measured, batch)
        bars += bars_of(subject, measured)
        progress(subject.name, measured)
        agrees = agrees and all(differs(measured, one) <= TOLERANCE[one.dtype] for one in CONTESTANTS)
    about = [
        f"{machine.cpu()}; load average {load_at_start} at the start, {machine.load()} at the end",
        machine.versions(("torch", "transformers")),
        f"batch {batch}, {threads} threads, medians of {rules.rounds} turns of at least {rules.round_s:g} s",
        HOW,
        "transformers runs as `from_pretrained` leaves it: eager, SDPA, the C library's own allocator settings; a "
        "second row has those that our workers set for themselves",
        "floors of bfloat16 are for processors with matrix units for it (AMX)",
        "`largest difference` from transformers float32 of this run, relative to the largest value",
    ]
    name = "models" + ("" if machine.multiplies_bfloat16() else "-without-amx")
    name += "" if threads == 2 else f"-{threads}-threads"
    return Report(name, f"Models beside transformers, {threads} threads", about, COLUMNS, rows, bars, agrees)


def measure(subject: Subject, rules: Rules, batch: int, threads: int) -> dict[str, Record]:
    """Measure each contestant; return its record by name."""
    with tempfile.TemporaryDirectory() as folder:
        save(subject, Path(folder))
        prepared = {
            one.name: partial(prepare, one, folder=folder, size=subject.size, batch=batch, threads=threads)
            for one in CONTESTANTS
        }
        return compete(prepared, rules)


def prepare(one: Contestant, folder: str, size: int, batch: int, threads: int) -> Call:
    """Prepare a contestant, in its own process."""
    if one.keeps_memory:
        from img2parquet.inference.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(threads)
    dtype: torch.dtype = getattr(torch, one.dtype)
    x_BCHW = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    call = _ours(folder, one.dtype, x_BCHW) if one.ours else _transformers(folder, dtype, x_BCHW)
    return torch.inference_mode()(call)


def _ours(folder: str, dtype: str, x_BCHW: Any) -> Call:
    import torch

    from img2parquet.models import load_model

    model = load_model(folder, dtype=dtype, image_size=x_BCHW.shape[-1])
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    wanted = "logits" if "logits" in model.card.gives else "pooled"
    return lambda: _array(model.backbone(x_BCHW, frozenset({wanted}))[wanted])


def _transformers(folder: str, dtype: Any, x_BCHW: Any) -> Call:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=dtype)

    def call() -> Array:
        outputs = model(x_BCHW)
        return _array(outputs.logits if "logits" in outputs else outputs.last_hidden_state[:, 0])

    return call


def _array(tensor: Any) -> Array:
    array: Array = tensor.float().numpy()
    return array


def save(subject: Subject, folder: Path) -> None:
    """Save a checkpoint in the hub's layout."""
    import transformers

    from img2parquet.models import published
    from tests.models.oracle import saved

    (entry,) = (entry for _, entry in published() if entry.repo == subject.repo)
    kind = getattr(transformers, entry.architecture)
    saved(kind(kind.config_class(**{**entry.config, **subject.changes})), folder)


def table(subject: Subject, measured: Mapping[str, Record], batch: int) -> list[Sequence[str]]:
    base, tuned = measured[BASELINE], measured[TUNED]
    rows = [[f"**{subject.name}**", *[""] * (len(COLUMNS) - 1)]]
    for one in CONTESTANTS:
        record = measured[one.name]
        rows.append(
            [
                one.name,
                f"{batch / record.wall_s:.1f}",
                f"{record.cpu_s / batch * 1e3:.2f}",
                f"{base.wall_s / record.wall_s:.2f}",
                f"{tuned.wall_s / record.wall_s:.2f}",
                f"{base.cpu_s / record.cpu_s:.2f}",
                f"{subject.floors[one.dtype]:g}" if asked(one) else "",
                f"{differs(measured, one):.1e}",
                f"{record.clean} of {len(record.turns)}",
            ]
        )
    return list(rows)


def bars_of(subject: Subject, measured: Mapping[str, Record]) -> list[Bar]:
    base_s = measured[BASELINE].wall_s
    return [
        Bar(f"{subject.name} {one.dtype}", base_s / measured[one.name].wall_s, subject.floors[one.dtype])
        for one in CONTESTANTS
        if asked(one)
    ]


def asked(one: Contestant) -> bool:
    """Whether this processor has a floor for the contestant."""
    return one.ours and (one.dtype == "float32" or machine.multiplies_bfloat16())


def differs(measured: Mapping[str, Record], one: Contestant) -> float:
    """Compute the largest difference from transformers float32, relative to its largest value; NaN is infinite."""
    reference, output = measured[BASELINE].output, measured[one.name].output
    difference = float(np.abs(output - reference).max() / np.abs(reference).max())
    return difference if np.isfinite(difference) else float("inf")
