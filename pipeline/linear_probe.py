"""A few labels and a model's embeddings -> labels for all of its rows, as the partition `model=<name>+probe`.

    OUT/model=<name>+probe/part-<index>-<id>.parquet   one for each part of the model: base and kept columns, `labels`
                                                       (calibrated, as output `labels` has them) and `confidence`
    OUT/_derived/<name>+probe/                         its classifier, plan, record, rejects, manifest, _SUCCESS

* The classifier is fitted once and stored; the partition's identity holds its digest, the model's identity and the
  labels' digest. The same command goes on where it was, and follows a model that is not complete yet.
* Each part mirrors its source: the same rows in the same order, the same rejects, so `verify` accepts the union. Rows
  that a retry won are in no part of the plan, and are not labelled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load, save

from pipeline.batch import Embedded
from pipeline.commit import MANIFEST, REJECTS, Output, parse_footer
from pipeline.derived import are_derived, records_of
from pipeline.embeddings import Vectors, open_vectors, unit_vectors
from pipeline.errors import InputError, NotFound, RunMismatch, StorageError
from pipeline.few_shot import Classifier, Report, fit
from pipeline.finish import Counting, encode_manifest
from pipeline.generations import encode_rejects
from pipeline.label_file import gather, read_labels
from pipeline.outputs.labels import LABEL, LABELS
from pipeline.plan import Plan
from pipeline.schema import RESERVED_COLUMNS, Part, Reject
from pipeline.storage import join
from pipeline.write import encode_part

PROBE_VERSION = 1  # raised by hand when the same labels would give other numbers
CLASSIFIER = "_classifier.safetensors"
TOP_K = 5
ADDED = ("labels", "confidence")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Probed:
    """What a call of `probe` did. `parts_left`: of the model's own run, not committed yet."""

    output_uri: str
    model: str
    parts: int
    parts_now: int
    parts_left: int
    rows: int
    report: dict[str, Any]
    left_out: tuple[str, ...]  # kept columns that have the name of one of ours
    retried_files: int = 0  # with rows that retries won; they are not labelled


def probe(
    uri: str,
    labels: str,
    model: str | None = None,
    column: str | None = None,
    *,
    name: str | None = None,
    seed: int = 0,
    **storage_options: Any,
) -> Probed:
    """Fit on the rows that `labels` (a CSV: key,label[,shard]) names, label all. The same call resumes.

    name: the partition, default `<model>+probe`. Raises InputError for labels that cannot work, RunMismatch where the
    partition was made from others, MissingDependency, StorageError."""
    vectors = open_vectors(uri, model, column, **storage_options)
    partition = name or f"{vectors.model}+probe"
    if not NAME.fullmatch(partition) or partition in vectors.plan.identities:
        raise InputError(f"--name {partition}: not a name for a new partition", hint="letters, digits, `.`, `_`, `+`")
    file = read_labels(labels)
    request = {
        "version": PROBE_VERSION,
        "source": {"model": vectors.model, "identity": vectors.identity, "column": vectors.column},
        "labels_sha256": file.sha256,
        "seed": seed,
    }
    records = records_of(vectors.output, partition)
    data = _stored_classifier(records, request)
    if data is None:
        classifier, report = fit(*gather(vectors, file), file.classes, seed)
        vectors.output.check_store()
        data = _encode(classifier, report, file.classes, request)
        if records.put_once(CLASSIFIER, data) == "done":
            data = _stored_classifier(records, request)
            assert data is not None
    return _label_all(vectors, records, partition, data)


def _label_all(vectors: Vectors, records: Output, partition: str, data: bytes) -> Probed:
    """Every part of the model that is committed and has no labels yet; then the end, where all have."""
    classifier, said = _decode(data)
    identity = _identity(vectors, said, hashlib.sha256(data).hexdigest())
    plan, digest = records.begin({partition: identity}, lambda: Plan(vectors.plan.parts, {partition: identity}))
    report = said["report"]
    if records.run_record() is None:
        records.record_run(
            {
                "identities": {partition: {"hash": plan.identity(partition), **identity}},
                "plan_sha256": digest,
                "parts": len(plan.parts),
                "report": report,
                "versions": {library: version(library) for library in ("numpy", "pyarrow", "scikit-learn")},
            }
        )
    files, made = vectors.output.files(), 0
    _refuse_foreign(vectors.output, plan, partition, files)
    for part, file_name in zip(plan.parts, plan.names[partition], strict=True):
        if part.index in vectors.parts and file_name not in files:
            encoded = _label_part(vectors, part, partition, plan, classifier, said["classes"])
            made += vectors.output.put_once(file_name, encoded) == "created"
    rows = _finish(vectors.output, records, plan, is_whole=not vectors.parts_left)
    left_out = tuple(sorted(set(ADDED) & set(_source_schema(vectors).names) & set(_kept(vectors))))
    later = len(vectors.parts) + vectors.parts_left - len(plan.parts)
    left = vectors.parts_left
    return Probed(vectors.output.uri, partition, len(plan.parts), made, left, rows, report, left_out, later)


def _identity(vectors: Vectors, said: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """What the partition's rows depend on; with its classes and outputs where those of a model have them."""
    classes = said["classes"]
    return {
        **said["request"],
        "result_version": PROBE_VERSION,
        "family": "probe",
        "weights": digest,
        "config": {"id2label": {str(id): name for id, name in enumerate(classes)}},
        "outputs": [{"kind": "labels", "name": "labels", "top_k": min(TOP_K, len(classes))}],
        "input": vectors.plan.identities[vectors.model].get("input", {}),
    }


def _label_part(
    vectors: Vectors, part: Part, partition: str, plan: Plan, classifier: Classifier, classes: list[str]
) -> bytes:
    """One part's file: a row group at a time, with the rejects of the part that it is made from."""
    kept = [name for name in _source_schema(vectors).names if name in RESERVED_COLUMNS or name in _kept(vectors)]
    kept = [name for name in kept if name not in ADDED]
    with vectors.open(part.index) as file:
        footer = parse_footer(file.metadata)
        schema = pa.schema([*(file.schema_arrow.field(name) for name in kept), *_fields()])
        tables = [schema.empty_table()]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*kept, vectors.column])
            unit_BD = unit_vectors(table, vectors.column)
            arrays = [*(table.column(name) for name in kept), *_columns(classifier, unit_BD, classes)]
            tables.append(pa.Table.from_arrays(arrays, schema=schema))
    rejects = tuple(Reject(**reject) for reject in footer.rejects)
    whole = Embedded(part.index, 0, {partition: pa.concat_tables(tables)}, {partition: rejects}, footer.rows_in)
    about = plan.identities[partition]
    return encode_part(part, partition, plan.identity(partition), [whole], about).data


def _fields() -> list[pa.Field]:
    return [pa.field("labels", LABELS, nullable=False), pa.field("confidence", pa.float32(), nullable=False)]


def _columns(classifier: Classifier, unit_BD: Any, classes: list[str]) -> list[pa.Array]:
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


def _source_schema(vectors: Vectors) -> pa.Schema:
    with vectors.open(next(iter(vectors.parts))) as file:
        return file.schema_arrow


def _kept(vectors: Vectors) -> list[str]:
    """Passthrough columns: all that are neither the base's nor an output's. An output's come last, embeddings and what
    a model wrote stay with the model."""
    said = vectors.plan.identities[vectors.model].get("input", {}).get("keep", ())
    names = [entry.partition(":")[0] for entry in said]
    return [name for name in names if name in _source_schema(vectors).names]


def _finish(output: Output, records: Output, plan: Plan, is_whole: bool) -> int:
    """Rows that have labels; and at the end of it all the rejects, the manifest and _SUCCESS."""
    files = output.files()
    names = [name for name in plan.names_by_part() if name in files]
    counting = Counting()
    rejects = encode_rejects(counting.rejects(output.footers(names, files)))
    if is_whole and len(names) == len(plan.parts):
        records.put_once(REJECTS, rejects)
        records.put_once(MANIFEST, encode_manifest(counting, files, {}))
        records.succeed(counting.totals(len(plan.parts)))
    return sum(counting.written.values())


def _refuse_foreign(output: Output, plan: Plan, partition: str, files: Mapping[str, Any]) -> None:
    ours = {name for name in are_derived(files) if name.startswith(f"model={partition}/")}
    foreign = sorted(ours - set(plan.names[partition]))
    if foreign:
        raise RunMismatch(
            f"{output.uri} holds files of another run in model={partition}: {foreign[0]} ({len(foreign)} in all)",
            hint="move them away, or give another --name",
        )


def _encode(classifier: Classifier, report: Report, classes: tuple[str, ...], request: Mapping[str, Any]) -> bytes:
    """The arrays, and all else as JSON in the header: the same bytes for the same fit."""
    plain = {name: getattr(classifier, name) for name in ("kind", "setting", "temperature")}
    said = {"classifier": plain, "classes": list(classes), "report": asdict(report), "request": dict(request)}
    arrays = {"first": np.ascontiguousarray(classifier.first), "second": np.ascontiguousarray(classifier.second)}
    return bytes(save(arrays, metadata={"img2parquet": json.dumps(said, sort_keys=True)}))


def _decode(data: bytes) -> tuple[Classifier, dict[str, Any]]:
    said = _header(data)
    arrays = load(data)
    plain, classes = said["classifier"], len(said["classes"])
    return Classifier(**plain, classes=classes, first=arrays["first"], second=arrays["second"]), said


def _header(data: bytes) -> dict[str, Any]:
    """What `_encode` put beside the arrays. Eight bytes say how long the header is, which is JSON."""
    length = int.from_bytes(data[:8], "little")
    said: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["img2parquet"])
    return said


def _stored_classifier(records: Output, request: Mapping[str, Any]) -> bytes | None:
    """The classifier that was fitted before for the same request. Raises RunMismatch where it was another."""
    try:
        data = records.store.read(join(records.uri, CLASSIFIER))
        said = _header(data)
    except NotFound:
        return None
    except (ValueError, KeyError) as error:
        raise StorageError(f"{join(records.uri, CLASSIFIER)}: cannot be read: {error}") from None
    what = [
        text
        for name, text in (("source", "the model's run"), ("labels_sha256", "the labels"), ("seed", "the seed"))
        if said["request"].get(name) != request[name]
    ]
    if said["request"] != request:
        raise RunMismatch(
            f"{records.uri.rpartition('/')[2]} is there already, made from another request: "
            f"{' and '.join(what) or 'the version of the probe'} differ",
            hint="give another --name; nothing is overwritten",
        )
    return data
