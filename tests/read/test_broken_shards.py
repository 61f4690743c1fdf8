"""Each broken shard comes to the outcome that is written beside it, and every byte of it is accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from img2parquet.errors import InputError
from img2parquet.read import PartLimits, read_part
from img2parquet.schema import Part, Reject, Row, Wanted
from tests.read.broken_shards import BROKEN_SHARDS, BrokenShard, put
from tests.read.sources import make_source


@pytest.mark.parametrize("shard", BROKEN_SHARDS, ids=lambda shard: shard.name.replace(" ", "-"))
def test_outcome(shard: BrokenShard, tmp_path: Path) -> None:
    source = make_source(put(shard, str(tmp_path)))
    if shard.error:
        with pytest.raises(shard.error) as caught:
            list(source.plan(PartLimits()))
        assert shard.says in str(caught.value)
        return
    parts = [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits()))]
    items = [item for part in parts for item in read_part(source, part)]
    rejects = [item for item in items if isinstance(item, Reject)]
    assert tuple(item.key for item in items if isinstance(item, Row)) == shard.keys
    assert Counter(reject.reason for reject in rejects) == Counter(shard.rejects)
    assert shard.says in " ".join(reject.message for reject in rejects)
    assert [item.row for item in items] == list(range(len(items)))
    assert all(part.rows in (None, len(items)) for part in parts)


def test_there_are_enough_of_them() -> None:
    assert len({shard.name for shard in BROKEN_SHARDS}) == len(BROKEN_SHARDS) >= 60
    assert {InputError} == {shard.error for shard in BROKEN_SHARDS} - {None}


@pytest.mark.parametrize(
    "shard", [shard for shard in BROKEN_SHARDS if not shard.error], ids=lambda shard: shard.name.replace(" ", "-")
)
def test_a_row_read_alone_is_as_it_was_among_the_others(shard: BrokenShard, tmp_path: Path) -> None:
    source = make_source(put(shard, str(tmp_path)))
    for index, pieces in enumerate(source.plan(PartLimits())):
        part = Part(index, pieces)
        for item in read_part(source, part):
            if isinstance(item, Row):
                alone = replace(part, only=(Wanted(item.row, item.key, item.shard, item.offset),))
                assert list(read_part(source, alone)) == [item]
