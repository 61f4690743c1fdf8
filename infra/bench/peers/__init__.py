"""Run the alternatives: a script for each, in an environment of their own, with settings to choose the best from."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
CONSTRAINTS = FOLDER / "constraints.txt"
PACKAGES = ("torch", "transformers", "ray[data]", "daft", "pyarrow", "pillow", "numpy")
SHOWN = ("torch", "transformers", "ray", "daft", "pyarrow", "pillow")
ENVIRONMENT = {
    "PYTHONPATH": str(FOLDER),
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Settings:
    """`workers` are actors, instances or loader processes; `threads` are torch's, of each copy of the model."""

    workers: int
    threads: int
    decode: str = ""
    batch: int = 32

    def __str__(self) -> str:
        where = f", decode: {self.decode}" if self.decode else ""
        return f"workers {self.workers}, threads {self.threads}, batch {self.batch}{where}"


@dataclass(frozen=True)
class Peer:
    name: str
    script: str
    settings: Sequence[Settings]  # for `cores` = 2; the best is chosen by measuring


PEERS = (
    Peer("Ray Data", "ray_data.py", (
        Settings(2, 1, "model"), Settings(1, 2, "model"), Settings(2, 1, "reader"),
    )),
    Peer("Daft", "daft_udf.py", (
        Settings(2, 1, "model"), Settings(2, 1, "engine"), Settings(1, 2, "engine"),
    )),
    Peer("torch DataLoader", "torch_loader.py", (Settings(2, 2), Settings(1, 2), Settings(2, 2, batch=64))),
)  # fmt: skip


def python(folder: Path) -> Path:
    """Return the environment's interpreter, creating it first if necessary, which needs a package index."""
    interpreter, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing the peers into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*pip, *PACKAGES], check=True)
        stamp.write_text(wanted)
    return interpreter


def is_installed(folder: Path) -> bool:
    return (folder / ".installed").exists()


def command(peer: Peer, interpreter: Path, settings: Settings, job: Mapping[str, object]) -> list[str]:
    """Return a peer's command. job: shards, model, dtype, out, cores."""
    return [str(interpreter.absolute()), str(FOLDER / peer.script), json.dumps({**job, **asdict(settings)})]


def versions() -> str:
    """Return the versions of the pinned packages; torch, transformers, Ray and Pillow are the same as ours."""
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return ", ".join(f"{name} {pinned[name]}" for name in SHOWN) + f"; ours pyarrow {version('pyarrow')}"
