"""Store a classifier, and label all rows of a model with it, as a partition of the output.

    OUT/model=<name>/part-<index>-<id>.parquet   one for each part of the source: base and kept columns, `labels` (as
                                                 the output `labels` has them) and `confidence`
    OUT/_derived/<name>/                         its classifier, plan, record, rejects, manifest, _SUCCESS

* The classifier is made once and stored; the partition's identity holds its digest and the source's identity. The same
  request resumes, and follows a model that is not complete yet.
* Each file mirrors its source, with the same rows in the same order and the same rejects, so `verify` accepts the
  union. Rows that a retry added are labelled in the same generation of the partition (`label_partition.py`), now or by
  the same request later.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from img2parquet.dataset.commit import Output
from img2parquet.dataset.derived import records_of
from img2parquet.dataset.plan import Plan
from img2parquet.errors import InputError, NotFound, RunMismatch, StorageError
from img2parquet.results.embeddings import Vectors
from img2parquet.results.probe.classifier import Classifier
from img2parquet.results.probe.label_partition import Labeller, Labels, label_partition
from img2parquet.storage import join

CLASSIFIER = "_classifier.safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Made:
    """What a request makes: a classifier, its classes by id, and what is reported of it."""

    classifier: Classifier
    classes: Sequence[str]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """Result of `write_partition`."""

    model: str
    parts: int
    parts_now: int
    parts_left: int  # of the model's own run, not committed yet
    rows: int
    classes: tuple[str, ...]
    report: dict[str, Any]
    left_out: tuple[str, ...]  # kept columns whose name the partition uses itself
    retry_files: int  # of retries, with labels; counted in the rows
    retry_files_left: int  # of retries, without labels yet


@dataclass(frozen=True)
class Kind:
    """What makes these partitions: `family` in their identity, the libraries that their values depend on, and the
    fields of a request that say in words what differs."""

    family: str
    libraries: tuple[str, ...]
    fields: Mapping[str, str]


def source_of(vectors: Vectors) -> dict[str, str]:
    """Return what a request says of the vectors that it labels."""
    return {"model": vectors.model, "identity": vectors.identity, "column": vectors.column}


def check_name(vectors: Vectors, partition: str) -> None:
    """Raise InputError when a partition cannot have this name."""
    if not NAME.fullmatch(partition) or partition in vectors.plan.identities:
        raise InputError(
            f"--name {partition}: not a valid name for a new partition", hint="use letters, digits, `.`, `_`, `+`, `-`"
        )


def write_partition(
    vectors: Vectors,
    partition: str,
    kind: Kind,
    request: Mapping[str, Any],
    make: Callable[[], Made],
    labels: Callable[[Classifier], Labels],
) -> Written:
    """Label every committed part of the model that has no labels yet; finalize when all parts have.

    request: everything that the classifier depends on, with a `version`. make: called where none is stored. labels:
    which labels each row gets. Raises RunMismatch when the partition was made from another request."""
    check_name(vectors, partition)
    records = records_of(vectors.output, partition)
    data = _stored_classifier(records, request, kind)
    if data is None:
        made = make()
        vectors.output.check_store()
        data = _encode(made, request)
        if records.put_once(CLASSIFIER, data) == "done":
            data = _stored_classifier(records, request, kind)
            assert data is not None
    classifier, header = _decode(data)
    labeller = Labeller(vectors, partition, classifier, tuple(header["classes"]), labels(classifier))
    identity = _identity(labeller, header, kind, hashlib.sha256(data).hexdigest())
    plan, digest = records.begin(
        {partition: identity}, lambda: Plan(vectors.history.first.parts, {partition: identity})
    )
    if records.run_record() is None:
        records.record_run(
            {
                "identities": {partition: {"hash": plan.identity(partition), **identity}},
                "plan_sha256": digest,
                "parts": len(plan.parts),
                "report": header["report"],
                "versions": {library: version(library) for library in kind.libraries},
            }
        )
    done = label_partition(labeller, records, plan)
    return Written(
        model=partition,
        parts=len(vectors.plan.parts),
        parts_now=done.now,
        parts_left=vectors.parts_left,
        rows=done.rows,
        classes=labeller.classes,
        report=header["report"],
        left_out=labeller.left_out,
        retry_files=done.retry_files,
        retry_files_left=done.retry_files_left,
    )


def _identity(labeller: Labeller, header: Mapping[str, Any], kind: Kind, digest: str) -> dict[str, Any]:
    """Return what the partition's rows depend on, with classes and outputs in the form of a model's identity."""
    vectors, function = labeller.vectors, labeller.classifier.function
    return {
        **header["request"],
        "result_version": header["request"]["version"],
        "family": kind.family,
        "weights": digest,
        "config": {"id2label": {str(id): name for id, name in enumerate(labeller.classes)}},
        "outputs": [{"kind": "labels", "name": "labels", **labeller.labels.settings()}],
        **({"scores": function} if function != "softmax" else {}),
        "input": vectors.plan.identities[vectors.model].get("input", {}),
    }


def _encode(made: Made, request: Mapping[str, Any]) -> bytes:
    """Encode the arrays as safetensors with everything else as JSON in the header; equal classifiers give equal
    bytes."""
    classifier = made.classifier
    plain = {name: getattr(classifier, name) for name in ("kind", "setting", "temperature")}
    if classifier.function != "softmax":  # what earlier versions stored stays as it was
        plain["function"] = classifier.function
    header = {
        "classifier": plain,
        "classes": list(made.classes),
        "report": dict(made.report),
        "request": dict(request),
    }
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


def _stored_classifier(records: Output, request: Mapping[str, Any], kind: Kind) -> bytes | None:
    """Read the classifier, where one was made before. Raises RunMismatch when it was made for another request."""
    try:
        data = records.store.read(join(records.uri, CLASSIFIER))
        header = _header(data)
    except NotFound:
        return None
    except (ValueError, KeyError) as error:
        raise StorageError(f"{join(records.uri, CLASSIFIER)}: cannot be read: {error}") from None
    if header["request"] != request:
        fields = {"source": "the model's run", **kind.fields}
        changed = [text for name, text in fields.items() if header["request"].get(name) != request.get(name)]
        raise RunMismatch(
            f"{records.uri.rpartition('/')[2]} already exists, made from another request: "
            f"{' and '.join(changed) or 'the version of img2parquet'} differ",
            hint="give another --name; nothing is overwritten",
        )
    return data
