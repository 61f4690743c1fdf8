"""SIGTERM and Ctrl-C to a driver: the first is a wish to stop, the second ends it at once.

* Only what a session does can be stopped with patience; before and after it a signal is a KeyboardInterrupt.
* A terminal, a supervisor and a container may all send the same wish: within `SAME_S` it counts once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WISHES = (signal.SIGTERM, signal.SIGINT)
SAME_S = 0.5


class Signals:
    """Listens while it is entered, in the main thread; elsewhere it hears nothing, and signals do what they did."""

    def __init__(self) -> None:
        self.came: signal.Signals | None = None
        self.came_at, self.is_patient = 0.0, False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Again after whatever takes SIGTERM for itself, as Ray's start does."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WISHES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self.before.setdefault(number, signal.signal(number, self._on))

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Within, the first signal is only noted, in `came`."""
        self.is_patient = True
        try:
            yield
        finally:
            self.is_patient = False

    @property
    def exit_code(self) -> int:
        """As a shell has it: 143 for SIGTERM, 130 for Ctrl-C, and for a KeyboardInterrupt of any other origin."""
        return 128 + (self.came or signal.SIGINT)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.came is not None and time.monotonic() - self.came_at > SAME_S:
            os._exit(128 + number)  # what is under way needs no clean-up: nothing is visible before it is whole
        if self.came is None:
            self.came, self.came_at = signal.Signals(number), time.monotonic()
            if not self.is_patient:
                raise KeyboardInterrupt
