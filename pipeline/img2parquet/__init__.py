"""Embed, label and segment image shards into Parquet.

This page is the map of the code. A package imports only packages that stand below it (`tests/test_imports.py` holds
that), and each package's own docstring lists its files.

    cli/           parse the command line, call one function, print
    engine/        run a job from start to end: schedule parts, watch them, commit them, retry rejects
    runners/       where the steps run: in this process, or on Ray's workers
    isolation/     contain images that kill the process which decodes them
    results/       read, verify, search, evaluate, label, report on and export an output
    inference/     take one batch through decoding, model and outputs on a device
    dataset/       what lies in an output: the plan, part files, commits, footers, generations, totals
    submit/        send a job to a Ray cluster elsewhere
    batch.py       the units of work and results that travel between processes
    run_identity.py  what decides a run's numbers, and how two runs differ
    job.py         the job file: its fields, defaults and checks
    outputs/       turn a model's features into columns
    models/        turn crops into features: a file for each family, and kernels/ compiled on the machine
    images/        turn image bytes into pixels, and pixels into crops of the model's size
    read/          turn shards into rows: a file for each input format
    telemetry/     logs, stage timing, Prometheus metrics, the flight recorder
    storage/       read, list and create objects by URI, on a disk, in S3 or over HTTP
    schema.py, errors.py  the few types and every exception that all of them share

The way of one image through a job:

    dataset/plan.py          list the input and cut it into parts, once
    read/                    read a part's rows: key, image bytes, passthrough columns
    batch.py                 group rows into batches
    images/decode.py         decode bytes into RGB pixels, or reject them with a reason
    images/preprocess.py     scale and crop pixels to the model's size
    models/                  compute features: pooled vectors, logits, tokens, maps
    outputs/                 reduce features to columns
    inference/steps.py       the worker's two steps, which call the four above
    engine/session.py        gather a part's batches
    dataset/part_file.py     encode a part as one Parquet file for each model
    dataset/commit.py        create the file, whole or not at all
    dataset/finalize.py      after the last part: rejects, manifest, totals and `_SUCCESS`

What a user calls is imported from here. `uri` is the job's `output.uri`, and comes first.

    run a job              load_job, parse_job, run, retry
    look at an output      status(uri), open_results(uri), read_rejects(uri), verify(uri), report(uri)
    use its columns        evaluate(uri, ...), find_mistakes(uri, ...), export(uri, ...), decode_vectors
    label it anew          fit_probe(uri, labels), relabel(uri, prompts)
    search it              search(uri, ...), build_index(uri), find_duplicates(uri, ...)
    use a model directly   load_model, embed, class_labels, class_masks, compute_loss
    extend the package     Source (read/), Output (outputs/), Family (models/): the protocols to implement

Every exception derives from `Img2ParquetError`; errors.py draws their tree. Names are imported when they are first
used, so `import img2parquet` loads neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from img2parquet.engine.driver import Summary, run
    from img2parquet.engine.retry import RetrySummary, retry
    from img2parquet.errors import (
        AccessDenied,
        AlreadyExists,
        CheckpointError,
        Img2ParquetError,
        InputError,
        JobError,
        JobFailed,
        MissingDependency,
        ModelError,
        NotFinite,
        NotFound,
        OutcomeUnknown,
        OutputUnavailable,
        PartFailed,
        PrivateAddress,
        Refused,
        RejectLimitExceeded,
        RunMismatch,
        Stopped,
        StorageError,
        UnknownModel,
        Unreachable,
        UserError,
    )
    from img2parquet.inference.embed_images import embed
    from img2parquet.inference.image_losses import compute_loss
    from img2parquet.job import JobSpec, load_job, parse_job
    from img2parquet.models import Family, load_model
    from img2parquet.models.model import Model
    from img2parquet.outputs import Output
    from img2parquet.outputs.labels import class_labels
    from img2parquet.outputs.segmentation import class_masks
    from img2parquet.outputs.vectors import decode_vectors
    from img2parquet.read import Source
    from img2parquet.results.embeddings import Hit
    from img2parquet.results.evaluation.evaluate import Evaluation, evaluate
    from img2parquet.results.evaluation.mistakes import MistakesSummary, find_mistakes
    from img2parquet.results.exports import ExportSummary, export
    from img2parquet.results.probe.linear_probe import ProbeSummary, fit_probe
    from img2parquet.results.probe.relabel import RelabelSummary, relabel
    from img2parquet.results.reader import Status, open_results, read_rejects, status
    from img2parquet.results.report import report
    from img2parquet.results.search.duplicates import DuplicateSummary, find_duplicates
    from img2parquet.results.search.index import IndexSummary, build_index
    from img2parquet.results.search.search import SearchResult, search
    from img2parquet.results.verify import verify

_HOME = {
    "job": ("JobSpec", "load_job", "parse_job"),
    "engine.driver": ("Summary", "run"),
    "engine.retry": ("RetrySummary", "retry"),
    "results.reader": ("Status", "open_results", "read_rejects", "status"),
    "results.verify": ("verify",),
    "results.report": ("report",),
    "results.evaluation.evaluate": ("Evaluation", "evaluate"),
    "results.evaluation.mistakes": ("MistakesSummary", "find_mistakes"),
    "results.probe.linear_probe": ("ProbeSummary", "fit_probe"),
    "results.probe.relabel": ("RelabelSummary", "relabel"),
    "results.exports": ("ExportSummary", "export"),
    "results.embeddings": ("Hit",),
    "results.search.search": ("SearchResult", "search"),
    "results.search.index": ("IndexSummary", "build_index"),
    "results.search.duplicates": ("DuplicateSummary", "find_duplicates"),
    "inference.embed_images": ("embed",),
    "inference.image_losses": ("compute_loss",),
    "models": ("Family", "load_model"),
    "models.model": ("Model",),
    "outputs": ("Output",),
    "outputs.segmentation": ("class_masks",),
    "outputs.labels": ("class_labels",),
    "outputs.vectors": ("decode_vectors",),
    "read": ("Source",),
    "errors": (
        "AccessDenied", "AlreadyExists", "CheckpointError", "Img2ParquetError", "InputError", "JobError", "JobFailed",
        "MissingDependency", "ModelError", "NotFinite", "NotFound", "OutcomeUnknown", "OutputUnavailable", "PartFailed",
        "PrivateAddress", "Refused", "RejectLimitExceeded", "RunMismatch", "Stopped", "StorageError", "UnknownModel",
        "Unreachable", "UserError",
    ),
}  # fmt: skip

__all__ = [
    "AccessDenied", "AlreadyExists", "CheckpointError", "DuplicateSummary", "Evaluation", "ExportSummary", "Family",
    "Hit", "Img2ParquetError", "IndexSummary", "InputError", "JobError", "JobFailed", "JobSpec",
    "MissingDependency", "MistakesSummary", "Model", "ModelError", "NotFinite", "NotFound", "OutcomeUnknown", "Output",
    "OutputUnavailable", "PartFailed", "PrivateAddress", "ProbeSummary", "Refused", "RejectLimitExceeded",
    "RelabelSummary", "RetrySummary", "RunMismatch", "SearchResult", "Source", "Status", "Stopped", "StorageError",
    "Summary", "UnknownModel", "Unreachable", "UserError", "build_index", "class_labels", "class_masks", "compute_loss",
    "decode_vectors", "embed", "evaluate", "export", "find_duplicates", "find_mistakes", "fit_probe", "load_job",
    "load_model", "open_results", "parse_job", "read_rejects", "relabel", "report", "retry", "run", "search", "status",
    "verify",
]  # fmt: skip

_MODULES = {name: module for module, names in _HOME.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module `img2parquet` has no attribute `{name}`")
        from importlib import import_module

        return getattr(import_module(f"img2parquet.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
