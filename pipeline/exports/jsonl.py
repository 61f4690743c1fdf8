"""Rows to JSON lines: one object a row, ASCII, binary as base64, a float that is no number as null."""

from __future__ import annotations

import json

from pipeline.exports import Options
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source
from pipeline.exports.text import json_texts


class Jsonl:
    shape = "file"
    takes: frozenset[str] = frozenset()
    last = ""

    def __init__(self, options: Options) -> None:
        pass

    def check(self, source: Source) -> None:
        pass  # any rows will do

    def write(self, source: Source, work: Workspace) -> None:
        names = [json.dumps(name) for name in source.names]
        with work.text() as out:
            for batch in source.batches():
                columns = [json_texts(batch.column(name)) for name in source.names]
                for values in zip(*columns, strict=True):
                    pairs = (f"{name}: {value}" for name, value in zip(names, values, strict=True))
                    out.write("{" + ", ".join(pairs) + "}\n")
