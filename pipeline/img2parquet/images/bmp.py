"""Open a BMP as its header says, where Pillow's plugin would misread it: few grey colours, and an alpha bit."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, ImageFile, ImagePalette

_INDICES = {1: "P;1", 4: "P;4", 8: "P"}
_BITFIELDS = 3


class BmpPicture(BmpImagePlugin.BmpImageFile):
    """A BMP whose pixels are read at the depth that its header states.

    Pillow reads indices into a grey palette as 1-bit or 8-bit greys, by the number of colours instead of the depth."""

    def _bitmap(self, header: int = 0, offset: int = 0) -> None:
        super()._bitmap(header, offset)
        assert self.fp is not None
        self.fp.seek(14)
        head = self.fp.read(16)
        bits = int.from_bytes(head[10:12] if head[0] == 12 else head[14:16], "little")
        if self.mode not in ("1", "L") or (self.mode, bits) in (("1", 1), ("L", 8)):
            return
        greys = b"\0\xff" if self.mode == "1" else bytes(range(256))
        self._mode, self.palette = "P", ImagePalette.raw("RGB", bytes(grey for grey in greys for _ in range(3)))
        tile = self.tile[0]
        args = tile.args
        if tile.codec_name == "raw" and isinstance(args, tuple):
            self.tile = [ImageFile._Tile("raw", tile.extents, tile.offset, (_INDICES[bits], *args[1:]))]


def hidden_pixels(view: memoryview) -> npt.NDArray[np.bool_] | None:
    """Find the pixels (height, width) that a 16-bit BMP's alpha bit hides; None where it has no such bit, or never sets
    it."""
    if len(view) < 70 or view[14] < 56 or view[28] != 16 or view[30] != _BITFIELDS:
        return None
    (offset, width, height), mask = struct.unpack_from("<I4xii", view, 10), int.from_bytes(view[66:70], "little")
    words = (width + 1) // 2 * 2
    if not mask or len(view) < offset + 2 * words * abs(height):
        return None
    pixels_HW = np.frombuffer(view, "<u2", words * abs(height), offset).reshape(abs(height), words)[:, :width]
    hidden_HW: npt.NDArray[np.bool_] = (pixels_HW & mask) == 0
    if hidden_HW.all():
        return None
    return hidden_HW if height < 0 else hidden_HW[::-1]
