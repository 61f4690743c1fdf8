"""Every part's footer -> _rejects.parquet, _manifest.parquet and the totals, part by part, in bounded memory.

* Footers that the driver made itself are not read back; those of other sessions are one read each, a few at a time.
* What is held is a line of the manifest for each file, and the rejects compressed as they are written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import MANIFEST, REJECTS, SUCCESS, Footer, Output, is_part_file, model_of
from pipeline.derived import are_derived
from pipeline.errors import RunMismatch, StorageError
from pipeline.generations import (
    REJECT_SCHEMA,
    History,
    RetryPlan,
    Standing,
    encode_rejects,
    of_generation,
    read_history,
    read_standing,
    supersede,
    to_table,
)
from pipeline.plan import Plan
from pipeline.storage import Entry

MANIFEST_SCHEMA = pa.schema(
    [
        ("file", pa.string()), ("model", pa.string()), ("part", pa.int32()), ("rows_in", pa.int64()),
        ("rows", pa.int64()), ("rejects", pa.int64()), ("size_bytes", pa.int64()), ("sha256", pa.binary(32)),
    ]
)  # fmt: skip
COUNTED = pa.schema([field for field in MANIFEST_SCHEMA if field.name != "size_bytes"])
FILES_AT_ONCE = 4096
METER_KEY = b"img2parquet.meter"  # in the manifest's metadata: the session that ended the job, or the last that worked
DERIVED = {REJECTS, MANIFEST, SUCCESS}


def finish(output: Output, plan: Plan, known: Mapping[str, Footer], meter: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the footers into the rejects and the manifest; the totals, which the caller judges before _SUCCESS.

    known: footers by file name, which need not be read. meter: of this session; {} is the last one that worked.
    Lists once. Raises RunMismatch, StorageError."""
    files = output.files()
    check_complete(output, read_history(output, plan, files), files, generation=0)
    counting = Counting()
    output.put_once(REJECTS, encode_rejects(counting.rejects(output.footers(plan.names_by_part(), files, known))))
    output.put_once(MANIFEST, encode_manifest(counting, files, meter or output.last_meter(files)))
    return counting.totals(len(plan.parts))


def finish_later(
    output: Output, history: History, known: Mapping[str, Footer], meter: Mapping[str, Any]
) -> dict[str, Any]:
    """The same for the last generation: what it wrote into its manifest, what stands now into its rejects; the totals
    of all generations."""
    plan, files = history.later[-1], output.files()
    generation = plan.generation
    check_complete(output, history, files, generation)
    counting = Counting()
    again = pa.Table.from_pylist(
        list(counting.rejects(output.footers(plan.names_by_part(), files, known))), schema=REJECT_SCHEMA
    )
    before = read_standing(output, generation - 1)
    if before is None:
        raise StorageError(f"{output.uri}: {of_generation(REJECTS, generation - 1)} is gone", hint="put it back")
    retried = plan.rejects if isinstance(plan, RetryPlan) else {}
    standing = supersede(before, to_table(retried), again)
    output.put_once(of_generation(REJECTS, generation), encode_rejects(standing))
    manifest = encode_manifest(counting, files, meter or output.last_meter(files))
    output.put_once(of_generation(MANIFEST, generation), manifest)
    return totals(history, read_manifests(output, history), standing)


def stored_totals(output: Output, history: History, files: Mapping[str, Entry]) -> dict[str, Any] | None:
    """What the last _SUCCESS says of an output that is complete with all that is derived from it; None where it is not.

    files: everything in the output. Raises RunMismatch for files of another run."""
    ended = history.ended(files)
    if ended is None or not files.keys() >= {of_generation(name, ended) for name in DERIVED}:
        return None
    check_complete(output, history, files, ended)
    return output.success(of_generation(SUCCESS, ended))


@dataclass
class Counting:
    """Footers go by, part after part with all models of each; what is kept of them is counts, as Arrow columns."""

    pending: list[tuple[Any, ...]] = field(default_factory=list)  # rows of COUNTED
    batches: list[pa.RecordBatch] = field(default_factory=list)
    written: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0

    def rejects(self, footers: Iterable[tuple[str, Footer]]) -> Iterator[dict[str, Any]]:
        """The reject rows of all files that stand: of a part and a model, come the oldest generation first. Counts
        while it is consumed."""
        for index, of_part in groupby(footers, key=lambda item: item[1].part_index):
            seen, first = dict[int, str](), None
            for model, of_model in groupby(of_part, key=lambda item: model_of(item[0])):
                standing = Standing()
                for name, footer in of_model:
                    if footer.generation == 0 and footer.rows_in != (first := first or footer).rows_in:
                        raise StorageError(f"part {index}: its models do not agree on how many rows came in")
                    standing.add(footer)
                    self._count(name, model, footer)
                for row in sorted(standing.rejects):
                    seen.setdefault(row, standing.rejects[row]["reason"])  # rejected by several models, it counts once
                    yield {"model": model, "part": index, **standing.rejects[row]}
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
        """A row of COUNTED for each file that has gone by."""
        self._pack()
        return pa.Table.from_batches(self.batches)

    def totals(self, parts: int) -> dict[str, Any]:
        return {
            "parts": parts,
            "rows_in": self.rows_in,
            "rows_written": dict(sorted(self.written.items())),
            "rejected": by_count(self.reasons),
        }


def totals(history: History, manifests: Sequence[pa.Table], standing: pa.Table) -> dict[str, Any]:
    """Of the union, from what was derived of each generation: its manifest, oldest first, and the last's rejects."""
    plans = (history.first, *history.later)
    of_new = [table for table, plan in zip(manifests, plans, strict=True) if not isinstance(plan, RetryPlan)]
    counted = pa.concat_tables([table.select(["part", "rows_in"]) for table in of_new])
    first = counted.group_by("part").aggregate([("rows_in", "max")])
    written: Counter[str] = Counter()
    for manifest in manifests:
        for row in manifest.group_by("model").aggregate([("rows", "sum")]).to_pylist():
            written[row["model"]] += row["rows_sum"]
    images = standing.group_by(["part", "row"], use_threads=False).aggregate([("reason", "first")])
    reasons = Counter(images.column("reason_first").to_pylist())
    return {
        "parts": first.num_rows,
        "rows_in": sum(first.column("rows_in_max").to_pylist()),
        "rows_written": dict(sorted(written.items())),
        "rejected": by_count(reasons),
    }


def by_count(reasons: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def read_manifests(output: Output, history: History) -> list[pa.Table]:
    """Of every generation. Raises StorageError."""
    uris = [f"{output.uri}/{of_generation(MANIFEST, g)}" for g in range(history.generation + 1)]
    return [pq.read_table(pa.BufferReader(output.store.read(uri))) for uri in uris]


def encode_manifest(counting: Counting, files: Mapping[str, Entry], meter: Mapping[str, Any]) -> bytes:
    """One row for each file, sorted by name."""
    table = counting.table().sort_by("file").combine_chunks()
    sizes = pa.array((files[name.as_py()].size_bytes for name in table.column("file")), pa.int64())
    schema = MANIFEST_SCHEMA.with_metadata({METER_KEY: json.dumps(meter, sort_keys=True)})
    columns = [sizes if name == "size_bytes" else table.column(name) for name in schema.names]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def check_complete(output: Output, history: History, files: Mapping[str, Entry], generation: int) -> None:
    """Every file that was planned up to this generation is there, and none that no generation has planned. Raises
    RunMismatch, StorageError."""
    gone = [name for name in history.upto(generation).names_by_part() if name not in files]
    theirs = are_derived(files)
    foreign = [name for name in files if is_part_file(name) and name not in history and name not in theirs]
    if foreign:
        raise RunMismatch(
            f"{output.uri} holds files of another run: {', '.join(sorted(foreign)[:3])} ({len(foreign)} in all)",
            hint="move them away, or use another output.uri",
        )
    if gone:
        raise StorageError(
            f"{output.uri}: {len(gone)} committed files are gone, {min(gone)} for one",
            hint="somebody deletes in this folder; run the same command again",
        )
