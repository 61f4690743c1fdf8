"""Poison the product's own steps in every process that has this folder on its path."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def is_lethal() -> bool:
    return os.environ["POISON"] == "kills"


def _hold_the_lock() -> None:
    while True:
        ctypes.PyDLL("libc.so.6").sleep(1000)


def _spin() -> None:
    while True:
        pass


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


KINDS: dict[str, tuple[Callable[[], object], str]] = {
    "segv": (lambda: ctypes.string_at(0), "SIGSEGV"),
    "abort": (os.abort, "SIGABRT"),
    "kill": (_kill, "SIGKILL"),
    "spin": (_spin, ""),
    "hold": (_hold_the_lock, ""),
}


def poison_of(stage: str, key: str) -> str | None:
    found = re.search(rf"{stage}-([a-z]+)", key)
    return found[1] if found else None


def strike(kind: str) -> None:
    """Leave a mark of the attempt, and never return. `once` kills only the first process that meets it."""
    marks = Path(os.environ["POISON_MARKS"])
    if kind == "once" and any("-once-" in mark.name for mark in marks.iterdir()):
        return
    (marks / f"attempt-{kind}-{len(list(marks.iterdir())):03d}-{os.getpid()}").touch()
    KINDS["segv" if kind == "once" else kind][0]()


def bad(kind: str, verb: str) -> tuple[str, str]:
    """Return the reason and message that the product should give."""
    name = KINDS[kind][1]
    if name:
        return "worker_died", f"{verb} it ended its process twice ({name})"
    return "timed_out", f"{verb} it took longer than {os.environ['POISON_LIMIT_S']} s, twice"


def poison_embed(embed: Any) -> None:
    decode, batch = embed._TimedDecoder.__call__, embed.Embedder._batch

    def decode_or_die(self: Any, row: Any) -> Any:
        kind = poison_of("decode", row.key)
        if kind and is_lethal():
            strike(kind)
        elif kind and kind != "once":
            from img2parquet.schema import Rejection

            return Rejection(*bad(kind, "decoding"))  # type: ignore[arg-type]
        return decode(self, row)

    def batch_or_die(self: Any, prepared: Any) -> Any:
        found = {n: kind for n, row in enumerate(prepared.rows) if (kind := poison_of("embed", row.key))}
        if is_lethal():
            for kind in found.values():
                strike(kind)
        else:
            from img2parquet.isolation.isolated_steps import without
            from img2parquet.schema import Reject

            rejects = {}
            for n, kind in found.items():
                row = prepared.rows[n]
                reason, message = bad(kind, "embedding")
                rejects[n] = Reject(row.row, row.key, row.shard, "embed", reason, message, row.offset)  # type: ignore
            prepared = without(prepared, rejects)
        return batch(self, prepared)

    embed._TimedDecoder.__call__, embed.Embedder._batch = decode_or_die, batch_or_die


def poison_read(webdataset: Any) -> None:
    read = webdataset.WebDataset._read_piece

    def read_or_die(self: Any, piece: Any, rows: Any, *more: Any) -> Iterator[Any]:
        for item in read(self, piece, rows, *more):
            kind = poison_of("read", item.key)
            if kind and is_lethal():
                strike(kind)
            elif kind:
                from img2parquet.schema import Reject

                fault = os.environ["POISON_READ"].format(name=KINDS[kind][1])
                yield Reject(item.row, fault.partition(": ")[0], item.shard, "read", "worker_died",
                             fault.partition(": ")[2])  # fmt: skip
                return
            yield item

    webdataset.WebDataset._read_piece = read_or_die


def without_isolation(flight: Any) -> None:
    """Make a restarted driver forget its suspects."""
    flight.Suspects.add = lambda self, *_, **__: None
    flight.Suspects.__setattr__ = lambda self, name, value: object.__setattr__(self, name, type(value)())


def without_watch(flight: Any) -> None:
    flight.DeadlineWatcher.look = lambda self, passed_s: []


WITHOUT = {"isolation": without_isolation, "watch": without_watch}

POISONED = {"img2parquet.inference.steps": poison_embed, "img2parquet.read.webdataset": poison_read}


class _Finder:
    """Finds the modules to poison as the default finders would, and changes them once they have been executed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in POISONED:
            return None
        poison = POISONED.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        execute = spec.loader.exec_module

        def execute_and_poison(module: Any) -> None:
            execute(module)
            poison(module)

        spec.loader.exec_module = execute_and_poison  # type: ignore[method-assign]
        return spec


if os.environ.get("POISON_WITHOUT"):
    POISONED["img2parquet.telemetry.flight_recorder"] = WITHOUT[os.environ["POISON_WITHOUT"]]
if os.environ.get("POISON"):
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
