"""Open the first page of a TIFF as its tags say, where Pillow's plugin misreads them, or refuse it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from PIL import ImagePalette, TiffImagePlugin

from img2parquet.images.headers import ImageRejected
from img2parquet.images.orientation import ORIENTATION, valid_orientation

SUBFILE, OLD_SUBFILE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
FILL_ORDER, SAMPLES, STRIP_BYTES, PLANAR, COLOUR_MAP, TILE_WIDTH, SUB_DIRECTORIES = 266, 277, 279, 284, 320, 322, 330
INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING, BLACK_AND_WHITE, DNG_VERSION = 332, 338, 339, 530, 532, 50706
_RAW_PHOTOS = {32803: "a colour filter array", 34892: "linear raw samples"}
_WHITE_IS_ZERO, _SEPARATED, _YCBCR = 0, 5, 6
_FULL_RANGE = (0, 255, 128, 255, 128, 255)
_FAX = (2, 3, 4)
_OLD_JPEG = 6
_DECODED_BY_LIBTIFF = 32771  # the one compression that Pillow hands to libtiff and libtiff does not look up
_PAGE_TAGS = {SUBFILE, OLD_SUBFILE, WIDTH, LENGTH, PHOTOMETRIC, SUB_DIRECTORIES, DNG_VERSION}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # TIFF types, as struct writes them
_MOST = 16  # of values, and of pages, that are looked at
_CONVERT = "; convert it to JPEG, PNG or an 8-bit RGB TIFF"


class TiffPage(TiffImagePlugin.TiffImageFile):
    """The first page of a TIFF, not turned upright.

    inverts: 0 is white, and pixels are as stored. depth: bits per sample of a 16-bit mode. alpha_is_said: whether tags
    say that a fourth sample is alpha."""

    inverts = False
    depth = 16
    alpha_is_said = True

    def _setup(self) -> None:
        tags = self.tag_v2
        bits, extra = _numbers(tags.get(BITS, 1)), _numbers(tags.get(EXTRA_SAMPLES, ()))
        samples, photometric = tags.get(SAMPLES, 1), tags.get(PHOTOMETRIC)
        if why := _refusal(tags, photometric):
            raise ImageRejected("unsupported", f"TIFF: {why}{_CONVERT}")
        if samples == 1:
            tags[PLANAR] = 1  # one plane is one plane, but Pillow would cut the name of its layout to one letter
        is_planar = tags.get(PLANAR, 1) == 2
        if tags.get(COMPRESSION, 1) == 1 and (
            (is_planar and (samples != 4 or extra or bits[0] != 8 or TILE_WIDTH in tags))
            or (photometric == _YCBCR and not _is_plain_ycbcr(tags))
            or tags.get(FILL_ORDER, 1) == 2
        ):
            tags[COMPRESSION] = _DECODED_BY_LIBTIFF
        super()._setup()
        is_odd = self.mode in ("LA", "La", "PA", "LAB") or (len(extra) > 1 and any(extra))
        if is_planar and (is_odd or (self.mode == "RGBA" and not extra and self.use_load_libtiff)):
            raise ImageRejected("unsupported", f"TIFF: {self.mode} in separate planes{_CONVERT}")
        self._size = self._tile_size
        self.inverts = photometric == _WHITE_IS_ZERO and self.mode.startswith("I;16")
        self.depth = bits[0]
        self.alpha_is_said = bool(extra)
        if self.mode in ("P", "PA") and max(tags[COLOUR_MAP]) < 256:  # 8 bits each instead of the standard's 16
            self.palette = ImagePalette.raw("RGB;L", bytes(tags[COLOUR_MAP]))

    def load_end(self) -> None:
        """Leave the pixels as stored, where Pillow would turn them upright."""

    @property
    def orientation(self) -> int:
        """How the page is turned, 1 to 8."""
        stored, xmp = self.tag_v2.get(ORIENTATION), self.info.get("xmp")
        return valid_orientation(stored if isinstance(stored, int) else None, xmp if isinstance(xmp, bytes) else b"")


def _refusal(tags: Any, photometric: int | None) -> str | None:
    compression = tags.get(COMPRESSION, 1)
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"compression {compression} is not decoded"
    if photometric is None and compression not in (*_FAX, _OLD_JPEG):
        return "it does not say what its samples mean (no PhotometricInterpretation)"
    if photometric in _RAW_PHOTOS:
        return f"{_RAW_PHOTOS[photometric]} of a camera's raw photo"
    if set(_numbers(tags.get(SAMPLE_FORMAT, 1))) & {2, 3}:
        return "signed or floating-point samples, whose range is not known"
    if photometric == _SEPARATED and tags.get(INK_SET, 1) != 1:
        return "inks other than cyan, magenta, yellow and black"
    return None


def _is_plain_ycbcr(tags: Any) -> bool:
    """Whether each pixel has its own three samples of full range, which is all that Pillow's own reader knows."""
    # where the tag is missing, samples are shared by 2 x 2 pixels, except in files whose size shows that they are not
    samples = 3 * tags.get(WIDTH, 0) * tags.get(LENGTH, 0)
    shared = (1, 1) if sum(_numbers(tags.get(STRIP_BYTES, 0))) == samples else (2, 2)
    return bool(tags.get(SUBSAMPLING, shared) == (1, 1) and tags.get(BLACK_AND_WHITE, _FULL_RANGE) == _FULL_RANGE)


def _numbers(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_first_page(view: memoryview) -> None:
    """Check that a TIFF's first page is a picture, and not the preview or the mask of one.

    Raises ImageRejected for those, and for the raw photos of cameras, which are TIFFs with a preview first."""
    if bytes(view[:4]) == b"MM\0+":
        raise ImageRejected("unsupported", f"TIFF: a BigTIFF in big-endian byte order{_CONVERT}")
    first, following = _directory(view, _first_directory(view))
    others = [_directory(view, at)[0] for at in first.get(SUB_DIRECTORIES, ())]
    is_larger = any(_area(inner) > _area(first) for inner in others)
    while following and len(others) < 2 * _MOST:
        page, following = _directory(view, following)
        others.append(page)
    is_raw = DNG_VERSION in first or bytes(view[8:10]) == b"CR"  # CR2
    is_raw = is_raw or any(each.get(PHOTOMETRIC, (0,))[0] in _RAW_PHOTOS for each in others)
    subfile = first.get(SUBFILE, (0,))[0]
    is_reduced = subfile & 1 or first.get(OLD_SUBFILE) == (2,)
    what = (
        "it is a camera's raw photo, and its first page only a preview" if is_raw
        else "its first page is only a preview of another one, as in a camera's raw photo"
        if is_larger or (is_reduced and others)
        else "its first page is the transparency mask of another one" if subfile & 4
        else ""
    )  # fmt: skip
    if what:
        raise ImageRejected("unsupported", f"TIFF: {what}{_CONVERT}")


def _area(page: Mapping[int, tuple[int, ...]]) -> int:
    return page.get(WIDTH, (0,))[0] * page.get(LENGTH, (0,))[0]


def _first_directory(view: memoryview) -> int:
    order, is_big = _byte_order(view)
    return int.from_bytes(view[8:16] if is_big else view[4:8], "little" if order == "<" else "big")


def _directory(view: memoryview, at: int) -> tuple[dict[int, tuple[int, ...]], int]:
    """Read the first values of `_PAGE_TAGS` in the directory at a byte, and where the next one stands; 0 is nowhere."""
    order, is_big = _byte_order(view)
    count_code, entry_code, inline, pointer = ("Q", "HHQ", 8, "Q") if is_big else ("H", "HHI", 4, "I")
    found: dict[int, tuple[int, ...]] = {}
    try:
        (count,) = struct.unpack_from(order + count_code, view, min(at, len(view)))
        position = at + struct.calcsize(order + count_code)
        for _ in range(min(count, 0xFFFF)):
            tag, kind, size = struct.unpack_from(order + entry_code, view, position)
            position += struct.calcsize(order + entry_code)
            if tag in _PAGE_TAGS and kind in _INTEGERS and size:
                code, start = _INTEGERS[kind], position
                if size * struct.calcsize(code) > inline:
                    (start,) = struct.unpack_from(order + pointer, view, position)
                found[tag] = struct.unpack_from(f"{order}{min(size, _MOST)}{code}", view, min(start, len(view)))
            position += inline
        return found, struct.unpack_from(order + pointer, view, position)[0]
    except struct.error:  # cut off: where that matters, opening it says so
        return found, 0


def _byte_order(view: memoryview) -> tuple[str, bool]:
    """Return the byte order, as struct writes it, and whether this is a BigTIFF."""
    return "<" if view[0] == ord("I") else ">", 43 in view[2:4]
