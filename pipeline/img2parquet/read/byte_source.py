"""Read bytes in order, with a position and `unread`: from a stream of chunks, or by ranged requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from img2parquet.storage import Entry, Store

NEAR_BYTES = 1 << 20  # reading over a gap of this size is cheaper than another request
HEADER_BYTES = 2 << 10  # a tar header, with the extended one that may precede it
AHEAD_BYTES = 8 << 20


class ByteSource(Protocol):
    """Bytes in order. `size_bytes` is where they end, None if unknown before; `fault` says why they ended early."""

    position: int
    fault: str

    @property
    def size_bytes(self) -> int | None: ...

    def take(self, count: int) -> bytes:
        """Return the next bytes; fewer than `count` only at the end."""

    def skip(self, count: int) -> int:
        """Skip bytes and return how many there were."""

    def unread(self, data: bytes) -> None:
        """Put back the bytes that were taken last."""


class ChunkBytes:
    """Read from chunks that arrive in order."""

    def __init__(self, chunks: Iterator[bytes], position: int = 0, size_bytes: int | None = None) -> None:
        self.chunks, self.position, self.size_bytes = chunks, position, size_bytes
        self.fault = ""
        self.chunk, self.at = b"", 0

    def take(self, count: int) -> bytes:
        taken = self.chunk[self.at : self.at + count]
        self.at += len(taken)
        pieces, missing = [taken], count - len(taken)
        while missing and self._refill():
            pieces.append(self.chunk[:missing])
            self.at = len(pieces[-1])
            missing -= self.at
        taken = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.position += len(taken)
        return taken

    def skip(self, count: int) -> int:
        missing = count - min(count, len(self.chunk) - self.at)
        self.at += count - missing
        while missing and self._refill():
            self.at = min(missing, len(self.chunk))
            missing -= self.at
        self.position += count - missing
        return count - missing

    def unread(self, data: bytes) -> None:
        self.position -= len(data)
        if self.at >= len(data):
            self.at -= len(data)
        else:
            self.chunk, self.at = data + self.chunk[self.at :], 0

    def _refill(self) -> bool:
        self.chunk, self.at = next(self.chunks, b""), 0
        return bool(self.chunk)


class RangedBytes:
    """Read by ranged requests, for a walk from header to header.

    The amount read ahead doubles each time the next header was near, and is reset after a far jump: large bodies are
    not read, and small ones do not cost a request each."""

    def __init__(self, store: Store, entry: Entry) -> None:
        self.store, self.entry = store, entry
        self.position, self.size_bytes, self.fault = 0, entry.size_bytes, ""
        self.window, self.window_at, self.ahead_bytes = b"", 0, HEADER_BYTES

    def take(self, count: int) -> bytes:
        count = min(count, self.size_bytes - self.position)
        at = self.position - self.window_at
        if at < 0 or at + count > len(self.window):
            self._read_ahead(count)
            at = 0
        self.position += count
        return self.window[at : at + count]

    def skip(self, count: int) -> int:
        count = min(count, self.size_bytes - self.position)
        self.position += count
        return count

    def unread(self, data: bytes) -> None:
        self.position -= len(data)

    def _read_ahead(self, count: int) -> None:
        jump = self.position - (self.window_at + len(self.window))
        self.ahead_bytes = min(2 * self.ahead_bytes, AHEAD_BYTES) if jump < NEAR_BYTES else HEADER_BYTES
        stop = min(self.position + max(count, self.ahead_bytes), self.size_bytes)
        self.window = self.store.read(self.entry.uri, self.position, stop, expect=self.entry)
        self.window_at = self.position
