"""Read a CSV of keys and labels, check it, and look up the vectors and class ids of its rows.

A column `label` has one class for each row; `labels` has any number of them, separated by `|` or as a JSON list.

Shapes: N labelled rows, D values of a vector, K classes.
"""

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

from img2parquet.errors import InputError, NotFound, nearest
from img2parquet.outputs.ground_truth import parsed
from img2parquet.results.embeddings import Floats, Vectors
from img2parquet.results.reader import read_rejects
from img2parquet.storage import Store

LEAST_PER_CLASS = 3  # fit on two and test on the third
SEVERAL = "labels"
COLUMNS = ("key", "label", "shard")
SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    line: int
    key: str
    labels: tuple[str, ...]  # one, or any number where the file has several for each row
    shard: str | None


@dataclass(frozen=True)
class LabelFile:
    """The rows of a label file, checked against each other."""

    uri: str
    rows: tuple[Labelled, ...]
    has_several: bool = False

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names by id: sorted as numbers where all are whole numbers, else as text."""
        names = {name for row in self.rows for name in row.labels}
        return tuple(sorted(names, key=(lambda name: (int(name), name)) if all(map(_is_number, names)) else None))

    @property
    def sha256(self) -> str:
        """Digest of the labels, independent of the order of the lines."""
        values: list[list[Any]] = sorted([row.key, *row.labels, row.shard or ""] for row in self.rows)
        if self.has_several:
            values = sorted([row.key, sorted(row.labels), row.shard or ""] for row in self.rows)
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_labels(uri: str) -> LabelFile:
    """Read a CSV with the columns key, label or labels, and optionally shard.

    Raises InputError, with the line, for a missing column, an empty key or label, a repeated key, a single class, or
    fewer than LEAST_PER_CLASS rows of a class."""
    try:
        text = Store().read(uri).decode("utf-8-sig")
    except NotFound:
        hint = "a CSV with the columns key,label[,shard], or key,labels[,shard] for several labels of a row"
        raise InputError(f"{uri}: no such file", hint=hint) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: not UTF-8: {error.reason} at byte {error.start}") from None
    at = _header(uri, text)
    labels = LabelFile(uri, tuple(_parse(uri, text, at)), SEVERAL in at)
    _refuse_twice(labels)
    _refuse_few(labels)
    return labels


def gather(vectors: Vectors, labels: LabelFile) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Look up the labelled rows, in the order of the output's rows: (N, D) unit vectors and (N,) class ids, or (N, K)
    of 0 and 1 where a row has several labels.

    Raises InputError for keys that have no row, or have rows in several shards where the file names none."""
    wanted: dict[str, list[Labelled]] = {}
    for row in labels.rows:
        wanted.setdefault(row.key, []).append(row)
    ids = {name: id for id, name in enumerate(labels.classes)}
    keys, units, classes, used = pa.array(list(wanted), pa.string()), list[Floats](), list[Any](), dict[int, str]()
    for block in vectors.blocks(columns=["key", "shard"]):
        inside = pc.is_in(block.columns.column("key"), value_set=keys).to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(inside).tolist():
            key, shard = (block.columns.column(name)[i].as_py() for name in ("key", "shard"))
            for row in wanted[key]:
                if row.shard in (None, shard):
                    _refuse_several(labels, row, used, shard)
                    units.append(block.unit_BD[i])
                    own = [ids[name] for name in row.labels]
                    classes.append(np.isin(np.arange(len(ids)), own) if labels.has_several else own[0])
    missing = [row for row in labels.rows if row.line not in used]
    if missing:
        raise _unknown(vectors, labels, missing)
    return np.stack(units), np.array(classes, np.int64)


def _header(uri: str, text: str) -> dict[str, int]:
    """Return the place of each column in a line: `key`, `label` or `labels`, and `shard` if there is one."""
    header = [name.strip() for name in next(csv.reader(io.StringIO(text, newline="")), [])]
    wanted = ("key", SEVERAL, "shard") if SEVERAL in header and "label" not in header else COLUMNS
    for name in wanted[:2]:
        if name not in header:
            hint = nearest(name, header) and f"rename `{nearest(name, header).split('`')[1]}`"
            raise InputError(f"{uri}: no column `{name}` in its first line", known=header, hint=hint)
    return {name: header.index(name) for name in wanted if name in header}


def _parse(uri: str, text: str, at: Mapping[str, int]) -> Iterator[Labelled]:
    lines = csv.reader(io.StringIO(text, newline=""))
    try:
        next(lines)
        for values in lines:
            if values:
                yield _row(uri, lines.line_num, values, at)
    except csv.Error as error:
        raise InputError(f"{uri}: line {lines.line_num}: {error}") from None


def _row(uri: str, line: int, values: Sequence[str], at: Mapping[str, int]) -> Labelled:
    if len(values) <= max(at.values()):
        raise InputError(f"{uri}: line {line} has only {len(values)} fields", hint="quote a field that contains commas")
    key, shard = values[at["key"]], (values[at["shard"]] if "shard" in at else "") or None
    label = "" if SEVERAL in at else values[at["label"]].strip()
    if not key or not (label or SEVERAL in at):
        raise InputError(f"{uri}: line {line}: its {'label' if key else 'key'} is empty")
    return Labelled(line, key, _several(values[at[SEVERAL]]) if SEVERAL in at else (label,), shard)


def _several(text: str) -> tuple[str, ...]:
    """Split the labels of a row: `cat|outdoor`, or `["cat", "outdoor"]`; none where it is empty."""
    listed = parsed(text.strip())
    names = [str(one).strip() for one in listed] if isinstance(listed, list) else [x.strip() for x in text.split("|")]
    return tuple(dict.fromkeys(name for name in names if name))


def _refuse_twice(labels: LabelFile) -> None:
    seen: dict[tuple[str, str | None], Labelled] = {}
    for row in labels.rows:
        first = seen.setdefault((row.key, row.shard), row)
        if first is not row:
            said, now = ("|".join(one.labels) for one in (first, row))
            labels_differ = "" if said == now else f", as `{said}` and as `{now}`"
            raise InputError(
                f"{labels.uri}: line {row.line}: the key `{row.key}` is already in line {first.line}{labels_differ}",
                hint="give one line for each key; if several shards have it, add a column `shard`; for several labels "
                "of a row, name the column `labels` and separate them by `|`",
            )


def _refuse_few(labels: LabelFile) -> None:
    counts = Counter(name for row in labels.rows for name in row.labels)
    if not counts:
        raise InputError(f"{labels.uri}: the file has no labels")
    if len(counts) == 1 and all(row.labels for row in labels.rows):
        raise InputError(
            f"{labels.uri}: all rows have the label `{next(iter(counts))}`; a probe needs at least two classes"
        )
    few = [f"`{name}` {counts[name]}" for name in labels.classes if counts[name] < LEAST_PER_CLASS]
    if few:
        raise InputError(
            f"{labels.uri}: too few rows of {len(few)} of {len(counts)} classes: {', '.join(few[:SHOWN])}",
            hint=f"give at least {LEAST_PER_CLASS} of each; 10 or more measure the quality better",
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
    rejects = read_rejects(vectors.output.uri, storage_options=vectors.output.store.options)
    rejected = {row["key"]: row["reason"] for row in rejects.to_pylist() if row["key"] in keys}
    shown = [
        f"line {row.line} `{row.key}`" + (f" (rejected: {rejected[row.key]})" if row.key in rejected else "")
        for row in missing[:SHOWN]
    ]
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    left = vectors.parts_left
    hint = f"{left} parts are not committed yet" if left else "use values of the column `key`, or remove these lines"
    return InputError(
        f"{labels.uri}: {len(missing)} of {len(labels.rows)} keys have no row of model `{vectors.model}`: "
        f"{', '.join(shown)}{more}",
        hint=hint,
    )


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdigit() and name.isascii()
