"""Find a model's files: resolve a path, any URI, or `org/name@revision` to a local folder.

* A folder behind a URI is downloaded whole into the cache, keyed by its files' names, sizes and etags, and renamed into
  place, so that two workers may download at once and a half-downloaded folder is never read.
* `org/name` goes through huggingface_hub and its cache, which also works offline; all files come from one commit.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2parquet.errors import AccessDenied, MissingDependency, NotFound, UnknownModel, nearest
from img2parquet.models.checkpoint import INDEX, WEIGHT_FILES, read_json
from img2parquet.models.wrong_files import ADAPTER, ADAPTER_CONFIG, MERGE, is_adapter, no_weights, other_weights
from img2parquet.storage import Entry, Store, redact
from img2parquet.storage.backend import redact_text

CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"  # in the place of config.json, for files that OpenCLIP alone wrote
CONFIGS = (CONFIG, OPEN_CLIP_CONFIG)
TOKENIZERS = TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SETTINGS = ("preprocessor_config.json", "processor_config.json")  # downloaded where they exist
POINTER_BYTES = 1024  # a git-lfs pointer has some 130
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class LocatedCheckpoint:
    """A checkpoint's files on this machine, and their source, safe to print."""

    folder: Path
    source: str


def find(
    model: str, storage_options: Mapping[str, object] | None = None, known: Collection[str] = ()
) -> LocatedCheckpoint:
    """Locate the files of a local folder, the URI of a folder, or `org/name@revision`.

    Raises UnknownModel with the nearest of `known` names and of the folder's neighbours, MissingDependency,
    StorageError."""
    path = Path(model.removeprefix("file://")).expanduser()
    if path.is_dir():
        return LocatedCheckpoint(path, str(path.resolve()))
    if path.is_file():
        raise UnknownModel(f"`{model}` is a file", hint=f"use its folder: `{path.parent}`")
    if "://" in model and not model.startswith("file://"):
        return _fetch(model, Store(dict(storage_options or {})))
    named = REPO.fullmatch(model)
    if not named or model.startswith((".", "/", "~")):
        raise _unknown(model, known)
    try:
        return _from_hub(named["repo"], named["revision"], known)
    except (UnknownModel, MissingDependency) as error:
        if named["repo"] in set(known) or not _models_in(path.parent):
            raise
        raise _unknown(model, known, f"not a folder, and {error.message}") from None


def cache_folder() -> Path:
    """Return the folder for downloaded models: below $IMG2PARQUET_CACHE, else below the user's cache folder."""
    base = os.environ.get("IMG2PARQUET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "img2parquet"
    return Path(base).expanduser() / "models"


def _models_in(folder: Path) -> list[str]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [str(folder / one.name) for one in found if any((one / name).is_file() for name in CONFIGS)]


def _unknown(
    model: str, known: Collection[str], problem: str = "neither a folder nor a name on the hub"
) -> UnknownModel:
    siblings = _models_in(Path(model.removeprefix("file://")).expanduser().parent)
    names = sorted([*known, *siblings])
    short = {name.rpartition("/")[-1]: name for name in names}
    close = nearest(model, names) or nearest(model, short)
    for name in short:
        close = close.replace(f"`{name}`", f"`{short[name]}`")
    hint = close or "use a folder, the URI of a folder, or `org/name@revision`"
    return UnknownModel(f"no model `{model}`: {problem}", known=names, hint=hint)


def _fetch(uri: str, store: Store) -> LocatedCheckpoint:
    entries = _needed(uri, store.list_files(uri), store)
    content = json.dumps([[name, entry.size_bytes, entry.etag] for name, entry in entries.items()])
    folder = cache_folder() / hashlib.sha256(content.encode()).hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _fetch_into(folder, entries, store)
    return LocatedCheckpoint(folder, redact(uri))


def _needed(uri: str, entries: list[Entry], store: Store) -> dict[str, Entry]:
    """Select a checkpoint's own files, by name; other files in its folder are not downloaded."""
    by_name = {entry.uri.rstrip("/").rpartition("/")[-1]: entry for entry in entries if _is_child(uri, entry.uri)}
    if by_name.keys().isdisjoint(CONFIGS):
        hint = f"it holds {ADAPTER}: {MERGE}" if is_adapter(by_name) else "use the folder that holds it"
        raise UnknownModel(f"no model at `{redact(uri)}`: there is no {CONFIG}", hint=hint)
    weights = next(filter(None, (_weights_of(name, by_name, store) for name in WEIGHT_FILES)), [])
    if not weights:  # something small may be a pointer to weights: the reader says so
        weights = [name for name in other_weights(by_name) if by_name[name].size_bytes <= POINTER_BYTES]
    if not weights:
        raise no_weights(redact(uri), by_name, WEIGHT_FILES)
    return {name: by_name[name] for name in sorted({*CONFIGS, *SETTINGS, *TOKENIZERS, *weights}) if name in by_name}


def _weights_of(name: str, by_name: Mapping[str, Entry], store: Store) -> list[str]:
    """List the files of weights that are in one file, or in those that an index names. Empty if there are none."""
    if name in by_name:
        return [name]
    if name + INDEX not in by_name:
        return []
    try:
        shards = json.loads(store.read(by_name[name + INDEX].uri))["weight_map"].values()
        return [name + INDEX, *map(str, shards)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [name + INDEX]  # the reader says what is wrong with it


def _is_child(folder_uri: str, uri: str) -> bool:
    return "/" not in uri.split("://")[-1].removeprefix(folder_uri.rstrip("/").split("://")[-1]).lstrip("/")


def _fetch_into(folder: Path, entries: Mapping[str, Entry], store: Store) -> None:
    half = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".fetching-"))
    try:
        for name, entry in entries.items():
            with (half / name).open("wb") as file:
                for chunk in store.stream(entry.uri, 0, entry.size_bytes, expect=entry):
                    file.write(chunk)
        half.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another worker was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _from_hub(repo: str, revision: str | None, known: Collection[str]) -> LocatedCheckpoint:
    hub = _huggingface_hub()
    try:
        config = _download(hub, repo, CONFIG, revision, known)
        config = config or _download(hub, repo, OPEN_CLIP_CONFIG, revision, known)
    except UnknownModel:
        config = _download(hub, repo, OPEN_CLIP_CONFIG, revision, known)  # offline, where nothing says which it has
        if config is None:
            _refuse_adapter(hub, repo, revision, known)
            raise
    if config is None:
        _refuse_adapter(hub, repo, revision, known)
        raise UnknownModel(f"`{repo}` has no {CONFIG}", hint="img2parquet cannot read it as a model")
    commit = config.parent.name
    with_text = config.name == OPEN_CLIP_CONFIG or "text_config" in read_json(config)
    for name in (*SETTINGS, *(TOKENIZERS if with_text else ())):
        _download(hub, repo, name, commit, known)
    if not any(_download_weights(hub, repo, name, commit, known) for name in WEIGHT_FILES):
        hint = f"download it on a machine with a network: `hf download {repo} --revision {commit}`"
        _refuse_adapter(hub, repo, commit, known)
        raise UnknownModel(f"`{repo}@{commit}` has no weights in the hub's cache or on the hub", hint=hint)
    return LocatedCheckpoint(config.parent, f"{repo}@{commit}")


def _refuse_adapter(hub: Any, repo: str, revision: str | None, known: Collection[str]) -> None:
    if _download(hub, repo, ADAPTER_CONFIG, revision, known):
        raise UnknownModel(f"`{repo}` holds {ADAPTER}", hint=MERGE)


def _download_weights(hub: Any, repo: str, name: str, commit: str, known: Collection[str]) -> bool:
    if _download(hub, repo, name, commit, known):
        return True
    index = _download(hub, repo, name + INDEX, commit, known)
    if index is None:
        return False
    shards = {str(shard) for shard in read_json(index).get("weight_map", {}).values()}
    return all(_download(hub, repo, shard, commit, known) for shard in sorted(shards))


def _download(hub: Any, repo: str, name: str, revision: str | None, known: Collection[str]) -> Path | None:
    """Get one file of a repository from the cache or the network; None if the repository does not have it."""
    errors = hub.errors
    try:
        return Path(hub.hf_hub_download(repo, name, revision=revision))
    except errors.LocalEntryNotFoundError:
        if name != CONFIG:
            return None
        at = f" --revision {revision}" if revision else ""
        hint = f"download it on a machine with a network: `hf download {repo}{at}`; or " + _otherwise(repo, known)
        raise UnknownModel(f"`{repo}` is not in the hub's cache, and the hub cannot be reached", hint=hint) from None
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise AccessDenied(
            f"`{repo}` is gated: {_first_line(error)}", hint="accept its terms, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownModel(f"`{repo}` has no revision `{revision}`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        hint = nearest(repo, known) or "check the spelling; a private repository needs `hf auth login`"
        raise UnknownModel(f"no repository `{repo}` on the hub", known=known, hint=hint) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise NotFound(
            f"`{repo}`: {name}: {_first_line(error)}", hint="try again, or download it with `hf download`"
        ) from None


def _otherwise(repo: str, known: Collection[str]) -> str:
    rehearse = "for a trial run without its weights, `weights: random(0)`"
    return rehearse if repo in known else nearest(repo, known) or "check the spelling"


def _huggingface_hub() -> Any:
    importer: Callable[[str], Any] = importlib.import_module
    try:
        hub = importer("huggingface_hub")
        importer("huggingface_hub.errors")
    except ImportError:
        message = "models named `org/name` need the package huggingface_hub"
        raise MissingDependency(message, hint="pip install huggingface_hub") from None
    for name in ("httpx", "urllib3", "filelock"):  # httpx logs each URL, including signed ones
        logging.getLogger(name).setLevel(logging.WARNING)
    return hub


def _first_line(error: BaseException) -> str:
    return redact_text((str(error).splitlines() or [type(error).__name__])[0])
