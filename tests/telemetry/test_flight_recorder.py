"""The flight recorder: what a dead process was working on, what exceeds its limit, and what becomes a suspect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from img2parquet.telemetry import flight_recorder
from img2parquet.telemetry.flight_recorder import DECODE, EMBED, READ, DeadlineWatcher, Record, Suspects


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
        (READ, 4, 0, 0, flight_recorder.NO_LIMIT_S),
    ]
    assert list(map(str, moments)) == ["row 17 of part 3 (decode)", "part 4 (read)"]
    assert record.parts_committed == 2
    record.clear()
    assert record.moments() == {} and record.parts_committed == 0


def test_each_thread_has_its_own_slot_and_there_may_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_recorder, "SLOTS", 3)
    record = Record()
    flight_recorder.use(record.slot)
    try:
        all_there = threading.Barrier(5)

        def work(number: int) -> None:
            flight_recorder.here().begin(DECODE, number)
            all_there.wait()
            assert flight_recorder.here() is flight_recorder.here()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        flight_recorder.use(flight_recorder.Slot)
    parts = {moment.part_index for moment in record.moments().values()}
    assert len(parts) == 3 and parts < set(range(5))


def test_only_time_that_the_watcher_sees_counts() -> None:
    record = Record()
    slot, watch = record.slot(), DeadlineWatcher(record)
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


def test_suspects_are_the_activities_in_progress() -> None:
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
from img2parquet.telemetry import flight_recorder
flight_recorder.use(flight_recorder.Alarms().slot)
slot = flight_recorder.here()
{}
"""


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("slot.begin(flight_recorder.DECODE, 0, limit_s=0.2)\nctypes.PyDLL(None).sleep(60)", -signal.SIGALRM),
        ("slot.begin(flight_recorder.DECODE, 0, limit_s=2.0)\nslot.end()\nctypes.PyDLL(None).sleep(3)", 0),
        ("slot.begin(flight_recorder.READ, 0)\nctypes.PyDLL(None).usleep(500_000)", 0),
    ],
    ids=["late, with Python's lock held", "ended in time", "without a limit"],
)
def test_an_alarm_ends_its_own_process(code: str, ends: int) -> None:
    assert subprocess.run([sys.executable, "-c", ALARM.format(code)], timeout=300).returncode == ends


def test_the_earliest_deadline_of_several_threads_counts() -> None:
    code = """
other = threading.Thread(target=lambda: flight_recorder.here().begin(flight_recorder.DECODE, 1, limit_s=0.2))
slot.begin(flight_recorder.DECODE, 0, limit_s=50)
other.start(); other.join()
ctypes.PyDLL(None).sleep(60)"""
    ran = subprocess.run([sys.executable, "-c", "import threading" + ALARM.format(code)], timeout=300)
    assert ran.returncode == -signal.SIGALRM
