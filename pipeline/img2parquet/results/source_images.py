"""Fetch the images of rows and rejects from the source shards, with the readers of `img2parquet.read`.

* Reading stops at a budget, each part's share of BYTES_AT_MOST, and after SECONDS_AT_MOST: images not found by then
  are left out.
* A shard that is missing, changed or refused becomes a note, never an error, since the images are only illustrations.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from img2parquet.errors import Img2ParquetError, InputError
from img2parquet.read import SOURCES, Source
from img2parquet.read.folder import Folder, Roots
from img2parquet.read.passthrough import to_valid_text
from img2parquet.schema import Part, Piece, Row

Place = tuple[str, str]  # shard, key
Note = Callable[[str], object]
BYTES_AT_MOST = 256 << 20
PART_BYTES = 8 << 20  # the least share of a part: one chunk of a stream
SECONDS_AT_MOST = 60.0  # for all parts together, so that a very slow store does not block a report
REJECT_BYTES = 4 << 20  # bytes to read for one reject, from its offset
THREADS = 8


def open_source(record: Mapping[str, Any], storage_options: Mapping[str, Any]) -> Source:
    """Rebuild the job's input from the run's record, without the secrets of signed URLs.

    Raises InputError when the record names no input or an invalid one."""
    settings = record.get("job", {}).get("input")
    if not isinstance(settings, Mapping) or settings.get("kind") not in SOURCES:
        raise InputError("the run's record names no input, so there are no thumbnails")
    module, name = SOURCES[settings["kind"]]
    options = {**settings, "storage_options": dict(storage_options)}
    try:
        made: Source = getattr(import_module(module), name).model_validate(options)
    except (ValidationError, Img2ParquetError, TypeError) as error:
        raise InputError(f"the input in the run's record cannot be read: {_first_line(error)}") from None
    return made


def find(
    source: Source, parts: Mapping[int, Part], wanted: Mapping[int, set[Place]], note: Note
) -> Iterator[tuple[Place, bytes]]:
    """Find the images of rows, wanted by part, reading several parts at once. A missing shard becomes a note."""
    share = max(PART_BYTES, BYTES_AT_MOST // max(1, len(wanted)))
    until = time.monotonic() + SECONDS_AT_MOST

    def of_part(index: int) -> list[tuple[Place, bytes]]:
        return list(_noted(note, _in_part(source, parts[index], wanted[index], share, until)))

    with ThreadPoolExecutor(THREADS, thread_name_prefix="images") as pool:
        for found in pool.map(of_part, wanted):
            yield from found


def find_rejects(
    source: Source, parts: Mapping[int, Part], rejects: Sequence[Mapping[str, Any]], note: Note
) -> Iterator[tuple[int, bytes]]:
    """Find the bytes of rejects, several at once. Yields each with its index in `rejects`."""
    until = time.monotonic() + SECONDS_AT_MOST

    def of_one(i: int) -> list[tuple[int, bytes]]:
        found = _rejected(source, parts[rejects[i]["part"]], rejects[i], until)
        return [(i, image) for _, image in _noted(note, found)]

    may_have_bytes = [i for i, reject in enumerate(rejects) if reject["reason"] not in ("empty", "shard_damaged")]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="images") as pool:
        for found in pool.map(of_one, may_have_bytes):
            yield from found


def _in_part(
    source: Source, part: Part, wanted: set[Place], budget_bytes: int, until: float
) -> Iterator[tuple[Place, bytes]]:
    left = set(wanted)
    for narrowed in _narrowed(source, part, left, budget_bytes):
        with closing(_rows(source, narrowed)) as rows:
            for row in rows:
                budget_bytes -= len(row.image)
                if (row.shard, row.key) in left:
                    left.discard((row.shard, row.key))
                    yield (row.shard, row.key), bytes(row.image)
                if budget_bytes <= 0 or not left or time.monotonic() > until:
                    return
                if source.kind != "folder" and not any(shard == row.shard for shard, _ in left):
                    break


def _narrowed(source: Source, part: Part, wanted: set[Place], budget_bytes: int) -> Iterator[Part]:
    """Narrow a part to what must be read: the wanted loose files, or else each shard alone, so that reading starts at
    its head and ends after the last wanted row."""
    if isinstance(source, Folder):
        roots = Roots(source.names)
        pieces = [p for p in part.pieces if (to_valid_text(roots.root_of(p.uri)), roots.key_of(p.uri)) in wanted]
        sums = itertools.accumulate(piece.size_bytes for piece in pieces)
        within = tuple(piece for piece, so_far in zip(pieces, sums, strict=True) if so_far <= budget_bytes)
        yield from [Part(part.index, within)] if within else []
        return
    shards = {shard for shard, _ in wanted}
    yield from (Part(part.index, (piece,)) for piece in part.pieces if piece.uri in shards)


def _rejected(source: Source, part: Part, reject: Mapping[str, Any], until: float) -> Iterator[tuple[Place, bytes]]:
    """Read the bytes of one reject: at its offset in a plain tar, otherwise by its key."""
    offset, place = reject["offset"], (reject["shard"], reject["key"])
    if source.kind == "webdataset" and offset is not None and not place[0].lower().endswith((".gz", ".tgz")):
        piece = next((p for p in part.pieces if p.uri == place[0] and _covers(p, offset)), None)
        if piece is None:
            return
        stop = min(offset + REJECT_BYTES, piece.stop or piece.size_bytes)
        part = Part(part.index, (replace(piece, start=offset, stop=stop, size_bytes=stop - offset, rows=None),))
        with closing(_rows(source, part)) as rows:
            yield from ((place, bytes(row.image)) for row in rows if row.offset == offset)
        return
    yield from _in_part(source, part, {place}, PART_BYTES, until)


def _covers(piece: Piece, offset: int) -> bool:
    return piece.start <= offset < (piece.stop if piece.stop is not None else piece.size_bytes)


def _rows(source: Source, part: Part) -> Generator[Row, None, None]:
    for item in source.read(part):
        if isinstance(item, Row):
            yield item


def _noted(note: Note, found: Iterable[tuple[Place, bytes]]) -> Iterator[tuple[Place, bytes]]:
    """Yield until a read fails, and note the failure."""
    try:
        yield from found
    except (Img2ParquetError, OSError, ValueError) as error:
        note(f"Some thumbnails are missing: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
