"""The table of images/s by number of GPUs: its arithmetic, and that the guide has what the results' pages give."""

from __future__ import annotations

import pytest

from infra.bench import fleet
from infra.bench.fleet import H200, L4, limits


def test_the_guide_has_the_table_of_today() -> None:
    assert fleet.block() in fleet.GUIDE.read_text(), "run: python -m infra.bench.fleet --write"


@pytest.mark.parametrize(
    ("card", "model", "gpus", "decoded", "expected"),
    [
        (H200, "BEiT-base", 8, 650.0, (56_000.0, "model")),
        (H200, "LeViT-128S", 1, 500.0, (8_000.0, "decode")),
        (H200, "LeViT-128S", 1, 650.0, (10e9 / 8 / 150_528, "network")),
        (L4, "BEiT-base", 64, 650.0, (56_000.0, "model")),
    ],
)
def test_the_slowest_stage_limits(
    card: fleet.Card, model: str, gpus: int, decoded: float, expected: tuple[float, str]
) -> None:
    assert limits(card, model, gpus, decoded).lowest == pytest.approx(expected)


def test_drivers_are_as_many_as_the_fleet_needs() -> None:
    made = {(row[0], row[1]): row for row in fleet.rows(650.0, 16_000.0)}
    one, rack = made["1 H200", "BEiT-base"], made["64 H200", "BEiT-base"]
    assert one[-4:] == ("7,000", "1", "7,000", "model")
    assert rack[-4:] == ("16,000", "28", "448,000", "model")  # 448,000 / 16,000
