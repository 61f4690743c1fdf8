"""An output and an input that has grown -> the plan of a new generation: the parts of files that no plan has yet.

* A file is known by its URI, with its size and etag. One that changed since it was planned is an error that names it:
  its rows are committed, and nothing is ever overwritten. One that is gone does not matter any more.
* The plan is stored once, as a job's is: whoever finds one goes on with it, and looks for newer files at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.commit import MANIFEST, PLAN, SUCCESS, Output
from pipeline.errors import InputError, RunMismatch
from pipeline.generations import Extension, History, RetryPlan, encode_extension, of_generation, store_later
from pipeline.job import JobSpec
from pipeline.models import Card
from pipeline.plan import Plan, cut_input, plan_hash
from pipeline.schema import Piece
from pipeline.storage import Entry, redact

SHOWN = 3


class Covered:
    """The files of a plan, as a container of entries. One with another size or etag is in it too, and in `changed`."""

    def __init__(self, plan: Plan) -> None:
        self.files: dict[str, tuple[str, int | None]] = {}  # etag and size; None where pieces are ranges of it
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
        """Raises InputError where files changed that were asked for."""
        if self.changed:
            shown = "; ".join(f"{redact(uri)}: {how}" for uri, how in sorted(self.changed.items())[:SHOWN])
            raise InputError(
                f"{len(self.changed)} files changed since {where} was planned: {shown}",
                hint="put them back as they were and add what is new under new names, or use another output.uri",
            )


def begun_extension(output: Output, history: History, files: Iterable[str]) -> tuple[Extension, str] | None:
    """The last generation, an extension that has not ended, and its plan's hash. Raises RunMismatch for a retry that
    has not: the end of one generation is the beginning of the next."""
    if not history.later or of_generation(SUCCESS, history.generation) in set(files):
        return None
    plan = history.later[-1]
    if isinstance(plan, RetryPlan):
        raise RunMismatch(
            f"{output.uri}: retry {plan.generation} was begun and has to come to its end before new files are added",
            hint=f"img2parquet retry {output.uri}" + "".join(f" --reason {reason}" for reason in plan.reasons),
        )
    data = output.read(of_generation(PLAN, plan.generation))
    assert isinstance(plan, Extension) and data is not None, "it was read"
    return plan, plan_hash(data)


def begin_extension(
    output: Output, history: History, job: JobSpec, cards: Mapping[str, Card]
) -> tuple[Extension, str] | None:
    """The stored plan of what has come since the last generation, ours if we are first, and its hash; None where
    nothing has. Lists the input once. Raises InputError for files that changed, StorageError."""
    covered = Covered(history.plan)
    parts = cut_input(job, cards, covered, first_index=len(history.plan.parts))
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
        raise RunMismatch(f"{output.uri}: a retry has just begun", hint="run the same command again when it has ended")
    return plan, digest


def _size_of_whole(piece: Piece) -> int | None:
    return piece.size_bytes if piece.start == 0 and piece.stop is None else None
