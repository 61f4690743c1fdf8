"""Label all rows of a model by prompts, from its embeddings, as the partition `model=<name>+prompts-<hash>`.

`classifier_partition.py` says what is written; here the classifier comes from sentences, and no image is read. Vectors
of classes are those of `models/prompts.py`. Scores are what the reference's `logits_per_image` become: a softmax over
the classes for CLIP, a sigmoid of each class for SigLIP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from img2parquet.errors import InputError
from img2parquet.models.prompts import PLAIN, ClassPrompts, class_prompts
from img2parquet.outputs.score_function import ScoreFunction
from img2parquet.results.embeddings import Vectors, open_vectors
from img2parquet.results.probe.classifier import Classifier
from img2parquet.results.probe.classifier_partition import Kind, Made, source_of, write_partition
from img2parquet.results.probe.label_partition import Labels
from img2parquet.results.search.query_text import model_with_text

RELABEL_VERSION = 1  # raise by hand when the same prompts would give other numbers
PROMPTS = Kind(
    "prompts",
    ("numpy", "pyarrow", "torch", "tokenizers"),
    {"classes": "the classes", "prompts_sha256": "the prompts", "top_k": "`top_k`", "threshold": "the threshold"},
)


@dataclass(frozen=True)
class RelabelSummary:
    """Result of `relabel`: a new partition."""

    output_uri: str
    model: str  # the name of the partition
    classes: tuple[str, ...]
    parts: int
    parts_now: int
    parts_left: int  # of the model's own run, not committed yet
    rows: int
    left_out: tuple[str, ...]  # kept columns whose name the partition uses itself
    retry_files: int = 0  # of retries, with labels; counted in the rows
    retry_files_left: int = 0  # of retries, without labels yet


def relabel(
    uri: str,
    prompts: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    model: str | None = None,
    column: str | None = None,
    *,
    templates: str | Sequence[str] = PLAIN,
    top_k: int = 5,
    threshold: float = 0.0,
    name: str | None = None,
    checkpoint: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> RelabelSummary:
    """Label every row of an output by prompts, from the vectors that CLIP or SigLIP gave its image.

    The labels are written beside the model's own rows as one more partition. No image is read. The same call resumes,
    and follows a job that is still running; other prompts make another partition.

    uri: the job's `output.uri`. prompts: class names; or, by class, one or several prompts of its own; or the path or
    URI of a file: one class a line, or JSON or YAML. A class such as `other` with prompts as `a photo` takes the images
    that fit no other class. model, column: which embedding to use, when the output has several. templates: sentences
    with `{}` that turn class names into prompts: `plain`, `imagenet` (80), or a list. top_k, threshold: as in the
    output `labels`. name: the new partition, by default `<model>+prompts-<hash of the request>`. checkpoint: where the
    run's model is now, if it was moved. storage_options: as under `output` in the job file.

    Raises InputError for prompts that cannot be used, OutputUnavailable when the model has no text tower or the vectors
    are not of the space that it shares with images, CheckpointError when the weights are not the run's, RunMismatch
    when the partition was made from another request, and StorageError when the output cannot be written."""
    if top_k < 1 or not 0 <= threshold <= 1:
        raise InputError(f"top_k: {top_k}, threshold: {threshold}", hint="use 1 or more, and a score from 0 to 1")
    classes = class_prompts(prompts, templates)
    vectors = open_vectors(uri, model, column, storage_options=storage_options)
    request: dict[str, Any] = {
        "version": RELABEL_VERSION,
        "source": source_of(vectors),
        "classes": list(classes.names),
        "prompts_sha256": classes.sha256,
        "top_k": top_k,
        "threshold": threshold,
    }
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    made = write_partition(
        vectors,
        name or f"{vectors.model}+prompts-{digest[:8]}",
        PROMPTS,
        request,
        lambda: zero_shot(vectors, classes, checkpoint),
        lambda classifier: Labels(min(top_k, classifier.classes), threshold),
    )
    return RelabelSummary(
        output_uri=vectors.output.uri,
        model=made.model,
        classes=made.classes,
        parts=made.parts,
        parts_now=made.parts_now,
        parts_left=made.parts_left,
        rows=made.rows,
        left_out=made.left_out,
        retry_files=made.retry_files,
        retry_files_left=made.retry_files_left,
    )


def zero_shot(vectors: Vectors, classes: ClassPrompts, checkpoint: str | None) -> Made:
    """Make the classifier whose weights are the classes' vectors, with the model's own scale and offset.

    checkpoint: where the run's model is now. Raises as `model_with_text` does."""
    text = model_with_text(vectors, checkpoint).text
    classes.check_choice(text.problem)
    weight_KE, bias_K = classes.weights(text)
    function: ScoreFunction = "sigmoid" if text.problem == "multi_label_classification" else "softmax"
    K = len(classes.names)
    classifier = Classifier(
        "linear", 0.0, K, 1.0,
        first=weight_KE.astype(np.float64),
        second=bias_K.astype(np.float64),
        function=function,
    )  # fmt: skip
    prompts = {name: list(of_class) for name, of_class in zip(classes.names, classes.prompts, strict=True)}
    return Made(classifier, classes.names, {"prompts": prompts})
