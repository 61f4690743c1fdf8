"""Define every error that a user may see. Each says what went wrong, where, and what to try.

Img2ParquetError
├── UserError                     the job, an argument or the input is wrong; exit code 2
│   ├── JobError                  a mistake in a job file
│   ├── InputError                missing shards, an empty input, a list without the named column
│   ├── ModelError
│   │   ├── UnknownModel          no such family, repository or folder
│   │   ├── CheckpointError       files that do not fit the architecture they name
│   │   └── OutputUnavailable     an output that this checkpoint cannot give
│   ├── RunMismatch               the output folder belongs to another run
│   └── MissingDependency         an optional package is not installed
├── StorageError                  a storage request failed; exit code 1
│   ├── NotFound
│   ├── AccessDenied
│   │   └── PrivateAddress        a server or a list refers to a private address, which only the user may name
│   ├── Refused                   the server does not answer this request in any other way, however often it is sent
│   ├── Unreachable               no server answers, or it fails each time
│   ├── AlreadyExists             another process created this object first
│   └── OutcomeUnknown            the request may or may not have taken effect
├── PartFailed                    one part cannot be done now, the others continue; exit code 1
│   └── NotFinite                 a model's values for some rows cannot be stored; these rows are rejected
├── JobFailed                     the job ended with unfinished parts; exit code 1
├── Stopped                       a signal stopped the job; exit code 143 (SIGTERM) or 130 (Ctrl-C)
└── RejectLimitExceeded           too many rejected images, the good ones are committed; exit code 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class Img2ParquetError(Exception):
    """The base class of all errors.

    `message` says what went wrong and where, `known` lists the valid alternatives, `hint` says what to try, and
    `exit_code` is what the command exits with. `str()` gives all of it except the exit code."""

    exit_code = 1

    def __init__(self, message: str, *, known: Iterable[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message, self.known, self.hint = message, tuple(known), hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.known:
            lines.append("  known: " + ", ".join(self.known))
        if self.hint:
            lines.append("hint: " + self.hint)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # errors travel between Ray's processes, and the default pickling would lose the keyword arguments
        return (_rebuild, (type(self), self.message, self.known, self.hint))


def _rebuild(kind: type[Img2ParquetError], message: str, known: tuple[str, ...], hint: str) -> Img2ParquetError:
    return kind(message, known=known, hint=hint)


class UserError(Img2ParquetError):
    """Raised when the job, an argument or the input is wrong; trying again without a change is useless."""

    exit_code = 2


class JobError(UserError):
    """Raised for a mistake in a job file or in an override of it."""


class InputError(UserError):
    """Raised for input or arguments that cannot be used: missing shards, an empty input, an unknown column."""


class ModelError(UserError):
    """Raised when a model cannot be used for the job."""


class UnknownModel(ModelError):
    """Raised when there is no such family, repository or folder."""


class CheckpointError(ModelError):
    """Raised when the files of a checkpoint are damaged, or do not fit the architecture that they name."""


class OutputUnavailable(ModelError):
    """Raised when a checkpoint cannot give an output that the job asks for."""


class RunMismatch(UserError):
    """Raised when the output folder holds the results of a run with another identity."""


class MissingDependency(UserError):
    """Raised when an optional package is not installed; the hint has the `pip install` line."""


class StorageError(Img2ParquetError):
    """Raised when a request to a store or a web server fails, after retries."""


class NotFound(StorageError):
    """Raised when an object or a bucket does not exist."""


class AccessDenied(StorageError):
    """Raised when the credentials do not permit a request."""


class PrivateAddress(AccessDenied):
    """Raised when a redirect or a list of URIs leads to a private address, which only the user may name."""


class Refused(StorageError):
    """Raised when a server refuses a request for good: HTTP 4xx, or redirects without an end."""


class Unreachable(StorageError):
    """Raised when no server answers a request after retries, or it answers with its own failure each time."""


class AlreadyExists(StorageError):
    """Raised by an exclusive create when another process created the object first."""


class OutcomeUnknown(StorageError):
    """Raised when the store's answer was lost, so that the request may or may not have taken effect."""


class PartFailed(Img2ParquetError):
    """Raised when one part cannot be done now, for example because its shard changed. Other parts continue."""


class NotFinite(PartFailed):
    """Raised when a model's values for some rows of a batch are NaN, infinite or too large for their column.

    `rows` are the indices of these rows in the batch. The worker rejects them."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class JobFailed(Img2ParquetError):
    """Raised when a job ends with unfinished parts. Running it again resumes it."""


class Stopped(Img2ParquetError):
    """Raised when a signal stops a job. Running it again resumes it."""

    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RejectLimitExceeded(Img2ParquetError):
    """Raised when more images were rejected than `reject_limit` allows. Good images are committed nevertheless."""


def printable(text: str) -> str:
    """Make untrusted text safe to print on a terminal.

    Control characters, marks that change the writing direction and other invisible characters are escaped; line feeds
    are kept."""
    letters = (x if x.isprintable() or x == "\n" else x.encode("unicode_escape").decode() for x in text)
    return text if text.isprintable() else "".join(letters)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint with the closest known word, or an empty text when none is close."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"did you mean `{by_lower[matches[0]]}`?" if matches else ""
