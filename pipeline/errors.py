"""Every error a user may see: what went wrong, where, and what to try.

Img2ParquetError
├── UserError                     the job, the arguments or the input cannot work; exit 2
│   ├── JobError                  a job file that says something it may not
│   ├── InputError                missing shards, an empty input, a list without the named column
│   ├── ModelError
│   │   ├── UnknownModel          no such family, repository or folder
│   │   ├── CheckpointError       files that do not fit the architecture they name
│   │   └── OutputUnavailable     an output that this checkpoint cannot give
│   ├── RunMismatch               the output belongs to another run
│   └── MissingDependency         an extra is not installed
├── StorageError                  the store said no, or nothing; exit 1
│   ├── NotFound
│   ├── AccessDenied
│   │   └── PrivateAddress        a server or a list sends us where only the user may
│   ├── AlreadyExists             somebody created this object before us
│   └── OutcomeUnknown            we cannot know whether the store did it
├── PartFailed                    one part cannot be done now; the others go on; exit 1
├── JobFailed                     the job ended with parts undone; exit 1
├── Stopped                       a signal asked for it; exit 143 (SIGTERM) or 130 (Ctrl-C)
└── RejectLimitExceeded           too many bad images; what was good is committed; exit 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Img2ParquetError(Exception):
    """The root. `message` says what and where, `known` lists the alternatives, `hint` says what to try."""

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
        # errors cross Ray's process border; the default pickling would lose the keyword arguments
        return (_rebuild, (type(self), self.message, self.known, self.hint))


def _rebuild(kind: type[Img2ParquetError], message: str, known: tuple[str, ...], hint: str) -> Img2ParquetError:
    return kind(message, known=known, hint=hint)


class UserError(Img2ParquetError):
    exit_code = 2


class JobError(UserError):
    pass


class InputError(UserError):
    pass


class ModelError(UserError):
    pass


class UnknownModel(ModelError):
    pass


class CheckpointError(ModelError):
    pass


class OutputUnavailable(ModelError):
    pass


class RunMismatch(UserError):
    pass


class MissingDependency(UserError):
    pass


class StorageError(Img2ParquetError):
    pass


class NotFound(StorageError):
    pass


class AccessDenied(StorageError):
    pass


class PrivateAddress(AccessDenied):
    pass


class AlreadyExists(StorageError):
    pass


class OutcomeUnknown(StorageError):
    pass


class PartFailed(Img2ParquetError):
    pass


class JobFailed(Img2ParquetError):
    pass


class Stopped(Img2ParquetError):
    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RejectLimitExceeded(Img2ParquetError):
    pass


def printable(text: str) -> str:
    """Text that holds words of others, fit for a terminal: control characters, marks that turn the direction of writing
    and what else is not seen are spelled out; a line feed stays."""
    letters = (x if x.isprintable() or x == "\n" else x.encode("unicode_escape").decode() for x in text)
    return text if text.isprintable() else "".join(letters)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, or nothing when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean `{matches[0]}`?" if matches else ""
