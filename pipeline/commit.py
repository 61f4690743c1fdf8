"""One encoded part to: created once, or found done, or unknown. What is left, and the start and end of a job.

* The existence of a part's file is its commit. There is no second object that could disagree with it.
* Nothing is overwritten, so every step here may be repeated by anyone, at any time, and changes nothing.
"""

from __future__ import annotations

import base64
import json
import random
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import AccessDenied, AlreadyExists, NotFound, OutcomeUnknown, RunMismatch, StorageError
from pipeline.plan import Plan, check_same_run, decode_plan, encode_plan, plan_hash
from pipeline.storage import Entry, Store, join, resolve

PLAN, RUN, MANIFEST, REJECTS, SUCCESS = (
    "_plan.parquet", "_run.json", "_manifest.parquet", "_rejects.parquet", "_SUCCESS",
)  # fmt: skip
PART_NAME = re.compile(r"model=(?P<model>[^/]+)/part-(?P<index>\d{6,})-(?P<id>[0-9a-f]{16})\.parquet")
PUT_TRIES = 8

REJECT_SCHEMA = pa.schema(
    [
        ("model", pa.string()), ("part", pa.int32()), ("shard", pa.string()), ("key", pa.string()), ("row", pa.int64()),
        ("stage", pa.string()), ("reason", pa.string()), ("message", pa.string()), ("offset", pa.int64()),
    ]
)  # fmt: skip
MANIFEST_SCHEMA = pa.schema(
    [
        ("file", pa.string()), ("model", pa.string()), ("part", pa.int32()), ("rows_in", pa.int64()),
        ("rows", pa.int64()), ("rejects", pa.int64()), ("size_bytes", pa.int64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Footer:
    """What a part's file says of itself."""

    identity: str
    part_index: int
    rows_in: int
    rows: int
    rejects: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Output:
    """The folder or prefix of one run's results."""

    store: Store
    uri: str

    @classmethod
    def at(cls, uri: str, store: Store | None = None) -> Output:
        return cls(store or Store(), resolve(uri).rstrip("/"))

    def check_store(self) -> None:
        """Refuse a store that overwrites where it was told not to: there, two drivers could double rows.
        On a disk, also remove what writers left that were killed a day ago or more."""
        if not self.store.creates_exclusively(self.uri):
            raise StorageError(
                f"{self.uri}: this store ignores `If-None-Match: *`, so a part could be written over",
                hint="use a store with conditional writes (AWS S3, MinIO, Ceph, GCS, Azure, a local disk)",
            )
        self.store.sweep(self.uri)

    def begin(self, identities: Mapping[str, Mapping[str, Any]], make_plan: Callable[[], Plan]) -> tuple[Plan, str]:
        """The frozen plan of this output and its hash: the stored one, or ours if we are first.
        Raises RunMismatch for an output of another run, or of something else."""
        data = self._read(PLAN)
        if data is None:
            self._refuse_foreign_files()
            data = encode_plan(make_plan())
            if self.put_once(PLAN, data) == "done":
                data = self.store.read(join(self.uri, PLAN))
        plan = decode_plan(data)
        check_same_run(plan, identities, self.uri)
        return plan, plan_hash(data)

    def record_run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Create _run.json, or return the one that is there. Raises RunMismatch where its plan is not this one."""
        data = json.dumps(record, indent=1, sort_keys=True).encode()
        if self.put_once(RUN, data) == "done":
            data = self.store.read(join(self.uri, RUN))
        stored: dict[str, Any] = json.loads(data)
        if stored.get("plan_sha256") != record["plan_sha256"]:
            raise RunMismatch(f"{join(self.uri, RUN)} was written for another plan", hint="use another output.uri")
        return stored

    def run_record(self) -> dict[str, Any] | None:
        data = self._read(RUN)
        return None if data is None else json.loads(data)

    def stored_plan(self) -> Plan | None:
        data = self._read(PLAN)
        return None if data is None else decode_plan(data)

    def part_files(self) -> dict[str, Entry]:
        """Every file below `model=*/`, by its name below the output's folder. One listing."""
        start = len(self.uri) + 1
        entries = ((entry.uri[start:], entry) for entry in self.store.list_files(self.uri))
        return {name: entry for name, entry in entries if name.startswith("model=") and _visible(name)}

    def put_once(self, name: str, data: bytes) -> Literal["created", "done"]:
        """Create one object, whatever the store answers: `done` when it was there, also when it was we who created
        it and the reply was lost. Raises AccessDenied, or OutcomeUnknown when PUT_TRIES attempts told nothing."""
        uri, last = join(self.uri, name), ""
        for attempt in range(PUT_TRIES):
            try:
                self.store.create(uri, data)
                return "created"
            except AlreadyExists:
                return "done"
            except AccessDenied:
                raise
            except StorageError as error:
                last = error.message
            time.sleep(random.random() * min(2.0, 0.05 * 2**attempt))
            if self._is_there(uri):
                return "done"
        raise OutcomeUnknown(f"{uri}: not created after {PUT_TRIES} tries: {last}", hint="run the same command again")

    def finish(self, plan: Plan) -> list[tuple[str, Footer]]:
        """Gather the footers, each with its model, into the manifest and the rejects. The caller judges them and
        decides whether _SUCCESS follows. Raises RunMismatch for files of another run."""
        names = sorted(plan.file_name(model, part) for model in plan.identities for part in plan.parts)
        files = self.part_files()
        foreign = sorted(files.keys() - set(names))
        if foreign:
            raise RunMismatch(
                f"{self.uri} holds files of another run: {', '.join(foreign[:3])} ({len(foreign)} in all)",
                hint="move them away, or use another output.uri",
            )
        footers = self.footers([files[name] for name in names])
        self.put_once(REJECTS, encode_rejects(zip(names, footers, strict=True)))
        self.put_once(MANIFEST, _encode_manifest(names, files, footers))
        return [(model_of(name), footer) for name, footer in zip(names, footers, strict=True)]

    def succeed(self, totals: Mapping[str, Any]) -> None:
        self.put_once(SUCCESS, json.dumps(totals, indent=1, sort_keys=True).encode())

    def footers(self, entries: Iterable[Entry]) -> list[Footer]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda entry: read_footer(self.store, entry), entries))

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.read(join(self.uri, name))
        except NotFound:
            return None

    def _is_there(self, uri: str) -> bool:
        try:
            return self.store.exists(uri)
        except StorageError:
            return False

    def _refuse_foreign_files(self) -> None:
        files = self.part_files()
        if files:
            raise RunMismatch(
                f"{self.uri} holds {len(files)} result files but no {PLAN}: it is not an output that can be resumed",
                hint="use another output.uri",
            )


def parse_name(name: str) -> tuple[str, int, str] | None:
    """`model=a/part-000003-<id>.parquet` -> (model, index, id); None for any other name."""
    match = PART_NAME.fullmatch(name)
    return (match["model"], int(match["index"]), match["id"]) if match else None


def model_of(name: str) -> str:
    return name.split("/")[0].removeprefix("model=")


def read_footer(store: Store, entry: Entry) -> Footer:
    """A part's own account, from the last bytes of its file. Raises StorageError for a file that is not whole."""
    tail_bytes = min(entry.size_bytes, 64 << 10)
    data = store.read(entry.uri, entry.size_bytes - tail_bytes, entry.size_bytes)
    if data[-4:] != b"PAR1" or len(data) < 12:
        raise StorageError(f"{entry.uri}: not a whole Parquet file")
    needed = int.from_bytes(data[-8:-4], "little") + 8
    if needed > entry.size_bytes:
        raise StorageError(f"{entry.uri}: not a whole Parquet file")
    if needed > tail_bytes:
        data = store.read(entry.uri, entry.size_bytes - needed, entry.size_bytes)
    try:
        return parse_footer(pq.read_metadata(pa.BufferReader(data)))
    except (pa.ArrowException, KeyError, ValueError, zlib.error) as error:
        raise StorageError(f"{entry.uri}: its footer cannot be read: {error}") from None


def parse_footer(metadata: pq.FileMetaData) -> Footer:
    said = metadata.metadata
    return Footer(
        identity=said[b"img2parquet.identity"].decode(),
        part_index=json.loads(said[b"img2parquet.part"])["index"],
        rows_in=int(said[b"img2parquet.rows_in"]),
        rows=metadata.num_rows,
        rejects=tuple(json.loads(zlib.decompress(base64.b64decode(said[b"img2parquet.rejects"])))),
    )


def encode_rejects(parts: Iterable[tuple[str, Footer]]) -> bytes:
    rows = []
    for name, footer in parts:
        model = model_of(name)
        rows += [{"model": model, "part": footer.part_index, **reject} for reject in footer.rejects]
    return _parquet(pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))


def _encode_manifest(names: list[str], files: Mapping[str, Entry], footers: list[Footer]) -> bytes:
    rows = [
        {"file": name, "model": model_of(name), "part": footer.part_index,
         "rows_in": footer.rows_in, "rows": footer.rows, "rejects": len(footer.rejects),
         "size_bytes": files[name].size_bytes}
        for name, footer in zip(names, footers, strict=True)
    ]  # fmt: skip
    return _parquet(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _visible(name: str) -> bool:
    return not any(segment.startswith((".", "_")) for segment in name.split("/"))
