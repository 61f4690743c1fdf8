"""Record what each thread is working on, so that a process that outlives a crash knows what caused it.

    Slot       the entry of one thread, updated before each image, shard and batch; the base class records nothing
    Record     slots in memory that is shared with the supervising process
    Alarms     slots that end their own process when something exceeds its time limit
    Suspects   what a process was working on when it died, for its successor to isolate

Updating a slot of a record costs 0.2 us of CPU an image (one `pack_into`, no lock, no system call), of an alarm 1.9 us.
"""

from __future__ import annotations

import mmap
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

NOTHING, READ, DECODE, EMBED = range(4)
STAGES = ("nothing", "read", "decode", "embed")
NO_LIMIT_S = float("inf")
SLOTS = 1024  # a thread beyond them is not recorded

_HEAD = struct.Struct("=qq")  # parts committed; 1 once the process is about to end by itself
_SLOT = struct.Struct("=qqqqqdd")  # stage, part, k, row, turn, limit_s, started


@dataclass(frozen=True)
class Activity:
    """A row (decode), a batch (embed) or a part (read) that a thread works on, since `started` (monotonic clock)."""

    stage: int
    part_index: int
    k: int
    row: int
    turn: int  # counts the activities of its thread
    limit_s: float
    started: float

    def __str__(self) -> str:
        what = {DECODE: f"row {self.row} of part", EMBED: f"batch {self.k} of part", READ: "part"}[self.stage]
        return f"{what} {self.part_index} ({STAGES[self.stage]})"


class Slot:
    def begin(self, stage: int, part_index: int, k: int = 0, row: int = 0, limit_s: float = NO_LIMIT_S) -> None:
        """Record that this thread starts an activity, which may take `limit_s`."""

    def end(self) -> None:
        """Record that this thread is idle."""


class Record:
    """A slot for each thread and the number of committed parts, in memory that a forked process shares."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _HEAD.size + SLOTS * _SLOT.size)
        self.free = count()

    def slot(self) -> Slot:
        number = next(self.free)
        return _RecordSlot(self.memory, _HEAD.size + number * _SLOT.size) if number < SLOTS else Slot()

    def moments(self) -> dict[int, Activity]:
        """Return the current activities by slot."""
        slots = enumerate(_SLOT.iter_unpack(self.memory[_HEAD.size :]))
        return {number: Activity(*values) for number, values in slots if values[0] in (READ, DECODE, EMBED)}

    @property
    def parts_committed(self) -> int:
        return int(_HEAD.unpack_from(self.memory)[0])

    @parts_committed.setter
    def parts_committed(self, parts: int) -> None:
        _HEAD.pack_into(self.memory, 0, parts, 0)

    @property
    def ends_by_itself(self) -> bool:
        return bool(_HEAD.unpack_from(self.memory)[1])

    def end(self) -> None:
        """Note that the process has said its last word."""
        _HEAD.pack_into(self.memory, 0, self.parts_committed, 1)

    def clear(self) -> None:
        """Reset everything for the next process."""
        self.memory[:] = bytes(len(self.memory))
        self.free = count()


class _RecordSlot(Slot):
    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self.memory, self.at, self.turn = memory, at, 0

    def begin(self, stage: int, part_index: int, k: int = 0, row: int = 0, limit_s: float = NO_LIMIT_S) -> None:
        self.turn += 1
        _SLOT.pack_into(self.memory, self.at, stage, part_index, k, row, self.turn, limit_s, time.monotonic())

    def end(self) -> None:
        self.begin(NOTHING, 0)


class DeadlineWatcher:
    """Find the activities of a record that exceed their time limit.

    Only time that passes between two checks of a running watcher counts, so that a machine that slept or a job that was
    suspended for an hour is not taken for an image that took an hour."""

    def __init__(self, record: Record) -> None:
        self.record, self.ages_s = record, dict[tuple[int, int], float]()

    def look(self, passed_s: float) -> list[Activity]:
        """Return the activities over their limit; `passed_s` is the time since the last call."""
        moments = self.record.moments()
        self.ages_s = {(n, m.turn): self.ages_s.get((n, m.turn), -passed_s) + passed_s for n, m in moments.items()}
        return [moment for n, moment in moments.items() if self.ages_s[n, moment.turn] > moment.limit_s]


class Alarms:
    """Slots that share this process's timer.

    Its signal ends the process by default, even while C code holds Python's lock."""

    def __init__(self) -> None:
        self.lock, self.deadlines = threading.Lock(), dict[int, float]()

    def slot(self) -> Slot:
        return AlarmSlot(self)

    def set(self, owner: int, limit_s: float) -> None:
        now = time.monotonic()
        with self.lock:
            self.deadlines.pop(owner, None)
            if limit_s != NO_LIMIT_S:
                self.deadlines[owner] = now + limit_s
            first = min(self.deadlines.values(), default=None)
            signal.setitimer(signal.ITIMER_REAL, 0 if first is None else max(first - now, 1e-3))


class AlarmSlot(Slot):
    def __init__(self, alarms: Alarms) -> None:
        self.alarms = alarms

    def begin(self, stage: int, part_index: int, k: int = 0, row: int = 0, limit_s: float = NO_LIMIT_S) -> None:
        self.alarms.set(id(self), limit_s)

    def end(self) -> None:
        self.alarms.set(id(self), NO_LIMIT_S)


@dataclass
class Suspects:
    """What may have killed a process.

    `parts` holds parts whose whole decoding and embedding is suspect; `everything` suspects all work."""

    rows: set[tuple[int, int]] = field(default_factory=set)  # part, row
    batches: set[tuple[int, int]] = field(default_factory=set)  # part, k
    reads: set[int] = field(default_factory=set)
    parts: set[int] = field(default_factory=set)
    everything: bool = False

    def add(self, moments: Iterable[Activity], whole_parts: bool = False) -> None:
        for moment in moments:
            if moment.stage == READ:
                self.reads.add(moment.part_index)
            elif moment.stage == DECODE:
                self.rows.add((moment.part_index, moment.row))
            else:
                self.batches.add((moment.part_index, moment.k))
            if whole_parts:
                self.parts.add(moment.part_index)

    def __bool__(self) -> bool:
        return bool(self.rows or self.batches or self.reads or self.parts or self.everything)

    def rows_of(self, part_index: int, rows: Iterable[int]) -> frozenset[int]:
        """Return the rows of a batch that must be decoded one by one in another process."""
        return frozenset(row for row in rows if (part_index, row) in self.rows)

    def decodes(self, part_index: int) -> bool:
        return self.everything or part_index in self.parts

    def embeds(self, part_index: int, k: int) -> bool:
        return self.decodes(part_index) or (part_index, k) in self.batches

    def reads_part(self, part_index: int) -> bool:
        return self.everything or part_index in self.reads


_make: Callable[[], Slot] = Slot
_mine = threading.local()
_suspects = Suspects()
_record: Record | None = None


def use(make: Callable[[], Slot], suspects: Suspects | None = None, record: Record | None = None) -> None:
    """Give this process's threads slots made by `make`, and its runner the suspects of earlier processes."""
    global _make, _mine, _suspects, _record
    _make, _mine, _suspects, _record = make, threading.local(), suspects or Suspects(), record


def here() -> Slot:
    """Return this thread's slot."""
    slot: Slot | None = getattr(_mine, "slot", None)
    if slot is None:
        slot = _mine.slot = _make()
    return slot


def suspects() -> Suspects:
    """Return what may have killed the processes before this one."""
    return _suspects


def committed(parts: int) -> None:
    """Tell the supervising process how many parts this process has committed."""
    if _record:
        _record.parts_committed = parts


def ends_by_itself() -> None:
    """Tell the supervising process that this one ends after its last word, whatever its exit code."""
    if _record:
        _record.end()
