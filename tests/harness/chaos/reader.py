"""Somebody who lists and reads the output all the while, with pyarrow: every file whole, unchanged, no row twice."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from img2parquet.dataset.part_file import is_intact
from tests.harness.chaos.bed import Key
from tests.harness.chaos.forks import fork

EVERY_S = 0.01
TRIES = 3
State = tuple[object, ...]  # of a file, which never changes


@dataclass
class Seen:
    looks: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list)


class Reader:
    """A process that looks until `stop`, which says what it has seen."""

    def __init__(self, uri: str, endpoint: str) -> None:
        self.pipe, theirs = Pipe()
        self.pid = fork(lambda: _watch(uri, endpoint, theirs))
        theirs.close()

    def stop(self) -> Seen:
        """Also of one that has ended before: with what it met, or with how it ended where it could not say."""
        seen = Seen()
        with suppress(ConnectionError):  # it may be gone, what it said is in the pipe all the same
            self.pipe.send(None)
        with suppress(ConnectionError, EOFError):
            seen = self.pipe.recv()
        status = os.waitpid(self.pid, 0)[1]
        if status:
            seen.problems.append(f"a reader ended with {os.waitstatus_to_exitcode(status)}")
        self.pipe.close()
        return seen


def _watch(uri: str, endpoint: str, pipe: Connection) -> None:
    look, stopped, failed = _Look(uri, endpoint), False, 0
    while not stopped and failed < TRIES:
        stopped = pipe.poll(EVERY_S)  # and looks once more
        try:
            look()
            failed = 0
        except Exception as error:  # a server that many ask at once may be late: what it shows is told later as well
            failed += 1
            if failed == TRIES or stopped:
                look.seen.problems.append(f"a reader met {type(error).__name__}: {error}")
    pipe.send(look.seen)


class _Look:
    def __init__(self, uri: str, endpoint: str) -> None:
        self.filesystem, self.root = _filesystem(uri, endpoint)
        self.states: dict[str, State] = {}
        self.keys: set[Key] = set()
        self.seen = Seen()

    def __call__(self) -> None:
        now = dict(self._files())
        self.seen.looks += 1
        for name, state in self.states.items():
            if name not in now:
                self.seen.problems.append(f"{name} was there, and is gone")
            elif now[name] != state:
                self.seen.problems.append(f"{name} was changed: {state} -> {now[name]}")
        for name in sorted(now.keys() - self.states.keys()):
            self._read(name)
            self.states[name] = now[name]
        self.states = now

    def _files(self) -> Iterator[tuple[str, State]]:
        """What a glob of `model=*/*.parquet` shows."""
        selector = pafs.FileSelector(self.root, allow_not_found=True, recursive=True)
        for info in self.filesystem.get_file_info(selector):
            folder, _, name = info.path[len(self.root) + 1 :].rpartition("/")
            if folder.startswith("model=") and name.endswith(".parquet") and not name.startswith((".", "_")):
                inode = os.stat(info.path).st_ino if self.root.startswith("/") else None  # noqa: PTH116 - of a string
                yield f"{folder}/{name}", (info.size, info.mtime_ns, inode)

    def _read(self, name: str) -> None:
        with self.filesystem.open_input_stream(f"{self.root}/{name}") as file:
            data = file.read()
        self.seen.files += 1
        if not is_intact(data):
            self.seen.problems.append(f"{name}: a partial file")
            return
        table = pq.read_table(io.BytesIO(data), columns=["shard", "key"]).to_pydict()
        keys = [(name.partition("/")[0], *key) for key in zip(table["shard"], table["key"], strict=True)]
        twice = len(keys) - len(set(keys)) + len(self.keys & set(keys))
        if twice:
            self.seen.problems.append(f"{name}: {twice} rows twice")
        self.keys |= set(keys)


def _filesystem(uri: str, endpoint: str) -> tuple[Any, str]:
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    filesystem = pafs.S3FileSystem(
        endpoint_override=endpoint, access_key="testing", secret_key="testing", region="us-east-1"
    )
    return filesystem, uri.removeprefix("s3://")
