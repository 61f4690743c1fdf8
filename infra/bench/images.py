"""Make webdataset tars of ImageNet-like JPEGs, once; every tool reads the same files.

The first `DISTINCT` images repeat under new keys, since making one takes ten times as long as reading it and no tool
keeps pixels. Members are `<shard>-<number>.jpg`, so a key names one image of the whole set.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from infra.bench.decode import SETS
from infra.bench.jpegs import generate

PER_SHARD = 32  # one batch; a part or a read task takes as many shards as it likes
DISTINCT = 512


def shards(count: int, folder: Path, distinct: int = DISTINCT) -> list[Path]:
    """Return the first `count` tars, in order, making those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:04d}.tar" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        files = generate(SETS[0], min(distinct, count * PER_SHARD))
        for index in missing:
            _write(paths[index], index, files)
    return paths


def _write(path: Path, index: int, files: Sequence[bytes]) -> None:
    """Write a tar atomically: an interrupted run leaves no short one."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    with tarfile.open(unfinished, "w") as tar:
        for number in range(PER_SHARD):
            file = files[(index * PER_SHARD + number) % len(files)]
            member = tarfile.TarInfo(f"{index:04d}-{number:03d}.jpg")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    unfinished.rename(path)
