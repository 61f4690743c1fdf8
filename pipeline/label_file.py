"""A CSV of a few keys and their labels -> the vectors of those rows and their classes; or what is wrong with it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embeddings import Floats, Vectors
from pipeline.errors import InputError, NotFound, nearest
from pipeline.results import read_rejects
from pipeline.storage import Store

LEAST_PER_CLASS = 3  # to fit on two and look at the third
COLUMNS = ("key", "label", "shard")
SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    line: int
    key: str
    label: str
    shard: str | None


@dataclass(frozen=True)
class LabelFile:
    """The rows of a label file, checked against each other."""

    uri: str
    rows: tuple[Labelled, ...]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """By id: in the order of the numbers where all are whole numbers, else of the text."""
        names = {row.label for row in self.rows}
        return tuple(sorted(names, key=(lambda name: (int(name), name)) if all(map(_is_number, names)) else None))

    @property
    def sha256(self) -> str:
        """Of what it says, whatever the order of its lines."""
        said = sorted([row.key, row.label, row.shard or ""] for row in self.rows)
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def read_labels(uri: str) -> LabelFile:
    """A CSV with the columns key, label and perhaps shard. Raises InputError with the line: a missing column, an empty
    field, a key twice, one class only, fewer than LEAST_PER_CLASS rows of a class."""
    try:
        text = Store().read(uri).decode("utf-8-sig")
    except NotFound:
        raise InputError(f"{uri}: no such file", hint="a CSV with the columns key,label[,shard]") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: not UTF-8: {error.reason} at byte {error.start}") from None
    labels = LabelFile(uri, tuple(_parse(uri, text)))
    _refuse_twice(labels)
    _refuse_few(labels)
    return labels


def gather(vectors: Vectors, labels: LabelFile) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(N, D) unit vectors and (N,) class ids, in the order of the output's rows. Raises InputError for keys that are
    not there, or in several shards where the file does not say which."""
    wanted: dict[str, list[Labelled]] = {}
    for row in labels.rows:
        wanted.setdefault(row.key, []).append(row)
    ids = {name: id for id, name in enumerate(labels.classes)}
    keys, units, classes, used = pa.array(list(wanted), pa.string()), list[Floats](), list[int](), dict[int, str]()
    for block in vectors.blocks(columns=["key", "shard"]):
        inside = pc.is_in(block.columns.column("key"), value_set=keys).to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(inside).tolist():
            key, shard = (block.columns.column(name)[i].as_py() for name in ("key", "shard"))
            for row in wanted[key]:
                if row.shard in (None, shard):
                    _refuse_several(labels, row, used, shard)
                    units.append(block.unit_BD[i])
                    classes.append(ids[row.label])
    missing = [row for row in labels.rows if row.line not in used]
    if missing:
        raise _unknown(vectors, labels, missing)
    return np.stack(units), np.array(classes, np.int64)


def _parse(uri: str, text: str) -> Iterator[Labelled]:
    lines = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(lines, [])]
        at = {name: header.index(name) for name in COLUMNS if name in header}
        for name in COLUMNS[:2]:
            if name not in at:
                hint = nearest(name, header) and f"rename `{nearest(name, header).split('`')[1]}`"
                raise InputError(f"{uri}: no column `{name}` in its first line", known=header, hint=hint)
        for values in lines:
            if values:
                yield _row(uri, lines.line_num, values, at)
    except csv.Error as error:
        raise InputError(f"{uri}: line {lines.line_num}: {error}") from None


def _row(uri: str, line: int, values: Sequence[str], at: Mapping[str, int]) -> Labelled:
    if len(values) <= max(at.values()):
        raise InputError(f"{uri}: line {line} has {len(values)} fields, too few", hint="quote a field that has commas")
    key, label = values[at["key"]], values[at["label"]].strip()
    if not key or not label:
        raise InputError(f"{uri}: line {line}: its {'label' if key else 'key'} is empty")
    return Labelled(line, key, label, (values[at["shard"]] if "shard" in at else "") or None)


def _refuse_twice(labels: LabelFile) -> None:
    seen: dict[tuple[str, str | None], Labelled] = {}
    for row in labels.rows:
        first = seen.setdefault((row.key, row.shard), row)
        if first is not row:
            said = "" if first.label == row.label else f", as `{first.label}` and as `{row.label}`"
            raise InputError(
                f"{labels.uri}: line {row.line}: the key `{row.key}` is there since line {first.line}{said}",
                hint="one line for each key; where several shards have it, add a column `shard`",
            )


def _refuse_few(labels: LabelFile) -> None:
    counts = Counter(row.label for row in labels.rows)
    if not counts:
        raise InputError(f"{labels.uri}: no labels in it")
    if len(counts) == 1:
        raise InputError(f"{labels.uri}: all rows have the label `{labels.rows[0].label}`; a probe tells classes apart")
    few = [f"`{name}` {counts[name]}" for name in labels.classes if counts[name] < LEAST_PER_CLASS]
    if few:
        raise InputError(
            f"{labels.uri}: too few rows of {len(few)} of {len(counts)} classes: {', '.join(few[:SHOWN])}",
            hint=f"give at least {LEAST_PER_CLASS} of each; 10 and more tell how good it is",
        )


def _refuse_several(labels: LabelFile, row: Labelled, used: dict[int, str], shard: str) -> None:
    if row.line in used:
        raise InputError(
            f"{labels.uri}: line {row.line}: several shards have the key `{row.key}`: {used[row.line]} and {shard}",
            hint="add a column `shard`",
        )
    used[row.line] = shard


def _unknown(vectors: Vectors, labels: LabelFile, missing: Sequence[Labelled]) -> InputError:
    keys = {row.key for row in missing}
    options: Any = vectors.output.store.options
    rejects = read_rejects(vectors.output.uri, **options)
    rejected = {row["key"]: row["reason"] for row in rejects.to_pylist() if row["key"] in keys}
    shown = [
        f"line {row.line} `{row.key}`" + (f" (rejected: {rejected[row.key]})" if row.key in rejected else "")
        for row in missing[:SHOWN]
    ]
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    left = vectors.parts_left
    hint = f"{left} parts are not committed yet" if left else "keys are those of the column `key`; take these lines out"
    return InputError(
        f"{labels.uri}: {len(missing)} of {len(labels.rows)} keys are no rows of model `{vectors.model}`: "
        f"{', '.join(shown)}{more}",
        hint=hint,
    )


def _is_number(name: str) -> bool:
    return name.lstrip("-").isdigit() and name.isascii()
