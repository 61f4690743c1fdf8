"""Give classes names that differ, for tools and readers that tell classes apart by name alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return names by class id, as they are where they differ.

    A name that several classes have is followed by the class id, `crane (134)`; an empty one becomes `class 7`. Tools
    may strip and join spaces and draw control characters, so these do not make names differ."""
    found = [name if name.strip() else f"class {id}" for id, name in enumerate(names)]
    while len(counts := Counter(map(_look, found))) < len(found):
        found = [f"{name} ({id})" if counts[_look(name)] > 1 else name for id, name in enumerate(found)]
    return found


def _look(name: str) -> str:
    drawn = (chr(0x2400 + ord(c)) if ord(c) < 32 and not c.isspace() else c for c in name)
    return " ".join("".join(drawn).split())
