"""Let contestants take turns, each in a process of its own; return their outputs and the seconds of each turn.

* Each has a process, because allocator settings and thread pools belong to a process; all live as long as the contest,
  and all but one sleep.
* A turn is as many calls as fill `round_s`, so that clocks of 10 ms do not matter. The first call warms up (its output
  is compared), the second finds how long a call takes; neither is counted.
* A turn during which other processes (or the host) took more than `FOREIGN_LIMIT` of the processors is not counted
  either. The contest goes on until each contestant has its `rounds`, or has tried `PATIENCE` times as often.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOREIGN_LIMIT = 0.08  # share of all processors
PATIENCE = 6
PAUSE_S = 5.0  # after a disturbed round: waiting discards fewer turns
HOW = (
    "each contestant is a process of its own, and they take turns; a turn in which others had more than "
    f"{FOREIGN_LIMIT:.0%} of the processors is not counted (`turns`: counted of all)"
)
Array = npt.NDArray[Any]
Call = Callable[[], Array]  # one batch; its output is compared
Prepare = Callable[[], Call]  # run once, in the contestant's process


@dataclass(frozen=True)
class Rules:
    rounds: int = 5
    round_s: float = 1.0
    quick: bool = False


@dataclass(frozen=True)
class Turn:
    """Seconds of one call, and the share of the processors that others used meanwhile."""

    wall_s: float
    cpu_s: float
    foreign: float

    @property
    def clean(self) -> bool:
        return self.foreign <= FOREIGN_LIMIT


@dataclass
class Record:
    output: Array
    turns: list[Turn] = field(default_factory=list)

    @property
    def clean(self) -> int:
        return sum(turn.clean for turn in self.turns)

    @property
    def wall_s(self) -> float:
        return statistics.median(turn.wall_s for turn in self._counted())

    @property
    def cpu_s(self) -> float:
        return statistics.median(turn.cpu_s for turn in self._counted())

    def _counted(self) -> list[Turn]:
        """Return the clean turns, or all turns when none was clean (see `clean`)."""
        return [turn for turn in self.turns if turn.clean] or self.turns


def compete(contestants: Mapping[str, Prepare], rules: Rules) -> dict[str, Record]:
    """Return each contestant's output and turns. Raises SystemExit when one fails; its traceback is on stderr."""
    with workers(contestants) as started:
        records = {name: Record(received(name, connection)) for name, connection in started.items()}
        calls = {}
        for name, connection in started.items():
            calls[name] = max(1, math.ceil(rules.round_s / _turn(name, connection, 1).wall_s))
        for _ in range(rules.rounds * (1 if rules.quick else PATIENCE)):
            for name, connection in started.items():
                records[name].turns.append(_turn(name, connection, calls[name]))
            if all(record.clean >= rules.rounds for record in records.values()):
                break
            if not rules.quick and not all(record.turns[-1].clean for record in records.values()):
                time.sleep(PAUSE_S)
    return records


def progress(subject: str, records: Mapping[str, Record]) -> None:
    """Print one line to stderr, since a whole suite takes minutes."""
    said = [f"{name} {record.wall_s * 1e3:.0f} ms ({record.clean} clean turns)" for name, record in records.items()]
    print(f"{subject}: {'; '.join(said)}", file=sys.stderr, flush=True)


def _turn(name: str, connection: Connection, calls: int) -> Turn:
    connection.send(calls)
    turn: Turn = received(name, connection)
    return turn


def received(name: str, connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"error: contestant `{name}` failed; its traceback is above") from None


@contextmanager
def workers(contestants: Mapping[str, Prepare]) -> Iterator[dict[str, Connection]]:
    """Start a process for each contestant, with a connection to it."""
    context, processes, connections = multiprocessing.get_context("spawn"), [], {}
    try:
        for name, prepare in contestants.items():
            connections[name], theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs, prepare), daemon=True))
            processes[-1].start()
            theirs.close()  # otherwise the end of the process would go unnoticed
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.join(timeout=10)
            process.terminate()


def _work(connection: Connection, prepare: Prepare) -> None:
    """Warm up and send the output, then take turns until the other end closes."""
    call = prepare()
    try:
        connection.send(np.array(call()))
        while True:
            connection.send(_timed(call, connection.recv()))
    except (EOFError, ConnectionError):
        return


def _timed(call: Call, calls: int) -> Turn:
    all_s, cpu_s, start_s = busy_s(), _cpu_s(), time.perf_counter()
    for _ in range(calls):
        call()
    wall_s, cpu_s, all_s = time.perf_counter() - start_s, _cpu_s() - cpu_s, busy_s() - all_s
    foreign = max(0.0, all_s - cpu_s) / (wall_s * (os.cpu_count() or 1))
    return Turn(wall_s / calls, cpu_s / calls, foreign)


def _cpu_s() -> float:
    """Return this process's CPU seconds, including the kernel's work for it (page faults)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def busy_s() -> float:
    """Return the busy seconds of all processors since boot, including time stolen by the host; 0 if unknown."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
