"""Every part's footer -> _rejects.parquet, _manifest.parquet and the totals, part by part, in bounded memory.

* Footers that the driver made itself are not read back; those of other sessions are one read each, a few at a time.
* What is held is a line of the manifest for each file, and the rejects compressed as they are written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import MANIFEST, REJECTS, SUCCESS, Footer, Output, is_part_file, model_of
from pipeline.errors import RunMismatch, StorageError
from pipeline.plan import Plan
from pipeline.storage import Entry

REJECT_SCHEMA = pa.schema(
    [
        ("model", pa.string()), ("part", pa.int32()), ("shard", pa.string()), ("key", pa.string()), ("row", pa.int64()),
        ("stage", pa.string()), ("reason", pa.string()), ("message", pa.string()), ("offset", pa.int64()),
    ]
)  # fmt: skip
MANIFEST_SCHEMA = pa.schema(
    [
        ("file", pa.string()), ("model", pa.string()), ("part", pa.int32()), ("rows_in", pa.int64()),
        ("rows", pa.int64()), ("rejects", pa.int64()), ("size_bytes", pa.int64()), ("sha256", pa.binary(32)),
    ]
)  # fmt: skip
METER_KEY = b"img2parquet.meter"  # in the manifest's metadata: the session that ended the job, or the last that worked
ROWS_AT_ONCE = 16_384
DERIVED = {REJECTS, MANIFEST, SUCCESS}


def finish(output: Output, plan: Plan, known: Mapping[str, Footer], meter: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the footers into the rejects and the manifest; the totals, which the caller judges before _SUCCESS.

    known: footers by file name, which need not be read. meter: of this session; {} is the last one that worked.
    Lists once. Raises RunMismatch, StorageError."""
    files = output.files()
    _check_complete(output, plan, files)
    counting = Counting()
    output.put_once(REJECTS, encode_rejects(counting.rejects(output.footers(plan.names_by_part(), files, known))))
    output.put_once(MANIFEST, encode_manifest(counting, files, meter or output.last_meter(files)))
    return counting.totals(len(plan.parts))


def stored_totals(output: Output, plan: Plan, files: Mapping[str, Entry]) -> dict[str, Any] | None:
    """What _SUCCESS says of an output that is complete with all that is derived from it; None where it is not.

    files: everything in the output. Raises RunMismatch for files of another run."""
    if not files.keys() >= DERIVED:
        return None
    _check_complete(output, plan, files)
    return output.success()


@dataclass
class Counting:
    """Footers go by, part after part with all models of each; what is kept of them is counts."""

    files: list[str] = field(default_factory=list)
    counts: list[tuple[int, int, int]] = field(default_factory=list)  # part, rows in, rows; of each file
    digests: list[bytes] = field(default_factory=list)  # of each file
    written: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0

    def rejects(self, footers: Iterable[tuple[str, Footer]]) -> Iterator[dict[str, Any]]:
        """The reject rows of all files. Counts while it is consumed."""
        part, seen = Footer("", -1, 0, 0, ""), dict[int, str]()
        for name, footer in footers:
            if footer.part_index != part.part_index:
                self._end_part(part, seen)
                part, seen = footer, {}
            elif footer.rows_in != part.rows_in:
                raise StorageError(f"part {footer.part_index}: its models do not agree on how many rows came in")
            model = model_of(name)
            self.files.append(name)
            self.counts.append((footer.part_index, footer.rows_in, footer.rows))
            self.digests.append(footer.digest)
            self.written[model] += footer.rows
            for reject in footer.rejects:
                seen.setdefault(reject["row"], reject["reason"])
                yield {"model": model, "part": footer.part_index, **reject}
        self._end_part(part, seen)

    def _end_part(self, part: Footer, seen: Mapping[int, str]) -> None:
        """An image that several models rejected counts once."""
        self.rows_in += part.rows_in
        self.reasons.update(seen.values())

    def totals(self, parts: int) -> dict[str, Any]:
        by_reason = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return {
            "parts": parts,
            "rows_in": self.rows_in,
            "rows_written": dict(sorted(self.written.items())),
            "rejected": dict(by_reason),
        }


def encode_rejects(rows: Iterator[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECT_SCHEMA, compression="zstd") as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=REJECT_SCHEMA))
    return bytes(sink.getvalue())


def encode_manifest(counting: Counting, files: Mapping[str, Entry], meter: Mapping[str, Any]) -> bytes:
    """One row for each file, sorted by name."""
    order = sorted(range(len(counting.files)), key=counting.files.__getitem__)
    names = [counting.files[i] for i in order]
    parts, rows_in, rows = zip(*(counting.counts[i] for i in order), strict=True)
    columns = [
        names, [model_of(name) for name in names], parts, rows_in, rows,
        [came - left for came, left in zip(rows_in, rows, strict=True)], [files[name].size_bytes for name in names],
        [counting.digests[i] or None for i in order],
    ]  # fmt: skip
    schema = MANIFEST_SCHEMA.with_metadata({METER_KEY: json.dumps(meter, sort_keys=True)})
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def _check_complete(output: Output, plan: Plan, files: Mapping[str, Entry]) -> None:
    names = set(plan.names_by_part())
    foreign, gone = {name for name in files if is_part_file(name)} - names, names - files.keys()
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
