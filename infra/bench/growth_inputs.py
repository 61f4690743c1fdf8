"""Make the inputs of the suite `growth`: tars of tiny JPEGs, empty tars, and mostly committed outputs."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from img2parquet.batch import Embedded
from img2parquet.dataset.commit import Output
from img2parquet.dataset.part_file import encode_part
from img2parquet.dataset.plan import identities, make_plan
from img2parquet.inference.capabilities import probe_capabilities
from img2parquet.inference.steps import result_schema
from img2parquet.job import JobSpec, load_job

SIDE = 64  # pixels: of the images, and of what the model sees
EMPTY_TAR = bytes(1024)


def make_images(folder: Path, images: int, per_shard: int) -> None:
    """Make tars of `per_shard` JPEGs of about 1 kB, all with the same content, which does not matter here."""
    folder.mkdir(parents=True)
    shard = _shard(min(images, per_shard))
    for number in range(-(-images // per_shard)):
        left = images - number * per_shard
        (folder / f"{number:05d}.tar").write_bytes(shard if left >= per_shard else _shard(left))


def make_empty(folder: Path, shards: int) -> None:
    """Make empty tars, and a last one with an image: a job whose input gives no row at all is refused."""
    folder.mkdir(parents=True)
    for number in range(shards):
        (folder / f"{number:06d}.tar").write_bytes(EMPTY_TAR if number < shards - 1 else _shard(1))


def make_model(folder: Path) -> Path:
    """Make a LeViT of three blocks for `SIDE` pixels, with seeded weights."""
    from tests.support.small_job import make_checkpoint

    return make_checkpoint(folder)


def write_job(path: Path, model: Path, shards: Path, output: Path) -> Path:
    """Write a job with one part for each tar."""
    document: Mapping[str, Any] = {
        "input": {"kind": "webdataset", "uris": [f"{shards}/*.tar"], "shards_per_part": 1},
        "models": [{"model": str(model), "outputs": [{"kind": "embedding"}]}],
        "output": {"uri": str(output)},
        "dtype": "float32",
        "resources": {"batch_size": 32, "device": "cpu"},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def commit_all_but(job_file: Path, left: int) -> None:
    """Make the output of a job over empty tars whose driver was killed `left` parts before the end."""
    job = load_job(job_file)
    probed = probe_capabilities(job)
    output = Output.at(job.output.uri)
    ids = identities(job, probed.cards, probed.dtype)
    plan, digest = output.begin(ids, lambda: make_plan(job, probed.cards, probed.dtype))
    output.record_run({"plan_sha256": digest, "batch_size": probed.batch_size, "threads_per_worker": 1})
    (Path(output.uri) / f"model={job.models[0].name}").mkdir(exist_ok=True)
    count = os.cpu_count() or 1
    slices = [range(first, len(plan.parts) - left, count) for first in range(count)]
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        pool.map(partial(_commit, job), slices)


def _commit(job: JobSpec, indices: range) -> None:
    """Write these parts' files, byte for byte as the driver does, but without syncing the disk."""
    output, model = Output.at(job.output.uri), job.models[0]
    plan = output.stored_plan()
    assert plan is not None
    empty = result_schema(job, model, probe_capabilities(job).cards[model.name]).empty_table()
    for part in (plan.parts[index] for index in indices):
        nothing = Embedded(part.index, 0, {model.name: empty}, {model.name: ()}, rows_in=0)
        encoded = encode_part(part, model.name, plan.identity(model.name), [nothing], plan.identities[model.name])
        (Path(output.uri) / plan.file_name(model.name, part)).write_bytes(encoded.data)


def _shard(images: int) -> bytes:
    random, sink = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(images):
            data = _jpeg(random)
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def _jpeg(random: np.random.Generator) -> bytes:
    coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((SIDE + 16, SIDE + 8), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=80)
    return sink.getvalue()
