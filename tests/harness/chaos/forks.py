"""A function in a forked process: started, waited for, or asked for its result."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")
BROKEN = 70  # the exit code of a function that raised what it should not


def fork(action: Callable[[], int | None], log: Path | None = None) -> int:
    """The child's process id. It ends with what `action` returns; its words go to `log`, else where ours go."""
    _check_alone()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be(action, log)
    return child


def result_of(action: Callable[[], T]) -> T:
    """What a forked process makes of it."""
    from_child, to_parent = os.pipe()

    def tell() -> None:
        with os.fdopen(to_parent, "wb") as pipe:
            pickle.dump(action(), pipe)

    child = fork(tell)
    os.close(to_parent)
    with os.fdopen(from_child, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"a helper ended with {os.waitstatus_to_exitcode(status)}"
    answer: T = pickle.loads(data)
    return answer


def _be(action: Callable[[], int | None], log: Path | None) -> NoReturn:
    code = BROKEN
    try:
        if log:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        code = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no clean-up that belongs to the parent


def _check_alone() -> None:
    """A lock that another thread holds would stay held in the child for ever; jemalloc's own thread knows of forks."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in names if not name.startswith("jemalloc")][1:]
    assert not others, f"only a single-threaded process may fork here, not one with {others}"
