"""Plan an extension: the parts of files that were added to the input since the last generation.

* A file is identified by its URI, size and etag. One that changed since it was planned is an error that names it: its
  rows are committed, and nothing is ever overwritten. One that was removed no longer matters.
* The plan is stored once, as a job's is: a driver that finds one continues it, and looks for newer files afterwards.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

from img2parquet.dataset.commit import MANIFEST, PLAN, Output
from img2parquet.dataset.generations import (
    Extension,
    History,
    RetryPlan,
    encode_extension,
    of_generation,
    store_later,
)
from img2parquet.dataset.plan import Plan, cut_input, plan_hash, rows_per_part
from img2parquet.errors import InputError, RunMismatch
from img2parquet.job import JobSpec
from img2parquet.models import Card
from img2parquet.schema import Piece
from img2parquet.storage import Entry, redact

SHOWN = 3


class StoredExtension(NamedTuple):
    """The plan of an extension, and the hash of its bytes.

    covers_all: it covers every file that this command has listed, so the input need not be listed again."""

    plan: Extension
    digest: str
    covers_all: bool


class CoveredInput:
    """Holds the files of a plan, as a container of entries.

    A file whose size or etag has changed counts as covered; looking it up notes it in `changed`."""

    def __init__(self, plan: Plan) -> None:
        self.files: dict[str, tuple[str, int | None]] = {}  # etag and size; None where pieces are ranges of the file
        for part in plan.parts:
            for piece in part.pieces:
                self.files[piece.uri] = (piece.etag, _size_of_whole(piece))
        self.changed: dict[str, str] = {}

    def __contains__(self, entry: object) -> bool:
        if not isinstance(entry, Entry) or entry.uri not in self.files:
            return False
        etag, size_bytes = self.files[entry.uri]
        if etag != entry.etag or size_bytes not in (None, entry.size_bytes):
            self.changed[entry.uri] = f"etag `{etag}` is now `{entry.etag}`"
        return True

    def check(self, where: str) -> None:
        """Raises InputError when files that were looked up have changed."""
        if self.changed:
            shown = "; ".join(f"{redact(uri)}: {how}" for uri, how in sorted(self.changed.items())[:SHOWN])
            raise InputError(
                f"{len(self.changed)} files changed since {where} was planned: {shown}",
                hint="restore them and add new data under new names, or use another output.uri",
            )


def started_extension(output: Output, history: History, files: Container[str]) -> StoredExtension | None:
    """Return the last generation where it is an extension that has not finished.

    Raises RunMismatch for an unfinished retry: a generation starts only when the one before it has ended."""
    plan = history.unfinished(files)
    if plan is None:
        return None
    if isinstance(plan, RetryPlan):
        raise RunMismatch(
            f"{output.uri}: retry {plan.generation} was started and has to finish before new files are added",
            hint=f"img2parquet retry {output.uri}" + "".join(f" --reason {reason}" for reason in plan.reasons),
        )
    data = output.read(of_generation(PLAN, plan.generation))
    assert isinstance(plan, Extension) and data is not None, "it was read"
    return StoredExtension(plan, plan_hash(data), covers_all=False)


def start_extension(
    output: Output, history: History, job: JobSpec, cards: Mapping[str, Card]
) -> StoredExtension | None:
    """Store a plan of the files added since the last generation, unless another driver has; return the stored plan, or
    None where no file was added. Lists the input once.

    Raises InputError when files have changed, StorageError."""
    covered = CoveredInput(history.plan)
    parts = cut_input(job, rows_per_part(job, cards), covered, first_index=len(history.plan.parts))
    covered.check(output.uri)
    if not parts:
        return None
    parent = output.read(of_generation(MANIFEST, history.generation))
    if parent is None:
        raise RunMismatch(
            f"{output.uri}: {of_generation(MANIFEST, history.generation)} is gone", hint="put it back, then run again"
        )
    generation = history.generation + 1
    data = encode_extension(Plan(parts, history.first.identities), generation, parent)
    plan, digest = store_later(output, data, history)
    if not isinstance(plan, Extension):
        raise RunMismatch(
            f"{output.uri}: a retry has just started", hint="run the same command again when it has finished"
        )
    return StoredExtension(plan, digest, covers_all=digest == plan_hash(data))


def _size_of_whole(piece: Piece) -> int | None:
    return piece.size_bytes if piece.start == 0 and piece.stop is None else None
