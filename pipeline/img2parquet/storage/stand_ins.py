"""Recognize files that only stand in for the real ones, by how they start: git-lfs pointers, web pages."""

from __future__ import annotations

STAND_INS = {  # lower-case start of a file that stands in for another -> what it is, and what to try
    b"version https://git-lfs": (
        "a git-lfs pointer, not the file itself",
        "run `git lfs pull` in its repository, or download the file itself",
    ),
    b"version https://hawser": ("a git-lfs pointer, not the file itself", "run `git lfs pull` in its repository"),
    b"/annex/objects/": ("a git-annex pointer, not the file itself", "run `git annex get` in its repository"),
    b"<!doctype": ("a web page, not the file itself", "download it again; the address may need a login"),
    b"<html": ("a web page, not the file itself", "download it again; the address may need a login"),
    b"<?xml": ("a store's XML answer, not the file itself", "download it again; the address may need a login"),
}


def stand_in(start: bytes) -> tuple[str, str] | None:
    """Return what a file that starts like this is and what to try; None where it may be the real one."""
    start = start[:64].lstrip().lower()
    return next((known for mark, known in STAND_INS.items() if start.startswith(mark)), None)
