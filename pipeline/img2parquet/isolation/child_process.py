"""Run steps that may crash or hang in a child process, and report its death to the owner.

    ChildProcess    the owner's side: starts the process on the first request, and again after it died
    `python -m img2parquet.isolation.child_process`   the process itself, which does what any worker does

* Pickles travel over its stdin and stdout, between our own processes only. It announces each image before decoding it.
* A timer of the process itself ends what takes longer than allowed, even while C code holds Python's lock.
* It ends with its owner: its stdin ends then, and whatever it is doing has a time limit.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, Literal

from img2parquet.batch import Work
from img2parquet.errors import Img2ParquetError, JobFailed
from img2parquet.isolation.import_path import worker_path
from img2parquet.isolation.supervisor import OUT_OF_MEMORY
from img2parquet.telemetry import flight_recorder

Task = Literal["prepare", "embed", "read"]
STARTS = 3


class Died(Exception):
    """Raised when the process ended instead of answering. `row`: the source row that it was decoding, if it was."""

    def __init__(self, code: int, row: int | None) -> None:
        self.cause, self.row, self.is_late = describe_exit(code), row, code == -signal.SIGALRM
        super().__init__(self.cause)


def describe_exit(code: int) -> str:
    """Name the signal of a negative code, as in `SIGSEGV`; else return `exit code 1`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class ChildProcess:
    """Runs tasks in a child process. One thread at a time may use it."""

    def __init__(self, work: Work) -> None:
        self.work, self.loaded = work, set[Task]()
        self.process: subprocess.Popen[bytes] | None = None

    def request(self, task: Task, item: object) -> Iterator[Any]:
        """Yield the items of the answer as they arrive. An iterator that is not read to its end ends the process.

        Raises Died, JobFailed when the process dies before it is given any work, and what the task itself raised where
        that is an error of our own."""
        is_answered, row = False, None
        try:
            process = self._ready(task)
            self._send(process, (task, item))
            while True:
                kind, value = self._receive(process, row)
                if kind == "at":
                    row = value
                elif kind == "item":
                    yield value
                else:
                    is_answered = True
                    if kind == "error":
                        raise value
                    return
        finally:
            if not is_answered:
                self.close()

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self.process:
            self.process.kill()
            self._reap()

    def _ready(self, task: Task) -> subprocess.Popen[bytes]:
        """Return a process that has loaded what the task needs, so that only the work itself can kill it."""
        cause = ""
        for _ in range(STARTS):
            process = self.process or self._start()
            if task in self.loaded:
                return process
            try:
                self._send(process, ("load", task))
                kind, value = self._receive(process, None)
            except Died as death:
                cause = death.cause
                continue
            if kind == "error":
                raise value
            self.loaded.add(task)
            return process
        raise JobFailed(
            f"the isolated process for `{task}` died {STARTS} times before it was given any work: {cause}",
            hint=OUT_OF_MEMORY,
        )

    def _start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "img2parquet.isolation.child_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(worker_path())},
        )
        self.loaded.clear()
        self._send(self.process, self.work)
        return self.process

    def _send(self, process: subprocess.Popen[bytes], item: object) -> None:
        assert process.stdin
        with suppress(BrokenPipeError):  # its death is noticed when the answer is read
            pickle.dump(item, process.stdin, protocol=5)
            process.stdin.flush()

    def _receive(self, process: subprocess.Popen[bytes], row: int | None) -> tuple[str, Any]:
        assert process.stdout
        try:
            message: tuple[str, Any] = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._reap()
            raise Died(code, row) from None
        return message

    def _reap(self) -> int:
        process, self.process = self.process, None
        assert process and process.stdin and process.stdout
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:  # it closed its stdout and is still alive
            process.kill()
            return process.wait()


# ---- the process -------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what a library prints is not taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests = sys.stdin.buffer
    tasks = _Tasks(pickle.load(requests))
    alarms = flight_recorder.Alarms()
    flight_recorder.use(lambda: _AnnouncingSlot(alarms, answers))
    faulthandler.register(signal.SIGALRM, chain=True)
    while True:
        try:
            task, item = pickle.load(requests)
        except EOFError:
            return
        try:
            for each in tasks(task, item):
                _send(answers, "item", each)
            _send(answers, "end", None)
        except Img2ParquetError as error:
            _send(answers, "error", error)
        except Exception:
            _send(answers, "error", RuntimeError(traceback.format_exc()))


def _send(answers: BinaryIO, kind: str, value: object) -> None:
    pickle.dump((kind, value), answers, protocol=5)
    answers.flush()


class _Tasks:
    """Loads the steps that are requested, and runs them."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.steps: dict[str, Callable[[Any], object]] = {}

    def __call__(self, task: str, item: Any) -> Iterator[object]:
        if task == "load":
            self._load(item)
        elif task == "read":
            yield from self.work.job.input.read(item)
        else:
            yield self.steps[task](item)

    def _load(self, task: Task) -> None:
        if task != "read":
            from img2parquet.inference.steps import Embedder, Preparer

            self.steps[task] = Preparer(self.work) if task == "prepare" else Embedder(self.work)


class _AnnouncingSlot(flight_recorder.AlarmSlot):
    """Tells the owner which row is decoded next."""

    def __init__(self, alarms: flight_recorder.Alarms, answers: BinaryIO) -> None:
        super().__init__(alarms)
        self.answers = answers

    def begin(
        self, stage: int, part_index: int, k: int = 0, row: int = 0, limit_s: float = flight_recorder.NO_LIMIT_S
    ) -> None:
        if stage == flight_recorder.DECODE:
            _send(self.answers, "at", row)
        super().begin(stage, part_index, k, row, limit_s)


if __name__ == "__main__":
    serve()
