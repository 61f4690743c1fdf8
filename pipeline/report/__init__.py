"""An output to one HTML page: what ran, what was lost, what the model saw. From a sample whose size is fixed.

    account.py   what the records say: state, totals, rejects, identities, meters
    sample.py    rows of a few parts, chosen by seed
    likeness.py  embeddings -> map, neighbours, near-duplicates
    accuracy.py  predictions against a truth column
    masks.py     masks -> overlays and their legend
    pictures.py  which images are shown -> thumbnails, each fetched from its shard once
    sections.py  all of these -> what one model's section shows
    charts.py    numbers -> inline SVG
    page.py      everything -> one HTML file without a reference to anything outside it
    sheets.py    the same pictures -> PNG files

A page costs the same for a thousand rows and for 1e8: totals come from records and footers, pictures from the sample.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import UserError
from pipeline.report.account import read_account
from pipeline.report.page import MARK, render
from pipeline.report.sample import read_samples
from pipeline.report.sections import Shown, show
from pipeline.report.sheets import write_sheets
from pipeline.storage.entry import scheme_of

SAMPLE_ROWS = 2000
MOST_ROWS = 20_000  # pairs are compared in memory, and a browser holds the page


def report(
    uri: str,
    to: str | Path | None = None,
    *,
    sample: int = SAMPLE_ROWS,
    truth: str | None = None,
    images: bool = False,
    **storage_options: Any,
) -> list[Path]:
    """Write one self-contained HTML page about an output, and PNG sheets beside it where `images` asks for them.

    to: a local file, default `report.html` in the working folder. sample: rows to look at, 1 to 20,000.
    truth: a passthrough column with the right answers; default: one whose values are the model's own class names.
    Returns the paths written, the page first. An unfinished or foreign output gives a page that says so.
    Raises InputError where there is nothing to report on, UserError for a file that is there and is no report."""
    if not 1 <= sample <= MOST_ROWS:
        raise UserError(f"a sample of {sample} rows: say 1 to {MOST_ROWS:,}")
    path = _place(to)
    account = read_account(uri, storage_options)
    samples = read_samples(account, sample, truth)
    shown: Shown = show(account, samples, truth)
    _write(path, render(shown).encode())
    return [path, *(write_sheets(shown, path) if images else [])]


def _place(to: str | Path | None) -> Path:
    name = str(to or "report.html")
    if scheme_of(name) not in ("", "file"):
        raise UserError(f"{name}: a report is written to a local file", hint="copy it from there")
    path = Path(name.removeprefix("file://"))
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint=f"--to {path / 'report.html'}")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(200):
                raise UserError(f"{path} is there and is no report of img2parquet", hint="choose another --to")
    return path


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; an older report is replaced."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


class _CallableModule(ModuleType):
    """`pipeline.report` names this package once it is imported, and is to be called like the public function."""

    def __call__(self, *arguments: Any, **options: Any) -> list[Path]:
        return report(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
