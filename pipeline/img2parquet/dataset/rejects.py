"""Hold rejects as a table, and work out which of them are still open after retries.

An open reject is one that no retry has superseded: a retry's footer lists the rejects that its rows replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.footer import Footer
from img2parquet.schema import Reject

REJECT_SCHEMA = pa.schema(
    [
        ("model", pa.string()), ("part", pa.int32()), ("shard", pa.string()), ("key", pa.string()), ("row", pa.int64()),
        ("stage", pa.string()), ("reason", pa.string()), ("message", pa.string()), ("offset", pa.int64()),
    ]
)  # fmt: skip
ROWS_AT_ONCE = 16_384


class OpenRejects:
    """Collect the open rejects of one part and model, by row, from its footers in order of generation."""

    def __init__(self) -> None:
        self.rejects: dict[int, dict[str, Any]] = {}

    def add(self, footer: Footer) -> list[dict[str, Any]]:
        """Apply one footer; return the rejects that it supersedes although they are not open."""
        unknown = []
        for reject in footer.superseded:
            if self.rejects.pop(reject["row"], None) != reject:
                unknown.append(reject)
        self.rejects.update((reject["row"], reject) for reject in footer.rejects)
        return unknown


def supersede(before: pa.Table, retried: pa.Table, again: pa.Table) -> pa.Table:
    """Return the rejects that are open after a generation, sorted by part, model and row.

    before: those open when it began. retried: those it tried again. again: those it rejected itself."""
    keys = ["part", "model", "row"]
    kept = before.join(retried.select(keys), keys, join_type="left anti").select(REJECT_SCHEMA.names)
    return pa.concat_tables([kept, again.cast(REJECT_SCHEMA)]).sort_by([(key, "ascending") for key in keys])


def by_part_and_model(table: pa.Table) -> dict[int, dict[str, tuple[Reject, ...]]]:
    """Group the rows of a reject table, keeping their order."""
    found: dict[int, dict[str, list[Reject]]] = {}
    for row in iter_rows(table):
        part, model = row.pop("part"), row.pop("model")
        found.setdefault(part, {}).setdefault(model, []).append(Reject(**row))
    return {part: {model: tuple(rows) for model, rows in of_part.items()} for part, of_part in found.items()}


def to_table(rejects: Mapping[int, Mapping[str, Iterable[Reject]]]) -> pa.Table:
    """Make a reject table of rejects grouped by part and model: the inverse of `by_part_and_model`."""
    rows = (
        {"model": model, "part": part, **reject.to_dict()}
        for part, of_part in rejects.items()
        for model, of_model in of_part.items()
        for reject in of_model
    )
    return pa.Table.from_pylist(list(rows), schema=REJECT_SCHEMA)


def encode_rejects(rows: Iterable[dict[str, Any]]) -> bytes:
    """Encode reject rows as Parquet, in bounded memory."""
    rows = iter(rows)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECT_SCHEMA, compression="zstd") as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=REJECT_SCHEMA))
    return bytes(sink.getvalue())


def iter_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    return (row for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE) for row in batch.to_pylist())
