"""Label a model's committed rows with a classifier, file by file, as a partition of their own.

Shapes: B rows of a row group, D values of a vector, K classes, k best of them.

* Each file has the rows of its source in the same order and the same rejects; that of a retry also supersedes the same.
* Rows that a retry or an extension added are labelled when all earlier ones are, into the same generation.
* The same command resumes: a file that exists is done, and records are created once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from img2parquet.batch import Embedded
from img2parquet.dataset.commit import MANIFEST, PLAN, RUN, Output
from img2parquet.dataset.derived import unplanned_files
from img2parquet.dataset.finalize import FooterTotals, finalize, mark_complete
from img2parquet.dataset.footer import parse_footer
from img2parquet.dataset.generations import (
    History,
    LaterPlan,
    RetryPlan,
    describe,
    encode_extension,
    encode_retry,
    of_generation,
    read_history,
    store_later,
)
from img2parquet.dataset.part_file import encode_part
from img2parquet.dataset.plan import Plan, plan_hash
from img2parquet.dataset.rejects import to_table
from img2parquet.errors import RunMismatch
from img2parquet.outputs.labels import LABEL, LABELS
from img2parquet.results.embeddings import GENERATION_SHIFT, Vectors, unit_vectors
from img2parquet.results.probe.classifier import Classifier
from img2parquet.schema import RESERVED_COLUMNS, Part, Reject

ADDED = ("labels", "confidence")


@dataclass(frozen=True)
class Labels:
    """Which labels a row gets: at most `top_k`, those with at least the score `threshold`."""

    top_k: int
    threshold: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Return them as the settings of the output `labels`; without the threshold where there is none."""
        return {"top_k": self.top_k, **({"threshold": self.threshold} if self.threshold else {})}


@dataclass(frozen=True)
class LabelledFiles:
    """Result of `label_partition`."""

    now: int  # files that this call made
    rows: int  # that have labels
    retry_files: int  # of retries, with labels
    retry_files_left: int  # of retries, without labels yet


@dataclass(frozen=True)
class Labeller:
    """Make files of the partition from the model's: base and kept columns, `labels` and `confidence`."""

    vectors: Vectors
    partition: str
    classifier: Classifier
    classes: tuple[str, ...]
    labels: Labels

    @property
    def left_out(self) -> tuple[str, ...]:
        """Kept columns that are left out since `labels` or `confidence` takes their name."""
        return tuple(sorted(set(ADDED) & set(self._passthrough)))

    def encode(self, number: int, part: Part, plan: Plan) -> bytes:
        """Encode the file whose source has this number in `Vectors.parts`. plan: of the partition, in the file's
        generation."""
        kept = [
            column for column in self.vectors.schema.names if column in RESERVED_COLUMNS or column in self._passthrough
        ]
        kept = [column for column in kept if column not in ADDED]
        with self.vectors.open(number) as file:
            footer = parse_footer(file.metadata)
            schema = pa.schema([*(file.schema_arrow.field(column) for column in kept), *_fields(self.classifier)])
            tables = [schema.empty_table()]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[*kept, self.vectors.column])
                unit_BD = unit_vectors(table, self.vectors.column)
                arrays = [*(table.column(column) for column in kept), *self._columns(unit_BD)]
                tables.append(pa.Table.from_arrays(arrays, schema=schema))
        rejects = tuple(Reject(**reject) for reject in footer.rejects)
        name = self.partition
        whole = Embedded(part.index, 0, {name: pa.concat_tables(tables)}, {name: rejects}, footer.rows_in)
        superseded = tuple(Reject(**reject) for reject in footer.superseded)
        about, generation = plan.identities[name], footer.generation
        return encode_part(
            part, name, plan.identity(name), [whole], about, generation=generation, superseded=superseded
        ).data

    def _columns(self, unit_BD: Any) -> list[pa.Array]:
        """Make `labels`, the best classes with their scores (on a tie the lower id first), and `confidence`, the score
        of the best, whether or not it reaches the threshold."""
        scores_BK = self.classifier.probabilities(unit_BD).astype(np.float32)
        ids_Bk = np.argsort(-scores_BK, axis=1, kind="stable")[:, : self.labels.top_k].astype(np.int32)
        scores_Bk = np.take_along_axis(scores_BK, ids_Bk, 1)
        kept_Bk = scores_Bk >= self.labels.threshold
        ids_N, stops_B = ids_Bk[kept_Bk], kept_Bk.sum(axis=1).cumsum()
        names_N = pa.array(self.classes, pa.string()).take(pa.array(ids_N))
        best_N = pa.StructArray.from_arrays(
            [pa.array(ids_N), names_N, pa.array(scores_Bk[kept_Bk])], fields=list(LABEL)
        )
        offsets = pa.array([0, *stops_B], pa.int32())
        return [pa.ListArray.from_arrays(offsets, best_N, type=LABELS), pa.array(scores_Bk[:, 0])]

    @cached_property
    def _passthrough(self) -> list[str]:
        """Columns that were kept from the input; those that the model wrote are not copied."""
        kept = self.vectors.plan.identities[self.vectors.model].get("input", {}).get("keep", ())
        names = [entry.partition(":")[0] for entry in kept]
        return [name for name in names if name in self.vectors.schema.names]


def label_partition(labeller: Labeller, records: Output, plan: Plan) -> LabelledFiles:
    """Label every committed file that has no labels yet, and finalize each generation that is complete.

    records: the folder of the partition's records. plan: the first of the partition. Raises RunMismatch when the
    partition has files of another run."""
    output, source = labeller.vectors.output, labeller.vectors.history
    history = read_history(records, plan, records.files())
    _refuse_foreign_files(output, records, history, labeller.partition)
    now = 0
    for generation in range(source.generation + 1):
        if generation:
            history = _start_generation(records, history, source.later[generation - 1], labeller)
        own = history.plans[generation]
        now += _label(labeller, own)
        files = output.files()
        if own.left(files):
            break
        totals = finalize(output, history, generation, files, records=records)
        mark_complete(records, history.upto(generation), totals)
    files = output.files()
    labelled = FooterTotals.of(output.footers((name for name in history.names_by_part() if name in files), files))
    of_retries = sum(len(retry.names[labeller.vectors.model]) for retry in source.retries)
    retries_labelled = sum(name in files for retry in history.retries for name in retry.names_by_part())
    return LabelledFiles(now, sum(labelled.written.values()), retries_labelled, of_retries - retries_labelled)


def _label(labeller: Labeller, plan: Plan) -> int:
    """Make the missing files of one generation whose source is committed; return how many this call made."""
    output, made = labeller.vectors.output, 0
    files = output.files()
    generation = plan.generation if isinstance(plan, RetryPlan) else 0
    for _, part, name in plan.files():
        number = (generation << GENERATION_SHIFT) + part.index
        if number in labeller.vectors.parts and name not in files:
            made += output.put_once(name, labeller.encode(number, part, plan)) == "created"
    return made


def _start_generation(records: Output, history: History, later: LaterPlan, labeller: Labeller) -> History:
    """Store the plan and the record of the generation that mirrors `later`, unless they exist; return the history with
    it."""
    generation = later.generation
    if history.generation < generation:
        parent = records.read(of_generation(MANIFEST, generation - 1))
        assert parent is not None, "the generation before has ended"
        plan, digest = store_later(records, _encode(later, parent, history, labeller), history)
        history = history.then(plan)
    else:
        plan = history.later[generation - 1]
        digest = plan_hash(records.read(of_generation(PLAN, generation)) or b"")
    records.record(of_generation(RUN, generation), describe(plan, digest))
    return history


def _encode(later: LaterPlan, parent: bytes, history: History, labeller: Labeller) -> bytes:
    """Encode the partition's own plan of a generation, from the model's."""
    if not isinstance(later, RetryPlan):
        return encode_extension(Plan(later.parts, history.first.identities), later.generation, parent)
    name, source = labeller.partition, labeller.vectors.model
    rejects = {part: {name: by_model[source]} for part, by_model in later.rejects.items() if source in by_model}
    return encode_retry(to_table(rejects), later.generation, parent, later.reasons)


def _refuse_foreign_files(output: Output, records: Output, history: History, partition: str) -> None:
    if foreign := unplanned_files(records, history, output.files()):
        raise RunMismatch(
            f"{output.uri} holds files of another run in model={partition}: {foreign[0]} ({len(foreign)} in all)",
            hint="move them away, or give another --name",
        )


def _fields(classifier: Classifier) -> list[pa.Field]:
    metadata = None if classifier.function == "softmax" else {"scores": classifier.function}
    return [
        pa.field("labels", LABELS, nullable=False, metadata=metadata),
        pa.field("confidence", pa.float32(), nullable=False),
    ]
