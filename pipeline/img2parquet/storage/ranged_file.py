"""Read any store's ranges as a seekable file.

Each read is one request, unless the ranges were announced before: then blocks ahead of the reader are fetched, so that
a store's round trip is waited for once and not for each block.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from img2parquet.storage.backend import Entry

FILE_BUFFER_BYTES = 1 << 20
BLOCK_BYTES, LEAST_BLOCK_BYTES = 8 << 20, 1 << 20
BLOCKS_AHEAD = 3  # of each track
IN_FLIGHT_BYTES = 64 << 20  # of one file, where its tracks are not very many

Read = Callable[[str, int, int | None, Entry | None], bytes]


class RangedFile(io.RawIOBase):
    """A seekable view of one version of an object; each read is one checked request, or a part of one."""

    def __init__(self, read: Read, entry: Entry) -> None:
        super().__init__()
        self._read, self._entry, self._at = read, entry, 0
        self._ahead: _Ahead | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.size_bytes}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._entry.size_bytes)
        if stop <= self._at:
            return 0
        data = self._ahead.take(self._at, stop) if self._ahead else None
        if data is None:
            data = self._read(self._entry.uri, self._at, stop, self._entry)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def announce(self, tracks: Sequence[Iterable[tuple[int, int]]]) -> None:
        if self._ahead:
            self._ahead.close()
        self._ahead = _Ahead(self._read, self._entry, tracks)

    def close(self) -> None:
        if self._ahead:
            self._ahead.close()
        super().close()


def announce(file: BinaryIO, tracks: Sequence[Iterable[tuple[int, int]]]) -> None:
    """Announce the ranges that will be read from a file of `Store.open`, so that they are fetched ahead.

    tracks: ranges [start, stop) in the order they are read; several tracks, such as the columns of a row group, are
    read side by side. Has no effect on a disk, where the system reads ahead itself."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, RangedFile):
        raw.announce(tracks)


@dataclass(frozen=True)
class _Block:
    start: int
    stop: int
    track: int
    place: int  # within its track


class _Ahead:
    """Hold announced blocks of each track: the one being read, the one before it, and those that come next."""

    def __init__(self, read: Read, entry: Entry, tracks: Sequence[Iterable[tuple[int, int]]]) -> None:
        self._read, self._entry = read, entry
        share = IN_FLIGHT_BYTES // (max(1, len(tracks)) * (1 + BLOCKS_AHEAD))
        size_bytes = min(BLOCK_BYTES, max(LEAST_BLOCK_BYTES, share))
        self.tracks = [list(_cut(ranges, size_bytes, entry.size_bytes, t)) for t, ranges in enumerate(tracks)]
        self.blocks = sorted((block for track in self.tracks for block in track), key=lambda block: block.start)
        self.starts = [block.start for block in self.blocks]
        self.coming: list[dict[int, Future[bytes]]] = [{} for _ in tracks]
        self.pool = ThreadPoolExecutor(1 + BLOCKS_AHEAD, thread_name_prefix="read")

    def take(self, start: int, stop: int) -> bytes | None:
        """Return bytes from `start` to `stop` or the end of a block; None where nothing was announced."""
        found = bisect_right(self.starts, start) - 1
        if found < 0 or start >= self.blocks[found].stop:
            return None
        block = self.blocks[found]
        track, coming = self.tracks[block.track], self.coming[block.track]
        for place in [place for place in coming if place < block.place - 1]:
            coming.pop(place).cancel()
        for wanted in track[block.place : block.place + 1 + BLOCKS_AHEAD]:
            if wanted.place not in coming:
                coming[wanted.place] = self.pool.submit(
                    self._read, self._entry.uri, wanted.start, wanted.stop, self._entry
                )
        data = coming[block.place].result()
        return data[start - block.start : stop - block.start]

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.coming = [{} for _ in self.tracks]


def _cut(ranges: Iterable[tuple[int, int]], size_bytes: int, end: int, track: int) -> Iterator[_Block]:
    """Cut ranges into blocks within the file, in total no longer than it: a damaged footer may claim anything."""
    place = total = 0
    for first, last in ranges:
        first, last = max(0, first), min(last, end)
        total += max(0, last - first)
        if total > end:
            return
        for start in range(first, last, size_bytes):
            yield _Block(start, min(start + size_bytes, last), track, place)
            place += 1
