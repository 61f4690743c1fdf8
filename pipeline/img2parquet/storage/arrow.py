"""Present a listing as a read-only pyarrow filesystem over Store.open, with its pinned versions and retries.

pyarrow's own S3 client is not used: it has no conditional reads, and gives up for good after 100 retries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
from pyarrow import fs

from img2parquet.storage.backend import Entry


def local_filesystem() -> Any:
    return fs.LocalFileSystem()


def snapshot(entries: Iterable[Entry], open_file: Callable[..., BinaryIO]) -> Any:
    """Make the filesystem. Its paths are URIs without their scheme."""
    return fs.PyFileSystem(Snapshot(entries, open_file))


class Snapshot(fs.FileSystemHandler):  # type: ignore[misc]
    def __init__(self, entries: Iterable[Entry], open_file: Callable[..., BinaryIO]) -> None:
        super().__init__()
        self._entries = {entry.uri.partition("://")[2]: entry for entry in entries}
        self._open = open_file

    def get_type_name(self) -> str:
        return "img2parquet"

    def get_file_info(self, paths: Sequence[str]) -> list[Any]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        folder = selector.base_dir.rstrip("/") + "/"
        inside = [path for path in self._entries if path.startswith(folder)]
        return [self._info(path) for path in inside if selector.recursive or "/" not in path[len(folder) :]]

    def open_input_file(self, path: str) -> Any:
        if path not in self._entries:
            raise FileNotFoundError(path)
        entry = self._entries[path]
        return pa.PythonFile(self._open(entry.uri, expect=entry), mode="r")

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def _info(self, path: str) -> Any:
        entry = self._entries.get(path)
        if entry is not None:
            return fs.FileInfo(path, fs.FileType.File, size=entry.size_bytes)
        is_folder = any(name.startswith(path.rstrip("/") + "/") for name in self._entries)
        return fs.FileInfo(path, fs.FileType.Directory if is_folder else fs.FileType.NotFound)

    def _refuse(self, *args: object) -> NoReturn:
        raise PermissionError("results are read-only")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse
