"""Count the requests that this process retried, by error. Workers take the counts and send them to the driver."""

from __future__ import annotations

import threading

MOST_KINDS = 32  # error codes are the store's own text, and may not fill the memory
MOST_LETTERS = 48


class Retries:
    """Count retries by kind, from any thread."""

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), dict[str, tuple[int, float]]()

    def add(self, kind: str, waited_s: float) -> None:
        """kind: the store's code, or the exception's name; waited_s: the back-off before the next attempt."""
        kind = kind[:MOST_LETTERS] if kind.isprintable() else "other"
        with self._lock:
            kind = kind if kind in self._counts or len(self._counts) < MOST_KINDS else "other"
            times, seconds = self._counts.get(kind, (0, 0.0))
            self._counts[kind] = (times + 1, seconds + waited_s)

    def take(self) -> dict[str, tuple[int, float]]:
        """Return counts and seconds waited by kind, since the last call."""
        with self._lock:
            counts, self._counts = self._counts, {}
            return counts


RETRIES = Retries()
