"""img2parquet: image shards in, Parquet datasets of what models see in them out.

The way of one image, a file for each step:

    plan.py         URIs -> parts, fixed once; packed.py: many of them in little memory
    read/           part -> rows: key, image bytes, passthrough columns
    batch.py        rows -> batches, the atoms that travel between processes
    decode.py       bytes -> RGB pixels, or a reject with a reason
    preprocess.py   pixels -> uint8 crop of the model's size
    models/         crops -> features (pooled, logits, tokens, maps)
    outputs/        features -> columns
    embed.py        the worker: one batch through the five steps above; allocator.py: the C library's, as it is told
    write.py        a part's rows and rejects -> one encoded Parquet file per model
    commit.py       encoded part -> created once, or found done, or unknown
    local.py, cluster.py   who runs it: this process, or a Ray Data graph (actors.py: its workers)
    apart.py        what kills its worker: done in a process apart (child.py), the culprit rejected
    supervise.py    a local driver that died is begun again; flight.py says what it was at
    session.py      what is left of a job, gathered and committed; meter.py says what held it up
    rounds.py       results of workers that may hang or be lost: watch.py looks at the clock, signals.py hears SIGTERM
    pump.py         one stream of results, taken by a thread of its own; stragglers.py: when to run its end twice
    stacks.py       where threads of workers on other machines are
    metrics.py      how a session stands (standing.py) -> Prometheus: a page here, Ray's exporter (ray_metrics.py)
    logs.py         what is said to stderr, as words or as JSON lines that name run and part
    finish.py       every part's footer -> rejects, manifest, totals
    driver.py       a job from start to end; measure.py: a sample of one (sample.py), and what the whole would take
    generations.py  what later runs added to an output: names, records and union; retrying.py tries rejects again,
                    extending.py adds files that have come to the input since
    slices.py       several drivers on one plan, each with its slice; listing.py: what lies in an output, compactly
    report/         what lies in an output -> one HTML page
    submit/         a job file -> a job on a Ray cluster elsewhere, by its Jobs API
    exports/        committed rows -> the files of another tool; vectors.py: a column of vectors -> numpy
    embed_images.py images at hand -> vectors, as a job would have written them
    cli.py          the commands: look.py has those that change nothing, ask.py those below; tell.py prints

and what may be asked of what came out (ask.py has the commands):

    embeddings.py   committed embeddings, file by file; index.py, search.py, duplicates.py, sheet.py build on it
    few_shot.py     a few labels -> a classifier; linear_probe.py, mirror.py: its labels for all rows; derived.py: where
    source_images.py, thumbnails.py  rows -> their images, from the source shards again, small
    evaluate.py     a column that says what is true -> how right the model is; judge.py counts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.driver import Summary, run
    from pipeline.embed_images import embed
    from pipeline.exports import Exported, export
    from pipeline.job import JobSpec, load_job, parse_job
    from pipeline.models import load_model
    from pipeline.report import report
    from pipeline.results import open_results, read_rejects, status
    from pipeline.retrying import RetrySummary, retry
    from pipeline.vectors import decode_vectors

_HOME = {
    "JobSpec": "pipeline.job", "load_job": "pipeline.job", "parse_job": "pipeline.job",
    "load_model": "pipeline.models", "embed": "pipeline.embed_images",
    "open_results": "pipeline.results", "read_rejects": "pipeline.results", "status": "pipeline.results",
    "report": "pipeline.report",
    "export": "pipeline.exports", "Exported": "pipeline.exports", "decode_vectors": "pipeline.vectors",
    "run": "pipeline.driver", "Summary": "pipeline.driver",
    "retry": "pipeline.retrying", "RetrySummary": "pipeline.retrying",
}  # fmt: skip

# names of files that are called by them too; always the module, whichever was asked for first
_CALLABLE = ("embed", "report")

__all__ = [
    "Exported", "JobSpec", "RetrySummary", "Summary", "decode_vectors", "embed", "export", "load_job", "load_model",
    "open_results", "parse_job", "read_rejects", "report", "retry", "run", "status",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: `import pipeline` loads neither torch nor ray."""
    if name not in _HOME:
        raise AttributeError(f"module `pipeline` has no attribute `{name}`")
    from importlib import import_module

    if name in _CALLABLE:
        return import_module(f"pipeline.{name}")
    return getattr(import_module(_HOME[name]), name)
