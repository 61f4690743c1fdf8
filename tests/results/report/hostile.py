"""A finished output whose keys, labels and passthrough texts are written to break a page."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from img2parquet.engine.driver import run
from tests.support.small_job import add_member, jpeg, make_checkpoint, small_job

SHARDS, PER_SHARD = 3, 24
NAMES = [
    "<img src=x onerror=window.hit=1>",
    "</script><script>window.hit=2</script>",
    "\u202egnp.exe\u2066",
    "two\nlines & 'quotes\" {{ 7 * 7 }}",
    "http://user:hunter2@example.com/cat",
]
KEYS = [
    '"><svg onload=hit=3>', "</title><script>window.hit=4</script>", "كلب\u202e", "a\x1b[31mred",
    "javascript:window", "<!--", "{% raw %}",
]  # fmt: skip


def make_output(folder: Path, *, broken: bool = True) -> Path:
    """72 images in three tars, each with a `label` that is one of NAMES; two of them cannot be used."""
    (folder / "in").mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / "in" / f"{shard}.tar", "w") as tar:
            for n in range(PER_SHARD):
                key = f"{KEYS[n % len(KEYS)]}{shard}-{n}"
                data = jpeg(100 * shard + n)
                if broken and (shard, n) == (0, 0):
                    data = b"<script>window.hit=5</script>"
                if broken and (shard, n) == (1, 1):
                    data = data[: 2 * len(data) // 3]
                add_member(tar, f"{key}.jpg", data)
                label = {"label": NAMES[n % len(NAMES)], "caption": "</script><script>window.hit=6</script>"}
                add_member(tar, f"{key}.json", json.dumps(label).encode())
    checkpoint = make_checkpoint(folder / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(NAMES)}
    config["label2id"] = {name: i for i, name in enumerate(NAMES)}
    (checkpoint / "config.json").write_text(json.dumps(config))
    job = small_job(f"{folder}/in/*.tar", checkpoint, str(folder / "out"))
    keep = job.input.model_copy(update={"keep": ("label", "caption")})
    run(job.model_copy(update={"input": keep}), "local")
    return folder / "out"
