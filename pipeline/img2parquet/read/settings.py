"""Define the settings that all sources share: URIs, kept columns, the store behind them, and how a part fails.

`uris` may hold secrets (a login, a signature). They travel to the workers with the settings and nowhere else: files are
called by their `names`, and so are the URIs when settings are dumped or shown. Options hold no secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_serializer,
    field_validator,
    model_validator,
)

from img2parquet.errors import InputError, NotFound, PartFailed, StorageError
from img2parquet.read.passthrough import Passthrough, parse_keep
from img2parquet.schema import Piece
from img2parquet.storage import Entry, Store, name_of, redact, resolve
from img2parquet.storage.patterns import expand_braces
from img2parquet.storage.uri_secrets import given

# files that are passed to `decode`, which looks at their bytes: a HEIC file becomes a reject there and is not ignored
IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "avifs"}
    | {"heic", "heif", "jp2", "jxl", "ppm", "pgm", "pbm", "pnm"}
)
SECRET = re.compile(
    r"(^|[_-])(key|secret|token|passwd|password|credentials?|sas|sig|auth|authorization|cookies?)([_-]|$)"
    r"|connection_?string|(account|access|api)key",
    re.IGNORECASE,
)
LISTS = frozenset({"uris", "keep"})  # fields that also take one text
CHANGED_HINT = "the plan is frozen: restore the input, or start a new run in another output folder"


def _refuse_secrets(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name in _names_in(options):
        if SECRET.search(name):
            raise ValueError(
                f"storage_options names `{name}`: secrets would be written into the run's record; "
                "set them in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...) of the driver and the workers"
            )
    Store(options=options)  # refuses options that no filesystem knows
    return options


StorageOptions = Annotated[dict[str, JsonValue], AfterValidator(_refuse_secrets)]  # for inputs and outputs


class SourceSettings(BaseModel):
    """The settings of every input format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uris: tuple[str, ...] = Field(
        min_length=1, description="Files or folders: paths or URIs, with globs and ranges such as {000..127}"
    )
    keep: tuple[str, ...] = Field(
        default=(),
        description="Columns to carry through to the results: `name` or `name:type` (string, int64, float64, bool)",
    )
    storage_options: StorageOptions = Field(
        default_factory=dict,
        description="Options of the input's filesystem (endpoint_url, profile, anon, ...); secrets belong in the "
        "environment",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_one(cls, values: Any) -> Any:
        """Take a text where a list is expected as a list of one."""
        if not isinstance(values, dict):
            return values
        return {**values, **{name: [values[name]] for name in LISTS if isinstance(values.get(name), str)}}

    @field_validator("uris")
    @classmethod
    def _make_absolute(cls, uris: tuple[str, ...]) -> tuple[str, ...]:
        """Resolve relative paths: a worker may run in another folder than the command."""
        if not all(uri.strip() for uri in uris):
            raise ValueError("a URI is empty")
        return tuple(resolve(str(Path(uri).expanduser()) if uri.startswith("~") else uri) for uri in uris)

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        parse_keep(keep)
        return keep

    @property
    def kept(self) -> tuple[Passthrough, ...]:
        return parse_keep(self.keep)

    @field_serializer("uris")
    def _without_secrets(self, uris: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(name_of, uris))

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, self.names if name == "uris" else value

    @property
    def names(self) -> tuple[str, ...]:
        """Return the URIs without logins, signatures and other secrets."""
        return tuple(map(name_of, self.uris))

    @cached_property
    def store(self) -> Store:
        """Return the store, which holds the secrets of the URIs. Raises InputError if a name has two signatures."""
        uris = (resolve(name) for uri in self.uris for name in (expand_braces(uri) if "://" in uri else ()))
        return Store(options=self.storage_options, given=given(uris))


def _names_in(options: Mapping[str, JsonValue]) -> Iterator[str]:
    for name, value in options.items():
        yield name
        if isinstance(value, dict):
            yield from _names_in(value)


@contextmanager
def input_exists() -> Iterator[None]:
    """While planning, turn NotFound into InputError: missing input is a mistake in the job."""
    try:
        yield
    except NotFound as error:
        raise InputError(error.message, known=error.known, hint=error.hint) from error


@contextmanager
def part_fails(uri: str) -> Iterator[None]:
    """While reading, turn errors of the store about `uri` into PartFailed, so that the other parts continue."""
    try:
        yield
    except NotFound as error:
        raise PartFailed(f"{redact(uri)} is gone since the plan was made", hint=CHANGED_HINT) from error
    except StorageError as error:
        raise PartFailed(error.message, known=error.known, hint=error.hint) from error


def entry_of_whole(piece: Piece) -> Entry:
    """Return the entry that the store must still have for a piece that is a whole file."""
    return Entry(piece.uri, piece.size_bytes, piece.etag)


def entry_of_slice(store: Store, piece: Piece, end: int | None = None) -> Entry:
    """Return the entry of the file that a piece is a slice of; `end` is the slice's end in bytes.

    Raises PartFailed when the file changed since it was planned."""
    entry = store.stat(piece.uri)
    if entry.etag != piece.etag or (end or 0) > entry.size_bytes:
        raise PartFailed(
            f"{redact(piece.uri)} changed since the plan was made: its etag was `{piece.etag}` and is `{entry.etag}`",
            hint=CHANGED_HINT,
        )
    return entry
