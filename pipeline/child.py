"""Work -> a process that reads, decodes or embeds what may kill it, as every worker does; its death is an answer.

    Child       the process as its owner sees it: started when first asked, and again after it died
    `python -m pipeline.child`   the process itself

* Pickles travel over its stdin and stdout, between processes of ours only. Before each image it says which one.
* What takes longer than it may is ended by the process's own timer, which fires also while C code holds Python's lock.
* It ends with its owner: its stdin ends then, and what it is busy with has a time limit.
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
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline import flight
from pipeline.batch import Work
from pipeline.errors import Img2ParquetError, JobFailed

Task = Literal["prepare", "embed", "read"]
STARTS = 3


class Died(Exception):
    """The process ended instead of answering. `row`: the source row that it was at, where it was decoding."""

    def __init__(self, code: int, row: int | None) -> None:
        super().__init__(how(code))
        self.how, self.row, self.is_late = how(code), row, code == -signal.SIGALRM


def how(code: int) -> str:
    """`SIGSEGV`, or `exit code 1`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Child:
    """For one thread at a time."""

    def __init__(self, work: Work) -> None:
        self.work, self.loaded = work, set[Task]()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task, item: object) -> Iterator[Any]:
        """The answer's items as they come. Raises Died, JobFailed where it dies before it is given anything to do, and
        what the task raised where that is an error of ours. Not read to its end, it ends the process."""
        is_answered, at = False, None
        try:
            process = self._ready(task)
            self._send(process, (task, item))
            while True:
                kind, value = self._receive(process, at)
                if kind == "at":
                    at = value
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
        """End the process, if there is one."""
        if self.process:
            self.process.kill()
            self._reap()

    def _ready(self, task: Task) -> subprocess.Popen[bytes]:
        """It has loaded what the task needs: what it dies of from there on is what it is given."""
        said = ""
        for _ in range(STARTS):
            process = self.process or self._start()
            if task in self.loaded:
                return process
            try:
                self._send(process, ("load", task))
                kind, value = self._receive(process, None)
            except Died as death:
                said = death.how
                continue
            if kind == "error":
                raise value
            self.loaded.add(task)
            return process
        raise JobFailed(
            f"the process that is to {task} what killed another died {STARTS} times before it was given any: {said}",
            hint="SIGKILL is usually the kernel, out of memory: use fewer workers or a smaller batch_size",
        )

    def _start(self) -> subprocess.Popen[bytes]:
        # the owner's own path, and not the folder that it happens to stand in
        path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.loaded.clear()
        self._send(self.process, self.work)
        return self.process

    def _send(self, process: subprocess.Popen[bytes], item: object) -> None:
        assert process.stdin
        with suppress(BrokenPipeError):  # its end is seen where its answer is read
            pickle.dump(item, process.stdin, protocol=5)
            process.stdin.flush()

    def _receive(self, process: subprocess.Popen[bytes], at: int | None) -> tuple[str, Any]:
        assert process.stdout
        try:
            message: tuple[str, Any] = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._reap()
            raise Died(code, at) from None
        return message

    def _reap(self) -> int:
        process, self.process = self.process, None
        assert process and process.stdin and process.stdout
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:  # it closed its end and lives on
            process.kill()
            return process.wait()


# ---- the process -------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is the owner's affair
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests = sys.stdin.buffer
    tasks = _Tasks(pickle.load(requests))
    alarms = flight.Alarms()
    flight.use(lambda: _Telling(alarms, answers))
    faulthandler.register(signal.SIGALRM, chain=True)
    while True:
        try:
            task, item = pickle.load(requests)
        except EOFError:
            return
        try:
            for each in tasks(task, item):
                _say(answers, "item", each)
            _say(answers, "end", None)
        except Img2ParquetError as error:
            _say(answers, "error", error)
        except Exception:
            _say(answers, "error", RuntimeError(traceback.format_exc()))


def _say(answers: BinaryIO, kind: str, value: object) -> None:
    pickle.dump((kind, value), answers, protocol=5)
    answers.flush()


class _Tasks:
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
            from pipeline.embed import Embedder, Preparer

            self.steps[task] = Preparer(self.work) if task == "prepare" else Embedder(self.work)


class _Telling(flight.AlarmSlot):
    def __init__(self, alarms: flight.Alarms, answers: BinaryIO) -> None:
        super().__init__(alarms)
        self.answers = answers

    def begin(self, stage: int, part_index: int, k: int = 0, row: int = 0, limit_s: float = flight.NO_LIMIT_S) -> None:
        if stage == flight.DECODE:
            _say(self.answers, "at", row)
        super().begin(stage, part_index, k, row, limit_s)


if __name__ == "__main__":
    serve()
