"""Read how an image is turned from its EXIF block or its XMP packet: 1 (upright) to 8."""

from __future__ import annotations

import re
from typing import Literal

ORIENTATION = 0x0112
_INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}  # TIFF's integer types and their sizes in bytes
_XMP = re.compile(rb"""\btiff:Orientation\s*(?:=\s*["']|>)\s*([0-9])\b""")


def read_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation that EXIF states; XMP counts where EXIF has none, and 1 where it is absent or invalid."""
    return valid_orientation(_in_exif(exif.removeprefix(b"Exif\0\0")), xmp)


def valid_orientation(stored: int | None, xmp: bytes = b"") -> int:
    """Return the tag's value, or the XMP packet's where there is no tag; 1 where it is absent or invalid."""
    if stored is None:
        found = _XMP.search(xmp)
        stored = int(found[1]) if found else 1
    return stored if 1 <= stored <= 8 else 1


def _in_exif(tiff: bytes) -> int | None:
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return None
    first = int.from_bytes(tiff[4:8], order)
    for index in range(int.from_bytes(tiff[first : first + 2], order)):
        start = first + 2 + 12 * index
        entry = tiff[start : start + 12]
        if len(entry) < 12:
            break
        tag, kind = int.from_bytes(entry[:2], order), int.from_bytes(entry[2:4], order)
        if tag == ORIENTATION:
            return int.from_bytes(entry[8 : 8 + _INTEGERS.get(kind, 0)], order)
    return None
