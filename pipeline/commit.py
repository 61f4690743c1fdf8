"""One encoded part to: created once, or found done, or unknown. What is left, and the start and end of a job.

* The existence of a part's file is its commit. There is no second object that could disagree with it.
* Nothing is overwritten, so every step here may be repeated by anyone, at any time, and changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import AccessDenied, AlreadyExists, NotFound, OutcomeUnknown, RunMismatch, StorageError
from pipeline.listing import Listing, parse_name
from pipeline.plan import Plan, check_same_run, decode_plan, encode_plan, plan_hash, readable
from pipeline.read.fetch import fetch_in_order
from pipeline.storage import Entry, Store, join, resolve
from pipeline.storage.retries import RETRIES
from pipeline.write import DIGEST_KEY

PLAN, RUN, MANIFEST, REJECTS, SUCCESS = (
    "_plan.parquet", "_run.json", "_manifest.parquet", "_rejects.parquet", "_SUCCESS",
)  # fmt: skip
RECORDS = (PLAN, RUN, MANIFEST, REJECTS)
PUT_TRIES = 8

SEAL = "sha256"  # the name of a record's digest of itself
METER = "_meter-"  # <session>-<number>.json: what a session had measured by then
FOOTER_READERS = 16
FOOTER_TYPE = np.dtype([("id", "u8"), ("rows_in", "i8"), ("rows", "i8"), ("digest", "u1", (32,))])


@dataclass(frozen=True, slots=True)
class Footer:
    """What a part's file says of itself."""

    identity: str
    part_index: int
    rows_in: int
    rows: int
    packed_rejects: str
    digest: bytes = b""  # SHA-256 of the file, with zeros in its place
    generation: int = 0  # above 0: of a retry
    packed_superseded: str = ""

    @property
    def rejects(self) -> tuple[dict[str, Any], ...]:
        """Unpacked each time: a driver may hold the footers of very many parts."""
        return () if self.rows_in == self.rows else _unpacked(self.packed_rejects)

    @property
    def superseded(self) -> tuple[dict[str, Any], ...]:
        """Of a retry: the rejects, of its part's files before it, that stand no longer; they are its rows in."""
        return _unpacked(self.packed_superseded) if self.packed_superseded else ()


class Footers(Mapping[str, Footer]):
    """Footers of one plan's files by name: 1e5 of them take some megabytes. One thread at a time may add."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.columns = plan, dict[str, Any]()  # an array of FOOTER_TYPE by model, in the order of the parts
        self.texts: dict[str, tuple[str, str]] = {}  # packed rejects and superseded, where there are any
        self.none_packed, self.generation, self.count = "", 0, 0

    def add(self, name: str, footer: Footer) -> None:
        model, index, id = parse_name(name) or ("", 0, "0")
        if model not in self.columns:
            self.columns[model] = np.zeros(len(self.plan.parts), FOOTER_TYPE)
        digest = np.frombuffer(footer.digest, np.uint8)
        self.columns[model][self.plan.by_index.place(index)] = (int(id, 16), footer.rows_in, footer.rows, digest)
        if footer.rows_in == footer.rows and not footer.packed_superseded:
            self.none_packed = footer.packed_rejects
        else:
            self.texts[name] = (footer.packed_rejects, footer.packed_superseded)
        self.generation, self.count = footer.generation, self.count + 1

    def __getitem__(self, name: str) -> Footer:
        model, index, id = parse_name(name) or ("", 0, "0")
        if model not in self.columns or ("-retry" in name) != bool(self.generation):
            raise KeyError(name)
        found, rows_in, rows, digest = self.columns[model][self.plan.by_index.place(index)]
        if int(found) != int(id, 16) or not digest.any():
            raise KeyError(name)
        packed, superseded = self.texts.get(name, (self.none_packed, ""))
        identity = self.plan.identity(model)
        return Footer(identity, index, int(rows_in), int(rows), packed, digest.tobytes(), self.generation, superseded)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.plan.names_by_part() if name in self)

    def __len__(self) -> int:
        return self.count


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
        data = self.read(PLAN)
        if data is None:
            self._refuse_foreign_files()
            data = encode_plan(make_plan())
            if self.put_once(PLAN, data) == "done":
                data = self.store.read(join(self.uri, PLAN))
        plan = self._decoded(data)
        check_same_run(plan, identities, self.uri)
        return plan, plan_hash(data)

    def record_run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Create _run.json, or return the one that is there. Raises RunMismatch where its plan is not this one."""
        return self.record(RUN, record)

    def record(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """The same under any name."""
        data = seal(record)
        if self.put_once(name, data) == "done":
            data = self.store.read(join(self.uri, name))
        stored: dict[str, Any] = {name: value for name, value in json.loads(data).items() if name != SEAL}
        if stored.get("plan_sha256") != record["plan_sha256"]:
            raise RunMismatch(f"{join(self.uri, name)} was written for another plan", hint="use another output.uri")
        return stored

    def run_record(self) -> dict[str, Any] | None:
        """_run.json. Raises StorageError where it is damaged."""
        data = self.read(RUN)
        try:
            record: dict[str, Any] | None = None if data is None else json.loads(data)
            return record
        except ValueError as error:
            raise StorageError(f"{join(self.uri, RUN)}: cannot be read: {error}") from None

    def stored_plan(self) -> Plan | None:
        """The frozen plan, where there is one. Raises StorageError where it is damaged."""
        data = self.read(PLAN)
        return None if data is None else self._decoded(data)

    def _decoded(self, plan: bytes) -> Plan:
        with readable(join(self.uri, PLAN)):
            return decode_plan(plan)

    def files(self) -> Listing:
        """Everything here, by its name below the output's folder. One listing."""
        return Listing(self.uri, self.store.scan(self.uri))

    def part_files(self) -> dict[str, Entry]:
        """Every file below `model=*/`, by its name below the output's folder. One listing."""
        return {name: entry for name, entry in sorted(self.files().items()) if is_part_file(name)}

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
            RETRIES.add("OutcomeUnknown", 0.0)
            time.sleep(random.random() * min(2.0, 0.05 * 2**attempt))
            if self._is_there(uri):
                return "done"
        raise OutcomeUnknown(f"{uri}: not created after {PUT_TRIES} tries: {last}", hint="run the same command again")

    def succeed(self, totals: Mapping[str, Any], name: str = SUCCESS, records: Iterable[str] = RECORDS) -> None:
        """With a digest of every record, of which the manifest has one of every part."""
        self.put_once(name, seal({**totals, "files": self.digests(records)}))

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """SHA-256 of the files of these names that are there."""
        found = {name: self.read(name) for name in names}
        return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if data is not None}

    def success(self, name: str = SUCCESS) -> dict[str, Any] | None:
        """The totals of a job that has ended well."""
        data = self.read(name)
        return None if data is None else json.loads(data)

    def last_meter(self, names: Iterable[str]) -> dict[str, Any]:
        """What the last session that worked here has measured, of these names in the output; {} where none has."""
        last = max((name for name in names if name.startswith(METER)), default=None)
        data = None if last is None else self.read(last)
        return {} if data is None else json.loads(data)

    def footers(
        self, names: Iterable[str], files: Mapping[str, Entry], known: Mapping[str, Footer] | None = None
    ) -> Iterator[tuple[str, Footer]]:
        """Each file's footer, in the order of the names; a few at a time are read of those that are not known."""
        names, ahead = tee(names)  # of those that are known as many wait as lie between two that are not
        known = known or {}
        missing = (name for name in ahead if name not in known)
        fetched = fetch_in_order(missing, lambda name: read_footer(self.store, files[name]), FOOTER_READERS)
        for name in names:
            yield name, known[name] if name in known else next(fetched)[1]

    def read(self, name: str) -> bytes | None:
        """A file of this name in the output; None where there is none."""
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
        files = self.part_files()  # cheap in the ordinary case: an empty folder
        if files:
            raise RunMismatch(
                f"{self.uri} holds {len(files)} result files but no {PLAN}: it is not an output that can be resumed",
                hint="use another output.uri",
            )


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
        footer = parse_footer(pq.read_metadata(pa.BufferReader(data)))
        _ = footer.rejects, footer.superseded  # damage there is this file's, and told here
        return footer
    except (pa.ArrowException, KeyError, ValueError, zlib.error) as error:
        raise StorageError(f"{entry.uri}: its footer cannot be read: {error}") from None


def parse_footer(metadata: pq.FileMetaData) -> Footer:
    said = metadata.metadata
    return Footer(
        identity=sys.intern(said[b"img2parquet.identity"].decode()),  # one for each model, not for each part
        part_index=json.loads(said[b"img2parquet.part"])["index"],
        rows_in=int(said[b"img2parquet.rows_in"]),
        rows=metadata.num_rows,
        packed_rejects=said[b"img2parquet.rejects"].decode(),
        digest=bytes.fromhex(said[DIGEST_KEY].decode().removeprefix("sha256:")),
        generation=int(said.get(b"img2parquet.generation", b"0")),
        packed_superseded=said.get(b"img2parquet.superseded", b"").decode(),
    )


def _unpacked(packed: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(zlib.decompress(base64.b64decode(packed))))


def seal(values: Mapping[str, Any]) -> bytes:
    """A record as JSON, with a digest of the rest of itself."""
    digest = hashlib.sha256(_json(values)).hexdigest()
    return _json({**values, SEAL: digest})


def is_sealed(data: bytes) -> bool:
    """Whether a record is the one that was written, to the last byte."""
    try:
        values = json.loads(data)
        return bool(seal({name: value for name, value in values.items() if name != SEAL}) == data)
    except (ValueError, AttributeError, RecursionError):
        return False


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode()


def is_part_file(name: str) -> bool:
    """Whether readers see it in a partition."""
    return name.startswith("model=") and is_visible(name)


def is_visible(name: str) -> bool:
    """Whether readers of the whole folder see it: no part of its name is hidden."""
    return not any(segment.startswith((".", "_")) for segment in name.split("/"))
