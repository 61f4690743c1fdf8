"""Compare a job's images per second with the cores' ideal: cores / (decode + forward + encode seconds).

* The stages are the workers' own steps on one batch, each measured alone, with one thread, in a process of its own, in
  turns with the others: decoding and cropping, the model and its outputs, a part's Parquet file.
* That ideal treats each core as a machine of its own. `all cores at once` repeats it with every core in the same stage:
  they share clock, cache and memory, so this is what is left of the ideal before moving work around costs anything.
* The job is timed from outside as one command, at two sizes, so that start-up is excluded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from infra.bench import machine, models
from infra.bench.command import Pair, take_turns
from infra.bench.contest import FOREIGN_LIMIT, Rules
from infra.bench.images import PER_SHARD, shards
from infra.bench.jobs import WORK, Job, checkpoint
from infra.bench.report import Bar, Report
from infra.bench.stages import STAGES, cores, resolved_dtype, seconds

FLOORS = {"local": 0.9, "ray": 0.85}
TINY = {"patch_size": 56, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


@dataclass(frozen=True)
class Subject:
    name: str
    model: models.Subject
    shards: tuple[int, int]  # of the two sizes of its job


SUBJECTS = (
    Subject("decode-only", models.Subject("facebook/vit-msn-small", {}, changes=TINY), (320, 960)),
    Subject("levit-128S", models.Subject("facebook/levit-128S", {}), (160, 480)),
    Subject("beit-base", models.Subject("microsoft/beit-base-patch16-224", {}), (8, 24)),
)
QUICK_SHARDS = (2, 6)
COLUMNS = (
    "model, runner",
    "images/s",
    "ideal",
    "of the ideal",
    "floor",
    "of all cores at once",
    "CPU ms/image",
    "turns",
)


@dataclass
class Measured:
    """One model: each stage alone and on all cores at once, and the whole job by runner."""

    subject: Subject
    dtype: str
    alone: Mapping[str, float]  # seconds of one image
    at_once: Mapping[str, float]
    jobs: dict[str, Pair] = field(default_factory=dict)

    @property
    def ideal(self) -> float:
        """Compute the ideal images per second of all cores."""
        return cores() / sum(self.alone.values())

    @property
    def ideal_at_once(self) -> float:
        return cores() / sum(self.at_once.values())


def report(rules: Rules, threads: int, only: Sequence[str], subjects: Sequence[Subject] = SUBJECTS) -> Report:
    """Write the report. `threads` is ignored: there is one worker with one thread for each core."""
    del threads
    load_at_start = machine.load()
    measured = [measure(subject, rules) for subject in subjects if not only or subject.name in only]
    about = [
        f"{machine.cpu()}; load average {load_at_start} at the start, {machine.load()} at the end",
        machine.versions(("torch", "ray", "pyarrow", "simplejpeg")),
        f"`ideal`: {cores()} cores / (decode + forward + encode), each alone with one thread; `all cores at once`: the "
        "same while every core does it",
        "jobs: images a second between N and 3N images, whole commands",
        f"turns in which others had more than {FOREIGN_LIMIT:.0%} of the processors are repeated",
        *map(_stages, measured),
    ]
    rows = [row for one in measured for row in table(one)]
    bars = [bar for one in measured for bar in bars_of(one)]
    return Report("efficiency", "Whole jobs over what the cores can do", about, COLUMNS, rows, bars, agrees=True)


def measure(subject: Subject, rules: Rules) -> Measured:
    folder = checkpoint(subject.model)
    small, large = QUICK_SHARDS if rules.quick else subject.shards
    files = shards(large, WORK / "shards")
    work = Job(files[:1], folder, "auto", WORK / "efficiency" / subject.name)
    alone, at_once = seconds(json.dumps(work.spec()), rules)
    measured = Measured(subject, resolved_dtype(), alone, at_once)
    measured.jobs = {runner: Pair((small * PER_SHARD, large * PER_SHARD)) for runner in FLOORS}
    takes = {
        runner: lambda images, runner=runner: replace(work, files=files[: images // PER_SHARD]).ours(runner)
        for runner in FLOORS
    }
    take_turns(takes, measured.jobs, rules, rounds=max(1, rules.rounds // 2))
    said = [f"{runner} {pair.images_per_s:.1f}/s ({pair.clean} clean)" for runner, pair in measured.jobs.items()]
    print(f"{subject.name}: ideal {measured.ideal:.1f}/s; {'; '.join(said)}", file=sys.stderr, flush=True)
    return measured


def _stages(one: Measured) -> str:
    """Format a line for the page: milliseconds per image in each stage."""
    said = ", ".join(f"{stage} {one.alone[stage] * 1e3:.2f} ({one.at_once[stage] * 1e3:.2f})" for stage in STAGES)
    return f"{one.subject.name}, {one.dtype}: ms of one image alone (on all cores at once): {said}"


def table(one: Measured) -> list[Sequence[str]]:
    rows = [[f"**{one.subject.name}, {one.dtype}**", *[""] * (len(COLUMNS) - 1)]]
    for runner, pair in one.jobs.items():
        record = min(pair.small, pair.large, key=lambda record: record.clean)
        rows.append(
            [
                runner,
                f"{pair.images_per_s:.1f}",
                f"{one.ideal:.1f}",
                f"{pair.images_per_s / one.ideal:.2f}",
                f"{FLOORS[runner]:g}",
                f"{pair.images_per_s / one.ideal_at_once:.2f}",
                f"{pair.cpu_ms_per_image:.2f}",
                f"{record.clean} of {len(record.turns)}",
            ]
        )
    return list(rows)


def bars_of(one: Measured) -> list[Bar]:
    """Make the bars; an unknown speed has not reached its floor."""
    return [
        Bar(f"{one.subject.name}, {runner}", float(np.nan_to_num(pair.images_per_s / one.ideal)), FLOORS[runner])
        for runner, pair in one.jobs.items()
    ]
