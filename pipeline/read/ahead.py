"""Pieces of files -> their bytes in chunks, the next ones always under way, whatever file they are of.

A store's answer begins after a round trip; several ranges at once hide it, also from one small shard to the next. Each
range is a request of its own, pinned to the file that was planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from pipeline.read.settings import entry_of_slice, entry_of_whole
from pipeline.schema import Piece
from pipeline.storage import Entry, Store
from pipeline.storage.entry import scheme_of

CHUNK_BYTES = 8 << 20
IN_FLIGHT_BYTES = 32 << 20  # of one reader: asked for or waiting, beside the chunk that is being parsed
REQUESTS = 16  # of small shards
LOCAL_REQUESTS = 2


class Ahead:
    """`chunks(i)` gives those of piece i; pieces are asked for in order, and what is left of one that is passed over is
    dropped. An error is raised where its chunk would have come."""

    def __init__(self, store: Store, pieces: Sequence[Piece]) -> None:
        self.store, self.pieces = store, pieces
        self.most = REQUESTS if any(scheme_of(piece.uri) for piece in pieces) else LOCAL_REQUESTS
        self.pool = ThreadPoolExecutor(self.most, thread_name_prefix="read")
        self.entries: dict[int, Future[Entry]] = {}
        self.asked: deque[tuple[int, int, Future[bytes]]] = deque()  # piece, bytes, chunk
        self.asked_bytes = 0
        self.requests = self._requests()
        self.next = next(self.requests, None)

    def chunks(self, i: int) -> Iterator[bytes]:
        """Raises PartFailed, StorageError."""
        while True:
            self._drop_before(i)
            self._fill()
            if not self.asked or self.asked[0][0] != i:
                return
            _, size_bytes, future = self.asked.popleft()
            try:
                chunk = future.result()
            finally:
                self.asked_bytes -= size_bytes
            self._fill()
            yield chunk

    def entry(self, i: int) -> Entry:
        """Of the file that piece i lies in. Raises PartFailed, StorageError."""
        return self._entry(i).result()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _requests(self) -> Iterator[tuple[int, int, int]]:
        for i, piece in enumerate(self.pieces):
            start, stop = (0, piece.size_bytes) if piece.stop is None else (piece.start, piece.stop)
            for at in range(start, stop, CHUNK_BYTES):
                yield i, at, min(at + CHUNK_BYTES, stop)

    def _fill(self) -> None:
        while self.next and len(self.asked) < self.most:
            i, start, stop = self.next
            if self.asked and self.asked_bytes + stop - start > IN_FLIGHT_BYTES:
                return
            entry = self._entry(i)  # before its first chunk, so that no chunk waits for what waits behind it
            self.asked.append((i, stop - start, self.pool.submit(self._read, entry, start, stop)))
            self.asked_bytes += stop - start
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
        while self.asked and self.asked[0][0] < i:
            _, size_bytes, future = self.asked.popleft()
            future.cancel()
            self.asked_bytes -= size_bytes
        while self.next and self.next[0] < i:
            self.next = next(self.requests, None)
