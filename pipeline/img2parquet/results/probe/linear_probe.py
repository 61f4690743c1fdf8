"""Label all rows of a model from a few labels and its embeddings, as the partition `model=<name>+probe`.

`classifier_partition.py` says what is written; here the classifier comes from labelled rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from img2parquet.results.embeddings import open_vectors
from img2parquet.results.probe.classifier import Classifier, fit
from img2parquet.results.probe.classifier_partition import Kind, Made, check_name, source_of, write_partition
from img2parquet.results.probe.label_file import gather, read_labels
from img2parquet.results.probe.label_partition import Labels
from img2parquet.results.probe.multi_label import fit_multi_label

PROBE_VERSION = 1  # raise by hand when the same labels would give other numbers
TOP_K, MOST_OF_SEVERAL = 5, 100  # labels of a row; of independent classes, of which any number may be true
PROBE = Kind("probe", ("numpy", "pyarrow", "scikit-learn"), {"labels_sha256": "the labels", "seed": "the seed"})


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
    check_name(vectors, partition)
    file = read_labels(labels)

    def fitted() -> Made:
        unit_ND, classes = gather(vectors, file)
        if file.has_several:
            classifier, report = fit_multi_label(unit_ND, classes.astype(bool), list(file.classes), seed)
        else:
            classifier, report = fit(unit_ND, classes, file.classes, seed)
        told = {name: value for name, value in asdict(report).items() if name != "f1" or value is not None}
        return Made(classifier, file.classes, told)

    request = {
        "version": PROBE_VERSION,
        "source": source_of(vectors),
        "labels_sha256": file.sha256,
        "seed": seed,
    }
    made = write_partition(vectors, partition, PROBE, request, fitted, most_labels)
    return ProbeSummary(
        output_uri=vectors.output.uri,
        model=made.model,
        parts=made.parts,
        parts_now=made.parts_now,
        parts_left=made.parts_left,
        rows=made.rows,
        report=made.report,
        left_out=made.left_out,
        retry_files=made.retry_files,
        retry_files_left=made.retry_files_left,
    )


def most_labels(classifier: Classifier) -> Labels:
    """Return how many labels each row gets."""
    return Labels(min(TOP_K if classifier.function == "softmax" else MOST_OF_SEVERAL, classifier.classes))
