"""How much is read, of which rows, and that their images are found again in every kind of input."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import img2parquet.results.report.row_sample as sampling
import img2parquet.results.source_images as finding
from img2parquet.dataset.generations import History
from img2parquet.dataset.plan import Plan
from img2parquet.engine.driver import run
from img2parquet.errors import PartFailed
from img2parquet.images.thumbnails import LARGE_PX, thumb
from img2parquet.job import parse_job
from img2parquet.outputs.vectors import decode_vectors
from img2parquet.read import SOURCES, PartLimits, Source, read_part
from img2parquet.results.reader import open_results
from img2parquet.results.report.row_sample import read_samples
from img2parquet.results.report.run_summary import RunSummary, read_run_summary
from img2parquet.results.report.sections import show
from img2parquet.results.source_images import find, open_source
from img2parquet.schema import Part, Row
from img2parquet.storage import Store
from tests.read.broken_shards import jpeg
from tests.read.sources import ROWS, make_source, put_input
from tests.support.small_job import job_dict, make_checkpoint, make_shards
from tests.support.small_job import jpeg as small_jpeg


@pytest.fixture
def summary(output: Path) -> RunSummary:
    return read_run_summary(str(output), {})


def keys(summary: RunSummary, rows: int) -> list[str]:
    (sample,) = read_samples(summary, rows, None)
    return sample.texts("key")


def opened(summary: RunSummary) -> tuple[Source, dict[int, Part]]:
    assert summary.plan is not None
    return open_source(summary.record, {}), {part.index: part for part in summary.plan.parts}


def test_the_sample_is_the_same_each_time_and_as_large_as_asked(summary: RunSummary) -> None:
    assert keys(summary, 20) == keys(summary, 20)
    assert [len(set(keys(summary, rows))) for rows in (1, 7, 30, 70, 5000)] == [1, 7, 30, 70, 70]


def test_of_many_files_a_few_are_opened(summary: RunSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 files and 1e8 rows cost what 64 files cost at most."""
    opened: list[str] = []
    plain = Store.open
    names = list(summary.files)
    part = next(name for name in names if name.startswith("model="))
    many = {f"model=tiny/part-{i:06d}-0123456789abcdef.parquet": summary.files[part] for i in range(1000)}
    assert summary.plan is not None
    plan = Plan((summary.plan.parts[0],) * 1000, summary.plan.identities)
    plan.__dict__["names"] = {"tiny": tuple(many)}
    summary = replace(summary, history=History(plan), files=many)
    monkeypatch.setattr(Store, "open", lambda self, uri, **more: opened.append(uri) or plain(self, uri, **more))
    (sample,) = read_samples(summary, 2000, None)
    assert sample.table.num_rows == 64 * (24 - 1) and len(opened) == sampling.PARTS_AT_MOST
    assert len(set(sample.parts.tolist())) == 64


def test_large_shards_give_a_run_from_their_head(summary: RunSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SMALL_PART_BYTES", 0)
    (sample,) = read_samples(summary, 15, None)
    assert summary.plan is not None
    for part, shard in set(zip(sample.parts.tolist(), sample.texts("shard"), strict=True)):
        rows = [key for key, p in zip(sample.texts("key"), sample.parts.tolist(), strict=True) if p == part]
        name = summary.plan.names["tiny"][part]
        stored = pq.read_table(summary.files[name].uri, columns=["key"], partitioning=None)["key"].to_pylist()
        assert rows == stored[: len(rows)] and shard == summary.plan.parts[part].pieces[0].uri


@pytest.mark.parametrize("kind", SOURCES)
def test_images_are_found_again_by_key(kind: str, tmp_path: Path) -> None:
    source = make_source(put_input(kind, str(tmp_path)))
    parts = tuple(Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(rows=4))))
    rows = [(part.index, item) for part in parts for item in read_part(source, part) if isinstance(item, Row)]
    assert len(rows) == ROWS
    some = rows[1::2]
    wanted: dict[int, set[tuple[str, str]]] = {}
    for index, row in some:
        wanted.setdefault(index, set()).add((row.shard, row.key))
    notes: list[str] = []
    found = dict(find(source, {part.index: part for part in parts}, wanted, notes.append))
    assert found == {(row.shard, row.key): bytes(row.image) for _, row in some} and notes == []
    assert set(found.values()) <= {jpeg(i) for i in range(ROWS)}


def test_no_more_bytes_than_the_budget(output: Path, summary: RunSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    source, parts = opened(summary)
    (sample,) = read_samples(summary, 70, None)
    wanted: dict[int, set[tuple[str, str]]] = {}
    rows = zip(sample.parts.tolist(), sample.texts("shard"), sample.texts("key"), strict=True)
    for part, shard, key in rows:
        wanted.setdefault(part, set()).add((shard, key))
    monkeypatch.setattr(finding, "PART_BYTES", 9000)
    monkeypatch.setattr(finding, "BYTES_AT_MOST", 1)
    found = list(find(source, parts, wanted, summary.note))
    assert 0 < sum(len(image) for _, image in found) < 3 * (9000 + 8000)  # a budget ends with the image that passes it
    assert len(found) < 70


def test_a_shard_that_fails_is_noted_and_the_others_are_read(
    summary: RunSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, parts = opened(summary)
    read = type(source).read

    def fails(self: Any, part: Part) -> Any:
        if part.index == 1:
            raise PartFailed("s3://b/x.tar?X-Amz-Signature=deadbeef is gone")
        yield from read(self, part)

    monkeypatch.setattr(type(source), "read", fails)
    (sample,) = read_samples(summary, 70, None)
    rows = list(zip(sample.parts.tolist(), sample.texts("shard"), sample.texts("key"), strict=True))
    wanted = {part: {(s, k) for p, s, k in rows if p == part} for part in range(3)}
    found = Counter(shard for (shard, _), _ in find(source, parts, wanted, summary.note))
    assert len(found) == 2 and len(summary.notes) == 1 and "deadbeef" not in summary.notes[0]


def test_a_store_that_crawls_is_left_after_a_while(summary: RunSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    source, parts = opened(summary)
    monkeypatch.setattr(finding, "SECONDS_AT_MOST", -1.0)
    (sample,) = read_samples(summary, 70, None)
    rows = list(zip(sample.parts.tolist(), sample.texts("shard"), sample.texts("key"), strict=True))
    wanted = {part: {(s, k) for p, s, k in rows if p == part} for part in range(3)}
    assert len(list(find(source, parts, wanted, summary.note))) <= 3  # one image of a part, and no more


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    made = thumb(small_jpeg(1), 48)
    assert made is not None and max(made.width, made.height) == 48 and len(made.data) < 4000
    assert thumb(b"<html>", LARGE_PX) is None
    half = small_jpeg(1)[:1500]
    assert thumb(half, LARGE_PX) is None and thumb(half, LARGE_PX, salvage=True) is not None


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_encoded_embeddings_are_compared_as_what_they_stand_for(dtype: str, tmp_path: Path) -> None:
    made, uri = make_checkpoint(tmp_path), str(tmp_path / "out")
    make_shards(tmp_path / "in", broken=False)
    document = job_dict(f"{tmp_path}/in/*.tar", made, uri)
    document["models"][0]["outputs"] = [{"kind": "embedding", "normalize": "l2", "dtype": dtype}]
    run(parse_job(document), "local")
    summary = read_run_summary(uri, {})
    (section,) = show(summary, read_samples(summary, 50, None), None).sections
    table = open_results(uri, "tiny").to_table()
    decoded_ND = decode_vectors(table["embedding"], table.schema.field("embedding"))
    assert section.embedding_map is not None and section.embedding_map.width == decoded_ND.shape[1]
    for row, other, cosine in section.embedding_map.pairs:
        keys = section.sample.table["key"]
        first, second = (table["key"].to_pylist().index(keys[place].as_py()) for place in (row, other))
        assert cosine == pytest.approx(float(decoded_ND[first] @ decoded_ND[second]), abs=1e-3)
