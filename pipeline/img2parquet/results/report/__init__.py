"""Report on an output in one HTML page: what ran, what was lost, what the model saw.

    run_summary.py    read the records: state, totals, rejects, identities, meters
    row_sample.py     choose rows from a few parts by seed
    embedding_map.py  lay out embeddings, find neighbours and near-duplicates
    accuracy.py       score the sample against ground-truth columns
    masks.py          draw masks as overlays with a legend
    thumbnails.py     fetch the images that are shown, each once
    speed.py          compute speed and time per stage from the meters
    sections.py       assemble what each model's section shows
    charts.py         draw numbers as inline SVG
    page.py           render everything as one HTML file that loads nothing from outside
    png_sheets.py     write the same pictures as PNG files

A page costs the same for a thousand rows and for 1e8: totals come from records and footers, pictures from a sample of
fixed size.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2parquet.errors import UserError
from img2parquet.results.report.page import MARK, render
from img2parquet.results.report.png_sheets import write_sheets
from img2parquet.results.report.row_sample import read_samples
from img2parquet.results.report.run_summary import read_run_summary
from img2parquet.results.report.sections import PageContent, show
from img2parquet.storage.backend import scheme_of

SAMPLE_ROWS = 2000
MOST_ROWS = 20_000  # pairs are compared in memory, and a browser must hold the page


def report(
    uri: str,
    to: str | Path | None = None,
    *,
    sample: int = SAMPLE_ROWS,
    truth: str | None = None,
    images: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write one self-contained HTML page about an output. Returns the paths written, the page first.

    An unfinished output, or Parquet files that another tool wrote, give a page that says so.

    uri: the job's `output.uri`. to: a local file, by default `report.html` in the working folder.
    sample: number of rows to look at, 1 to 20,000. truth: the passthrough column that holds the ground truth; by
    default one whose values are the model's own class names. images: also write PNG sheets beside the page.
    storage_options: as under `output` in the job file.

    Raises InputError when there is nothing to report on, UserError when `to` exists and is not a report."""
    if not 1 <= sample <= MOST_ROWS:
        raise UserError(f"a sample of {sample} rows: expected 1 to {MOST_ROWS:,}")
    path = _place(to)
    summary = read_run_summary(uri, storage_options or {})
    samples = read_samples(summary, sample, truth)
    shown: PageContent = show(summary, samples, truth)
    _write(path, render(shown).encode())
    return [path, *(write_sheets(shown, path) if images else [])]


def _place(to: str | Path | None) -> Path:
    name = str(to or "report.html")
    if scheme_of(name) not in ("", "file"):
        raise UserError(
            f"{name}: a report is written to a local file", hint="write it to a local path and copy it from there"
        )
    path = Path(name.removeprefix("file://"))
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint=f"--to {path / 'report.html'}")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(200):
                raise UserError(f"{path} exists and is not a report of img2parquet", hint="choose another --to")
    return path


def _write(path: Path, data: bytes) -> None:
    """Write the page whole or not at all; an older report is replaced."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
