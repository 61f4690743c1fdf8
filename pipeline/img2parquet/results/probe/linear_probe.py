"""Label all rows of a model from a few labels and its embeddings, as the partition `model=<name>+probe`.

    OUT/model=<name>+probe/part-<index>-<id>.parquet   one for each part of the model: base and kept columns, `labels`
                                                       (calibrated, in the form of output `labels`) and `confidence`
    OUT/_derived/<name>+probe/                         its classifier, plan, record, rejects, manifest, _SUCCESS

* The classifier is fitted once and stored; the partition's identity holds its digest, the model's identity and the
  labels' digest. The same command resumes, and follows a model that is not complete yet.
* Each file mirrors its source, with the same rows in the same order and the same rejects, so `verify` accepts the
  union. Rows that a retry added are labelled in the same generation of the partition (`label_partition.py`), now or by
  the same command later.
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
from safetensors.numpy import load, save

from img2parquet.dataset.commit import Output
from img2parquet.dataset.derived import records_of
from img2parquet.dataset.plan import Plan
from img2parquet.errors import InputError, NotFound, RunMismatch, StorageError
from img2parquet.results.embeddings import Vectors, open_vectors
from img2parquet.results.probe.classifier import Classifier, Report, fit
from img2parquet.results.probe.label_file import gather, read_labels
from img2parquet.results.probe.label_partition import Labeller, label_partition, most_labels
from img2parquet.results.probe.multi_label import fit_multi_label
from img2parquet.storage import join

PROBE_VERSION = 1  # raise by hand when the same labels would give other numbers
CLASSIFIER = "_classifier.safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class ProbeSummary:
    """Result of `fit_probe`."""

    output_uri: str
    model: str
    parts: int
    parts_now: int
    parts_left: int  # of the model's own run, not committed yet
    rows: int
    report: dict[str, Any]
    left_out: tuple[str, ...]  # kept columns whose name the partition uses itself
    retry_files: int = 0  # of retries, with labels; counted in the rows
    retry_files_left: int = 0  # of retries, without labels yet


def fit_probe(
    uri: str,
    labels: str,
    model: str | None = None,
    column: str | None = None,
    *,
    name: str | None = None,
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> ProbeSummary:
    """Fit a linear classifier on a few labelled rows, and label every row of the output with it.

    The labels are written beside the model's own rows as one more partition. The same call resumes, and follows a job
    that is still running.

    uri: the job's `output.uri`. labels: path or URI of a CSV file with the columns key, label and, optionally, shard.
    With a column labels in place of label, a row has any number of labels, as `cat|outdoor`, and each class gets a
    probability of its own. model, column: which embedding to use, when the output has several. name: the new partition,
    by default `<model>+probe`. seed: of the cross-validation folds and the held-out rows. storage_options: as under
    `output` in the job file.

    Raises InputError when the labels cannot be used, RunMismatch when the partition was made from other labels or
    another run, MissingDependency when scikit-learn is not installed, StorageError when the output cannot be
    written."""
    vectors = open_vectors(uri, model, column, storage_options=storage_options)
    partition = name or f"{vectors.model}+probe"
    if not NAME.fullmatch(partition) or partition in vectors.plan.identities:
        raise InputError(
            f"--name {partition}: not a valid name for a new partition", hint="use letters, digits, `.`, `_`, `+`, `-`"
        )
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
        unit_ND, classes = gather(vectors, file)
        if file.has_several:
            classifier, report = fit_multi_label(unit_ND, classes.astype(bool), list(file.classes), seed)
        else:
            classifier, report = fit(unit_ND, classes, file.classes, seed)
        vectors.output.check_store()
        data = _encode(classifier, report, file.classes, request)
        if records.put_once(CLASSIFIER, data) == "done":
            data = _stored_classifier(records, request)
            assert data is not None
    return _label_all(vectors, records, partition, data)


def _label_all(vectors: Vectors, records: Output, partition: str, data: bytes) -> ProbeSummary:
    """Label every committed part of the model that has no labels yet; finalize when all parts have."""
    classifier, header = _decode(data)
    identity = _identity(vectors, header, classifier, hashlib.sha256(data).hexdigest())
    plan, digest = records.begin(
        {partition: identity}, lambda: Plan(vectors.history.first.parts, {partition: identity})
    )
    report = header["report"]
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
    labeller = Labeller(vectors, partition, classifier, tuple(header["classes"]))
    made = label_partition(labeller, records, plan)
    return ProbeSummary(
        output_uri=vectors.output.uri,
        model=partition,
        parts=len(vectors.plan.parts),
        parts_now=made.now,
        parts_left=vectors.parts_left,
        rows=made.rows,
        report=report,
        left_out=labeller.left_out,
        retry_files=made.retry_files,
        retry_files_left=made.retry_files_left,
    )


def _identity(vectors: Vectors, header: Mapping[str, Any], classifier: Classifier, digest: str) -> dict[str, Any]:
    """Return what the partition's rows depend on, with classes and outputs in the form of a model's identity."""
    classes = header["classes"]
    return {
        **header["request"],
        "result_version": PROBE_VERSION,
        "family": "probe",
        "weights": digest,
        "config": {"id2label": {str(id): name for id, name in enumerate(classes)}},
        "outputs": [{"kind": "labels", "name": "labels", "top_k": most_labels(classifier)}],
        **({"scores": classifier.function} if classifier.function != "softmax" else {}),
        "input": vectors.plan.identities[vectors.model].get("input", {}),
    }


def _encode(classifier: Classifier, report: Report, classes: tuple[str, ...], request: Mapping[str, Any]) -> bytes:
    """Encode the arrays as safetensors with everything else as JSON in the header; equal fits give equal bytes."""
    plain = {name: getattr(classifier, name) for name in ("kind", "setting", "temperature")}
    if classifier.function != "softmax":  # what earlier versions stored stays as it was
        plain["function"] = classifier.function
    told = {name: value for name, value in asdict(report).items() if name != "f1" or value is not None}
    header = {"classifier": plain, "classes": list(classes), "report": told, "request": dict(request)}
    arrays = {"first": np.ascontiguousarray(classifier.first), "second": np.ascontiguousarray(classifier.second)}
    return bytes(save(arrays, metadata={"img2parquet": json.dumps(header, sort_keys=True)}))


def _decode(data: bytes) -> tuple[Classifier, dict[str, Any]]:
    header = _header(data)
    arrays = load(data)
    plain, classes = header["classifier"], len(header["classes"])
    return Classifier(**plain, classes=classes, first=arrays["first"], second=arrays["second"]), header


def _header(data: bytes) -> dict[str, Any]:
    """Read what `_encode` stored beside the arrays: eight bytes of length, then the header as JSON."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["img2parquet"])
    return header


def _stored_classifier(records: Output, request: Mapping[str, Any]) -> bytes | None:
    """Read the classifier, where one was fitted before. Raises RunMismatch when it was fitted for another request."""
    try:
        data = records.store.read(join(records.uri, CLASSIFIER))
        header = _header(data)
    except NotFound:
        return None
    except (ValueError, KeyError) as error:
        raise StorageError(f"{join(records.uri, CLASSIFIER)}: cannot be read: {error}") from None
    changed = [
        text
        for name, text in (("source", "the model's run"), ("labels_sha256", "the labels"), ("seed", "the seed"))
        if header["request"].get(name) != request[name]
    ]
    if header["request"] != request:
        raise RunMismatch(
            f"{records.uri.rpartition('/')[2]} already exists, made from another request: "
            f"{' and '.join(changed) or 'the version of the probe'} differ",
            hint="give another --name; nothing is overwritten",
        )
    return data
