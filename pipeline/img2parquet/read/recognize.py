"""Recognize what lies at some paths or URIs, and describe it as the `input` of a job file.

Images, tars, Parquet files and lists of URIs are told apart by their extensions; columns by the first file's header.
Nothing is guessed where several answers fit: then an error names them, and says what to write.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from img2parquet.errors import InputError
from img2parquet.read.row_groups import open_parquet
from img2parquet.read.settings import IMAGE_EXTENSIONS, input_exists
from img2parquet.read.uri_lists import DELIMITERS, SEP_LINE
from img2parquet.schema import RESERVED_COLUMNS
from img2parquet.storage import Entry, Store, name_of, redact, resolve
from img2parquet.storage.backend import scheme_of
from img2parquet.storage.fsspec_backend import is_web
from img2parquet.storage.patterns import has_magic

TARS, LISTS = ("tar", "tar.gz", "tgz"), ("csv", "tsv", "jsonl", "ndjson")
GROUPS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "images"), **dict.fromkeys(TARS, "tars"), "parquet": "Parquet files",
    **dict.fromkeys(LISTS, "lists"),
}  # fmt: skip
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes", "content")
LINK_COLUMNS = (
    "uri", "url", "image_uri", "image_url", "img_url", "image", "img", "image_path", "path", "filepath", "file_path",
    "file_name", "filename", "file", "src", "link",
)  # fmt: skip
KEY_COLUMNS = ("key", "id", "image_id", "uid", "name", "file_name", "filename", "path", "uri", "url", "image_url")
HEADER_BYTES = 1 << 20
SAMPLED_LINES = 100
MOST_NAMES = 1000


@dataclass(frozen=True)
class Recognized:
    """input: what a job file says under `input:`. about: what was found, in a few words. name: of the first source."""

    input: dict[str, Any]
    about: str
    name: str


def recognize(sources: Sequence[str], reserved: Collection[str] = ()) -> Recognized:
    """Look at folders, files, globs or URIs, all of one kind.

    reserved: names of columns that the results will have, which no kept column can take. Raises InputError when nothing
    there can be read, when the kinds are mixed, or when no column can be told to hold the images; StorageError."""
    store, found = Store(), dict[str, list[Entry]]()
    with input_exists():
        for source in sources:
            found[source] = _files(store, source)
    groups: dict[str, list[Entry]] = {}
    other: Counter[str] = Counter()
    for entry in {entry.uri: entry for entries in found.values() for entry in entries}.values():
        extension = extension_of(entry.uri)
        if extension in GROUPS:
            groups.setdefault(GROUPS[extension], []).append(entry)
        else:
            other[f".{extension}" if extension else "no extension"] += 1
    if "images" in groups and set(groups) <= {"images", "lists"}:
        other.update(f".{extension_of(entry.uri)}" for entry in groups.pop("lists", ()))  # such as a metadata.csv
    _check_one_kind(groups, other, sources)
    ((kind, entries),) = groups.items()
    counts = _counted(Counter(f".{extension_of(entry.uri)}" for entry in entries))
    about = f"{_number(len(entries), kind)} ({counts})"
    if other:
        about += f"; not read: {_counted(other)}"
    taken = {*RESERVED_COLUMNS, "model", *reserved}
    if kind == "images":
        settings = _folder(sources, entries)
    else:
        uris = [uri for source in sources for uri in _globs(source, found[source], kind)]
        settings = {"kind": "webdataset", "uris": uris} if kind == "tars" else _columns(store, entries[0], uris, taken)
    return Recognized(settings, about, _stem(sources[0]))


def extension_of(uri: str) -> str:
    """Return the extension in lower case, `tar.gz` being one; empty where there is none."""
    name = redact(uri).rpartition("/")[2].lower()
    double = next((end for end in TARS if name.endswith(f".{end}")), "")
    stem, dot, extension = name.rpartition(".")
    return double or (extension if stem and dot else "")


def _files(store: Store, source: str) -> list[Entry]:
    """List the files of one source. Hidden files and folders are left out."""
    at = _absolute(source)
    if _is_glob(at):
        return store.expand([source], _pass_over)
    if is_web(at) or (extension_of(at) in GROUPS and store.exists(at)):
        return [store.stat(at)]
    below = [entry for entry in store.list_files(at, _pass_over) if not _is_hidden(entry.uri[len(at) :])]
    if below or (not scheme_of(at) and Path(at).is_dir()):
        return below
    return [store.stat(at)]


def _pass_over(path: str, kind: str) -> None:
    """Leave out what cannot be read; the job warns of it."""


def _is_glob(at: str) -> bool:
    """Return whether a name with wildcards is not that of a local file or folder, and no URL with a query."""
    return has_magic(at) and not is_web(at) and (bool(scheme_of(at)) or not Path(at).exists())


def _is_hidden(path: str) -> bool:
    return any(name.startswith(".") for name in path.split("/"))


def _check_one_kind(groups: Mapping[str, Sequence[Entry]], other: Counter[str], sources: Sequence[str]) -> None:
    where = ", ".join(redact(source) for source in sources)
    if not groups:
        there = f"; there are {_counted(other)}" if other else ": there are no files"
        known = ["images", "tars", "Parquet files", "lists (.csv, .tsv, .jsonl)"]
        raise InputError(f"{where}: nothing that can be read{there}", known=known)
    if len(groups) > 1:
        parts = " and ".join(_number(len(entries), kind) for kind, entries in groups.items())
        first = extension_of(next(iter(groups.values()))[0].uri)
        raise InputError(
            f"{where}: two kinds of input, {parts}; one job reads one kind",
            hint=f"name one with a glob, such as '*.{first}'",
        )


def _number(count: int, kind: str) -> str:
    return f"{count:,} {kind if count > 1 else kind.removesuffix('s')}"


def _counted(counts: Counter[str]) -> str:
    shown = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(4))
    return shown + (f" and {len(counts) - 4} more kinds" if len(counts) > 4 else "")


def _folder(sources: Sequence[str], entries: Iterable[Entry]) -> dict[str, Any]:
    uris = [_absolute(source) for source in sources]
    roots = [uri.rstrip("/") for uri in uris if not has_magic(uri)]
    inside = [entry.uri[len(root) + 1 :] for entry in entries for root in roots if entry.uri.startswith(root + "/")]
    keep = ["class"] if inside and all("/" in path for path in inside) else []
    return {"kind": "folder", "uris": uris, **({"keep": keep} if keep else {})}


def _globs(source: str, entries: Sequence[Entry], kind: str) -> list[str]:
    """Return what names the files of a source in a job file: itself, or globs below a folder."""
    at = _absolute(source)
    files = [entry.uri for entry in entries if GROUPS.get(extension_of(entry.uri)) == kind]
    if files == [at] or _is_glob(at):
        return [at]
    root = at.rstrip("/")
    if has_magic(root) or "{" in root:  # a glob would read the folder's own name as a pattern
        if len(files) > MOST_NAMES:
            raise InputError(f"{redact(source)}: its name has characters of a glob", hint="rename the folder")
        return files
    nested = any("/" in uri[len(root) + 1 :] for uri in files)
    return [f"{root}/{'**/' * nested}*.{extension}" for extension in sorted({extension_of(uri) for uri in files})]


def _absolute(source: str) -> str:
    at = str(Path(source).expanduser()) if source.startswith("~") else source
    return resolve(at)


def _columns(store: Store, first: Entry, uris: Sequence[str], taken: Collection[str]) -> dict[str, Any]:
    """Describe Parquet files or lists by the columns of the first one."""
    kinds = _parquet_columns(store, first) if extension_of(first.uri) == "parquet" else _list_columns(store, first)
    images = [name for name, kind in kinds.items() if kind == "image"]
    if images:
        image = _chosen(images, IMAGE_COLUMNS, kinds, first, "input.image")
        key = next((name for name in _ordered(kinds, KEY_COLUMNS) if kinds[name] in ("text", "whole")), None)
        columns = {"image": image, **({"key": key} if key else {})}
        base: dict[str, Any] = {"kind": "parquet", "uris": list(uris), **columns}
    else:
        texts = [name for name, kind in kinds.items() if kind in ("text", "link")]
        links = [name for name in texts if kinds[name] == "link"]
        known = _ordered(texts, LINK_COLUMNS)
        link = _chosen(known[:1] or links, LINK_COLUMNS, kinds, first, "input.uri")
        columns = {"uri": link}
        base = {"kind": "table", "uris": list(uris), **({} if link == "uri" else columns)}
    used = {*columns.values(), *taken}
    keep = [
        name for name, kind in kinds.items() if kind not in ("image", "other") and name not in used and ":" not in name
    ]
    return {**base, **({"keep": keep} if keep else {})}


def _chosen(
    candidates: Sequence[str], known: Sequence[str], kinds: Mapping[str, str], first: Entry, setting: str
) -> str:
    """Return the one candidate, or that with the best known name."""
    named = _ordered(candidates, known)
    if len(candidates) == 1 or named:
        return named[0] if named else candidates[0]
    what = (
        f"several columns may hold the images: {', '.join(candidates)}"
        if candidates
        else "no column names or holds images"
    )
    raise InputError(
        f"{redact(first.uri)}: {what}", known=list(kinds), hint=f"name the column with --set {setting}=COLUMN"
    )


def _ordered(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Return the names that are known, best first, whatever their case."""
    folded = {name.casefold(): name for name in names}
    return [folded[name] for name in known if name in folded]


def _parquet_columns(store: Store, entry: Entry) -> dict[str, str]:
    """Return what each column holds: image, text, whole (numbers), plain (other values to keep) or other."""
    with store.open(entry.uri) as file:
        schema = open_parquet(file, entry.uri).schema_arrow
    return {field.name: _kind(field.type) for field in schema}


def _kind(type_: pa.DataType) -> str:
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_binary(plain) or pa.types.is_large_binary(plain) or plain == pa.binary_view():
        return "image"
    if pa.types.is_struct(plain):
        return "image" if plain.get_field_index("bytes") >= 0 else "other"
    if pa.types.is_string(plain) or pa.types.is_large_string(plain) or plain == pa.string_view():
        return "text"
    if pa.types.is_integer(plain):
        return "whole"
    return "other" if pa.types.is_nested(plain) or pa.types.is_null(plain) else "plain"


def _list_columns(store: Store, entry: Entry) -> dict[str, str]:
    """Return the columns of a text list: `link` where the first values look like names of images, else text."""
    text = store.read(entry.uri, 0, HEADER_BYTES).decode("utf-8-sig", errors="replace")
    rows = list(_records(text, extension_of(entry.uri), whole=entry.size_bytes <= HEADER_BYTES))
    values: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    if not values:
        raise InputError(f"{redact(entry.uri)}: the list has no rows", hint="its first line names the columns")
    return {name: "link" if _are_links(column) else "text" for name, column in values.items()}


def _records(text: str, extension: str, whole: bool) -> Iterable[dict[str, str]]:
    lines = io.StringIO(text).readlines()
    lines = (lines if whole else lines[:-1])[: SAMPLED_LINES + 1]
    if extension in ("csv", "tsv") and lines:
        separator = SEP_LINE.fullmatch(lines[0])
        lines = lines[1:] if separator else lines
        own = separator[1] if separator else "," if extension == "csv" else "\t"
        for row in csv.DictReader(lines, delimiter=own if own in lines[0] else max(DELIMITERS, key=lines[0].count)):
            yield {name: value for name, value in row.items() if isinstance(name, str) and isinstance(value, str)}
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


def _are_links(values: Sequence[str]) -> bool:
    seen = [value.strip() for value in values if value.strip()]
    return bool(seen) and all(scheme_of(value) or extension_of(value) in IMAGE_EXTENSIONS for value in seen)


def _stem(source: str) -> str:
    """Name a source for a person: `photos` for `s3://bucket/photos/*.tar`."""
    names = [
        name for name in name_of(source).rstrip("/").split("/") if name and not has_magic(name) and "{" not in name
    ]
    name = names[-1] if names else "images"
    extension = extension_of(name)
    return name[: -len(extension) - 1] if extension in GROUPS else name.rpartition(":")[2] or "images"
