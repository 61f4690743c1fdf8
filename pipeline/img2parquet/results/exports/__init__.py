"""Write committed rows in the formats of other tools: one file per format, one line each in `EXPORTS`.

To add a format, write one file with a class that has the members of `Export` below, and add its line to `EXPORTS`.
`csv.py` is the shortest example of a file and `npy.py` of a folder; `tests/results/exports` then checks the new format
like every other.

    rows.py         read an output's rows part by part, and find the columns of labels, masks and embeddings
    destination.py  write a file or folder, and give it its name when it is complete
    masks.py        decode masks into regions; polygons.py: trace their outlines
    json_text.py    write values as JSON
    the others      one format each

* Rows are read part by part and written as they come; no format holds all of them in memory.
* `check` looks for the columns that a format needs before anything is written.
* A destination is complete or absent: files are made beside it, or on a local disk for a store, and named last.
* Keys, names and texts are data in every format: quoted by its rules, never part of a path, a query or a tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

from img2parquet.errors import InputError, UserError, nearest

if TYPE_CHECKING:
    from img2parquet.results.exports.destination import Workspace
    from img2parquet.results.exports.rows import ExportRows

EXPORTS = {
    "coco": ("img2parquet.results.exports.coco", "Coco"),
    "coco-panoptic": ("img2parquet.results.exports.coco_panoptic", "CocoPanoptic"),
    "label-studio": ("img2parquet.results.exports.label_studio", "LabelStudio"),
    "cvat": ("img2parquet.results.exports.cvat", "Cvat"),
    "fiftyone": ("img2parquet.results.exports.fiftyone", "FiftyOne"),
    "datasets": ("img2parquet.results.exports.hf_datasets", "Datasets"),
    "csv": ("img2parquet.results.exports.csv", "Csv"),
    "jsonl": ("img2parquet.results.exports.jsonl", "Jsonl"),
    "npy": ("img2parquet.results.exports.npy", "Npy"),
    "lance": ("img2parquet.results.exports.lance", "Lance"),
    "pgvector": ("img2parquet.results.exports.pgvector", "PgVector"),
}


@dataclass(frozen=True)
class ExportOptions:
    """Options of the formats; each format names in `takes` those that it knows."""

    images: str | None = None
    masks: Literal["rle", "polygons"] | None = None
    name: str | None = None

    def image_of(self, key: str, shard: str) -> str:
        """Fill {key} and {shard} into the template `images`, as plain text: where the other tool finds an image."""
        from urllib.parse import quote

        template = self.images or "{key}"
        if template.startswith(("http://", "https://")):
            key, shard = quote(key, safe="/"), quote(shard, safe="/")
        head, *tails = template.split("{key}")
        return key.join(part.replace("{shard}", shard) for part in (head, *tails))


class Export(Protocol):
    """The members of every format, which is constructed with the options."""

    shape: Literal["file", "folder"]
    takes: frozenset[str]  # fields of ExportOptions that the format knows
    last: str  # in a folder, the file that readers open first and that is therefore stored last; else empty

    def __init__(self, options: ExportOptions) -> None: ...

    def check(self, source: ExportRows) -> None:
        """Raise InputError when the rows lack what the format needs."""

    def write(self, source: ExportRows, work: Workspace) -> None:
        """Write all rows into the workspace's file or folder."""


@dataclass(frozen=True)
class ExportSummary:
    """The result of `export`. `notes` are remarks that a user should read."""

    destination: str
    rows: int
    parts: int
    parts_planned: int
    notes: tuple[str, ...] = ()


def export(
    uri: str,
    to: str,
    destination: str,
    *,
    model: str | None = None,
    columns: tuple[str, ...] = (),
    images: str | None = None,
    masks: Literal["rle", "polygons"] | None = None,
    name: str | None = None,
    force: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> ExportSummary:
    """Write the committed rows of one model in the format of another tool.

    uri: the job's `output.uri`. to: a format of `EXPORTS`. destination: a path or URI outside the output, where nothing
    exists yet. model: needed when the output has several. columns: the columns to write, by default all; `key` is
    always written, and naming a column also chooses between several of the kind that the format needs.
    images: where the other tool finds an image, a template with {key} and {shard}; by default `{key}`.
    masks: for coco, `rle` (the default) or `polygons`. name: of the table, task or dataset; by default the model's.
    force: replace an earlier export. storage_options: as under `output` in the job file.

    Raises InputError when the rows lack what the format needs, UserError when the format or an option is unknown or the
    destination lies inside the output, AlreadyExists when the destination exists, MissingDependency when the format's
    library is not installed, StorageError when something cannot be read or written."""
    from img2parquet.results.exports.destination import Destination
    from img2parquet.results.exports.rows import ExportRows

    options = ExportOptions(images, masks, name)
    format = _format(to, options)
    source = ExportRows.at(uri, model, columns, storage_options or {})
    format.check(source)
    place = Destination.at(destination, format.shape, source.store, force)
    place.check(source.uri)
    with place.workspace() as work:
        format.write(source, work)
        notes = [*source.notes(), *work.notes()]
        place.put(work, to, format.last)
    return ExportSummary(place.uri, source.rows_read, source.parts, source.parts_planned, tuple(notes))


def _format(to: str, options: ExportOptions) -> Export:
    if to not in EXPORTS:
        raise UserError(f"unknown export format `{to}`", known=EXPORTS, hint=nearest(to, EXPORTS))
    module, name = EXPORTS[to]
    kind: type[Export] = getattr(import_module(module), name)
    for option in ("images", "masks", "name"):
        if getattr(options, option) is not None and option not in kind.takes:
            takes = ", ".join(f"--{x}" for x in sorted(kind.takes)) or "none of these options"
            raise UserError(f"format `{to}` does not use --{option}", hint=f"it takes {takes}")
    if options.masks not in (None, "rle", "polygons"):
        raise UserError(f"--masks {options.masks}", known=("rle", "polygons"))
    return kind(options)


def needs(source: ExportRows, format: str, what: str, hint: str = "") -> InputError:
    """Return the error for rows that lack what a format needs."""
    has = ", ".join(f"{field.name} {field.type}" for field in source.fields)
    return InputError(f"{source.uri}: `{format}` needs {what}; model `{source.model}` has: {has}", hint=hint)
