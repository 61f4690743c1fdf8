"""Read and write the generations of an output: the plan of each, and the files of all of them together.

* The job is generation 0; each retry or extension adds the next one. The records of generation g are `_plan-g`,
  `_run-g`, `_manifest-g`, `_rejects-g` and `_SUCCESS-g`, each created once; those of generation 0 have no suffix.
* A retry's plan lists the rejects that it tries again. An extension's plan has parts, as a job's has, and their indices
  continue the earlier ones. Both name their parent generation by a digest of its manifest.
* Files of a part supersede each other row by row, never as a whole: a reject is open until a retry's footer lists it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.dataset.commit import PLAN, RECORDS, REJECTS, SUCCESS, Output
from img2parquet.dataset.damage import reading_record
from img2parquet.dataset.listing import parse_name
from img2parquet.dataset.packed_parts import joined
from img2parquet.dataset.plan import Plan, decode_plan, encode_plan, plan_hash
from img2parquet.dataset.rejects import REJECT_SCHEMA, by_part_and_model
from img2parquet.errors import RunMismatch
from img2parquet.schema import Part, Reject, Wanted
from img2parquet.storage import join

LATER_PLAN = re.compile(r"_plan-([1-9]\d*)\.parquet")
ABOUT_KEY = b"img2parquet.generation"


def of_generation(name: str, generation: int) -> str:
    """Return the name of a generation's record: (`_plan.parquet`, 2) gives `_plan-2.parquet`."""
    stem, dot, extension = name.partition(".")
    return f"{stem}-{generation}{dot}{extension}" if generation else name


@dataclass(frozen=True, kw_only=True)
class LaterPlan(Plan):
    """The plan of a retry or an extension."""

    parent_sha256: str  # of the parent's manifest


@dataclass(frozen=True, kw_only=True)
class Extension(LaterPlan):
    """Parts of files that were added to the input later."""


@dataclass(frozen=True, kw_only=True)
class RetryPlan(LaterPlan):
    """The rejects that one retry tries again. `parts` are the parts they belong to, restricted to their rows."""

    reasons: tuple[str, ...]  # as requested; empty: every reason that can be retried
    rejects: Mapping[int, Mapping[str, tuple[Reject, ...]]]  # by part and model, sorted by row

    def file_name(self, model: str, part: Part) -> str:
        return super().file_name(model, part).replace(".parquet", f"-retry{self.generation}.parquet")

    def files(self) -> Iterator[tuple[str, Part, str]]:
        for part in self.parts:
            yield from ((model, part, self.file_name(model, part)) for model in sorted(self.rejects[part.index]))

    def indexed(self) -> Iterator[tuple[str, int, str]]:
        return ((model, part.index, name) for model, part, name in self.files())

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """File names by model, of the parts in which that model has rejects."""
        named = list(self.files())
        return {model: tuple(name for of, _, name in named if of == model) for model in self.identities}

    @property
    def models(self) -> set[str]:
        return {model for of_part in self.rejects.values() for model in of_part}

    @property
    def images(self) -> int:
        return sum(len(part.only or ()) for part in self.parts)


@dataclass(frozen=True)
class History:
    """The plans of an output's generations, oldest first: its job's, then the later ones."""

    first: Plan
    later: tuple[LaterPlan, ...] = ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of every generation."""
        return (self.first, *self.later)

    @cached_property
    def plan(self) -> Plan:
        """One plan of every part: the job's and those that extensions added."""
        added = [plan for plan in self.later if isinstance(plan, Extension)]
        if not added:
            return self.first
        return Plan(joined([self.first.parts, *(plan.parts for plan in added)]), self.first.identities)

    @property
    def retries(self) -> tuple[RetryPlan, ...]:
        return tuple(plan for plan in self.later if isinstance(plan, RetryPlan))

    @property
    def generation(self) -> int:
        """The last generation that was started."""
        return len(self.later)

    def upto(self, generation: int) -> History:
        return History(self.first, self.later[:generation])

    def then(self, plan: LaterPlan) -> History:
        """Append one generation."""
        return History(self.first, (*self.later, plan))

    def unfinished(self, there: Container[str]) -> LaterPlan | None:
        """Return the last retry or extension where it has not ended well. there: names in the output."""
        if not self.later or of_generation(SUCCESS, self.generation) in there:
            return None
        return self.later[-1]

    def ended(self, there: Container[str]) -> int | None:
        """Return the last generation that has ended well; None where none has."""
        ended = [g for g in range(self.generation + 1) if of_generation(SUCCESS, g) in there]
        return max(ended, default=None)

    def indexed(self) -> Iterator[tuple[str, int, str]]:
        """Yield (model, part index, name) of every file: by part, then by model, then by generation."""
        added: dict[tuple[int, str], list[tuple[str, int, str]]] = {}
        for retry in self.retries:
            for model, index, name in retry.indexed():
                added.setdefault((index, model), []).append((model, index, name))
        for model, index, name in self.plan.indexed():
            yield model, index, name
            yield from added.get((index, model), ())

    def names_by_part(self) -> Iterator[str]:
        return (name for _, _, name in self.indexed())

    def __contains__(self, name: object) -> bool:
        """Return whether a file of this name is planned."""
        parsed = parse_name(name) if isinstance(name, str) else None
        if parsed is None or parsed[0] not in self.plan.identities:
            return False
        model, index, _ = parsed
        place = self.plan.by_index.find(index)
        return (place is not None and self.plan.names[model][place] == name) or name in self._retried

    @cached_property
    def _retried(self) -> set[str]:
        return {name for retry in self.retries for name in retry.names_by_part()}

    @property
    def names(self) -> Mapping[str, Sequence[str]]:
        """File names by model, oldest generation first."""
        if not self.retries:
            return self.plan.names
        plans = (self.plan, *self.retries)
        return {model: tuple(name for plan in plans for name in plan.names[model]) for model in self.plan.identities}

    def records(self) -> list[str]:
        """List the records whose digests the last _SUCCESS holds: every one but itself."""
        names = [of_generation(name, g) for g in range(self.generation + 1) for name in RECORDS]
        return names + [of_generation(SUCCESS, g) for g in range(self.generation)]


def read_history(output: Output, plan: Plan, there: Iterable[str]) -> History:
    """Read the plans of all generations. plan: the first. there: names in the output.

    Raises RunMismatch when one is missing or of an unknown kind, StorageError when one is damaged."""
    return read_newer(output, History(plan), there)


def read_newer(output: Output, history: History, there: Iterable[str]) -> History:
    """Append the generations that were started since `history` was read. Raises as `read_history` does."""
    numbers = [int(match[1]) for name in there if (match := LATER_PLAN.fullmatch(name))]
    for number in range(history.generation + 1, max(numbers, default=0) + 1):
        name = of_generation(PLAN, number)
        data = output.read(name)
        if data is None:
            raise RunMismatch(
                f"{output.uri}: {name} is missing, but later generations exist",
                hint="put it back, or use another output.uri",
            )
        with reading_record(join(output.uri, name)):
            history = history.then(decode_later(data, history))
    return history


def store_later(output: Output, data: bytes, before: History) -> tuple[LaterPlan, str]:
    """Store the plan of the generation after `before`, unless another driver has; return the stored one and its hash.

    Raises RunMismatch when it is of an unknown kind, StorageError when it is damaged."""
    name = of_generation(PLAN, before.generation + 1)
    data = output.create_or_read(name, data)
    with reading_record(join(output.uri, name)):
        return decode_later(data, before), plan_hash(data)


def describe(plan: LaterPlan, digest: str) -> dict[str, Any]:
    """Return what every _run-g.json says of its generation. digest: of the stored plan."""
    kind, more = "extension", dict[str, Any]()
    if isinstance(plan, RetryPlan):
        kind, more = "retry", {"reasons": list(plan.reasons), "images": plan.images}
    return {
        "kind": kind,
        "generation": plan.generation,
        "parent": plan.generation - 1,
        "parent_manifest_sha256": plan.parent_sha256,
        "plan_sha256": digest,
        "parts": len(plan.parts),
        **more,
    }


def encode_extension(plan: Plan, generation: int, parent: bytes) -> bytes:
    """Encode the plan of an extension. plan: of its new parts alone. parent: the bytes of the parent's manifest."""
    return encode_plan(plan, {ABOUT_KEY: _about("extension", generation, parent)})


def encode_retry(rejects: pa.Table, generation: int, parent: bytes, reasons: Sequence[str]) -> bytes:
    """Encode the plan of a retry. rejects: of REJECT_SCHEMA, sorted by part, model and row. parent: the bytes of the
    parent's manifest."""
    about = _about("retry", generation, parent, reasons=sorted(reasons))
    sink = pa.BufferOutputStream()
    pq.write_table(rejects.replace_schema_metadata({ABOUT_KEY: about}), sink, compression="zstd")
    return bytes(sink.getvalue())


def _about(kind: str, generation: int, parent: bytes, **more: object) -> str:
    digest = hashlib.sha256(parent).hexdigest()
    about = {"kind": kind, "generation": generation, "parent": generation - 1, "parent_manifest_sha256": digest}
    return json.dumps({**about, **more}, sort_keys=True)


def decode_later(data: bytes, before: History) -> LaterPlan:
    """Decode the plan of the generation after `before`.

    Raises RunMismatch when it is of an unknown kind, or belongs to another generation."""
    about = json.loads((pq.read_metadata(pa.BufferReader(data)).metadata or {}).get(ABOUT_KEY, b"{}"))
    decode = {"retry": _decode_retry, "extension": _decode_extension}.get(about.get("kind"))
    if decode is None or about.get("generation") != before.generation + 1:
        name = of_generation(PLAN, before.generation + 1)
        raise RunMismatch(
            f"{name} is not the plan of a retry or of an extension",
            hint="was it written by a newer version? update img2parquet",
        )
    return decode(data, before, about)


def _decode_extension(data: bytes, before: History, about: Mapping[str, Any]) -> Extension:
    plan = decode_plan(data)
    if plan.identities != before.first.identities or plan.parts[0].index != len(before.plan.parts):
        raise RunMismatch(f"{of_generation(PLAN, about['generation'])} does not continue the plans before it")
    return Extension(
        parts=plan.parts,
        identities=before.first.identities,
        generation=about["generation"],
        parent_sha256=about["parent_manifest_sha256"],
    )


def _decode_retry(data: bytes, before: History, about: Mapping[str, Any]) -> RetryPlan:
    table = pq.read_table(pa.BufferReader(data))
    table.validate(full=True)
    models = set(table["model"].unique().to_pylist())
    if table.schema.types != REJECT_SCHEMA.types or not models <= before.plan.identities.keys():
        raise ValueError("its rejects do not belong to this run")
    rejects = by_part_and_model(table)
    parts = before.plan.parts  # the index of a part is its place
    return RetryPlan(
        parts=tuple(replace(parts[index], only=_wanted(rejects[index])) for index in sorted(rejects)),
        identities=before.plan.identities,
        generation=about["generation"],
        parent_sha256=about["parent_manifest_sha256"],
        reasons=tuple(about["reasons"]),
        rejects=rejects,
    )


def _wanted(of_models: Mapping[str, Iterable[Reject]]) -> tuple[Wanted, ...]:
    """Return the rows that at least one model tries again."""
    rows = {reject.row: reject for rejects in of_models.values() for reject in rejects}
    return tuple(Wanted(row, rows[row].key, rows[row].shard, rows[row].offset) for row in sorted(rows))


def read_open_rejects(output: Output, generation: int = 0) -> pa.Table | None:
    """Read the rejects that were open when a generation ended, sorted by part, model and row; None before its end."""
    data = output.read(of_generation(REJECTS, generation))
    return None if data is None else pq.read_table(pa.BufferReader(data)).cast(REJECT_SCHEMA)
