"""Committed rows to the files of another tool: one file per format, one line each in `EXPORTS`.

* Rows are read part by part from `open_results` and written as they come; no format holds all of them.
* What a format needs is looked for in the columns before anything is written.
* A destination is whole or not there: files are made beside it (or on a local disk, for a store) and named last.
* Keys, names and texts are data in every format: quoted by its own rules, never part of a path, a query or a tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipeline.errors import InputError, UserError, nearest

if TYPE_CHECKING:
    from pipeline.exports.place import Workspace
    from pipeline.exports.source import Source

EXPORTS = {
    "coco": ("pipeline.exports.coco", "Coco"),
    "coco-panoptic": ("pipeline.exports.coco_panoptic", "CocoPanoptic"),
    "label-studio": ("pipeline.exports.label_studio", "LabelStudio"),
    "cvat": ("pipeline.exports.cvat", "Cvat"),
    "fiftyone": ("pipeline.exports.fiftyone", "FiftyOne"),
    "datasets": ("pipeline.exports.datasets", "Datasets"),
    "csv": ("pipeline.exports.csv", "Csv"),
    "jsonl": ("pipeline.exports.jsonl", "Jsonl"),
    "npy": ("pipeline.exports.npy", "Npy"),
    "lance": ("pipeline.exports.lance", "Lance"),
    "pgvector": ("pipeline.exports.pgvector", "PgVector"),
}


@dataclass(frozen=True)
class Options:
    """What may be asked of a format beyond its rows; each format says in `takes` which of these it knows."""

    images: str | None = None
    masks: Literal["rle", "polygons"] | None = None
    name: str | None = None

    def image_of(self, key: str, shard: str) -> str:
        """Where the target finds an image: `images` with {key} and {shard} filled in, as text and nothing else."""
        from urllib.parse import quote

        template = self.images or "{key}"
        if template.startswith(("http://", "https://")):
            key, shard = quote(key, safe="/"), quote(shard, safe="/")
        head, *tails = template.split("{key}")
        return key.join(part.replace("{shard}", shard) for part in (head, *tails))


class Export(Protocol):
    """What every format offers; made from the options."""

    shape: Literal["file", "folder"]
    takes: frozenset[str]  # of the fields of Options
    last: str  # of a folder: the file that readers open first, so the one that a store gets last

    def __init__(self, options: Options) -> None: ...

    def check(self, source: Source) -> None:
        """Raises InputError where the rows have not what the format needs."""

    def write(self, source: Source, work: Workspace) -> None:
        """All rows, into the workspace's file or folder."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `notes` are remarks that a user should read."""

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
    **storage_options: Any,
) -> Exported:
    """The committed rows of one model of an output, in another tool's format, at a path or URI that is not there yet.

    columns: what of the rows goes along (all of them; always `key`); which one is meant where several would do.
    images: where the target finds an image, with {key} and {shard}; default `{key}`.
    masks: coco: `rle` (default) or `polygons`. name: of the table or dataset; default: the model's.
    force: replace an earlier export. Raises InputError, UserError, MissingDependency, StorageError."""
    from pipeline.exports.place import Place
    from pipeline.exports.source import Source

    options = Options(images, masks, name)
    format = _format(to, options)
    source = Source.at(uri, model, columns, storage_options)
    format.check(source)
    place = Place.at(destination, format.shape, source.store, force)
    place.check(source.uri)
    with place.workspace() as work:
        format.write(source, work)
        notes = [*source.notes(), *work.notes()]
        place.put(work, to, format.last)
    return Exported(place.uri, source.rows_read, source.parts, source.parts_planned, tuple(notes))


def _format(to: str, options: Options) -> Export:
    if to not in EXPORTS:
        raise UserError(f"no export format `{to}`", known=EXPORTS, hint=nearest(to, EXPORTS))
    module, name = EXPORTS[to]
    kind: type[Export] = getattr(import_module(module), name)
    for option in ("images", "masks", "name"):
        if getattr(options, option) is not None and option not in kind.takes:
            takes = ", ".join(f"--{x}" for x in sorted(kind.takes)) or "none of them"
            raise UserError(f"format `{to}` has no use for --{option}", hint=f"it takes {takes}")
    if options.masks not in (None, "rle", "polygons"):
        raise UserError(f"--masks {options.masks}", known=("rle", "polygons"))
    return kind(options)


def needs(source: Source, format: str, what: str, hint: str = "") -> InputError:
    """The error for rows that a format cannot be made of."""
    has = ", ".join(f"{field.name} {field.type}" for field in source.fields)
    return InputError(f"{source.uri}: `{format}` needs {what}; model `{source.model}` has: {has}", hint=hint)
