"""What a user calls a model to a local folder with its files: a path, any URI, or `org/name@revision`.

* A folder behind a URI is fetched whole into the cache, keyed by its files' names, sizes and etags, and renamed into
  place, so that two workers may fetch at once and a half-fetched folder is never read.
* `org/name` goes through huggingface_hub and its cache, which also works offline; all files are of one commit.
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

from pipeline.errors import AccessDenied, MissingDependency, NotFound, UnknownModel, nearest
from pipeline.models.checkpoint import INDEX, WEIGHT_FILES, read_json
from pipeline.storage import Entry, Store, redact
from pipeline.storage.entry import redact_text

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Found:
    """A checkpoint's files on this machine, and where they came from, fit to be printed."""

    folder: Path
    source: str


def find(model: str, storage_options: Mapping[str, object] | None = None, known: Collection[str] = ()) -> Found:
    """Local folder, URI of a folder, or `org/name@revision` -> its files. Raises UnknownModel with the nearest of
    `known` names and of the folder's neighbours, MissingDependency, StorageError."""
    path = Path(model.removeprefix("file://")).expanduser()
    if path.is_dir():
        return Found(path, str(path.resolve()))
    if path.is_file():
        raise UnknownModel(f"`{model}` is a file", hint=f"name its folder: `{path.parent}`")
    if "://" in model and not model.startswith("file://"):
        return _fetch(model, Store(dict(storage_options or {})))
    named = REPO.fullmatch(model)
    if named and (named["repo"] in set(known) or not _looks_local(model, path)):
        return _from_hub(named["repo"], named["revision"], known)
    raise _unknown(model, known)


def cache_folder() -> Path:
    """Where fetched folders are kept: $IMG2PARQUET_CACHE, else the user's cache folder."""
    base = os.environ.get("IMG2PARQUET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "img2parquet"
    return Path(base).expanduser() / "models"


def _looks_local(model: str, path: Path) -> bool:
    return model.startswith((".", "/", "~")) or path.parent.is_dir()


def _unknown(model: str, known: Collection[str]) -> UnknownModel:
    parent = Path(model.removeprefix("file://")).expanduser().parent
    siblings = [str(parent / p.name) for p in parent.iterdir() if (p / CONFIG).is_file()] if parent.is_dir() else []
    names = sorted([*known, *siblings])
    short = {name.rpartition("/")[-1]: name for name in names}
    close = nearest(model, names) or nearest(model, short)
    for name in short:
        close = close.replace(f"`{name}`", f"`{short[name]}`")
    hint = close or "give a folder, a URI of a folder, or `org/name@revision`"
    return UnknownModel(f"no model `{model}`: not a folder, nor a name on the hub", known=names, hint=hint)


def _fetch(uri: str, store: Store) -> Found:
    entries = _needed(uri, store.list_files(uri))
    content = json.dumps([[name, entry.size_bytes, entry.etag] for name, entry in entries.items()])
    folder = cache_folder() / hashlib.sha256(content.encode()).hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _fetch_into(folder, entries, store)
    return Found(folder, redact(uri))


def _needed(uri: str, entries: list[Entry]) -> dict[str, Entry]:
    """A checkpoint's own files by name; what else lies in its folder is not fetched."""
    by_name = {entry.uri.rstrip("/").rpartition("/")[-1]: entry for entry in entries if _is_child(uri, entry.uri)}
    if CONFIG not in by_name:
        raise UnknownModel(f"no model at `{redact(uri)}`: there is no {CONFIG}", hint="name the folder that holds it")
    kinds = (".safetensors", "pytorch_model", "flax_model")  # the first that is there is fetched
    found = ({name: entry for name, entry in by_name.items() if kind in name} for kind in kinds)
    weights = next(filter(None, found), {})
    settings = {name: by_name[name] for name in (CONFIG, PREPROCESSOR) if name in by_name}
    return dict(sorted({**settings, **weights}.items()))


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
        if not folder.is_dir():  # else another worker was first, with the same bytes
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _from_hub(repo: str, revision: str | None, known: Collection[str]) -> Found:
    hub = _huggingface_hub()
    config = _download(hub, repo, CONFIG, revision, known)
    if config is None:
        raise UnknownModel(f"`{repo}` has no {CONFIG}", hint="it is not a model that this program can read")
    commit = config.parent.name
    _download(hub, repo, PREPROCESSOR, commit, known)
    if not any(_download_weights(hub, repo, name, commit, known) for name in WEIGHT_FILES):
        hint = f"fetch it where there is a network: `hf download {repo} --revision {commit}`"
        raise UnknownModel(f"`{repo}@{commit}` has no weights in the hub's cache or on the hub", hint=hint)
    return Found(config.parent, f"{repo}@{commit}")


def _download_weights(hub: Any, repo: str, name: str, commit: str, known: Collection[str]) -> bool:
    if _download(hub, repo, name, commit, known):
        return True
    index = _download(hub, repo, name + INDEX, commit, known)
    if index is None:
        return False
    shards = {str(shard) for shard in read_json(index).get("weight_map", {}).values()}
    return all(_download(hub, repo, shard, commit, known) for shard in sorted(shards))


def _download(hub: Any, repo: str, name: str, revision: str | None, known: Collection[str]) -> Path | None:
    """One file of a repository, from the cache or the network; None where the repository does not have it."""
    errors = hub.errors
    try:
        return Path(hub.hf_hub_download(repo, name, revision=revision))
    except errors.LocalEntryNotFoundError:
        if name != CONFIG:
            return None
        at = f" --revision {revision}" if revision else ""
        hint = f"fetch it where there is a network: `hf download {repo}{at}`; or " + _otherwise(repo, known)
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
            f"`{repo}`: {name}: {_first_line(error)}", hint="try again, or fetch it with `hf download`"
        ) from None


def _otherwise(repo: str, known: Collection[str]) -> str:
    rehearse = "for a rehearsal without its weights, `weights: random(0)`"
    return rehearse if repo in known else nearest(repo, known) or "check the spelling"


def _huggingface_hub() -> Any:
    importer: Callable[[str], Any] = importlib.import_module
    try:
        hub = importer("huggingface_hub")
        importer("huggingface_hub.errors")
    except ImportError:
        message = "models named `org/name` need the package huggingface_hub"
        raise MissingDependency(message, hint="pip install 'img2parquet[hub]'") from None
    for name in ("httpx", "urllib3", "filelock"):  # httpx tells each URL, also the signed ones that it is sent to
        logging.getLogger(name).setLevel(logging.WARNING)
    return hub


def _first_line(error: BaseException) -> str:
    return redact_text((str(error).splitlines() or [type(error).__name__])[0])
