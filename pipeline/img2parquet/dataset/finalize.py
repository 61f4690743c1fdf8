"""Finalize a generation: gather its footers into `_rejects`, `_manifest` and the totals, and write `_SUCCESS`.

* A job is generation 0; retries, extensions and derived partitions end in the same way.
* Footers of files that this driver committed are not read back; each of the others is one read, a few at a time.
* Memory is bounded: one manifest row for each file, and the rejects as they are compressed for writing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import MANIFEST, PLAN, REJECTS, REMOVED_HINT, SUCCESS, Output, model_of
from img2parquet.dataset.derived import unplanned_files
from img2parquet.dataset.footer import Footer
from img2parquet.dataset.generations import History, RetryPlan, of_generation, read_open_rejects
from img2parquet.dataset.rejects import REJECT_SCHEMA, OpenRejects, encode_rejects, iter_rows, supersede, to_table
from img2parquet.dataset.sealed_json import seal
from img2parquet.errors import RunMismatch, StorageError
from img2parquet.storage import Entry

MANIFEST_SCHEMA = pa.schema(
    [
        ("file", pa.string()), ("model", pa.string()), ("part", pa.int32()), ("rows_in", pa.int64()),
        ("rows", pa.int64()), ("rejects", pa.int64()), ("size_bytes", pa.int64()), ("sha256", pa.binary(32)),
    ]
)  # fmt: skip
COUNTED = pa.schema([field for field in MANIFEST_SCHEMA if field.name != "size_bytes"])
FILES_AT_ONCE = 4096
METER_KEY = b"img2parquet.meter"  # in the manifest's metadata: of the session that finalized, or the last that worked
WRITTEN_AT_END = {REJECTS, MANIFEST, SUCCESS}


def finalize(
    output: Output,
    history: History,
    generation: int,
    files: Mapping[str, Entry],
    *,
    known: Mapping[str, Footer] | None = None,
    meter: Mapping[str, Any] | None = None,
    records: Output | None = None,
) -> dict[str, Any]:
    """Write the rejects and the manifest of one generation; return the totals of the output up to it.

    The caller judges these totals, and then calls `mark_complete`. Every step may be repeated: nothing is overwritten.

    history: every generation that was started. files: everything in the output, listed after the last commit. known:
    footers by file name that need not be read. meter: for the manifest. records: the folder of a derived partition's
    records; those of the output itself are in the output.

    Raises RunMismatch when the output holds files of another run, StorageError when files are missing."""
    records, upto = records or output, history.upto(generation)
    check_complete(output, records, history, files, generation)
    plan, counted = upto.plans[-1], FooterTotals()
    rejects = counted.rejects(output.footers(plan.names_by_part(), files, known))
    if generation:
        again = pa.Table.from_pylist(list(rejects), schema=REJECT_SCHEMA)
        retried = to_table(plan.rejects if isinstance(plan, RetryPlan) else {})
        rejects = iter_rows(supersede(_open_rejects(records, generation - 1), retried, again))
    records.put_once(of_generation(REJECTS, generation), encode_rejects(rejects))
    records.put_once(of_generation(MANIFEST, generation), encode_manifest(counted, files, meter or {}))
    return union_totals(records, upto) if generation else counted.totals(len(plan.parts))


def mark_complete(records: Output, history: History, totals: Mapping[str, Any]) -> None:
    """Write `_SUCCESS` of the last generation of `history`, with a digest of every record. The manifests hold those of
    the part files.

    Raises StorageError when a record is gone."""
    names = history.records()
    digests = records.digests(names)
    if gone := [name for name in names if name not in digests and not name.startswith(SUCCESS)]:
        can_be_written = not any(name.startswith("_plan") for name in gone)
        raise StorageError(
            f"{records.uri}: {', '.join(gone)} was removed while the job ended",
            hint="run the same command again" if can_be_written else REMOVED_HINT,
        )
    records.put_once(of_generation(SUCCESS, history.generation), seal({**totals, "files": digests}))


def stored_totals(
    output: Output, history: History, files: Mapping[str, Entry], generation: int = 0
) -> dict[str, Any] | None:
    """Return what the last _SUCCESS says; None where `generation` has not ended, or a record of the last is missing.

    files: everything in the output. Raises RunMismatch when the output holds files of another run, StorageError when
    files are missing."""
    ended = history.ended(files)
    if ended is None or ended < generation:
        return None
    if not files.keys() >= {of_generation(name, ended) for name in WRITTEN_AT_END}:
        return None
    check_complete(output, output, history, files, ended)
    return output.success(of_generation(SUCCESS, ended))


def check_complete(
    output: Output, records: Output, history: History, files: Mapping[str, Entry], generation: int
) -> None:
    """Check that every file planned up to a generation is there, and none that no generation has planned.

    records: the folder of the plans. Raises StorageError for a missing file, RunMismatch for a foreign one."""
    if foreign := unplanned_files(records, history, files):
        raise RunMismatch(
            f"{output.uri} holds files of another run: {', '.join(foreign[:3])} ({len(foreign)} in all)",
            hint="move them away, or use another output.uri",
        )
    if missing := [name for name in history.upto(generation).names_by_part() if name not in files]:
        raise StorageError(
            f"{output.uri}: {len(missing)} committed files are gone, {min(missing)} for one",
            hint=_how_to_replace(missing, output, history, files),
        )


def _how_to_replace(missing: Collection[str], output: Output, history: History, files: Container[str]) -> str:
    """Say how files that were deleted can be made again, which depends on whether their generation has ended."""
    if PLAN not in files:
        return REMOVED_HINT
    ended = {name for plan in history.later if of_generation(SUCCESS, plan.generation) in files
             for name in plan.names_by_part()}  # fmt: skip
    if ended.isdisjoint(missing):
        return "something deletes files in this folder; run the command again that made them"
    return (
        "restore them, or use another output.uri: a retry or an extension that has ended is not done again; "
        f"`img2parquet verify {output.uri}` lists them"
    )


def union_totals(records: Output, history: History) -> dict[str, Any]:
    """Compute the totals of all generations, from their manifests and the rejects that are open after the last.

    Raises StorageError when a record is missing."""
    uris = [f"{records.uri}/{of_generation(MANIFEST, plan.generation)}" for plan in history.plans]
    manifests = [pq.read_table(pa.BufferReader(records.store.read(uri))) for uri in uris]
    added = [table for table, plan in zip(manifests, history.plans, strict=True) if not isinstance(plan, RetryPlan)]
    counted = pa.concat_tables([table.select(["part", "rows_in"]) for table in added])
    of_parts = counted.group_by("part").aggregate([("rows_in", "max")])
    written: Counter[str] = Counter()
    for manifest in manifests:
        for row in manifest.group_by("model").aggregate([("rows", "sum")]).to_pylist():
            written[row["model"]] += row["rows_sum"]
    rejects = _open_rejects(records, history.generation)
    images = rejects.group_by(["part", "row"], use_threads=False).aggregate([("reason", "first")])
    return {
        "parts": of_parts.num_rows,
        "rows_in": sum(of_parts.column("rows_in_max").to_pylist()),
        "rows_written": dict(sorted(written.items())),
        "rejected": _most_frequent_first(Counter(images.column("reason_first").to_pylist())),
    }


@dataclass
class FooterTotals:
    """Count files, rows and rejects over footers, which come by part, then by model; only counts are kept."""

    pending: list[tuple[Any, ...]] = field(default_factory=list)  # rows of COUNTED
    batches: list[pa.RecordBatch] = field(default_factory=list)
    written: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0

    @classmethod
    def of(cls, footers: Iterable[tuple[str, Footer]]) -> FooterTotals:
        """Count footers without looking at the rejects one by one."""
        counted = cls()
        for _ in counted.rejects(footers):
            pass
        return counted

    def rejects(self, footers: Iterable[tuple[str, Footer]]) -> Iterator[dict[str, Any]]:
        """Yield the open rejects of all files, as rows of REJECT_SCHEMA. Counts while it is consumed.

        footers: (file name, footer) by part, then by model, then by generation."""
        for index, of_part in groupby(footers, key=lambda item: item[1].part_index):
            seen, first = dict[int, str](), None
            for model, of_model in groupby(of_part, key=lambda item: model_of(item[0])):
                open_rejects = OpenRejects()
                for name, footer in of_model:
                    if footer.generation == 0 and footer.rows_in != (first := first or footer).rows_in:
                        raise StorageError(f"part {index}: its models do not agree on how many rows came in")
                    open_rejects.add(footer)
                    self._count(name, model, footer)
                for row, reject in sorted(open_rejects.rejects.items()):
                    seen.setdefault(row, reject["reason"])  # an image that several models rejected counts once
                    yield {"model": model, "part": index, **reject}
            self.rows_in += first.rows_in if first else 0
            self.reasons.update(seen.values())

    def _count(self, name: str, model: str, footer: Footer) -> None:
        rejects = footer.rows_in - footer.rows
        self.pending.append(
            (name, model, footer.part_index, footer.rows_in, footer.rows, rejects, footer.digest or None)
        )
        if len(self.pending) >= FILES_AT_ONCE:
            self._pack()
        self.written[model] += footer.rows

    def _pack(self) -> None:
        columns = list(zip(*self.pending, strict=True)) or [()] * len(COUNTED)
        self.batches.append(
            pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, COUNTED, strict=True)], COUNTED)
        )
        self.pending.clear()

    def table(self) -> pa.Table:
        """Return one row of COUNTED for each file."""
        self._pack()
        return pa.Table.from_batches(self.batches)

    def totals(self, parts: int) -> dict[str, Any]:
        return {
            "parts": parts,
            "rows_in": self.rows_in,
            "rows_written": dict(sorted(self.written.items())),
            "rejected": _most_frequent_first(self.reasons),
        }


def encode_manifest(counted: FooterTotals, files: Mapping[str, Entry], meter: Mapping[str, Any]) -> bytes:
    """Encode one row for each file, sorted by name."""
    table = counted.table().sort_by("file").combine_chunks()
    sizes = pa.array((files[name.as_py()].size_bytes for name in table.column("file")), pa.int64())
    schema = MANIFEST_SCHEMA.with_metadata({METER_KEY: json.dumps(meter, sort_keys=True)})
    columns = [sizes if name == "size_bytes" else table.column(name) for name in schema.names]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def _open_rejects(records: Output, generation: int) -> pa.Table:
    table = read_open_rejects(records, generation)
    if table is None:
        raise StorageError(f"{records.uri}: {of_generation(REJECTS, generation)} is gone", hint="put it back")
    return table


def _most_frequent_first(reasons: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
