"""A small job with poison in it, run as a command; and what it should have written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import embed
from pipeline.commit import Output
from pipeline.driver import run as drive
from pipeline.job import parse_job
from pipeline.read import webdataset
from pipeline.read.webdataset import WebDataset
from pipeline.results import read_rejects
from pipeline.verify import verify
from tests.small import add_member, job_dict, jpeg

HOOK = Path(__file__).parent / "hook"
PER_SHARD = 12
LATE = ("spin", "hold")  # kinds that do not die but stay


Poison = Mapping[tuple[int, int], str]  # (shard, place) -> stage-kind


@dataclass(frozen=True)
class Ran:
    code: int
    said: str
    attempts: int  # how often a process met poison

    @property
    def deaths(self) -> int:
        """Of the driver, as its supervisor told."""
        return len(re.findall(r"^img2parquet: the driver ", self.said, re.MULTILINE))


def make_shards(folder: Path, poison: Poison, shards: int = 3, per_shard: int = PER_SHARD) -> None:
    """Tars of photographs; `poison` says which (shard, place) has what in its key: `decode-segv`, ..."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for n in range(per_shard):
                key = f"{shard:03d}/{n:04d}" + (f"-{poison[shard, n]}" if (shard, n) in poison else "")
                add_member(tar, f"{key}.jpg", jpeg(shard * 1000 + n))
                add_member(tar, f"{key}.json", json.dumps({"label": n % 5, "caption": f"no. {n}"}).encode())


def limit_s(poison: Poison) -> float:
    """Short where a test waits for it, else what nothing here takes on the busiest machine."""
    return 4.0 if any(what.endswith(LATE) for what in poison.values()) else 60.0


def document(folder: Path, checkpoint: Path, out: str, poison: Poison) -> dict[str, Any]:
    resources = {"workers": 2, "batch_size": 6, "image_timeout_s": limit_s(poison)}
    return job_dict(f"{folder}/in/*.tar", checkpoint, str(folder / out), resources=resources, reject_limit=1.0)


def run_undisturbed(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, poison: Poison, **environment: str
) -> None:
    """In this process, into `quiet`: what is poison to others is rejected."""
    spec = importlib.util.spec_from_file_location("poison", HOOK / "sitecustomize.py")
    assert spec and spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    with monkeypatch.context() as patch:
        for name, value in {"POISON": "rejects", "POISON_LIMIT_S": f"{limit_s(poison):g}", **environment}.items():
            patch.setenv(name, value)
        for owner, name in ((embed._Decoding, "__call__"), (embed.Embedder, "_batch"), (WebDataset, "_read_piece")):
            patch.setattr(owner, name, getattr(owner, name))  # to have it back
        hook.poison_embed(embed)
        hook.poison_read(webdataset)
        drive(parse_job(document(folder, checkpoint, "quiet", poison)), "local")


def run(
    folder: Path, checkpoint: Path, out: str, runner: str, poison: Poison, timeout_s: float = 400, **environment: str
) -> Ran:
    """The command to its end. Raises TimeoutExpired, when all of it has been ended."""
    with started(folder, checkpoint, out, runner, poison, **environment) as process:
        process.wait(timeout_s)
    said = (folder / f"{out}.log").read_text()
    return Ran(process.returncode, said, len(list((folder / f"{out}-marks").iterdir())))


def run_beside_undisturbed(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, runner: str, poison: Poison, **environment: str
) -> Ran:
    """The command, into `out`: it ends well and leaves the bytes of the undisturbed run, whose `environment` is."""
    make_shards(folder / "in", poison)
    run_undisturbed(folder, checkpoint, monkeypatch, poison, **environment)
    ran = run(folder, checkpoint, "out", runner, poison)
    assert ran.code == 0, ran.said
    same_files(folder, "out", "quiet")
    return ran


@contextmanager
def started(
    folder: Path, checkpoint: Path, out: str, runner: str, poison: Poison, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, with the hook on every process's path. Ended with all its family when it is left."""
    job, marks, log = folder / f"{out}.yaml", folder / f"{out}-marks", folder / f"{out}.log"
    job.write_text(yaml.safe_dump(document(folder, checkpoint, out, poison)))
    marks.mkdir()
    told = {"POISON": "kills", "POISON_MARKS": str(marks), **environment}
    path = os.pathsep.join([str(HOOK), str(Path(__file__).parents[2])])
    with log.open("w") as file:  # not a pipe, which what outlives the command would keep open
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "run", str(job), "--runner", runner],
            env={**os.environ, **told, "PYTHONPATH": path},
            stdout=file,
            stderr=file,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def expected(poison: Poison) -> list[tuple[str, str, str]]:
    """Key, stage and reason of each, as `rejected` has them."""
    return sorted(
        (f"{shard:03d}/{n:04d}-{what}", what.split("-")[0], "timed_out" if what.endswith(LATE) else "worker_died")
        for (shard, n), what in poison.items()
    )


def told_of_read(shard: int, row: int, how: str) -> str:
    """`key: message` of the fault where a shard's reading ends."""
    return (
        f"row {row}: reading this file ended its process 2 times ({how}), at the furthest at row {row} of it, "
        f"after `{shard:03d}/{row - 1:04d}`; what follows was not read"
    )


def same_files(folder: Path, one: str, other: str) -> None:
    """Two outputs have the same parts, byte for byte."""
    first, second = (Output.at(str(folder / out)) for out in (one, other))
    assert verify(first) == []
    files = [{name: o.store.read(entry.uri) for name, entry in o.part_files().items()} for o in (first, second)]
    assert files[0].keys() == files[1].keys() and files[0]
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def rejected(folder: Path, out: str) -> list[tuple[str, str, str]]:
    """(key, stage, reason), sorted."""
    rows: Iterable[Mapping[str, Any]] = read_rejects(str(folder / out)).to_pylist()
    return sorted((row["key"], row["stage"], row["reason"]) for row in rows)
