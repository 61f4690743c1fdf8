"""Compute images/s by number of GPUs, and what limits, from measured stages: `python -m infra.bench.fleet [--write]`.

    images/s = min(GPUs x CPUs of each x decode, GPUs x network, GPUs x model, drivers x rows)

* decode and rows are read from `results/decode.md` and `results/simulate.md`. Each image is a photograph of 85 kB.
* network: every crop of 224 pixels reaches its GPU from another node, at 10 Gb/s for each GPU.
* model: ASSUMED, until `make bench-gpu` has run on these cards. Those of an H200 are the lower ends of a review by
  reading; an L4 has an eighth of its matrix units' speed and a sixteenth of its memory's (NVIDIA's data sheets: 121 of
  989 TFLOP/s in bfloat16, 0.3 of 4.8 TB/s), and LeViT, whose kernels are small, is taken to wait for memory.

`--write` puts the table into infra/docs/clusters.md; a test compares it with this file.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS, GUIDE = ROOT / "infra/bench/results", ROOT / "infra/docs/clusters.md"
BEGIN, END = "<!-- made by infra/bench/fleet.py --write -->", "<!-- end -->"
NETWORK_BYTES_PER_S, CROP_BYTES = 10e9 / 8, 224 * 224 * 3
COUNTS = (1, 8, 64, 512)
COLUMNS = ("GPUs", "model", "decode", "network", "GPUs compute", "with one driver", "drivers", "with these", "limit")


@dataclass(frozen=True)
class Card:
    """A kind of GPU. cpus: for each, of the machines that one rents with it. models: images/s, assumed."""

    name: str
    cpus: int
    models: dict[str, float]


H200 = Card("H200", 16, {"LeViT-128S": 40_000, "ViT-MSN-small": 20_000, "BEiT-base": 7_000})
L4 = Card("L4", 8, {"LeViT-128S": 40_000 / 16, "ViT-MSN-small": 20_000 / 8, "BEiT-base": 7_000 / 8})


@dataclass(frozen=True)
class Limits:
    """Images/s that each stage can give."""

    decode: float
    network: float
    model: float

    @property
    def lowest(self) -> tuple[float, str]:
        return min((self.decode, "decode"), (self.network, "network"), (self.model, "model"))


def limits(card: Card, model: str, gpus: int, decoded_per_s: float) -> Limits:
    """Compute what the stages of a fleet give. decoded_per_s: images that one core decodes."""
    return Limits(gpus * card.cpus * decoded_per_s, gpus * NETWORK_BYTES_PER_S / CROP_BYTES, gpus * card.models[model])


def measured() -> tuple[float, float]:
    """Read the images/s that a core decodes, and the rows/s of 768 floats that a driver commits."""
    decode, simulate = (RESULTS / "decode.md").read_text(), (RESULTS / "simulate.md").read_text()
    own = re.search(r"\*\*imagenet-like\*\*.*?\| ours, our allocator settings \| ([\d,]+) \|", decode, re.DOTALL)
    rows = re.search(r"768 floats: about ([\d,]+) rows a second", simulate)
    assert own and rows, "the results' pages no longer say it"
    return float(own[1].replace(",", "")), float(rows[1].replace(",", ""))


def rows(decoded_per_s: float, committed_per_s: float) -> Iterator[tuple[str, ...]]:
    for card in (H200, L4):
        for model in card.models:
            for gpus in COUNTS:
                found = limits(card, model, gpus, decoded_per_s)
                most, why = found.lowest
                drivers = math.ceil(most / committed_per_s)
                figures = (found.decode, found.network, found.model, min(most, committed_per_s))
                yield (f"{gpus} {card.name}", model, *(f"{figure:,.0f}" for figure in figures), f"{drivers}",
                       f"{most:,.0f}", why)  # fmt: skip


def table() -> str:
    lines = [COLUMNS, ["---", "---"] + ["---:"] * 6 + ["---"], *rows(*measured())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block() -> str:
    decoded, committed = measured()
    network = NETWORK_BYTES_PER_S / CROP_BYTES
    return (
        f"{BEGIN}\nWith {H200.cpus} CPUs for each H200 and {L4.cpus} for each L4:\n\n"
        f"`images/s = min(GPUs x CPUs x {decoded:,.0f}, GPUs x {network:,.0f}, GPUs x model, "
        f"drivers x {committed:,.0f})`\n\n{table()}\n{END}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into infra/docs/clusters.md")
    if not parser.parse_args().write:
        print(block())
        return 0
    before, _, rest = GUIDE.read_text().partition(BEGIN)
    GUIDE.write_text(before + block() + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
