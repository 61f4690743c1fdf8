"""The bottleneck of a job: the rules, case by case, and the clocks that feed them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from img2parquet.telemetry.stage_timing import IdleClock, Measured, Meter, StageTime, bottleneck


def cpu(
    read: float = 1, decode: float = 5, embed: float = 5, idle: float = 0, encode: float = 1, commit: float = 1,
    blocked: float = 0, driver: float = 1, readers: int = 1,
) -> Measured:  # fmt: skip
    """Measurements of ten seconds of two workers that decode and embed."""
    seconds = {"read": read, "decode": decode, "preprocess": 1.0, "embed": embed, "encode": encode, "commit": commit}
    return Measured(
        seconds=10,
        stages={stage: StageTime(busy, 100, 1000) for stage, busy in seconds.items()},
        waited={"workers": idle},
        pools={"readers": readers, "workers": 2},
        blocked_s=blocked,
        driver_s=driver,
    )


def gpu(
    models_idle: float, preparers_idle: float, preparers: int = 6, gpus: int = 1, read: float = 1, blocked: float = 0
) -> Measured:
    """Measurements of ten seconds with each pool's share of idle time."""
    wall = 10.0
    return Measured(
        seconds=wall,
        stages={
            "read": StageTime(read),
            "decode": StageTime(wall * preparers * (1 - preparers_idle)),
            "embed": StageTime(wall * gpus * (1 - models_idle)),
        },
        waited={"models": wall * gpus * models_idle, "preparers": wall * preparers * preparers_idle},
        pools={"readers": 2, "preparers": preparers, "models": gpus},
        blocked_s=blocked,
    )


CASES = {
    # CPUs: workers that hardly wait are told by what they do
    "most time goes to decoding": (cpu(decode=13, embed=6), "decode-bound", "took 70 % of the workers' time"),
    "most time goes to the model": (cpu(decode=3, embed=16), "model-bound", "the model took 80 %"),
    "a little waiting changes nothing": (cpu(decode=3, embed=14, idle=1.5), "model-bound", "more CPUs"),
    # workers that wait are fed too slowly, or nobody takes their results
    "one reader is busy all the time": (cpu(read=9.8, idle=8), "read-bound", "workers waited 42 %"),
    "several readers are": (cpu(read=30, idle=8, readers=4), "read-bound", "4 readers were busy 75 %"),
    "the store is slow": (cpu(idle=8, blocked=7, commit=30), "commit-bound", "mostly for storing"),
    "wide rows are slow to encode": (cpu(idle=8, blocked=7, encode=30), "commit-bound", "mostly for encoding"),
    "the driver gathers": (cpu(idle=8, driver=9.5), "driver-bound", "busy 95 %"),
    "nobody is busy": (cpu(read=1, idle=12), "overhead-bound", "readers were busy only 10 %"),
    # GPUs: decoding is a pool of its own
    "the model is busy": (gpu(0.04, 0.5), "model-bound", "busy 96 %"),
    "too few preparers": (gpu(0.37, 0.0, preparers=6), "decode-bound", "the model was idle 37 %; 4 more CPUs per GPU"),
    "of four GPUs": (gpu(0.5, 0.02, preparers=8, gpus=4), "decode-bound", "idle 50 %; 2 more CPUs per GPU"),
    "preparers wait as well": (gpu(0.4, 0.6, read=19), "read-bound", "the model waited 40 %"),
    "all wait for commits": (gpu(0.5, 0.6, blocked=8), "commit-bound", "80 %"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_line_names_the_bottleneck(case: str) -> None:
    measured, kind, words = CASES[case]
    line = bottleneck(measured)
    assert line.startswith(f"{kind}: ") and words in line, line
    assert "\n" not in line


def test_a_setting_that_the_job_already_has_is_not_advised() -> None:
    decoding = cpu(decode=13, embed=6)
    assert "`preprocess: fast`" in bottleneck(decoding)
    assert "`preprocess: fast`" not in bottleneck(replace(decoding, is_fast=True))


def test_a_session_without_work_has_no_bottleneck() -> None:
    assert bottleneck(Measured(seconds=3)) == ""


def test_the_advice_is_in_proportion() -> None:
    """The CPUs that the line asks for would keep the model busy."""
    for idle in (0.2, 0.5, 0.8):
        more = int(bottleneck(gpu(idle, 0.0, preparers=10)).split("; ")[1].split()[0])
        assert (10 + more) * (1 - idle) / 10 >= 1 > (10 + more - 1) * (1 - idle) / 10


def test_sums_are_right_from_any_thread() -> None:
    meter = Meter({"workers": 2})
    one = {"decode": StageTime(0.5, 2, 10), "of its own": StageTime(1.0)}

    def work() -> None:
        for _ in range(500):
            meter.add(one, {"workers": 0.25})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured = meter.measured()
    assert measured.stages["decode"] == StageTime(1000, 4000, 20_000)
    assert measured.stages["of its own"].seconds == 2000
    assert measured.waited == {"workers": 500}
    assert measured.idle("workers") == pytest.approx(500 / 1500)


def test_idle_time_is_between_batches_and_the_first_is_start_up() -> None:
    idle = IdleClock()
    time.sleep(0.02)
    assert idle.end() == 0
    idle.begin()
    time.sleep(0.03)
    assert 0.03 <= idle.end() < 10


def test_start_up_and_blocked_time_are_separate() -> None:
    meter = Meter({})
    time.sleep(0.02)
    meter.arrived()
    meter.arrived()
    with meter.blocked():
        time.sleep(0.02)
    measured = meter.measured()
    assert 0.02 <= measured.startup_s < 10
    assert 0.02 <= measured.blocked_s <= measured.seconds < 10
