"""A model's committed files and a classifier -> the same files with labels, as a partition of their own.

Shapes: B rows of a row group, D values of a vector, K classes, k best of them.

* File by file: the same rows in the same order, the same rejects, and of a retry's file the rejects that it superseded.
* Generation by generation: what a retry or an extension added is labelled when all before it is, into records of the
  same generation.
* Whoever comes later goes on: a file that is there is done, and records are created once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.batch import Embedded
from pipeline.commit import MANIFEST, PLAN, REJECTS, RUN, SUCCESS, Output, parse_footer
from pipeline.derived import are_derived
from pipeline.embeddings import GENERATION_SHIFT, Vectors, unit_vectors
from pipeline.errors import RunMismatch, StorageError
from pipeline.few_shot import Classifier
from pipeline.finish import Counting, encode_manifest, read_manifests, totals
from pipeline.generations import (
    REJECT_SCHEMA,
    History,
    LaterPlan,
    RetryPlan,
    describe,
    encode_extension,
    encode_rejects,
    encode_retry,
    of_generation,
    read_history,
    read_standing,
    store_later,
    supersede,
    to_table,
)
from pipeline.outputs.labels import LABEL, LABELS
from pipeline.plan import Plan, plan_hash
from pipeline.schema import RESERVED_COLUMNS, Part, Reject
from pipeline.write import encode_part

TOP_K = 5
ADDED = ("labels", "confidence")


@dataclass(frozen=True)
class Mirrored:
    """Files that were made now, rows that have labels, and files with rows of retries: labelled, and not yet."""

    now: int
    rows: int
    retry_files: int
    retry_files_left: int


@dataclass(frozen=True)
class Labeller:
    """What turns one file of the model into one of the partition: base and kept columns, `labels`, `confidence`."""

    vectors: Vectors
    partition: str
    classifier: Classifier
    classes: tuple[str, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Kept columns that have the name of one of ours."""
        return tuple(sorted(set(ADDED) & set(self._passthrough)))

    def encode(self, number: int, part: Part, plan: Plan) -> bytes:
        """The file that has this number among the model's. plan: of the partition, in the file's generation."""
        kept = [name for name in self._schema.names if name in RESERVED_COLUMNS or name in self._passthrough]
        kept = [name for name in kept if name not in ADDED]
        with self.vectors.open(number) as file:
            footer = parse_footer(file.metadata)
            schema = pa.schema([*(file.schema_arrow.field(name) for name in kept), *_fields()])
            tables = [schema.empty_table()]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[*kept, self.vectors.column])
                unit_BD = unit_vectors(table, self.vectors.column)
                arrays = [*(table.column(name) for name in kept), *_columns(self.classifier, unit_BD, self.classes)]
                tables.append(pa.Table.from_arrays(arrays, schema=schema))
        rejects = tuple(Reject(**reject) for reject in footer.rejects)
        of = self.partition
        whole = Embedded(part.index, 0, {of: pa.concat_tables(tables)}, {of: rejects}, footer.rows_in)
        superseded = tuple(Reject(**reject) for reject in footer.superseded)
        about, generation = plan.identities[of], footer.generation
        return encode_part(
            part, of, plan.identity(of), [whole], about, generation=generation, superseded=superseded
        ).data

    @cached_property
    def _schema(self) -> pa.Schema:
        with self.vectors.open(next(iter(self.vectors.parts))) as file:
            return file.schema_arrow

    @cached_property
    def _passthrough(self) -> list[str]:
        """Columns that are neither the base's nor an output's; what a model wrote stays with the model."""
        said = self.vectors.plan.identities[self.vectors.model].get("input", {}).get("keep", ())
        names = [entry.partition(":")[0] for entry in said]
        return [name for name in names if name in self._schema.names]


def mirror(labeller: Labeller, records: Output, plan: Plan) -> Mirrored:
    """Every committed file that has no labels yet, and the records of each generation that is whole.

    records: where the partition's lie, plan: its first. Raises RunMismatch for files that are not the partition's."""
    output, source = labeller.vectors.output, labeller.vectors.history
    history = read_history(records, plan, records.files())
    _refuse_foreign(output, history, labeller.partition)
    now = _label(labeller, plan)
    is_whole = _finish(output, records, history.upto(0))
    for later in source.later:
        if not is_whole:
            break
        history = _begin(records, history, later, labeller)
        now += _label(labeller, history.later[later.generation - 1])
        is_whole = _finish(output, records, history.upto(later.generation))
    files = output.files()
    names = [name for name in history.names_by_part() if name in files]
    counting = Counting()
    for _ in counting.rejects(output.footers(names, files)):
        pass
    of_retries = sum(len(retry.names[labeller.vectors.model]) for retry in source.retries)
    labelled = sum(name in files for retry in history.retries for name in retry.names_by_part())
    return Mirrored(now, sum(counting.written.values()), labelled, of_retries - labelled)


def _label(labeller: Labeller, plan: Plan) -> int:
    """Files of one generation that were missing, and whose source is there."""
    output, made = labeller.vectors.output, 0
    files = output.files()
    generation = plan.generation if isinstance(plan, RetryPlan) else 0
    for _, part, name in plan.files():
        number = (generation << GENERATION_SHIFT) + part.index
        if number in labeller.vectors.parts and name not in files:
            made += output.put_once(name, labeller.encode(number, part, plan)) == "created"
    return made


def _begin(records: Output, history: History, later: LaterPlan, labeller: Labeller) -> History:
    """With the generation that mirrors this one: its plan and its record, ours if we are first."""
    generation = later.generation
    if history.generation < generation:
        parent = records.read(of_generation(MANIFEST, generation - 1))
        assert parent is not None, "all before is whole"
        plan, digest = store_later(records, _encode(later, parent, history, labeller), history)
        history = History(history.first, (*history.later, plan))
    else:
        plan = history.later[generation - 1]
        digest = plan_hash(records.read(of_generation(PLAN, generation)) or b"")
    records.record(of_generation(RUN, generation), describe(plan, digest))
    return history


def _encode(later: LaterPlan, parent: bytes, history: History, labeller: Labeller) -> bytes:
    """The partition's own plan of a generation, from the model's."""
    if not isinstance(later, RetryPlan):
        return encode_extension(Plan(later.parts, history.first.identities), later.generation, parent)
    of, own = labeller.partition, labeller.vectors.model
    rejects = {part: {of: by_model[own]} for part, by_model in later.rejects.items() if own in by_model}
    return encode_retry(to_table(rejects), later.generation, parent, later.reasons)


def _finish(output: Output, records: Output, history: History) -> bool:
    """Whether the last generation of `history` has all its files; its rejects, manifest and _SUCCESS where it has."""
    files, generation = output.files(), history.generation
    plan = history.later[-1] if history.later else history.first
    names = list(plan.names_by_part())
    if not files.keys() >= set(names):
        return False
    counting = Counting()
    rejects: Any = counting.rejects(output.footers(names, files))
    if generation:
        again = pa.Table.from_pylist(list(rejects), schema=REJECT_SCHEMA)
        retried = plan.rejects if isinstance(plan, RetryPlan) else {}
        rejects = supersede(_standing(records, generation - 1), to_table(retried), again)
    records.put_once(of_generation(REJECTS, generation), encode_rejects(rejects))
    records.put_once(of_generation(MANIFEST, generation), encode_manifest(counting, files, {}))
    found = counting.totals(len(plan.parts))
    if generation:
        found = totals(history, read_manifests(records, history), _standing(records, generation))
    records.succeed(found, of_generation(SUCCESS, generation), history.records())
    return True


def _standing(records: Output, generation: int) -> pa.Table:
    table = read_standing(records, generation)
    if table is None:
        raise StorageError(f"{records.uri}: {of_generation(REJECTS, generation)} is gone", hint="put it back")
    return table


def _refuse_foreign(output: Output, history: History, partition: str) -> None:
    ours = {name for name in are_derived(output.files()) if name.startswith(f"model={partition}/")}
    foreign = sorted(ours - set(history.names_by_part()))
    if foreign:
        raise RunMismatch(
            f"{output.uri} holds files of another run in model={partition}: {foreign[0]} ({len(foreign)} in all)",
            hint="move them away, or give another --name",
        )


def _fields() -> list[pa.Field]:
    return [pa.field("labels", LABELS, nullable=False), pa.field("confidence", pa.float32(), nullable=False)]


def _columns(classifier: Classifier, unit_BD: Any, classes: Sequence[str]) -> list[pa.Array]:
    """The best classes with their calibrated probabilities, of equal ones the lower id first; and the first's alone."""
    shares_BK = classifier.probabilities(unit_BD).astype(np.float32)
    k = min(TOP_K, len(classes))
    ids_Bk = np.argsort(-shares_BK, axis=1, kind="stable")[:, :k].astype(np.int32)
    scores_Bk = np.take_along_axis(shares_BK, ids_Bk, 1)
    names = pa.array(classes, pa.string()).take(pa.array(ids_Bk.reshape(-1)))
    best = pa.StructArray.from_arrays(
        [pa.array(ids_Bk.reshape(-1)), names, pa.array(scores_Bk.reshape(-1))], fields=list(LABEL)
    )
    offsets = pa.array(np.arange(len(unit_BD) + 1, dtype=np.int32) * k)
    return [pa.ListArray.from_arrays(offsets, best, type=LABELS), pa.array(scores_Bk[:, 0])]
