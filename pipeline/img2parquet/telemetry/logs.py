"""Write log lines to stderr: plain text or, with `--log-format json`, one JSON object a line with its run and part.

    use_json()     switch this process's log, progress and errors to JSON
    LogAs          the log settings of a worker in another process; they travel with the work
    log_step()     name a step that takes a while, before it begins
    at_part()      set the part that the lines of this thread are about

A line has `time` (UTC), `level`, `logger`, `message`, `run` (the first 12 digits of the plan's hash, which all sessions
of one output share) and `part` (its index, as in the file names), each null where there is none, and the fields of its
event. URLs are written without logins, signatures and other secrets. Only what C code writes itself (a crash dump) is
not JSON.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")
RUN_DIGITS = 12
STEPS = logging.getLogger("img2parquet.steps")
_PART: ContextVar[int | None] = ContextVar("part", default=None)


@dataclass(frozen=True)
class LogAs:
    """The format, one of FORMATS, and the `run` of every line."""

    format: str = "text"
    run: str = ""


_now = LogAs()


def use_json(run: str = "") -> None:
    """Log as JSON: our own lines from level info, those of other libraries from level warning."""
    _begin(LogAs("json", run))


def begin_worker(log_as: LogAs) -> None:
    """Apply the driver's log settings in a worker process."""
    if log_as.format == "json" and log_as != _now:
        _begin(log_as, node=socket.gethostname(), pid=os.getpid())


def set_run(digest: str) -> LogAs:
    """Set the run of this process's lines from the plan's hash, and return the log settings for its workers."""
    global _now
    _now = LogAs(_now.format, digest[:RUN_DIGITS])
    return _now


def end() -> None:
    """Restore plain-text logging."""
    global _now
    _now = LogAs()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, JsonLines)]:
        root.removeHandler(handler)
        logging.getLogger("img2parquet").setLevel(logging.NOTSET)


def is_json() -> bool:
    return _now.format == "json"


def log_step(step: str, *arguments: object) -> None:
    """Log a step that users wait for, as it begins. The command prints these lines, and only these, of level info."""
    STEPS.info(step, *arguments)


def at_part(index: int | None) -> None:
    """Set the part that this thread's lines are about."""
    _PART.set(index)


def write_line(
    message: str, level: str = "info", stream: TextIO | None = None, fields: Mapping[str, object] | None = None
) -> None:
    """Write one JSON line of our own; callers check `is_json` first."""
    _write({**_head(level, "img2parquet", message), **(fields or {})}, stream)


def repeat(lines: Iterable[str]) -> None:
    """Write lines of worker processes: JSON lines of ours unchanged, any other line as the message of one."""
    for line in lines:
        if line.startswith('{"time": "') and line.endswith("}"):
            sys.stderr.write(line + "\n")
        elif line.strip():
            _write(_head("info", "worker", line), None)
    sys.stderr.flush()


def _begin(log_as: LogAs, **fields: object) -> None:
    global _now
    _now = log_as
    root = logging.getLogger()
    old = [handler for handler in root.handlers if isinstance(handler, JsonLines)]
    for handler in old or [JsonLines(fields)]:
        if not old:
            root.addHandler(handler)
    logging.getLogger("img2parquet").setLevel(logging.INFO)


class JsonLines(logging.Handler):
    """Write log records as JSON lines, with `fields` added to each, and with the record's own `fields` attribute."""

    def __init__(self, fields: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self.fields = dict(fields or {})

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = {**_head(record.levelname.lower(), record.name, record.getMessage()), **self.fields}
            line.update(getattr(record, "fields", {}))
            if record.exc_info and record.exc_info[0]:
                line["error"] = _plain("".join(traceback.format_exception(*record.exc_info)))
            _write(line, None)
        except Exception:
            self.handleError(record)


def _head(level: str, logger: str, message: str) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level, "logger": logger, "run": _now.run or None, "part": _PART.get(), "message": _plain(message),
    }  # fmt: skip


def _plain(text: str) -> str:
    from img2parquet.storage import names_in

    return names_in(text)


def _write(line: Mapping[str, object], stream: TextIO | None) -> None:
    """Write ASCII without control characters, in one call, so that lines of several threads stay whole."""
    text = json.dumps(line, default=str).replace("\x7f", "\\u007f")
    (stream or sys.stderr).write(text + "\n")
    (stream or sys.stderr).flush()
