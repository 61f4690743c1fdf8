"""How the input is divided into parts: by rows, by what the widest model writes, and into nothing that is empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.dataset import plan
from img2parquet.dataset.packed_parts import SCHEMA, Parts, checked
from img2parquet.dataset.plan import cut_input, make_plan, most_rows, rows_per_part
from img2parquet.errors import InputError, JobError
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.job import JobSpec, parse_job
from img2parquet.models import Card
from img2parquet.schema import Part, Piece

WIDE, NARROW = 50_000, 10


def card(width: int) -> Card:
    settings = PreprocessSettings("exact", 32, 32, "bilinear", None, None)
    return Card("m", "fake", "fake:m", "0" * 64, {}, settings, {"pooled": (width,)}, "a fake", ())


CARDS = {"narrow": card(NARROW), "wide": card(WIDE), "last": card(NARROW)}
WIDEST_BYTES = 256 + WIDE * 4 + WIDE // 8 + 16


def job(folder: Path, **output: Any) -> JobSpec:
    models = [{"model": "fake", "name": name, "outputs": [{"kind": "embedding"}]} for name in CARDS]
    source = {"kind": "folder", "uris": [str(folder)]}
    return parse_job({"input": source, "models": models, "output": {"uri": str(folder / "out"), **output}})


def test_a_part_holds_as_many_rows_as_its_widest_model_allows(tmp_path: Path) -> None:
    fits = plan.PART_BYTES // WIDEST_BYTES
    assert rows_per_part(job(tmp_path, rows_per_part=10_000), CARDS) == fits
    assert rows_per_part(job(tmp_path, rows_per_part=fits - 1), CARDS) == fits - 1


def test_a_part_whose_rows_are_counted_late_may_hold_more_but_not_any_number(tmp_path: Path) -> None:
    fits = plan.MOST_PART_BYTES // WIDEST_BYTES
    assert most_rows(job(tmp_path, rows_per_part=7), CARDS) == fits
    assert most_rows(job(tmp_path, rows_per_part=fits + 1), CARDS) == fits + 1


@pytest.mark.parametrize("over", [0, 1])
def test_one_row_may_fill_a_part_and_no_more(over: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", WIDEST_BYTES - over)
    if not over:
        assert rows_per_part(job(tmp_path), CARDS) == 1
        return
    with pytest.raises(JobError, match="model `wide`: one row of its outputs may take 206,522 bytes"):
        rows_per_part(job(tmp_path), CARDS)


def test_the_input_is_cut_at_the_limit_and_counted_on_from_an_index(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(b"x")
    parts = cut_input(job(tmp_path), 2, first_index=7)
    assert [(part.index, part.rows) for part in parts] == [(7, 2), (8, 2), (9, 1)]


def test_an_input_without_images_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "cut_input", lambda *_: Parts.of(()))
    with pytest.raises(InputError, match="no images"):
        make_plan(job(tmp_path), CARDS, "float32")


def test_a_stored_plan_says_what_each_part_covers_in_16_digits() -> None:
    parts = [Part(0, (Piece("a", 1, "e"),)), Part(1, (Piece("b", 2, "f"),))]
    table = pq.read_table(pa.BufferReader(plan.encode_plan(plan.Plan(Parts.of(parts), {}))))
    assert table.column(1).to_pylist() == [part.covers[:16] for part in parts] and len(table.column(1)[0].as_py()) == 16


def test_a_stored_plan_with_a_missing_value_is_damaged() -> None:
    table = Parts.of([Part(0, (Piece("a", 1, "e"), Piece("b", 2, "f", 3, 4, 5)))]).table
    assert checked(table) is table  # `stop` and `rows` may be missing
    pieces = table.column("pieces").to_pylist()
    for name in ("uri", "size_bytes", "etag", "start"):
        damaged = [[{**pieces[0][0], name: None}, pieces[0][1]]]
        columns = [table.column("index"), pa.array(damaged, SCHEMA.field("pieces").type)]
        with pytest.raises(ValueError, match="a value is missing"):
            checked(pa.Table.from_arrays(columns, schema=SCHEMA))
    with pytest.raises(ValueError, match="its columns are"):
        checked(table.select(["index"]))
