"""Run a small job with poison in it as a command, and state what it should have written."""

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

from img2parquet.dataset.commit import Output
from img2parquet.engine.driver import run as drive
from img2parquet.inference import steps
from img2parquet.job import parse_job
from img2parquet.read import webdataset
from img2parquet.read.webdataset import WebDataset
from img2parquet.results.reader import read_rejects
from img2parquet.results.verify import find_problems
from tests.support.ray_cluster import driver_environment
from tests.support.small_job import add_member, job_dict, jpeg

HOOK = Path(__file__).parent / "hook"
PER_SHARD = 12
LATE = ("spin", "hold")  # kinds that do not die but hang


Poison = Mapping[tuple[int, int], str]  # (shard, place) -> stage-kind


@dataclass(frozen=True)
class Ran:
    code: int
    said: str
    attempts: int  # how often a process met poison

    @property
    def deaths(self) -> int:
        """Count the deaths of the driver that its supervisor reported."""
        return len(re.findall(r"^img2parquet: the driver ", self.said, re.MULTILINE))


def make_shards(folder: Path, poison: Poison, shards: int = 3, per_shard: int = PER_SHARD) -> None:
    """Write tars of photographs; `poison` maps (shard, place) to what goes into the key: `decode-segv`, ..."""
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
    """Run the job in this process, into `quiet`, with the poisonous rows rejected."""
    spec = importlib.util.spec_from_file_location("poison", HOOK / "sitecustomize.py")
    assert spec and spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    with monkeypatch.context() as patch:
        for name, value in {"POISON": "rejects", "POISON_LIMIT_S": f"{limit_s(poison):g}", **environment}.items():
            patch.setenv(name, value)
        for owner, name in ((steps._TimedDecoder, "__call__"), (steps.Embedder, "_batch"), (WebDataset, "_read_piece")):
            patch.setattr(owner, name, getattr(owner, name))  # so that it is restored
        hook.poison_embed(steps)
        hook.poison_read(webdataset)
        drive(parse_job(document(folder, checkpoint, "quiet", poison)), "local")


def run(
    folder: Path, checkpoint: Path, out: str, runner: str, poison: Poison, timeout_s: float = 400, **environment: str
) -> Ran:
    """Run the command to its end. On a timeout, end all of its processes and raise TimeoutExpired."""
    with started(folder, checkpoint, out, runner, poison, **environment) as process:
        process.wait(timeout_s)
    said = (folder / f"{out}.log").read_text()
    return Ran(process.returncode, said, len(list((folder / f"{out}-marks").iterdir())))


def run_beside_undisturbed(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, runner: str, poison: Poison, **environment: str
) -> Ran:
    """Run the command into `out`, and check that it writes the bytes of the undisturbed run.

    environment: of the undisturbed run."""
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
    """Start the command with the hook on every process's path; on exit, end it with all of its processes."""
    job, marks, log = folder / f"{out}.yaml", folder / f"{out}-marks", folder / f"{out}.log"
    job.write_text(yaml.safe_dump(document(folder, checkpoint, out, poison)))
    marks.mkdir()
    variables = {"POISON": "kills", "POISON_MARKS": str(marks), **environment}
    variables["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(Path(__file__).parents[2])])
    with log.open("w") as file:  # not a pipe, which processes that outlive the command would keep open
        process = subprocess.Popen(
            [sys.executable, "-m", "img2parquet.cli", "run", str(job), "--runner", runner],
            env=driver_environment(**variables) if runner == "ray" else {**os.environ, **variables},
            stdout=file,
            stderr=file,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def expected(poison: Poison) -> list[tuple[str, str, str]]:
    """Return the (key, stage, reason) that each poisonous row should be rejected with, sorted."""
    return sorted(
        (f"{shard:03d}/{n:04d}-{what}", what.split("-")[0], "timed_out" if what.endswith(LATE) else "worker_died")
        for (shard, n), what in poison.items()
    )


def read_fault(shard: int, row: int, cause: str) -> str:
    """Return `key: message` of the reject at which the reading of a shard ends."""
    return (
        f"row {row}: reading this file ended its process 2 times ({cause}), at the furthest at row {row} of it, "
        f"after `{shard:03d}/{row - 1:04d}`; what follows was not read"
    )


def same_files(folder: Path, one: str, other: str) -> None:
    """Check that two outputs have the same parts, byte for byte."""
    first, second = (Output.at(str(folder / out)) for out in (one, other))
    assert find_problems(first) == []
    files = [{name: o.store.read(entry.uri) for name, entry in o.part_files().items()} for o in (first, second)]
    assert files[0].keys() == files[1].keys() and files[0]
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def rejected(folder: Path, out: str) -> list[tuple[str, str, str]]:
    """Return the (key, stage, reason) of every reject, sorted."""
    rows: Iterable[Mapping[str, Any]] = read_rejects(str(folder / out)).to_pylist()
    return sorted((row["key"], row["stage"], row["reason"]) for row in rows)
