"""Check that a worker's memory does not grow with the number of batches it has computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BATCHES, BATCH = 26, 32
MAX_MB = 120  # the results are 1 MB; without the copy into Arrow's memory it was 20 MB a batch

SCRIPT = f"""
import io, sys
import numpy as np
from PIL import Image
from img2parquet.batch import Batch, Work
from img2parquet.inference.steps import Embedder, Preparer
from img2parquet.job import parse_job
from img2parquet.inference.capabilities import probe_capabilities
from img2parquet.schema import Row

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def run():
    job = parse_job({{
        "input": {{"kind": "folder", "uris": [sys.argv[1]]}},
        "models": [{{"model": "facebook/levit-128S", "weights": "random(0)", "outputs": [{{"kind": "embedding"}}]}}],
        "output": {{"uri": sys.argv[1] + "/out"}},
        "dtype": "float32",
    }})
    probed = probe_capabilities(job)
    work = Work(job, probed.cards, probed.dtype, probed.device, batch_size={BATCH}, threads=1)
    prepare, embed = Preparer(work), Embedder(work)
    file = io.BytesIO()
    Image.fromarray(np.full((240, 260, 3), 90, np.uint8)).save(file, "JPEG")
    held = []
    for k in range({BATCHES}):
        rows = tuple(Row(i, f"{{k}}-{{i}}", "shard", file.getvalue()) for i in range({BATCH}))
        held.append(embed(prepare(Batch(0, k, rows))))  # as in a job, until the part is complete
        if k == 5:
            before = resident_mb()
    print(resident_mb() - before)

from concurrent.futures import ThreadPoolExecutor
ThreadPoolExecutor(1).submit(run).result()  # in a thread, like a worker: threads have their own memory arenas
"""


def test_results_that_wait_for_their_part_hold_no_more_than_themselves(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    grown_mb = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert float(grown_mb) < MAX_MB, f"{grown_mb} MB more after {BATCHES - 6} batches"
