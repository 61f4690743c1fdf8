"""What is said to stderr: words, or with `--log-format json` one JSON object a line, with the run and the part.

    use_json()     from now on, in this process: its log, its progress, its errors
    LogAs          how a worker of another process is to log; it travels with the work
    at_part()      what this thread is at

A line has `time` (UTC), `level`, `logger`, `message`, `run` (the first 12 digits of the plan's hash: the same for all
sessions of one output) and `part` (its index, as in the file names), each null where there is none, and what else its
event knows. URLs in it are names, without what opens them. Only what C code writes itself (a crash dump) is no JSON.
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
_PART: ContextVar[int | None] = ContextVar("part", default=None)


@dataclass(frozen=True)
class LogAs:
    """`format` of FORMATS, `run` as in every line."""

    format: str = "text"
    run: str = ""


_now = LogAs()


def use_json(run: str = "") -> None:
    """Also what other libraries log, from warnings on; ours from info on."""
    _begin(LogAs("json", run))


def begin_worker(log_as: LogAs) -> None:
    """In a process that was started for others' work."""
    if log_as.format == "json" and log_as != _now:
        _begin(log_as, node=socket.gethostname(), pid=os.getpid())


def of_run(digest: str) -> LogAs:
    """From now on lines are of this run; how its workers log. digest: the plan's hash."""
    global _now
    _now = LogAs(_now.format, digest[:RUN_DIGITS])
    return _now


def end() -> None:
    """Words again."""
    global _now
    _now = LogAs()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, JsonLines)]:
        root.removeHandler(handler)
        logging.getLogger("pipeline").setLevel(logging.NOTSET)


def is_json() -> bool:
    return _now.format == "json"


def at_part(index: int | None) -> None:
    """This thread's lines are about that part from now on."""
    _PART.set(index)


def tell(
    message: str, level: str = "info", stream: TextIO | None = None, fields: Mapping[str, object] | None = None
) -> None:
    """One line of our own, where lines are JSON."""
    _write({**_head(level, "img2parquet", message), **(fields or {})}, stream)


def repeat(lines: Iterable[str]) -> None:
    """Lines of other processes: ours, which are JSON, as they are; what anybody else wrote, as a message."""
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
    logging.getLogger("pipeline").setLevel(logging.INFO)


class JsonLines(logging.Handler):
    """`fields`: what every line of this process has beside its own. Extra attributes of a record named `fields` too."""

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
    from pipeline.storage import names_in

    return names_in(text)


def _write(line: Mapping[str, object], stream: TextIO | None) -> None:
    """ASCII, without a control character; one write, so that lines of several threads stay whole."""
    text = json.dumps(line, default=str).replace("\x7f", "\\u007f")
    (stream or sys.stderr).write(text + "\n")
    (stream or sys.stderr).flush()
