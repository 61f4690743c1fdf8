"""Sample rows from a few parts by seed: the same rows for the same output, and as many for 1e3 rows as for 1e8.

* At most PARTS_AT_MOST files are opened and one row group of each is read, BYTES_AT_MOST in all.
* Where images are reached only by reading a shard from its start, a part's rows are the first ones of a shard, so that
  thumbnails cost little more than their own bytes. Loose files and small parts are sampled at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import model_of
from img2parquet.dataset.listing import parse_name
from img2parquet.results.report.accuracy import truths_named
from img2parquet.results.report.run_summary import UNREADABLE, RunSummary
from img2parquet.schema import Part

SEED = 6
PARTS, PARTS_AT_MOST = 24, 64  # files to open; the most, where parts hold fewer rows than their share
BYTES_AT_MOST = 512 << 20  # compressed, of all row groups together
COLUMN_BYTES = 96 << 20  # a wider column of one row group is left out
SMALL_PART_BYTES = 16 << 20  # of input: small enough to read whole for thumbnails


@dataclass(frozen=True)
class SampleColumns:
    """Which columns hold what, according to the run's identity or, without one, to their types."""

    labels: str | None = None
    embedding: str | None = None
    logits: str | None = None
    mask: str | None = None
    histogram: str | None = None
    tokens: str | None = None  # codes of masked patches
    truths: tuple[str, ...] = ()  # columns that the job itself names as ground truth
    passthrough: tuple[str, ...] = ()

    @property
    def wanted(self) -> list[str]:
        logits = None if self.labels else self.logits
        used = (self.labels, self.embedding, logits, self.mask, self.histogram, self.tokens, *self.truths)
        return [name for name in used if name]


@dataclass(frozen=True)
class RowSample:
    """Sampled rows of one model. `parts` is each row's part, -1 where files have no parts."""

    model: str
    table: pa.Table
    parts: npt.NDArray[np.int64]
    columns: SampleColumns
    files_read: int
    files: int
    notes: tuple[str, ...] = field(default=())

    def texts(self, name: str) -> list[str]:
        return [str(value) for value in self.table[name].to_pylist()] if name in self.table.column_names else []


def read_samples(summary: RunSummary, rows: int, truth: str | None) -> list[RowSample]:
    """Sample rows of each model, the same ones where possible. Unreadable files become notes."""
    samples = []
    for model in summary.models:
        names = summary.names_of(model)
        if names:
            samples.append(_sample(summary, model, names, rows, truth))
    return [sample for sample in samples if sample is not None]


def _sample(summary: RunSummary, model: str, names: Sequence[str], rows: int, truth: str | None) -> RowSample | None:
    order = np.random.default_rng(SEED).permutation(len(names))[:PARTS_AT_MOST]
    share = -(-rows // min(PARTS, len(names)))
    tables: list[pa.Table] = []
    parts: list[int] = []
    columns: SampleColumns | None = None
    left, budget, opened = rows, BYTES_AT_MOST, 0
    for name in (names[i] for i in order):
        if left <= 0 or budget <= 0:
            break
        try:
            read = _read(summary, name, columns, min(share, left), truth)
        except UNREADABLE as error:
            summary.note(f"{name} cannot be read: {(str(error).splitlines() or ['?'])[0]}")
            continue
        opened += 1
        if read is None:
            continue
        table, spent, found = read
        if tables and table.schema != tables[0].schema:
            continue  # a foreign folder may hold anything
        columns = found
        tables.append(table)
        parsed = parse_name(name)
        parts += [parsed[1] if parsed else -1] * table.num_rows
        left, budget = left - table.num_rows, budget - spent
    if not tables or columns is None:
        return None
    table = pa.concat_tables(tables)
    return RowSample(model, table, np.asarray(parts, np.int64), columns, opened, len(names))


def _read(
    summary: RunSummary, name: str, columns: SampleColumns | None, rows: int, truth: str | None
) -> tuple[pa.Table, int, SampleColumns] | None:
    """Read chosen rows of one row group. Returns them, the compressed bytes that were read, and the columns' roles."""
    entry = summary.files[name]
    with summary.output.store.open(entry.uri, expect=entry) as raw:
        file = pq.ParquetFile(raw)
        if not file.metadata.num_rows:
            return None
        columns = columns or identify_columns(summary, model_of(name), file.schema_arrow)
        rng = np.random.default_rng([SEED, *name.encode()[-40:]])
        group, chosen = _choose(summary, name, file, rows, rng)
        metadata = file.metadata.row_group(group)
        sizes = _column_bytes(metadata)
        every = [*columns.wanted, *columns.passthrough, *([truth] if truth else [])]
        base = ["key", "shard", "width", "height", "warnings"]
        wanted = [n for n in dict.fromkeys(base + every) if n in file.schema_arrow.names]
        wanted = [n for n in wanted if sizes.get(n, 0) <= COLUMN_BYTES]
        table = file.read_row_group(group, columns=wanted).take(pa.array(chosen))
        return table.replace_schema_metadata(None), sum(sizes.get(n, 0) for n in wanted), columns


def _column_bytes(group: pq.RowGroupMetaData) -> dict[str, int]:
    """Measure each top-level column in bytes: the larger of its compressed and plain size."""
    sizes: dict[str, int] = {}
    for i in range(group.num_columns):
        column = group.column(i)
        top = column.path_in_schema.split(".")[0]
        sizes[top] = sizes.get(top, 0) + max(column.total_compressed_size, column.total_uncompressed_size)
    return sizes


def _choose(
    summary: RunSummary, name: str, file: pq.ParquetFile, rows: int, rng: np.random.Generator
) -> tuple[int, npt.NDArray[np.int64]]:
    """Choose a row group and rows in it: consecutive ones from the start of a shard, or random ones."""
    group = int(rng.integers(file.num_row_groups))
    count = file.metadata.row_group(group).num_rows
    if "shard" not in file.schema_arrow.names or not _reads_on(summary, name):
        return group, np.sort(rng.choice(count, min(rows, count), replace=False))
    heads = _heads(file, group)
    if not len(heads):  # one long shard: its head is in the first group
        group, heads = 0, np.zeros(1, np.int64)
    count = file.metadata.row_group(group).num_rows
    start = int(min(rng.choice(heads), max(heads[0], count - rows)))
    start = int(heads[heads <= start].max())
    return group, np.arange(start, min(start + rows, count))


def _heads(file: pq.ParquetFile, group: int) -> npt.NDArray[np.int64]:
    """Find the rows of a row group where another shard begins."""
    shards = np.asarray(file.read_row_group(group, columns=["shard"])["shard"].to_pylist(), object)
    heads = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    return np.concatenate([[0], heads]) if group == 0 else heads


def _reads_on(summary: RunSummary, name: str) -> bool:
    """Whether images are reached only by reading the shard up to them, and the part is too large to read whole."""
    parsed, kind = parse_name(name), input_kind(summary)
    if summary.plan is None or parsed is None or kind in ("", "folder"):
        return False
    part: Part = summary.plan.parts[parsed[1]]
    return part.size_bytes > SMALL_PART_BYTES


def input_kind(summary: RunSummary) -> str:
    return str(summary.record.get("job", {}).get("input", {}).get("kind", ""))


def identify_columns(summary: RunSummary, model: str, schema: pa.Schema) -> SampleColumns:
    """Identify a model's columns by the outputs in its identity, or else by their types."""
    found = dict(_by_identity(summary, model)) or dict(_by_type(schema))
    found = {kind: name for kind, name in found.items() if name in schema.names}
    histogram = f"{found['mask']}_histogram" if "mask" in found else ""
    taken = {*found.values(), histogram, "key", "shard", "width", "height", "warnings", "model"}
    simple = (f.name for f in schema if f.name not in taken and _is_simple(f.type))
    identity = summary.identities.get(model, {})
    return SampleColumns(
        **found,
        histogram=histogram if histogram in schema.names else None,
        truths=tuple(name for name in dict.fromkeys(truths_named(identity)) if name in schema.names),
        passthrough=tuple(simple)[:16],
    )


def _by_identity(summary: RunSummary, model: str) -> Iterator[tuple[str, str]]:
    identity = summary.identities.get(model, {})
    outputs = identity.get("outputs", []) if isinstance(identity, dict) else []
    for output in reversed([o for o in outputs if isinstance(o, dict)]):  # the first of a kind counts
        kind = {"segmentation": "mask", "visual_tokens": "tokens"}.get(str(output.get("kind")), str(output.get("kind")))
        if kind in ("labels", "embedding", "logits", "mask", "tokens"):
            yield kind, str(output.get("name", ""))


def _by_type(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    for field_ in reversed(list(schema)):
        kind = field_.type
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
            names = {kind.value_type.field(i).name for i in range(kind.value_type.num_fields)}
            if names >= {"name", "score"}:
                yield "labels", field_.name
        elif pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type) and kind.list_size > 1:
            yield "embedding", field_.name


def _is_simple(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))
