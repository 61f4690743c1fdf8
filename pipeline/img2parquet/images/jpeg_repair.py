"""Take harmless defects out of a JPEG, so that strict decoding tells whether anything else is wrong with it.

libjpeg warns of them and loses no pixel, but after one warning nobody can tell whether another would follow:

- Zero bytes behind the last code of a scan or of a restart interval. All of them go: where a damaged stretch of zeros
  only looks like padding, the codes are then too few, and strict decoding says so.
- A spectral range other than 0..63 in a sequential scan, where it has no meaning.
- Stray bytes between segments, and a JFIF version that libjpeg does not know.
"""

from __future__ import annotations

import re

_ENDS_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# a run of zeros up to a restart marker, to fill bytes before a marker, or to the end of the scan
_ZEROS = re.compile(rb"(?<!\x00)\x00++(?=\xff[\xd0-\xd7\xff]|\xff?\Z)")
_WHOLE_SCAN = b"\x00\x3f\x00"
_START_OF_SCAN, _JFIF, _END = 0xDA, 0xE0, 0xD9


def without_harmless_defects(jpeg: bytes, sequential: bool, zeros_kept: int) -> bytes:
    """Return the JPEG without these defects. zeros_kept: of each run that may be padding, as a code may end in some."""
    pieces, position = [jpeg[:2]], 2
    while (position := jpeg.find(b"\xff", position)) >= 0 and position + 4 <= len(jpeg):
        marker = jpeg[position + 1]
        if marker in (0x00, 0x01, *range(0xD0, 0xD9), 0xFF):  # a stray byte, or a marker that stands alone
            position += 1
            continue
        if marker == _END:
            break
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        pieces.append(_segment(jpeg[position:end], marker, sequential))
        if marker == _START_OF_SCAN:
            found = _ENDS_SCAN.search(jpeg, end)
            scan = jpeg[end : found.start() if found else len(jpeg)]
            pieces.append(_ZEROS.sub(lambda zeros: _kept(zeros, zeros_kept), scan))
            end += len(scan)
        position = end
    return b"".join([*pieces, b"\xff\xd9" if jpeg.find(b"\xff\xd9", position) >= 0 else b""])


def _segment(segment: bytes, marker: int, sequential: bool) -> bytes:
    if marker == _START_OF_SCAN and sequential:
        return segment[:-3] + _WHOLE_SCAN
    if marker == _JFIF and segment[4:9] == b"JFIF\0":
        return segment[:9] + b"\1" + segment[10:]
    return segment


def _kept(zeros: re.Match[bytes], kept: int) -> bytes:
    is_stuffed = zeros.start() > 0 and zeros.string[zeros.start() - 1] == 0xFF  # FF 00 is one byte FF of data
    return zeros[0][: kept + is_stuffed]
