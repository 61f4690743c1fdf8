"""Name the stages of a job that the threads of this process are in."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

WORK_THREADS = ("img2parquet-worker", "img2parquet-reader")
STAGES = {  # by source file, or by package
    "read": "read",
    "images/decode.py": "decode",
    "images/preprocess.py": "preprocess",
    "inference/forward.py": "embed",
    "inference/steps.py": "embed",
}


def stages_of_threads() -> str:
    """Return the stages that the worker and reader threads are in, such as `decode (decode.py:123)`."""
    threads = [frame for name, frame in running_threads() if name.startswith(WORK_THREADS)]
    return (
        ", ".join(sorted({stage for frame in threads if (stage := _stage(frame))}))
        or "what comes before the first batch"
    )


def _stage(frame: FrameType) -> str:
    """Return the stage of the innermost frame that belongs to one; an idle thread has none."""
    root = Path(__file__).parents[1]
    for each in reversed(traceback.extract_stack(frame)):
        path = Path(each.filename)
        if root not in path.parents:
            continue
        place = path.relative_to(root)
        if stage := STAGES.get(place.as_posix()) or STAGES.get(place.parts[0]):
            return f"{stage} ({path.name}:{each.lineno})"
    return ""


def running_threads() -> list[tuple[str, FrameType]]:
    """Return the name and the innermost frame of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [(names.get(ident, str(ident)), frame) for ident, frame in sys._current_frames().items()]
