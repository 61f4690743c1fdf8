"""Report the steps of a write to listeners, which are tests that kill, stop or fail a writer between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEPS = {
    "asked": "nothing has happened yet",
    "opened": "disk: a temporary file is there, and empty",
    "written": "disk: it holds all bytes, perhaps not on the medium",
    "synced": "disk: it is durable, under its temporary name",
    "named": "disk: it has its final name, perhaps not durably",
    "cleared": "disk: its temporary name is gone",
    "answered": "S3: the store has answered that the object is there",
    "done": "it is there, durably, and the caller is told so next",
}
Listener = Callable[[str, str], None]
_LISTENERS: list[Listener] = []


def reached(step: str, uri: str) -> None:
    """Call the listeners, on the thread that creates the object `uri`."""
    for listener in _LISTENERS:
        listener(step, uri)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Register a listener. An OSError that it raises at `opened` or `written` is treated as the disk's own."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)
