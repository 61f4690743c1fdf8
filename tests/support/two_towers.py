"""Make small two-tower models of images and words with their tokenizers, and finished runs of them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2parquet.engine import driver
from tests.models.test_text import clip_folder, siglip_folder
from tests.models.towers import clip_tokenizer, gemma_tokenizer
from tests.support.small_job import jpeg

IMAGES = 12
KINDS = ("clip", "siglip")


@dataclass(frozen=True)
class Finished:
    """A run's reference module, and the folder that has `ckpt`, the images `in`, and the output `out`."""

    model: Any
    root: Path

    @property
    def out(self) -> str:
        return str(self.root / "out")


@functools.cache
def finished_run(kind: str) -> Finished:
    """Run a job of vectors on a few images, in three parts, once per process, for tests that only read it."""
    root = Path(tempfile.mkdtemp(prefix=f"img2parquet-{kind}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / "ckpt"
    model, _ = clip_folder(folder) if kind == "clip" else siglip_folder(folder, projection_size=32)
    (clip_tokenizer if kind == "clip" else gemma_tokenizer)(folder)
    (root / "in").mkdir()
    for n in range(IMAGES):
        (root / "in" / f"{n:02}.jpg").write_bytes(jpeg(n))
    driver.run(job_of(root, root / "out", rows_per_part=5), "local")
    return Finished(model, root)


def job_of(root: Path, output: Path, rows_per_part: int = 16_384, **settings: str) -> dict[str, Any]:
    """Return a job over the run's images. settings: of the output `embedding`."""
    return {
        "input": {"kind": "folder", "uris": [str(root / "in")]},
        "models": [{"model": str(root / "ckpt"), "name": "words", "outputs": [{"kind": "embedding", **settings}]}],
        "output": {"uri": str(output), "rows_per_part": rows_per_part},
        "dtype": "float32",
        "resources": {"workers": 1, "batch_size": 4},
    }
