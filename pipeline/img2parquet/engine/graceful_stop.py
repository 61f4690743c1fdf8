"""Handle SIGTERM and Ctrl-C. The first signal asks for a graceful stop, the second one quits immediately.

* Only a session at work stops gracefully; before and after it, a signal is a KeyboardInterrupt.
* A terminal, a supervisor and a container may each send the same request: signals within `SAME_S` count once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 0.5


class StopSignals:
    """Handles signals while it is entered on the main thread. On any other thread it does nothing.

    before_exit: called before a second signal ends this process."""

    def __init__(self, before_exit: Callable[[], None] = lambda: None) -> None:
        self.before_exit: Callable[[], None] = before_exit
        self.received: signal.Signals | None = None
        self.received_at, self.is_graceful = 0.0, False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Install the handlers; again after something that takes SIGTERM for itself, as the start of Ray does."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self.previous.setdefault(number, signal.signal(number, self._on_signal))

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """While entered, only note the first signal in `received`."""
        self.is_graceful = True
        try:
            yield
        finally:
            self.is_graceful = False

    @property
    def exit_code(self) -> int:
        """Return the exit code of a shell: 143 for SIGTERM, 130 for Ctrl-C and for any other KeyboardInterrupt."""
        return 128 + (self.received or signal.SIGINT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self.received_at > SAME_S:
            self.before_exit()
            os._exit(128 + number)  # work in progress needs no clean-up: nothing is visible before it is complete
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
            if not self.is_graceful:
                raise KeyboardInterrupt
