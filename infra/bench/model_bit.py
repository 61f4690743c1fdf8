"""How fast BiT-50 is here and in transformers, on this CPU: images per second of one batch, and the ratios.

    python infra/bench/model_bit.py [--batch 32] [--size 224] [--threads 2] [--rounds 5] [--json FILE]

Every contestant is a process of its own (allocator settings are a process's), all hold the same seeded weights, and
they take turns, so that a busy machine slows all of them. Medians of the rounds; the first warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

CONTESTANTS = {  # name -> (whose, dtype, the workers' allocator settings)
    "transformers float32": ("transformers", "float32", False),
    "transformers float32, our allocator": ("transformers", "float32", True),
    "transformers bfloat16, our allocator": ("transformers", "bfloat16", True),
    "ours float32": ("ours", "float32", True),
    "ours bfloat16": ("ours", "bfloat16", True),
}
BASELINE = "transformers float32"
Seconds = tuple[float, float]  # wall, CPU
CONFIG: dict[str, Any] = {"depths": [3, 4, 6, 3], "num_labels": 1000}


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder))
        seconds = compete(Path(folder), options)
    result = table(seconds, options)
    for row in result["rows"]:
        ratios = f"{row['times_baseline']:6.2f} x wall {row['times_baseline_cpu']:6.2f} x CPU time"
        print(f"{row['name']:38} {row['images_per_s']:7.1f} images/s {ratios}")
    print(
        f"{result['cpu']}, {options.threads} threads, batch {options.batch}, {options.size} px, torch {result['torch']}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def compete(folder: Path, options: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Wall and CPU seconds of each counted round, by contestant."""
    context, workers = multiprocessing.get_context("spawn"), {}
    for name in CONTESTANTS:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, name, folder, options), daemon=True)
        process.start()
        ours.recv()
        workers[name] = (process, ours)
    seconds: dict[str, list[Seconds]] = {name: [] for name in CONTESTANTS}
    for round_ in range(options.rounds + 1):
        for name, (_, connection) in workers.items():
            connection.send("run")
            round_s = connection.recv()
            if round_:
                seconds[name].append(round_s)
    for process, connection in workers.values():
        connection.send("stop")
        process.join()
    return seconds


def work(connection: Connection, name: str, folder: Path, options: argparse.Namespace) -> None:
    """One contestant: a forward pass whenever it is told to."""
    whose, dtype, tuned = CONTESTANTS[name]
    torch.set_num_threads(options.threads)
    if tuned:
        from pipeline.embed import keep_freed_memory

        keep_freed_memory()
    x_BCHW = torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    forward = (_ours if whose == "ours" else _transformers)(folder, getattr(torch, dtype), x_BCHW)
    connection.send("ready")
    with torch.inference_mode():
        while connection.recv() == "run":
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            forward()
            connection.send((time.perf_counter() - start_s, time.process_time() - start_cpu_s))


def _ours(folder: Path, dtype: torch.dtype, x_BCHW: torch.Tensor) -> Callable[[], Any]:
    from pipeline.models import load_model

    loaded = load_model(str(folder), dtype=str(dtype).removeprefix("torch."), image_size=x_BCHW.shape[-1])
    return lambda: loaded.backbone(x_BCHW, frozenset({"logits"}))


def _transformers(folder: Path, dtype: torch.dtype, x_BCHW: torch.Tensor) -> Callable[[], Any]:
    from transformers import BitForImageClassification

    model, x_BCHW = BitForImageClassification.from_pretrained(folder, dtype=dtype), x_BCHW.to(dtype)
    return lambda: model(x_BCHW).logits


def _save(folder: Path) -> None:
    from transformers import BitConfig, BitForImageClassification

    torch.manual_seed(0)
    BitForImageClassification(BitConfig(**CONFIG)).save_pretrained(folder)


def table(seconds: dict[str, list[Seconds]], options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    medians = {name: [statistics.median(both) for both in zip(*runs, strict=True)] for name, runs in seconds.items()}
    rows = [
        {
            "name": name,
            "images_per_s": round(options.batch / wall_s, 2),
            "times_baseline": round(medians[BASELINE][0] / wall_s, 3),
            "times_baseline_cpu": round(medians[BASELINE][1] / cpu_s, 3),  # what is left on a machine that others use
            "seconds": [round(wall, 4) for wall, _ in seconds[name]],
        }
        for name, (wall_s, cpu_s) in medians.items()
    ]
    said = {key: getattr(options, key) for key in ("batch", "size", "threads", "rounds")}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"model": "google/bit-50", **said, **versions, "cpu": _cpu(), "rows": rows}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 32, "size": 224, "threads": 2, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
