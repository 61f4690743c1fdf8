"""Turn what a decoder raises on a damaged file into one StorageError that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from img2parquet.errors import StorageError


@contextmanager
def reading_record(uri: str) -> Iterator[None]:
    """Turn any error of decoding the record at `uri` into a StorageError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0] or "its pages are damaged"
        raise StorageError(f"{uri}: cannot be read: {what}", hint="restore the file that the run wrote") from None


@contextmanager
def reading_parts(uri: str) -> Iterator[None]:
    """Turn any error of reading committed files into a StorageError; Arrow's message names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        hint = f"`img2parquet verify {uri}` lists everything that is wrong"
        raise StorageError(f"{uri}: a committed file cannot be read: {what}", hint=hint) from None
