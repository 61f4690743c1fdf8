"""A few labels and a model's embeddings -> labels for all of its rows, as the partition `model=<name>+probe`.

    OUT/model=<name>+probe/part-<index>-<id>.parquet   one for each part of the model: base and kept columns, `labels`
                                                       (calibrated, as output `labels` has them) and `confidence`
    OUT/_derived/<name>+probe/                         its classifier, plan, record, rejects, manifest, _SUCCESS

* The classifier is fitted once and stored; the partition's identity holds its digest, the model's identity and the
  labels' digest. The same command goes on where it was, and follows a model that is not complete yet.
* Each file mirrors its source: the same rows in the same order, the same rejects, so `verify` accepts the union. What a
  retry added is mirrored by the same generation of the partition (`mirror.py`), now or by the same command later.
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

from pipeline.commit import Output
from pipeline.derived import records_of
from pipeline.embeddings import Vectors, open_vectors
from pipeline.errors import InputError, NotFound, RunMismatch, StorageError
from pipeline.few_shot import Classifier, Report, fit
from pipeline.label_file import gather, read_labels
from pipeline.mirror import TOP_K, Labeller, mirror
from pipeline.plan import Plan
from pipeline.storage import join

PROBE_VERSION = 1  # raised by hand when the same labels would give other numbers
CLASSIFIER = "_classifier.safetensors"
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
    retry_files: int = 0  # with rows that retries won and that have labels; of the rows
    retry_files_left: int = 0  # of a retry that has not ended


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
    plan, digest = records.begin(
        {partition: identity}, lambda: Plan(vectors.history.first.parts, {partition: identity})
    )
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
    labeller = Labeller(vectors, partition, classifier, tuple(said["classes"]))
    made = mirror(labeller, records, plan)
    return Probed(
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
