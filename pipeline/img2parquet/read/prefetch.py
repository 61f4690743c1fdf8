"""Read pieces of files in chunks, requesting the next chunks ahead of time, across files.

The response of a store starts after a round trip; several requests at once hide it, also between small shards. Each
chunk is a ranged request of its own, pinned to the version of the file that was planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from img2parquet.read.settings import entry_of_slice, entry_of_whole
from img2parquet.schema import Piece
from img2parquet.storage import Entry, Store
from img2parquet.storage.backend import scheme_of

CHUNK_BYTES = 8 << 20
IN_FLIGHT_BYTES = 32 << 20  # of one reader: requested or waiting, in addition to the chunk that is being parsed
REQUESTS = 16  # at once, reached with small shards
LOCAL_REQUESTS = 2


class Prefetcher:
    """Read ahead over pieces in order: `chunks(i)` yields the chunks of piece i.

    Chunks left over from earlier pieces are dropped. An error is raised in place of the chunk that it concerns."""

    def __init__(self, store: Store, pieces: Sequence[Piece]) -> None:
        self.store, self.pieces = store, pieces
        self.most = REQUESTS if any(scheme_of(piece.uri) for piece in pieces) else LOCAL_REQUESTS
        self.pool = ThreadPoolExecutor(self.most, thread_name_prefix="read")
        self.entries: dict[int, Future[Entry]] = {}
        self.pending: deque[tuple[int, int, Future[bytes]]] = deque()  # piece, bytes, chunk
        self.pending_bytes = 0
        self.requests = self._requests()
        self.next = next(self.requests, None)

    def chunks(self, i: int) -> Iterator[bytes]:
        """Yield the chunks of piece i. Raises PartFailed, StorageError."""
        while True:
            self._drop_before(i)
            self._fill()
            if not self.pending or self.pending[0][0] != i:
                return
            _, size_bytes, future = self.pending.popleft()
            try:
                chunk = future.result()
            finally:
                self.pending_bytes -= size_bytes
            self._fill()
            yield chunk

    def entry(self, i: int) -> Entry:
        """Return the entry of the file that holds piece i. Raises PartFailed, StorageError."""
        return self._entry(i).result()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _requests(self) -> Iterator[tuple[int, int, int]]:
        for i, piece in enumerate(self.pieces):
            start, stop = (0, piece.size_bytes) if piece.stop is None else (piece.start, piece.stop)
            for at in range(start, stop, CHUNK_BYTES):
                yield i, at, min(at + CHUNK_BYTES, stop)

    def _fill(self) -> None:
        while self.next and len(self.pending) < self.most:
            i, start, stop = self.next
            if self.pending and self.pending_bytes + stop - start > IN_FLIGHT_BYTES:
                return
            entry = self._entry(
                i
            )  # submitted before its first chunk, so that no chunk waits for a task queued behind it
            self.pending.append((i, stop - start, self.pool.submit(self._read, entry, start, stop)))
            self.pending_bytes += stop - start
            self.next = next(self.requests, None)

    def _entry(self, i: int) -> Future[Entry]:
        if i not in self.entries:
            self.entries = dict(islice(self.entries.items(), max(0, len(self.entries) - 2 * REQUESTS), None))
            piece = self.pieces[i]
            if piece.stop is None:
                self.entries[i] = Future()
                self.entries[i].set_result(entry_of_whole(piece))
            else:
                self.entries[i] = self.pool.submit(entry_of_slice, self.store, piece, piece.stop)
        return self.entries[i]

    def _read(self, entry: Future[Entry], start: int, stop: int) -> bytes:
        found = entry.result()
        return self.store.read(found.uri, start, stop, expect=found)

    def _drop_before(self, i: int) -> None:
        while self.pending and self.pending[0][0] < i:
            _, size_bytes, future = self.pending.popleft()
            future.cancel()
            self.pending_bytes -= size_bytes
        while self.next and self.next[0] < i:
            self.next = next(self.requests, None)
