"""Keys of sampled rows and rejects -> their image bytes, from the source shards, by the readers of `pipeline.read`.

Nothing is read past a budget: a part's share of BYTES_AT_MOST. What lies beyond it has no thumbnail.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from pipeline.errors import Img2ParquetError
from pipeline.read import SOURCES, Source
from pipeline.read.folder import Folder, Roots
from pipeline.read.keep import to_valid_text
from pipeline.report.account import Account
from pipeline.schema import Part, Piece, Row

Place = tuple[str, str]  # shard, key
BYTES_AT_MOST = 256 << 20
PART_BYTES = 8 << 20  # a part's share is never less: one chunk of a stream
REJECT_BYTES = 4 << 20  # read for one reject, from its offset
THREADS = 8


def open_source(account: Account) -> Source | None:
    """The job's input as its run recorded it, without what opened signed URLs. None and a note where there is none."""
    settings = account.record.get("job", {}).get("input")
    if not isinstance(settings, Mapping) or settings.get("kind") not in SOURCES:
        if account.plan is not None:
            account.note("The run's record names no input: there are no thumbnails.")
        return None
    module, name = SOURCES[settings["kind"]]
    options = dict(account.output.store.options)
    try:
        made: Source = getattr(import_module(module), name).model_validate({**settings, "storage_options": options})
    except (ValidationError, Img2ParquetError, TypeError) as error:
        account.note(f"The input in the run's record cannot be read: {(str(error).splitlines() or ['?'])[0]}")
        return None
    return made


def find(account: Account, source: Source, wanted: Mapping[int, set[Place]]) -> Iterator[tuple[Place, bytes]]:
    """Images of rows by part; several parts are read at once. A shard that is gone becomes a note."""
    assert account.plan is not None
    share = max(PART_BYTES, BYTES_AT_MOST // max(1, len(wanted)))
    parts = [account.plan.parts[index] for index in wanted]

    def of_part(part: Part) -> list[tuple[Place, bytes]]:
        return list(_noted(account, _in_part(source, part, wanted[part.index], share)))

    with ThreadPoolExecutor(THREADS, thread_name_prefix="thumbs") as pool:
        for found in pool.map(of_part, parts):
            yield from found


def find_rejects(account: Account, source: Source, rejects: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, bytes]]:
    """(place in `rejects`, bytes) of those whose bytes can be reached; several at once."""
    assert account.plan is not None
    parts = account.plan.parts

    def of_one(i: int) -> list[tuple[int, bytes]]:
        return [(i, image) for _, image in _noted(account, _rejected(source, parts[rejects[i]["part"]], rejects[i]))]

    may_have_bytes = [i for i, reject in enumerate(rejects) if reject["reason"] not in ("empty", "shard_damaged")]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="thumbs") as pool:
        for found in pool.map(of_one, may_have_bytes):
            yield from found


def _in_part(source: Source, part: Part, wanted: set[Place], budget_bytes: int) -> Iterator[tuple[Place, bytes]]:
    left = set(wanted)
    for narrowed in _narrowed(source, part, left, budget_bytes):
        with closing(_rows(source, narrowed)) as rows:
            for row in rows:
                budget_bytes -= len(row.image)
                if (row.shard, row.key) in left:
                    left.discard((row.shard, row.key))
                    yield (row.shard, row.key), bytes(row.image)
                if budget_bytes <= 0 or not left:
                    return
                if source.kind != "folder" and not any(shard == row.shard for shard, _ in left):
                    break


def _narrowed(source: Source, part: Part, wanted: set[Place], budget_bytes: int) -> Iterator[Part]:
    """What of a part to read: just the loose files that are wanted, else each shard alone, so that reading begins at
    its head and ends where nothing more is wanted."""
    if isinstance(source, Folder):
        roots = Roots(source.names)
        pieces = [p for p in part.pieces if (to_valid_text(roots.root_of(p.uri)), roots.key_of(p.uri)) in wanted]
        sums = itertools.accumulate(piece.size_bytes for piece in pieces)
        within = tuple(piece for piece, so_far in zip(pieces, sums, strict=True) if so_far <= budget_bytes)
        yield from [Part(part.index, within)] if within else []
        return
    shards = {shard for shard, _ in wanted}
    yield from (Part(part.index, (piece,)) for piece in part.pieces if piece.uri in shards)


def _rejected(source: Source, part: Part, reject: Mapping[str, Any]) -> Iterator[tuple[Place, bytes]]:
    """The bytes of one reject: of a plain tar at its offset, else by its key."""
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
    yield from _in_part(source, part, {place}, PART_BYTES)


def _covers(piece: Piece, offset: int) -> bool:
    return piece.start <= offset < (piece.stop if piece.stop is not None else piece.size_bytes)


def _rows(source: Source, part: Part) -> Generator[Row, None, None]:
    for item in source.read(part):
        if isinstance(item, Row):
            yield item


def _noted(account: Account, found: Iterable[tuple[Place, bytes]]) -> Iterator[tuple[Place, bytes]]:
    """Up to the first word of a store that says no, which is noted."""
    try:
        yield from found
    except (Img2ParquetError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        account.note(f"Some thumbnails are missing: {first}")
