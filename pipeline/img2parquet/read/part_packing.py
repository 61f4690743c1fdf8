"""Pack neighbouring pieces of input into parts within the limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from img2parquet.read import PartLimits
from img2parquet.schema import Piece


def pack(pieces: Iterable[Piece], limits: PartLimits) -> Iterator[tuple[Piece, ...]]:
    """Yield parts of as many pieces as the limits allow, in order; a piece above the limits is a part of its own."""
    part: list[Piece] = []
    rows = size_bytes = 0
    for piece in pieces:
        rows, size_bytes = rows + (piece.rows or 0), size_bytes + piece.size_bytes
        if part and (rows > limits.rows or size_bytes > limits.size_bytes):
            yield tuple(part)
            part, rows, size_bytes = [], piece.rows or 0, piece.size_bytes
        _append(part, piece)
    if part:
        yield tuple(part)


def _append(part: list[Piece], piece: Piece) -> None:
    """Append a piece, merging it with the last one if they are neighbouring ranges of one file."""
    last = part[-1] if part else None
    if last is None or last.uri != piece.uri or last.stop is None or last.stop != piece.start:
        part.append(piece)
        return
    rows = None if last.rows is None or piece.rows is None else last.rows + piece.rows
    part[-1] = replace(last, size_bytes=last.size_bytes + piece.size_bytes, stop=piece.stop, rows=rows)
