"""A seekable file over any store that reads ranges."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from pipeline.storage.entry import Entry

FILE_BUFFER_BYTES = 1 << 20


class PinnedFile(io.RawIOBase):
    """A seekable view of one version of an object; each read is one checked request."""

    def __init__(self, read: Callable[[str, int, int | None, Entry | None], bytes], entry: Entry) -> None:
        super().__init__()
        self._read, self._entry, self._at = read, entry, 0

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
        data = self._read(self._entry.uri, self._at, stop, self._entry)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)
