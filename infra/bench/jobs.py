"""Describe one job, from images to Parquet embeddings, to each tool, and read what it wrote."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from infra.bench import machine, models, peers
from infra.bench.command import run
from infra.bench.contest import Array, Turn
from infra.bench.peers import Peer, Settings

WORK = Path("out/bench")
CALIBRATION = WORK / "calibration.json"
# Random residual branches as strong as what they are added to turn one level in 500 pixels into a cosine of 0.95; those
# of a trained model are weak. A norm's weight and bias scale its branch: ReLU follows, then a standardised convolution.
WEAK_BRANCHES = {"google/bit-50": ".norm3."}
BRANCH_SCALE = 0.1


@dataclass(frozen=True)
class Job:
    """A job; `out` is emptied before each run, so that there is nothing to resume."""

    files: Sequence[Path]
    checkpoint: Path
    dtype: str
    out: Path

    def ours(self, runner: str) -> Turn:
        """Return the command `img2parquet run JOB --runner RUNNER`."""
        self._clear()
        file = self.out.with_suffix(".yaml")
        file.write_text(json.dumps(self.spec()))
        return run([sys.executable, "-m", "img2parquet.cli", "run", str(file), "--runner", runner], self._log())

    def spec(self) -> dict[str, object]:
        """Return the job file's content."""
        return {
            "input": {"kind": "webdataset", "uris": self._uris()},
            "models": [{"model": str(self.checkpoint), "outputs": [{"kind": "embedding"}]}],
            "output": {"uri": str(self.out)},
            "dtype": self.dtype,
        }

    def peer(self, peer: Peer, settings: Settings, interpreter: Path) -> Turn:
        self._clear()
        told = {
            "shards": self._uris(),
            "model": str(self.checkpoint.absolute()),
            "dtype": self.dtype,
            "out": str(self.out.absolute()),
            "cores": os.cpu_count(),
        }
        return run(peers.command(peer, interpreter, settings, told), self._log(), peers.ENVIRONMENT)

    def _uris(self) -> list[str]:
        return [str(path.absolute()) for path in self.files]

    def _log(self) -> Path:
        return self.out.with_suffix(".log")

    def _clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)


def checkpoint(model: models.Subject) -> Path:
    """Make, once, a checkpoint with seeded weights and the published preprocessing at the model's size."""
    recipe = hashlib.sha256(repr((model, WEAK_BRANCHES, BRANCH_SCALE)).encode()).hexdigest()[:8]
    folder = WORK / "checkpoints" / f"{model.name}-{recipe}"
    settings = folder / "preprocessor_config.json"
    if not settings.exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        models.save(model, folder)
        _weaken_branches(folder / "model.safetensors", WEAK_BRANCHES.get(model.repo))
        settings.write_text(json.dumps(_preprocessor(model)))
    return folder


def _weaken_branches(file: Path, norms: str | None) -> None:
    from safetensors.torch import load_file, save_file

    if norms is not None:
        tensors = load_file(file)
        scaled = {name: tensor * BRANCH_SCALE if norms in name else tensor for name, tensor in tensors.items()}
        save_file(scaled, file, metadata={"format": "pt"})


def _preprocessor(model: models.Subject) -> dict[str, object]:
    from img2parquet.models import published

    (entry,) = (entry for _, entry in published() if entry.repo == model.repo)
    if entry.image_size == model.size:
        return dict(entry.preprocessor)
    square = {"height": model.size, "width": model.size}
    short = {"shortest_edge": model.size} if "shortest_edge" in entry.preprocessor["size"] else square
    return {**entry.preprocessor, "size": short, "crop_size": square}


def calibrated(peer: Peer, subject: str, take: Callable[[Settings], Turn]) -> Settings:
    """Find a peer's fastest settings for a subject by whole commands; measured once and kept."""
    key = f"{subject}, {peer.name}, {machine.cpu()}, {hashlib.sha256(repr(peer).encode()).hexdigest()[:8]}"
    known = json.loads(CALIBRATION.read_text()) if CALIBRATION.exists() else {}
    if key not in known:
        walls_s = {settings: take(settings).wall_s for settings in peer.settings}
        for settings, wall_s in walls_s.items():
            print(f"{subject}: {peer.name}, {settings}: {wall_s:.1f} s", file=sys.stderr, flush=True)
        known[key] = asdict(min(walls_s, key=lambda settings: walls_s[settings]))
        CALIBRATION.write_text(json.dumps(known, indent=1))
    return Settings(**known[key])


def vectors(folder: Path) -> dict[str, Array]:
    """Read the embedding of each key below a folder. Raises ValueError when a key occurs twice."""
    files = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("_"))
    found: dict[str, Array] = {}
    rows = 0
    for file in files:
        table = pq.ParquetFile(file).read(columns=["key", "embedding"])
        embedding = table.column("embedding").combine_chunks()
        vectors_BD = embedding.flatten().to_numpy().reshape(table.num_rows, -1)
        found.update(zip(table.column("key").to_pylist(), vectors_BD, strict=True))
        rows += table.num_rows
    if rows != len(found):
        raise ValueError(f"{folder}: {rows} rows, but {len(found)} keys")
    return found


def least_cosine(mine: dict[str, Array], reference: dict[str, Array]) -> float:
    """Compute the least cosine over all images, after subtracting both means: random weights give every image nearly
    the same vector. Returns 0 when the keys differ."""
    if mine.keys() != reference.keys():
        return 0.0
    keys = sorted(reference)
    mine_BD, reference_BD = (np.stack([which[key] for key in keys]).astype(np.float64) for which in (mine, reference))
    mine_BD, reference_BD = mine_BD - mine_BD.mean(axis=0), reference_BD - reference_BD.mean(axis=0)
    lengths = np.linalg.norm(mine_BD, axis=1) * np.linalg.norm(reference_BD, axis=1)
    cosine = float(np.min((mine_BD * reference_BD).sum(axis=1) / lengths))
    return cosine if np.isfinite(cosine) else 0.0
