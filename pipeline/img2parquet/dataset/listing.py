"""Hold the files of an output, by name, in little memory: 1e5 parts take some megabytes and not some 60.

A part file's name follows from its model, index and id, so only these are kept; the few other names are kept whole.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from img2parquet.storage import Entry

PART_NAME = re.compile(
    r"model=(?P<model>[^/]+)/part-(?P<index>\d{6,})-(?P<id>[0-9a-f]{16})(-retry(?P<retry>[1-9]\d*))?\.parquet"
)
LARGEST = 1 << 31


class Listing(Mapping[str, Entry]):
    """Entries by name relative to a folder; sorted by name, part files after the others."""

    def __init__(self, folder: str, entries: Iterable[Entry]) -> None:
        self.folder, self.others = folder, dict[str, Entry]()
        self.models: list[str] = []
        ids, indices, models, retries, sizes = array("Q"), array("l"), array("l"), array("l"), array("q")
        etags = list[bytes]()
        for entry in entries:
            name = entry.uri[len(folder) + 1 :]
            parsed = _parsed(name)
            if parsed is None or entry.uri != self._uri(name):
                self.others[name] = entry
                continue
            model, index, id, retry = parsed
            if model not in self.models:
                self.models.append(model)
            for column, value in zip(
                (ids, indices, models, retries, sizes),
                (id, index, self.models.index(model), retry, entry.size_bytes),
                strict=True,
            ):
                column.append(value)
            etags.append(entry.etag.encode())
        self.others = dict(sorted(self.others.items()))
        self.order = array("l", sorted(range(len(ids)), key=ids.__getitem__))  # places, by id
        self.ids = array("Q", (ids[place] for place in self.order))
        self.columns = (ids, indices, models, retries, sizes)
        self.etags = b"".join(etags)
        self.ends = array("q", _running(map(len, etags)))

    def __getitem__(self, name: str) -> Entry:
        if name in self.others:
            return self.others[name]
        place = self._place(name)
        if place is None:
            raise KeyError(name)
        etag = self.etags[self.ends[place - 1] if place else 0 : self.ends[place]]
        return Entry(self._uri(name), self.columns[4][place], etag.decode())

    def __contains__(self, name: object) -> bool:
        return name in self.others or (isinstance(name, str) and self._place(name) is not None)

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        ids, indices, models, retries, _ = self.columns
        yield from map(
            self._name,
            sorted(range(len(ids)), key=lambda n: (self.models[models[n]], indices[n], ids[n], retries[n])),
        )

    def __len__(self) -> int:
        return len(self.others) + len(self.ids)

    def _place(self, name: str) -> int | None:
        parsed = _parsed(name)
        if parsed is None or parsed[0] not in self.models:
            return None
        model, (_, indices, models, retries, _) = self.models.index(parsed[0]), self.columns
        at = bisect_left(self.ids, parsed[2])
        while at < len(self.ids) and self.ids[at] == parsed[2]:
            place = self.order[at]
            if (models[place], indices[place], retries[place]) == (model, parsed[1], parsed[3]):
                return place
            at += 1
        return None

    def _name(self, place: int) -> str:
        ids, indices, models, retries, _ = (column[place] for column in self.columns)
        retry = f"-retry{retries}" if retries else ""
        return f"model={self.models[models]}/part-{indices:06d}-{ids:016x}{retry}.parquet"

    def _uri(self, name: str) -> str:
        return f"{self.folder}/{name}"


def parse_name(name: str) -> tuple[str, int, str] | None:
    """Split `model=a/part-000003-<id>.parquet` into (model, index, id); None for any other name."""
    match = PART_NAME.fullmatch(name)
    return (match["model"], int(match["index"]), match["id"]) if match else None


def _parsed(name: str) -> tuple[str, int, int, int] | None:
    """Split a name into model, index, id and retry; None for a name that cannot be put together from these again."""
    match = PART_NAME.fullmatch(name)
    if match is None:
        return None
    index, retry = int(match["index"]), int(match["retry"] or 0)
    is_plain = index < LARGEST and retry < LARGEST and match["index"] == f"{index:06d}"
    return (match["model"], index, int(match["id"], 16), retry) if is_plain else None


def _running(lengths: Iterable[int]) -> Iterator[int]:
    total = 0
    for length in lengths:
        total += length
        yield total
