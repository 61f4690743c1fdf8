"""Commit part files and records to an output exactly once, and read them back.

* The existence of a part's file is its commit: there is no second object that could disagree with it.
* Nothing is ever overwritten, so any driver may repeat any step here at any time without changing anything.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import Any, Literal

from img2parquet.dataset.damage import reading_record
from img2parquet.dataset.footer import Footer, read_footer
from img2parquet.dataset.listing import Listing
from img2parquet.dataset.plan import Plan, check_same_run, decode_plan, encode_plan, plan_hash
from img2parquet.dataset.sealed_json import SEAL, seal
from img2parquet.errors import AccessDenied, AlreadyExists, NotFound, OutcomeUnknown, RunMismatch, StorageError
from img2parquet.storage import Entry, Store, join, resolve
from img2parquet.storage.parallel import fetch_in_order
from img2parquet.storage.retry_counters import RETRIES

PLAN, RUN, MANIFEST, REJECTS, SUCCESS = (
    "_plan.parquet", "_run.json", "_manifest.parquet", "_rejects.parquet", "_SUCCESS",
)  # fmt: skip
RECORDS = (PLAN, RUN, MANIFEST, REJECTS)
PUT_TRIES = 8
REMOVED_HINT = "put it back and run the same command again, or start over: remove the rest, or use another output.uri"

METER = "_meter-"  # <session>-<number>.json: a session's measurements so far
FOOTER_READERS = 16


@dataclass(frozen=True)
class Output:
    """The folder or prefix of one run's results."""

    store: Store
    uri: str

    @classmethod
    def at(cls, uri: str, store: Store | None = None) -> Output:
        return cls(store or Store(), resolve(uri).rstrip("/"))

    def check_store(self) -> None:
        """Refuse a store that overwrites in spite of `If-None-Match: *`: two drivers could then write rows twice.

        On a disk, also remove temporary files of writers that were killed a day ago or more."""
        if not self.store.creates_exclusively(self.uri):
            raise StorageError(
                f"{self.uri}: this store ignores `If-None-Match: *`, so a committed part could be overwritten",
                hint="use a store with conditional writes (AWS S3, MinIO, Ceph, GCS, Azure, a local disk)",
            )
        self.store.sweep(self.uri)

    def begin(self, identities: Mapping[str, Mapping[str, Any]], make_plan: Callable[[], Plan]) -> tuple[Plan, str]:
        """Store the plan of a new output, unless it has one; return the stored plan and its hash.

        Raises RunMismatch when the output belongs to another run, or was not written by img2parquet."""
        data = self.read(PLAN)
        if data is None:
            self._refuse_foreign_files()
            data = self.create_or_read(PLAN, encode_plan(make_plan()))
        plan = self._decoded(data)
        check_same_run(plan, identities, self.uri)
        return plan, plan_hash(data)

    def record_run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Store _run.json, unless it exists. Returns and raises as `record` does."""
        return self.record(RUN, record)

    def record(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Store the record of a run, unless it exists; return the stored one. Raises RunMismatch when that one was
        written for another plan."""
        data = self.create_or_read(name, seal(record))
        stored: dict[str, Any] = {name: value for name, value in json.loads(data).items() if name != SEAL}
        if stored.get("plan_sha256") != record["plan_sha256"]:
            raise RunMismatch(f"{join(self.uri, name)} was written for another plan", hint="use another output.uri")
        return stored

    def run_record(self) -> dict[str, Any] | None:
        """Read _run.json; None where it does not exist. Raises StorageError when it is damaged."""
        data = self.read(RUN)
        try:
            record: dict[str, Any] | None = None if data is None else json.loads(data)
            return record
        except ValueError as error:
            raise StorageError(f"{join(self.uri, RUN)}: cannot be read: {error}") from None

    def stored_plan(self) -> Plan | None:
        """Read the plan; None where none is stored. Raises StorageError when it is damaged."""
        data = self.read(PLAN)
        return None if data is None else self._decoded(data)

    def _decoded(self, plan: bytes) -> Plan:
        with reading_record(join(self.uri, PLAN)):
            return decode_plan(plan)

    def files(self) -> Listing:
        """List everything in the output, by name relative to its folder."""
        return Listing(self.uri, self.store.scan(self.uri))

    def part_files(self) -> dict[str, Entry]:
        """List every file below `model=*/`, by name relative to the output's folder."""
        return {name: entry for name, entry in sorted(self.files().items()) if is_part_file(name)}

    def put_once(self, name: str, data: bytes) -> Literal["created", "done"]:
        """Create one object, retrying until it is known to exist; return `done` where it did before.

        `done` is also the answer when we created it but the reply was lost. Raises AccessDenied, or OutcomeUnknown
        when PUT_TRIES attempts left it undecided."""
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

    def check_record(self, name: str) -> None:
        """Raise StorageError when a record is gone, as when somebody has removed the whole output."""
        try:
            is_there = self.store.exists(join(self.uri, name))
        except StorageError:
            return  # a fault of the store, which the next request will meet as well
        if not is_there:
            raise StorageError(f"{join(self.uri, name)} is gone while the job was writing", hint=REMOVED_HINT)

    def create_or_read(self, name: str, data: bytes) -> bytes:
        """Create one object, unless it exists; return the stored bytes."""
        return data if self.put_once(name, data) == "created" else self.store.read(join(self.uri, name))

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """Compute the SHA-256 of each of these files that exists."""
        found = {name: self.read(name) for name in names}
        return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if data is not None}

    def success(self, name: str = SUCCESS) -> dict[str, Any] | None:
        """Read a _SUCCESS record, which holds the totals; None where it does not exist."""
        data = self.read(name)
        return None if data is None else json.loads(data)

    def last_meter(self, names: Iterable[str]) -> dict[str, Any]:
        """Read the measurements of the last session that worked here; {} where there are none. names: in the output."""
        last = max((name for name in names if name.startswith(METER)), default=None)
        data = None if last is None else self.read(last)
        return {} if data is None else json.loads(data)

    def footers(
        self, names: Iterable[str], files: Mapping[str, Entry], known: Mapping[str, Footer] | None = None
    ) -> Iterator[tuple[str, Footer]]:
        """Yield each file's footer, in the order of the names; those that are not `known` are read, a few at a time."""
        names, ahead = tee(names)  # buffers the known names that lie between two unknown ones
        known = known or {}
        missing = (name for name in ahead if name not in known)
        fetched = fetch_in_order(missing, lambda name: read_footer(self.store, files[name]), FOOTER_READERS)
        for name in names:
            yield name, known[name] if name in known else next(fetched)[1]

    def read(self, name: str) -> bytes | None:
        """Read a file of the output; None where it does not exist."""
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
        files = self.part_files()  # cheap for a new output, whose folder is empty
        if files:
            raise RunMismatch(
                f"{self.uri} holds {len(files)} result files but no {PLAN}, so it cannot be resumed",
                hint="use another output.uri, or remove these files",
            )


def model_of(name: str) -> str:
    return name.split("/")[0].removeprefix("model=")


def is_part_file(name: str) -> bool:
    """Return whether some reader sees this file in a partition. Globs of DuckDB and Polars match hidden names too."""
    return name.startswith("model=") and (is_visible(name) or name.endswith(".parquet"))


def is_visible(name: str) -> bool:
    """Return whether readers of the whole folder see this file: no segment of its name is hidden."""
    return not any(segment.startswith((".", "_")) for segment in name.split("/"))
