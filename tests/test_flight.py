"""The flight record: what a dead process was at, what takes too long, and who is under suspicion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from pipeline import flight
from pipeline.flight import DECODE, EMBED, READ, Record, Suspects, Watch


def test_a_record_outlives_the_process_that_wrote_it() -> None:
    record = Record()
    child = os.fork()
    if child == 0:
        record.slot().begin(DECODE, 3, 1, 17, 60.0)
        record.slot().begin(READ, 4)
        ended = record.slot()
        ended.begin(EMBED, 5)
        ended.end()
        record.parts_committed = 2
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    moments = list(record.moments().values())
    assert [(m.stage, m.part_index, m.k, m.row, m.limit_s) for m in moments] == [
        (DECODE, 3, 1, 17, 60.0),
        (READ, 4, 0, 0, flight.NO_LIMIT_S),
    ]
    assert list(map(str, moments)) == ["row 17 of part 3 (decode)", "part 4 (read)"]
    assert record.parts_committed == 2
    record.clear()
    assert record.moments() == {} and record.parts_committed == 0


def test_each_thread_has_its_own_slot_and_there_may_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "SLOTS", 3)
    record = Record()
    flight.use(record.slot)
    try:
        all_there = threading.Barrier(5)

        def work(number: int) -> None:
            flight.here().begin(DECODE, number)
            all_there.wait()
            assert flight.here() is flight.here()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        flight.use(flight.Slot)
    parts = {moment.part_index for moment in record.moments().values()}
    assert len(parts) == 3 and parts < set(range(5))


def test_time_counts_as_it_passes_for_the_watcher() -> None:
    record = Record()
    slot, watch = record.slot(), Watch(record)
    slot.begin(DECODE, 0, 0, 5, limit_s=2.0)
    assert [watch.look(1.0) for _ in range(3)] == [[], [], []]  # 0, 1 and 2 s
    (late,) = watch.look(0.5)
    assert late.row == 5
    slot.begin(DECODE, 0, 0, 5, limit_s=2.0)  # the same row again, as another thread's batch may have it
    assert watch.look(100.0) == []  # whatever has passed before it was first seen
    assert watch.look(2.5) != []
    slot.begin(READ, 0)
    assert [watch.look(1e6), watch.look(1e6)] == [[], []]
    slot.end()
    assert watch.look(1e6) == []


def test_suspects_are_what_was_under_way() -> None:
    record, suspects = Record(), Suspects()
    assert not suspects
    for stage, part, k, row in ((DECODE, 1, 0, 3), (EMBED, 2, 4, 0), (READ, 3, 0, 0)):
        record.slot().begin(stage, part, k, row)
    suspects.add(record.moments().values())
    assert suspects and suspects.rows_of(1, range(8)) == {3} and suspects.rows_of(2, range(8)) == frozenset()
    assert [suspects.embeds(2, k) for k in (3, 4)] == [False, True] and not suspects.embeds(1, 0)
    assert suspects.reads_part(3) and not suspects.reads_part(1) and not suspects.decodes(1)
    suspects.add(record.moments().values(), whole_parts=True)
    assert [part for part in range(5) if suspects.decodes(part)] == [1, 2, 3]
    everything = Suspects(everything=True)
    assert everything.decodes(9) and everything.embeds(9, 9) and everything.reads_part(9)


ALARM = """
import ctypes, sys
from pipeline import flight
flight.use(flight.Alarms().slot)
slot = flight.here()
{}
"""


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("slot.begin(flight.DECODE, 0, limit_s=0.2)\nctypes.PyDLL(None).sleep(60)", -signal.SIGALRM),
        ("slot.begin(flight.DECODE, 0, limit_s=2.0)\nslot.end()\nctypes.PyDLL(None).sleep(3)", 0),
        ("slot.begin(flight.READ, 0)\nctypes.PyDLL(None).usleep(500_000)", 0),
    ],
    ids=["late, with Python's lock held", "ended in time", "without a limit"],
)
def test_an_alarm_ends_its_own_process(code: str, ends: int) -> None:
    assert subprocess.run([sys.executable, "-c", ALARM.format(code)], timeout=300).returncode == ends


def test_the_earliest_of_several_threads_rings() -> None:
    code = """
other = threading.Thread(target=lambda: flight.here().begin(flight.DECODE, 1, limit_s=0.2))
slot.begin(flight.DECODE, 0, limit_s=50)
other.start(); other.join()
ctypes.PyDLL(None).sleep(60)"""
    ran = subprocess.run([sys.executable, "-c", "import threading" + ALARM.format(code)], timeout=300)
    assert ran.returncode == -signal.SIGALRM
