"""Measure the seconds per image of each worker step: alone on one core, and with all cores in it at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from infra.bench.contest import Array, Call, Prepare, Record, Rules, Turn, received, workers

if TYPE_CHECKING:
    from img2parquet.batch import Embedded, Work
    from img2parquet.dataset.plan import Plan

STAGES = ("decode", "forward", "encode")
PART_BATCHES = 32  # of the part whose file is encoded
PATIENCE = 4


def cores() -> int:
    return len(os.sched_getaffinity(0))


def resolved_dtype() -> str:
    """Resolve `dtype: auto` on this machine."""
    from img2parquet.models.dtypes import resolve_dtype

    return resolve_dtype("auto", "cpu")


def seconds(spec: str, rules: Rules) -> tuple[dict[str, float], dict[str, float]]:
    """Measure seconds per image in each stage of a job (its file as JSON): alone, and on all cores at once."""
    contestants: dict[str, Prepare] = {
        f"{stage} {core}": partial(prepare, stage, spec) for stage in STAGES for core in range(cores())
    }
    alone, at_once = ({stage: Record(np.empty(0)) for stage in STAGES} for _ in range(2))
    with workers(contestants) as started:
        images = {name: int(received(name, connection)[0]) for name, connection in started.items()}
        calls = {stage: _calls(partial(_together, started, [f"{stage} 0"]), rules) for stage in STAGES}
        for _ in range(rules.rounds * (1 if rules.quick else PATIENCE)):
            for stage in STAGES:
                for record, count in ((alone[stage], 1), (at_once[stage], cores())):
                    names = [f"{stage} {core}" for core in range(count)]
                    record.turns.append(_together(started, names, calls[stage]))
            if all(record.clean >= rules.rounds for record in (*alone.values(), *at_once.values())):
                break
    both = [
        {stage: record.wall_s / images[f"{stage} 0"] for stage, record in which.items()} for which in (alone, at_once)
    ]
    return both[0], both[1]


def _calls(once: Callable[[int], Turn], rules: Rules) -> int:
    """Find how many calls fill a turn."""
    return max(1, int(np.ceil(rules.round_s / once(1).wall_s)))


def _together(started: Mapping[str, Connection], names: Sequence[str], calls: int) -> Turn:
    """Run all of `names` at once and return their mean turn; CPU used by one is not foreign to another."""
    for name in names:
        started[name].send(calls)
    turns: list[Turn] = [received(name, started[name]) for name in names]
    wall_s, cpu_s = (float(np.mean([getattr(turn, what) for turn in turns])) for what in ("wall_s", "cpu_s"))
    known = sum(turn.cpu_s / turn.wall_s for turn in turns[1:]) / (os.cpu_count() or 1)
    return Turn(wall_s, cpu_s, max(0.0, turns[0].foreign - known))


def prepare(stage: str, spec: str) -> Call:
    """Prepare a stage in its own process: one call is one batch, or one part for `encode`; it returns its images."""
    from img2parquet.batch import Batch, Embedded, split_into_batches
    from img2parquet.inference.allocator import keep_freed_memory
    from img2parquet.inference.steps import Embedder, Preparer

    keep_freed_memory()
    work, plan = _planned(spec)
    batch = next(iter(split_into_batches(work.job.input, plan.parts[0], work.batch_size)))
    assert isinstance(batch, Batch), batch
    decode = Preparer(work)
    if stage == "decode":
        return _told(lambda: decode(batch), len(batch.rows))
    prepared, forward = decode(batch), Embedder(work)
    if stage == "forward":
        return _told(lambda: forward(prepared), len(batch.rows))
    embedded = forward(prepared)
    assert isinstance(embedded, Embedded), embedded
    return _encode(embedded, plan)


def _told(step: Callable[[], object], images: int) -> Call:
    def call() -> Array:
        step()
        return np.array([images])

    return call


def _encode(embedded: Embedded, plan: Plan) -> Call:
    """Encode a part of many such batches."""
    from img2parquet.dataset.part_file import encode_part

    (model,) = plan.identities
    rows = embedded.images * PART_BATCHES
    batches = [replace(embedded, k=k, rows_in=None) for k in range(PART_BATCHES - 1)]
    batches.append(replace(embedded, k=PART_BATCHES - 1, rows_in=rows))
    about, part = plan.identities[model], plan.parts[0]
    return _told(lambda: encode_part(part, model, plan.identity(model), batches, about), rows)


def _planned(spec: str) -> tuple[Work, Plan]:
    """Plan the job as the driver does when it starts."""
    from img2parquet.batch import Work
    from img2parquet.dataset.plan import make_plan
    from img2parquet.inference.capabilities import probe_capabilities
    from img2parquet.job import parse_job

    job = parse_job(json.loads(spec))
    found = probe_capabilities(job)
    work = Work(job, found.cards, found.dtype, found.device, found.batch_size, job.resources.threads_per_worker)
    return work, make_plan(job, found.cards, found.dtype)
