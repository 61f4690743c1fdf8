"""What each thread is at, left where it outlives the process: whoever survives a death knows what it came of.

    Slot       one thread's: told before each image, shard and batch; a plain one forgets what it is told
    Record     slots in memory that is shared with the process that watches
    Alarms     slots that end their own process when something takes longer than it may
    Suspects   what a process was at when it died, for its successor to do elsewhere

Telling a slot of a record costs 0.2 us of CPU an image (one `pack_into`, no lock, no system call), an alarm's 1.9 us.
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

_HEAD = struct.Struct("=q")  # parts committed
_SLOT = struct.Struct("=qqqqqdd")  # stage, part, k, row, turn, limit_s, begun


@dataclass(frozen=True)
class Moment:
    """What a thread is at: a row (decode), a batch (embed) or a part (read), since `begun` of the monotonic clock."""

    stage: int
    part_index: int
    k: int
    row: int
    turn: int  # counts what its thread has begun
    limit_s: float
    begun: float

    def __str__(self) -> str:
        what = {DECODE: f"row {self.row} of part", EMBED: f"batch {self.k} of part", READ: "part"}[self.stage]
        return f"{what} {self.part_index} ({STAGES[self.stage]})"


class Slot:
    def begin(self, stage: int, part_index: int, k: int = 0, row: int = 0, limit_s: float = NO_LIMIT_S) -> None:
        """This thread is at that from now on; `limit_s` is how long it may take."""

    def end(self) -> None:
        """This thread is at nothing."""


class Record:
    """One slot a thread, and how many parts were committed, in memory that a forked process shares."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _HEAD.size + SLOTS * _SLOT.size)
        self.free = count()

    def slot(self) -> Slot:
        number = next(self.free)
        return _RecordSlot(self.memory, _HEAD.size + number * _SLOT.size) if number < SLOTS else Slot()

    def moments(self) -> dict[int, Moment]:
        """What threads are at, by slot."""
        slots = enumerate(_SLOT.iter_unpack(self.memory[_HEAD.size :]))
        return {number: Moment(*values) for number, values in slots if values[0] in (READ, DECODE, EMBED)}

    @property
    def parts_committed(self) -> int:
        return int(_HEAD.unpack_from(self.memory)[0])

    @parts_committed.setter
    def parts_committed(self, parts: int) -> None:
        _HEAD.pack_into(self.memory, 0, parts)

    def clear(self) -> None:
        """For the next process."""
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


class Watch:
    """What in a record takes longer than it may. Time counts as it passes for the watcher, look by look, so that a
    machine asleep or a job stopped for an hour is not an image that took one."""

    def __init__(self, record: Record) -> None:
        self.record, self.ages_s = record, dict[tuple[int, int], float]()

    def look(self, passed_s: float) -> list[Moment]:
        """passed_s: since the last look. Those over their limit."""
        moments = self.record.moments()
        self.ages_s = {(n, m.turn): self.ages_s.get((n, m.turn), -passed_s) + passed_s for n, m in moments.items()}
        return [moment for n, moment in moments.items() if self.ages_s[n, moment.turn] > moment.limit_s]


class Alarms:
    """Slots that share this process's timer. Its signal ends the process by default, also one whose C code holds
    Python's lock."""

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
    """What may have killed a process. `parts`: all that is decoded and embedded of them; `everything`: all there is."""

    rows: set[tuple[int, int]] = field(default_factory=set)  # part, row
    batches: set[tuple[int, int]] = field(default_factory=set)  # part, k
    reads: set[int] = field(default_factory=set)
    parts: set[int] = field(default_factory=set)
    everything: bool = False

    def add(self, moments: Iterable[Moment], whole_parts: bool = False) -> None:
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
        """Those of a batch's rows to be decoded elsewhere, each alone."""
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
    """From now on this process's threads have slots that `make` gives, and its runner knows of suspects."""
    global _make, _mine, _suspects, _record
    _make, _mine, _suspects, _record = make, threading.local(), suspects or Suspects(), record


def here() -> Slot:
    """This thread's slot."""
    slot: Slot | None = getattr(_mine, "slot", None)
    if slot is None:
        slot = _mine.slot = _make()
    return slot


def suspects() -> Suspects:
    """What processes before this one may have died of."""
    return _suspects


def committed(parts: int) -> None:
    """Tell whoever watches how many parts this process has committed."""
    if _record:
        _record.parts_committed = parts
