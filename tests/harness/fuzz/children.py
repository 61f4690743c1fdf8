"""Seeds -> what became of each, in forked children: a crash, a hang or a stray exception costs one seed, by name.

A child tells of each seed when it is done, so that its parent knows which one it died of, and goes on after it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from tests.harness.chaos.forks import fork

T = TypeVar("T")
MOST_DATA_BYTES = 8 << 30  # of a child, so that a bomb ends it and not the machine
START_S = float(os.environ.get("FUZZ_START_S", "20"))  # for a child to start, and to make its input
SEEDS_PER_CHILD = 1000  # what leaks in one is not blamed on a later seed


@dataclass(frozen=True)
class Suite(Generic[T]):
    """`make` turns a seed into the input, `check` says in a word or two what became of it, and raises where that may
    not be. Time and memory are those of `check`."""

    make: Callable[[int], T]
    check: Callable[[int, T], str]
    limit_s: float
    most_mb: float


@dataclass(frozen=True)
class Result:
    """`grew_mb` is by how much the child's memory grew at its peak; `problem` is empty where all is as it should be."""

    seed: int
    became: str = ""
    problem: str = ""
    seconds: float = 0.0
    grew_mb: float = 0.0


def run(seeds: Sequence[int], suite: Suite[T]) -> Iterator[Result]:
    """Each seed's result, in order. One that takes longer or more memory than it may has a problem."""
    left = list(seeds)
    while left:
        for result in _child(left[:SEEDS_PER_CHILD], suite):
            assert result.seed == left.pop(0)
            if not result.problem and result.grew_mb > suite.most_mb:
                result = replace(result, problem=f"took {result.grew_mb:.0f} MB, of {suite.most_mb:.0f}")
            yield result


def _child(seeds: Sequence[int], suite: Suite[T]) -> Iterator[Result]:
    """Results of one child, as far as it came; the last one says what ended it."""
    from_child, to_parent = os.pipe()
    child = fork(lambda: _work(seeds, suite, to_parent))
    os.close(to_parent)
    done, rest, fault = 0, b"", ""
    with os.fdopen(from_child, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], suite.limit_s + START_S)[0]:
                os.kill(child, signal.SIGKILL)
                fault = f"hangs: more than {suite.limit_s:g} s"
                break
            data = pipe.read(1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                result = Result(**json.loads(line))
                done += 1
                yield result if result.seconds <= suite.limit_s else replace(result, problem="takes too long")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    fault = fault or (f"the process ended with {status}" if status else "")
    if fault and done < len(seeds):
        yield Result(seeds[done], problem=fault)


def _work(seeds: Sequence[int], suite: Suite[T], to_parent: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_DATA_BYTES, MOST_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        given = suite.make(seed)
        before_mb, started = _reset_peak_mb(), time.perf_counter()
        became = problem = ""
        try:
            became = suite.check(seed, given)
        except BaseException:
            problem = traceback.format_exc(limit=-8)[-3000:]
        seconds = round(time.perf_counter() - started, 4)
        result = Result(seed, became, problem, seconds, round(_peak_mb() - before_mb, 1))
        os.write(to_parent, json.dumps(asdict(result)).encode() + b"\n")


def _reset_peak_mb() -> float:
    """Makes the kernel forget the largest memory until now; what it is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) / 1024
