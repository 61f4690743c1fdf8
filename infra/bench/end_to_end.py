"""Compare whole jobs, from tars to Parquet embeddings, with Ray Data, Daft and a torch DataLoader.

* Same images, same checkpoint, same two columns (ours has more), same cores; each runs as one command, as users run it.
* Each peer has the fastest of a few documented settings, found by measuring and kept in out/bench/calibration.json.
* Speed excludes start-up: the additional images of a job three times as long, divided by its additional seconds.
* All are measured once; then ours and the peers close to the best one continue in turns.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from infra.bench import machine, models, peers
from infra.bench.command import Pair, Take, take_turns
from infra.bench.contest import FOREIGN_LIMIT, Rules, Turn
from infra.bench.images import PER_SHARD, shards
from infra.bench.jobs import WORK, Job, calibrated, checkpoint, least_cosine, vectors
from infra.bench.peers import PEERS, Peer, Settings
from infra.bench.report import Bar, Report
from infra.bench.stages import resolved_dtype

OURS = {"ours, local": "local", "ours, ray": "ray"}
CONTENDS = 0.85  # of the best peer's speed in the first round: slower peers are measured once
# Daft's own JPEG decoder is further from libjpeg than a resize is: BiT-50 over 576 images 0.9820, where 0.9997 when
# Daft's job decodes with Pillow instead
OWN_DECODER_COSINE = 0.98
LEAST_COSINE = {"float32": 0.999, "bfloat16": 0.9}  # bfloat16 loses more than a resize that rounds in a different order


@dataclass(frozen=True)
class Subject:
    """A model, the shards of its two job sizes, and the least factor by which ours must beat the best peer."""

    model: models.Subject
    shards: Mapping[str, tuple[int, int]]  # by dtype
    floors: Mapping[str, float]  # by dtype, of both
    auto_floor: float  # ours with `dtype: auto`, theirs float32

    @property
    def name(self) -> str:
        return self.model.name


SUBJECTS = (
    Subject(models.Subject("facebook/levit-128S", {}), {"float32": (16, 48), "bfloat16": (32, 96)},
            {"float32": 2.0, "bfloat16": 2.0}, 3.5),
    Subject(models.Subject("google/bit-50", {}), {"float32": (6, 18), "bfloat16": (6, 18)},
            {"float32": 2.0, "bfloat16": 2.0}, 7.0),
    Subject(models.Subject("microsoft/beit-base-patch16-224", {}), {"float32": (3, 9), "bfloat16": (4, 12)},
            {"float32": 1.1, "bfloat16": 1.25}, 4.5),
)  # fmt: skip
_NO_UNITS = ", without units that multiply bfloat16 matrices, so its floors are not asked"
QUICK_SHARDS = (1, 3)
COLUMNS = (
    "model, precision",
    "images/s",
    "CPU ms/image",
    "start-up s",
    "whole command s",
    "x best peer",
    "x best peer float32",
    "floors",
    "least cosine",
    "turns",
)


@dataclass
class Cell:
    """One model at one precision: a pair of sizes for each contestant."""

    subject: Subject
    dtype: str
    pairs: dict[str, Pair] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    settings: Mapping[str, Settings] = field(default_factory=dict)  # of the peers

    @property
    def title(self) -> str:
        return f"{self.subject.name}, {self.dtype}"

    def agrees(self, name: str) -> bool:
        own_decoder = name in self.settings and self.settings[name].decode == "engine"
        least = LEAST_COSINE[self.dtype]
        return self.cosines[name] >= (min(least, OWN_DECODER_COSINE) if own_decoder else least)

    def contends(self, name: str) -> bool:
        return name in OURS or self.pairs[name].images_per_s >= CONTENDS * self.best_peer()

    def best_peer(self) -> float:
        """Return the best peer's images per second; NaN without a peer."""
        return _most(pair for name, pair in self.pairs.items() if name not in OURS)

    def best_of_ours(self) -> float:
        return _most(self.pairs[name] for name in OURS)


def report(rules: Rules, threads: int, only: Sequence[str], subjects: Sequence[Subject] = SUBJECTS) -> Report:
    """Write the report. `threads` is ignored: every tool gets all cores."""
    del threads
    load_at_start, interpreter, cells, chosen = machine.load(), _interpreter(rules), list[Cell](), list[str]()
    for subject in subjects:
        if only and subject.name not in only:
            continue
        contest = Contest(subject, rules, interpreter)
        chosen += [f"{subject.name}: {name} with {settings}" for name, settings in contest.settings.items()]
        cells += contest.cells()
    auto = resolved_dtype()
    about = [
        f"{machine.cpu()}; load average {load_at_start} at the start, {machine.load()} at the end",
        machine.versions(("torch", "ray", "pyarrow", "simplejpeg")),
        f"peers: {peers.versions()}" if interpreter else "peers are not installed: `make bench` installs them",
        f"generated ImageNet-like JPEGs in tars of {PER_SHARD}; embeddings as float32; {os.cpu_count()} cores",
        "`images/s` and `CPU ms/image` are of the steady job: N and 3N images, (3N - N) / (t3 - t1); `whole command` "
        "is 3N images with start-up; CPU counts every process that the command started",
        f"medians of clean turns; one in which others had more than {FOREIGN_LIMIT:.0%} of the processors is repeated "
        "(`turns`: clean of all, at the size that has fewer)",
        f"`dtype: auto` is {auto} here{_NO_UNITS if auto == 'float32' else ''}; floors: the faster of our runners over "
        "the fastest peer",
        "`least cosine`: of one image's vector and that of ours in float32, both without the mean over all images",
        *chosen,
    ]
    bars = [bar for cell in cells for bar in bars_of(cell, cells, auto)] if interpreter else []
    agrees = all(cell.agrees(name) for cell in cells for name in cell.cosines)
    rows = [row for cell in cells for row in table(cell, cells, auto)]
    return Report("end_to_end", "End to end beside Ray Data, Daft and a DataLoader", about, COLUMNS, rows, bars, agrees)


def _interpreter(rules: Rules) -> Path | None:
    """Return the peers' interpreter; a quick run does not install it."""
    folder = WORK / "peers-venv"
    return None if rules.quick and not peers.is_installed(folder) else peers.python(folder)


def _most(pairs: Iterable[Pair]) -> float:
    speeds = [pair.images_per_s for pair in pairs]
    return max((speed for speed in speeds if not np.isnan(speed)), default=float("nan"))


class Contest:
    """One model: its checkpoint, the peers' settings, then a cell of turns for each precision."""

    def __init__(self, subject: Subject, rules: Rules, interpreter: Path | None) -> None:
        self.subject, self.rules, self.interpreter = subject, rules, interpreter
        self.checkpoint = checkpoint(subject.model)
        self.sizes = dict.fromkeys(subject.shards, QUICK_SHARDS) if rules.quick else dict(subject.shards)
        self.files = shards(max(large for _, large in self.sizes.values()), WORK / "shards")
        self.out = WORK / "end_to_end" / subject.name
        self.settings = {peer.name: self._settings(peer) for peer in PEERS} if interpreter else {}

    def cells(self) -> list[Cell]:
        made = [self._cell(dtype) for dtype in self.sizes]
        shutil.rmtree(self.out)
        return made

    def _cell(self, dtype: str) -> Cell:
        small, large = (count * PER_SHARD for count in self.sizes[dtype])
        takes: dict[str, Take] = {name: partial(self._ours, name, dtype) for name in OURS}
        takes |= {peer.name: partial(self._peer, peer, dtype) for peer in PEERS if self.interpreter}
        cell = Cell(self.subject, dtype, {name: Pair((small, large)) for name in takes})
        take_turns(takes, cell.pairs, self.rules, rounds=1)
        cell.cosines, cell.settings = self._compared(dtype, large), self.settings
        if not self.rules.quick:
            near = {name: take for name, take in takes.items() if cell.contends(name)}
            take_turns(near, cell.pairs, self.rules, rounds=max(1, self.rules.rounds // 2))
        progress(cell)
        return cell

    def _compared(self, dtype: str, images: int) -> dict[str, float]:
        """Compare the outputs of the last turn of each, which was the large one."""
        reference = self._job("reference", "float32", images)
        reference.ours("local")
        wanted = vectors(reference.out)
        return {name: least_cosine(vectors(self._job(name, dtype, images).out), wanted) for name in self._names()}

    def _names(self) -> list[str]:
        return [*OURS, *self.settings]

    def _ours(self, name: str, dtype: str, images: int) -> Turn:
        return self._job(name, dtype, images).ours(OURS[name])

    def _peer(self, peer: Peer, dtype: str, images: int, settings: Settings | None = None) -> Turn:
        assert self.interpreter
        return self._job(peer.name, dtype, images).peer(peer, settings or self.settings[peer.name], self.interpreter)

    def _job(self, name: str, dtype: str, images: int) -> Job:
        folder = self.out / f"{name} {dtype}".replace(", ", "-").replace(" ", "-")
        return Job(self.files[: images // PER_SHARD], self.checkpoint, dtype, folder)

    def _settings(self, peer: Peer) -> Settings:
        if self.rules.quick:
            return peer.settings[0]
        images = self.sizes["float32"][1] * PER_SHARD
        return calibrated(peer, self.subject.name, lambda one: self._peer(peer, "float32", images, one))


def progress(cell: Cell) -> None:
    """Print one line to stderr, since the whole suite takes a while."""
    said = [f"{name} {pair.images_per_s:.1f}/s ({pair.clean} clean)" for name, pair in cell.pairs.items()]
    print(f"{cell.title}: {'; '.join(said)}", file=sys.stderr, flush=True)


def table(cell: Cell, cells: Sequence[Cell], auto: str) -> list[Sequence[str]]:
    default_rival = _rival_in_float32(cell, cells)
    rows = [[f"**{cell.title}**", *[""] * (len(COLUMNS) - 1)]]
    for name, pair in cell.pairs.items():
        speed, record = pair.images_per_s, min(pair.small, pair.large, key=lambda record: record.clean)
        rows.append(
            [
                name,
                f"{speed:.1f}",
                f"{pair.cpu_ms_per_image:.2f}",
                f"{pair.startup_s:.1f}",
                f"{pair.large.wall_s:.1f}",
                _ratio(speed / cell.best_peer()),
                _ratio(speed / default_rival),
                _floors(cell, auto) if name in OURS else "",
                f"{cell.cosines[name]:.5f}",
                f"{record.clean} of {len(record.turns)}",
            ]
        )
    return list(rows)


def _ratio(ratio: float) -> str:
    return "" if np.isnan(ratio) else f"{ratio:.2f}"


def _floors(cell: Cell, auto: str) -> str:
    equal = f"{cell.subject.floors[cell.dtype]:g}"
    return f"{equal}, {cell.subject.auto_floor:g} x float32" if cell.dtype == auto != "float32" else equal


def _rival_in_float32(cell: Cell, cells: Sequence[Cell]) -> float:
    (same,) = (other for other in cells if other.subject is cell.subject and other.dtype == "float32")
    return same.best_peer()


def bars_of(cell: Cell, cells: Sequence[Cell], auto: str) -> list[Bar]:
    ours = cell.best_of_ours()
    bars = [Bar(cell.title, ours / cell.best_peer(), cell.subject.floors[cell.dtype])]
    if cell.dtype == auto != "float32":
        title = f"{cell.subject.name}, auto x float32"
        bars.append(Bar(title, ours / _rival_in_float32(cell, cells), cell.subject.auto_floor))
    return [
        replace(bar, ratio=float(np.nan_to_num(bar.ratio))) for bar in bars
    ]  # an unknown speed has not reached its floor
