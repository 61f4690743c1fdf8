"""A small job that runs in a second: tars of generated photographs, some broken, and a tiny LeViT."""

from __future__ import annotations

import atexit
import functools
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from img2parquet.job import JobSpec, parse_job

SHARDS, PER_SHARD = 6, 20
BROKEN = {(0, 3): ("empty", b""), (2, 7): ("not_an_image", b"<html>no</html>"), (4, 19): ("truncated", None)}
ROWS = SHARDS * PER_SHARD
GOOD = ROWS - len(BROKEN)


def jpeg(seed: int) -> bytes:
    """A smooth random picture of a random size, 70 to 130 pixels a side."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(70, 130, 2)
    coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=85)
    return sink.getvalue()


def thin_png() -> bytes:
    """One pixel wide and 20,000 high: scaled by its short side to 64, it would have 82 million."""
    sink = io.BytesIO()
    Image.new("RGB", (1, 20_000)).save(sink, "PNG")
    return sink.getvalue()


def make_shards(folder: Path, shards: int = SHARDS, per_shard: int = PER_SHARD, broken: bool = True) -> list[Path]:
    """Tars `000.tar` ...: `<shard>/<n>.jpg` with a `.json` sidecar {"label": n % 5, "caption": text}."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        path = folder / f"{shard:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for n in range(per_shard):
                image = jpeg(shard * 1000 + n)
                if broken and (shard, n) in BROKEN:
                    replacement = BROKEN[shard, n][1]
                    image = image[: len(image) // 2] if replacement is None else replacement
                add_member(tar, f"{shard:03d}/{n:04d}.jpg", image)
                add_member(
                    tar, f"{shard:03d}/{n:04d}.json", json.dumps({"label": n % 5, "caption": f"no. {n}"}).encode()
                )
        paths.append(path)
    return paths


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@functools.cache
def small_set(seed: int) -> Path:
    """Make `in/*.tar` and the checkpoint `model` once per process, for every test that only reads them."""
    folder = Path(tempfile.mkdtemp(prefix="img2parquet-small-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_shards(folder / "in")
    make_checkpoint(folder / "model", seed)
    return folder


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a LeViT for 64 pixels and 5 labels with seeded weights to a test's own folder, as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _checkpoint_files(seed).items():
        (folder / name).write_bytes(data)
    return folder


@functools.cache
def _checkpoint_files(seed: int) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="img2parquet-checkpoint-") as folder:
        return {path.name: path.read_bytes() for path in _saved(Path(folder), seed).iterdir()}


def _saved(folder: Path, seed: int) -> Path:
    from transformers import LevitConfig, LevitForImageClassificationWithTeacher

    from tests.models.oracle import saved

    config = LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        id2label={i: f"class {i}" for i in range(5)}, label2id={f"class {i}": i for i in range(5)},
    )  # fmt: skip
    saved(LevitForImageClassificationWithTeacher(config), folder, seed)
    geometry = {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps(geometry))
    return folder


def job_dict(shards: str, checkpoint: Path | str, output: str, **more: Any) -> dict[str, Any]:
    return {
        "input": {"kind": "webdataset", "uris": [shards], "keep": ["label:int64", "caption"], "shards_per_part": 1},
        "models": [
            {
                "model": str(checkpoint),
                "name": "tiny",
                "outputs": [
                    {"kind": "embedding", "normalize": "l2"},
                    {"kind": "labels", "top_k": 2},
                    {"kind": "logits"},
                ],
            }
        ],
        "output": {"uri": output},
        "dtype": "float32",
        "resources": {"workers": 2, "batch_size": 8},
        **more,
    }


def small_job(shards: str, checkpoint: Path | str, output: str, **more: Any) -> JobSpec:
    return parse_job(job_dict(shards, checkpoint, output, **more))
