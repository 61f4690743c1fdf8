"""Sources for tests: one from a job's `input:`, and well-formed input for each kind in SOURCES."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from img2parquet.read import SOURCES, Source
from img2parquet.storage import Store, join
from tests.read.broken_shards import jpeg, parquet, tar

ROWS = 10


def make_source(settings: Mapping[str, Any]) -> Source:
    module, name = SOURCES[settings["kind"]]
    return cast(Source, getattr(import_module(module), name).model_validate(settings))


def put_input(kind: str, root: str) -> dict[str, Any]:
    """Two shards of five images each, with a kept column, below `root`; the settings that read them."""
    files, settings = INPUTS[kind]()
    for name, data in files.items():
        Store().create(join(root, name), data)
    return {"kind": kind, **settings, "uris": [join(root, name) for name in settings["uris"]]}


def _webdataset() -> tuple[dict[str, bytes], dict[str, Any]]:
    def members(start: int) -> list[tuple[str, bytes]]:
        rows = range(start, start + 5)
        return [m for i in rows for m in ((f"{i:03}.cls", b"%d" % i), (f"{i:03}.jpg", jpeg(i)))]

    return {f"{n}.tar": tar(members(5 * n)) for n in range(2)}, {"uris": ["{0,1}.tar"], "keep": ["cls", "txt"]}


def _folder() -> tuple[dict[str, bytes], dict[str, Any]]:
    return {f"f/{i % 2}/{i:03}.jpg": jpeg(i) for i in range(ROWS)}, {"uris": ["f"], "keep": ["class"]}


def _parquet() -> tuple[dict[str, bytes], dict[str, Any]]:
    def shard(start: int) -> bytes:
        rows = range(start, start + 5)
        image = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in rows]
        return parquet(
            {"image": image, "label": list(rows), "tags": [["a"], None, [], ["b", "c"], ["d"]]}, row_group_size=3
        )

    return {f"{n}.parquet": shard(5 * n) for n in range(2)}, {"uris": ["*.parquet"], "keep": ["label", "tags"]}


def _table() -> tuple[dict[str, bytes], dict[str, Any]]:
    images = {f"img/{i:03}.jpg": jpeg(i) for i in range(ROWS)}
    lists = {
        f"{n}.csv": "uri,n\n" + "".join(f"img/{i:03}.jpg,{i}\n" for i in range(5 * n, 5 * n + 5)) for n in range(2)
    }
    files = {**images, **{name: text.encode() for name, text in lists.items()}}
    return files, {"uris": ["0.csv", "1.csv"], "keep": ["n:int64"]}


INPUTS = {"webdataset": _webdataset, "folder": _folder, "parquet": _parquet, "table": _table}
