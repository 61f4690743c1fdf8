"""Export rows as JSON lines: one ASCII object per row, binary as base64, NaN and infinity as null."""

from __future__ import annotations

import json

from img2parquet.results.exports import ExportOptions
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.json_text import json_texts
from img2parquet.results.exports.rows import ExportRows


class Jsonl:
    shape = "file"
    takes: frozenset[str] = frozenset()
    last = ""

    def __init__(self, options: ExportOptions) -> None:
        pass

    def check(self, source: ExportRows) -> None:
        pass  # no column is required

    def write(self, source: ExportRows, work: Workspace) -> None:
        names = [json.dumps(name) for name in source.names]
        with work.text() as out:
            for batch in source.batches():
                columns = [json_texts(batch.column(name)) for name in source.names]
                for values in zip(*columns, strict=True):
                    pairs = (f"{name}: {value}" for name, value in zip(names, values, strict=True))
                    out.write("{" + ", ".join(pairs) + "}\n")
