"""Decompress a gzip stream of any size, keeping the bytes before a fault.

Python's own reader drops what it had inflated when a checksum or the end of the stream is wrong. Here it is kept, and
`fault` says what was wrong. Several members in a row are one stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator

from img2parquet.read.byte_source import ChunkBytes

MAGIC = b"\x1f\x8b"
INPUT_BYTES = 64 << 10  # an error in the deflate stream costs at most so many good bytes before it
OUTPUT_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 << 10  # for the file name or comment in a header
CHECKSUM, EXTRA, NAME, COMMENT, RESERVED = 2, 4, 8, 16, 0xE0


class GzipBytes(ChunkBytes):
    """The decompressed bytes. `fault` is set when they end early or their checksum is wrong."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.compressed = ChunkBytes(chunks)
        super().__init__(self._inflate())

    def _inflate(self) -> Iterator[bytes]:
        while True:
            fault = yield from self._inflate_member()
            if fault:
                self.fault = f"{fault} (byte {self.compressed.position} of the compressed file)"
                return
            if not self._more_members():
                return

    def _inflate_member(self) -> Generator[bytes, None, str]:
        if not self._read_header():
            return "the gzip header is damaged"
        inflater, checksum, size_bytes = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0
        while not inflater.eof:
            data = inflater.unconsumed_tail or self.compressed.take(INPUT_BYTES)
            try:
                inflated = inflater.decompress(data, OUTPUT_BYTES)
            except zlib.error:
                return "the gzip stream is damaged"
            if not data and not inflated and not inflater.eof:
                return "the gzip stream ends early"
            checksum, size_bytes = zlib.crc32(inflated, checksum), size_bytes + len(inflated)
            if inflated:
                yield inflated
        self.compressed.unread(inflater.unused_data)
        trailer = self.compressed.take(8)
        right = checksum.to_bytes(4, "little") + (size_bytes & 0xFFFFFFFF).to_bytes(4, "little")
        return "" if trailer == right else "the gzip checksum does not match: bytes before it may be wrong"

    def _read_header(self) -> bool:
        """Skip a header. Return False if there is none or it is damaged, since then the data's start is unknown."""
        header = self.compressed.take(10)
        if len(header) < 10 or header[:3] != MAGIC + b"\x08" or header[3] & RESERVED:
            return False
        flags = header[3]
        if flags & EXTRA:
            length = self.compressed.take(2)
            header += length + self.compressed.take(int.from_bytes(length, "little"))
        for flag in (NAME, COMMENT):
            if flags & flag:
                text = self._take_text()
                if not text:
                    return False
                header += text
        return not flags & CHECKSUM or self.compressed.take(2) == (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")

    def _take_text(self) -> bytes:
        """Return a text with its terminating zero, or nothing if it does not end."""
        text = self.compressed.take(MAX_TEXT_BYTES)
        end = text.find(b"\0") + 1
        self.compressed.unread(text[end:])
        return text[:end]

    def _more_members(self) -> bool:
        """Whether anything but zeros, with which some writers pad, follows this member."""
        while True:
            data = self.compressed.take(INPUT_BYTES)
            rest = data.lstrip(b"\0")
            if rest or not data:
                self.compressed.unread(rest)
                return bool(rest)


def unzipped(data: bytes, most_bytes: int) -> bytes:
    """Return an object's own bytes where it was stored or sent compressed (`Content-Encoding: gzip`), at most so many.

    No image format starts like gzip."""
    if not data.startswith(MAGIC):
        return data
    return GzipBytes(iter([data])).take(most_bytes) or data
