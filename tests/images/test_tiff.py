"""Check that a TIFF of any layout gives its own pixels, or is refused as unsupported, and never others.

Samples are written by `tests/support/tiffs.py`, so that right pixels are known without another decoder."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.images.headers import _directory_end
from img2parquet.schema import Pixels, Rejection
from tests.support.bad_images import GREY, RGB, encode
from tests.support.tiffs import BYTE, IFD, LONG, SHORT, Tags, directory, tiff

COLOUR, LIGHT = RGB[:21, :37], GREY[:21, :37]
SHADES = np.repeat(LIGHT[:, :, None], 3, axis=2)
ALPHA = np.broadcast_to(np.linspace(0, 255, 37).astype(np.uint8), LIGHT.shape)
WIDE, WIDE_LIGHT = COLOUR.astype(np.uint16) * 257, LIGHT.astype(np.uint16) * 257
EXTRA, MAP, INKS, SHARED = 338, 320, 332, 530
UNSPECIFIED, PREMULTIPLIED, STRAIGHT = 0, 1, 2


@dataclass(frozen=True)
class Layout:
    """Samples, what they mean, and the pixels that they are; `read_in` says how often of 16 layouts they are read."""

    name: str
    samples_HWC: np.ndarray
    photometric: int | None
    expected_HWC: np.ndarray
    read_in: int = 16
    bits: int | None = None
    tags: Tags = field(default_factory=dict)
    tolerance: int = 0


def over_white(rgb_HWC: np.ndarray) -> np.ndarray:
    alpha = ALPHA[:, :, None] / 255
    return np.rint(rgb_HWC * alpha + 255 * (1 - alpha))


def premultiplied(rgb_HWC: np.ndarray) -> np.ndarray:
    return np.rint(rgb_HWC * (ALPHA[:, :, None] / 255)).astype(np.uint8)


def few_bits(bits: int) -> np.ndarray:
    scaled = (LIGHT >> (8 - bits)).astype(int) * 255 // ((1 << bits) - 1)
    return np.repeat(scaled[:, :, None], 3, axis=2)


def one(grey_HW: np.ndarray) -> np.ndarray:
    return grey_HW[:, :, None]


def extra(*kinds: int) -> Tags:
    return {EXTRA: (SHORT, kinds)} if kinds else {}


def colours(count: int, scale: int) -> tuple[Tags, np.ndarray]:
    palette = np.arange(count)[None] * np.array([[1], [2], [3]]) * (256 // count) % 256
    return {MAP: (SHORT, (palette * scale).reshape(-1).tolist())}, palette.T


def layouts() -> Iterator[Layout]:
    yield Layout("grey", one(LIGHT), 1, SHADES)
    yield Layout("white is 0", one(255 - LIGHT), 0, SHADES)
    yield Layout("16-bit grey", one(WIDE_LIGHT), 1, SHADES)
    yield Layout("16-bit grey, white is 0", one(65535 - WIDE_LIGHT), 0, SHADES, read_in=8)  # little-endian alone
    for bits in (1, 2, 4):
        yield Layout(f"{bits}-bit grey", one(LIGHT >> (8 - bits)), 1, few_bits(bits), bits=bits)
        inverse = (1 << bits) - 1 - (LIGHT >> (8 - bits))
        yield Layout(f"{bits}-bit grey, white is 0", one(inverse), 0, few_bits(bits), bits=bits)
    yield Layout("12-bit grey", one(WIDE_LIGHT >> 4), 1, SHADES, read_in=8, bits=12)
    yield Layout("12-bit grey, white is 0", one(4095 - (WIDE_LIGHT >> 4)), 0, SHADES, read_in=0, bits=12)
    yield Layout("RGB", COLOUR, 2, COLOUR)
    yield Layout("16-bit RGB", WIDE, 2, COLOUR)
    yield Layout("4-bit RGB", COLOUR >> 4, 2, (COLOUR >> 4) * 17, read_in=0, bits=4)
    yield Layout("12-bit RGB", WIDE >> 4, 2, COLOUR, read_in=0, bits=12)

    straight = np.dstack([COLOUR, ALPHA])
    yield Layout("RGB and padding", straight, 2, COLOUR, tags=extra(UNSPECIFIED))
    yield Layout("RGB and more", np.dstack([straight, ALPHA]), 2, COLOUR, tags=extra(UNSPECIFIED, UNSPECIFIED))
    yield Layout("RGBA", straight, 2, over_white(COLOUR), tags=extra(STRAIGHT), tolerance=1)
    yield Layout("RGBA unsaid", straight, 2, over_white(COLOUR), read_in=10, tolerance=1)
    yield Layout("RGBX unsaid", np.dstack([COLOUR, 0 * ALPHA]), 2, COLOUR, read_in=10)
    yield Layout("RGBX said", np.dstack([COLOUR, 0 * ALPHA]), 2, np.full_like(COLOUR, 255), tags=extra(STRAIGHT))
    shaded = np.dstack([premultiplied(COLOUR), ALPHA])
    yield Layout("RGBa", shaded, 2, over_white(COLOUR), tags=extra(PREMULTIPLIED), tolerance=1)
    for name, samples, kinds in (("RGBA", straight, STRAIGHT), ("RGBa", shaded, PREMULTIPLIED)):
        wide = samples.astype(np.uint16) * 257
        yield Layout(f"16-bit {name}", wide, 2, over_white(COLOUR), tags=extra(kinds), tolerance=1)
    yield Layout("RGBXA", np.dstack([straight, ALPHA]), 2, over_white(COLOUR), 0, tags=extra(UNSPECIFIED, STRAIGHT))
    yield Layout("grey and padding", np.dstack([LIGHT, ALPHA]), 1, SHADES, tags=extra(UNSPECIFIED))
    grey_alpha = np.dstack([LIGHT, ALPHA])
    yield Layout("grey and alpha", grey_alpha, 1, over_white(SHADES), 8, tags=extra(STRAIGHT), tolerance=1)
    shaded = np.dstack([premultiplied(one(LIGHT)), ALPHA])
    yield Layout("premultiplied grey", shaded, 1, over_white(SHADES), 8, tags=extra(PREMULTIPLIED), tolerance=1)

    for bits, count in ((8, 256), (4, 16), (1, 2)):
        for scale in (257, 1):  # 16 bits each as they should have, and 8
            tags, palette = colours(count, scale)
            index = LIGHT >> (8 - bits)
            yield Layout(f"{bits}-bit indices, x{scale}", one(index), 3, palette[index], bits=bits, tags=tags)
    tags, palette = colours(256, 257)
    indices = np.dstack([LIGHT, ALPHA])
    blended = over_white(palette[LIGHT])
    yield Layout("indices and alpha", indices, 3, blended, 8, tags={**tags, **extra(STRAIGHT)}, tolerance=1)

    cmyk = np.dstack([255 - COLOUR, np.zeros_like(LIGHT)])
    yield Layout("CMYK", cmyk, 5, COLOUR, tolerance=1)
    yield Layout("16-bit CMYK", cmyk.astype(np.uint16) * 257, 5, COLOUR, tolerance=1)
    yield Layout("other inks", cmyk, 5, COLOUR, read_in=0, tags={INKS: (SHORT, [2])})
    ycbcr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
    back = np.asarray(Image.fromarray(ycbcr, "YCbCr").convert("RGB"))
    yield Layout("YCbCr", ycbcr, 6, back, tags={SHARED: (SHORT, [1, 1])}, tolerance=1)

    shades_of_lab = np.dstack([LIGHT, np.zeros_like(LIGHT), np.zeros_like(LIGHT)])
    linear = np.where(LIGHT / 2.55 > 8, ((LIGHT / 2.55 + 16) / 116) ** 3, LIGHT / 2.55 / 903.3)
    neutral = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    yield Layout("CIELab", shades_of_lab, 8, np.repeat(one(neutral), 3, axis=2), read_in=8, tolerance=2)
    for photometric in (9, 10):
        yield Layout(f"other Lab {photometric}", shades_of_lab, photometric, SHADES, read_in=0)

    yield Layout("signed", one((LIGHT.astype(int) - 128).astype(np.int8)), 1, SHADES, read_in=0)
    yield Layout("signed RGB", (COLOUR.astype(int) - 128).astype(np.int8), 2, COLOUR, read_in=0)
    yield Layout("signed 16-bit", one((WIDE_LIGHT.astype(int) - 32768).astype(np.int16)), 1, SHADES, read_in=0)
    yield Layout("32-bit", one(WIDE_LIGHT.astype(np.uint32) << 16), 1, SHADES, read_in=0)
    yield Layout("float", one(LIGHT.astype(np.float32)), 1, SHADES, read_in=0)
    yield Layout("colour filter array", one(LIGHT), 32803, SHADES, read_in=0)
    yield Layout("linear raw", COLOUR, 34892, COLOUR, read_in=0)
    yield Layout("a mask", one(LIGHT >> 7), 4, SHADES, read_in=0, bits=1)
    yield Layout("unsaid", one(LIGHT), None, SHADES, read_in=0)
    yield Layout("unsaid RGB", COLOUR, None, COLOUR, read_in=0)


def written(
    layout: Layout, order: str, planar: bool, tile: tuple[int, int] | None, compression: int, **more: int
) -> bytes:
    return tiff(layout.samples_HWC, layout.photometric, order=order, planar=planar, tile=tile,
                compression=compression, bits=layout.bits, tags=layout.tags, **more)  # fmt: skip


@pytest.mark.parametrize("layout", list(layouts()), ids=lambda layout: layout.name)
def test_each_layout_is_read_right_or_refused(layout: Layout) -> None:
    read = []
    for how in itertools.product("<>", (False, True), (None, (16, 16)), (1, 8)):
        result = decode(written(layout, *how))
        if isinstance(result, Rejection):
            assert result.reason == "unsupported", (how, result)
            continue
        read.append(how)
        assert result.rgb_HWC.shape == layout.expected_HWC.shape
        far = np.abs(result.rgb_HWC.astype(int) - layout.expected_HWC).max()
        assert far <= layout.tolerance, (how, far)
    assert len(read) == layout.read_in, read


@pytest.mark.parametrize("layout", list(layouts()), ids=lambda layout: layout.name)
def test_mirrored_bytes_are_read_right_or_refused(layout: Layout) -> None:
    """FillOrder 2: the first pixel is in a byte's lowest bit."""
    for order, compression in itertools.product("<>", (1, 8)):
        result = decode(written(layout, order, False, None, compression, fill_order=2))
        if isinstance(result, Rejection):
            assert result.reason == "unsupported"
        else:
            assert np.abs(result.rgb_HWC.astype(int) - layout.expected_HWC).max() <= layout.tolerance


def test_an_unknown_compression_is_told() -> None:
    refused = decode(tiff(COLOUR, 2, compression=9999))
    assert isinstance(refused, Rejection) and refused.reason == "unsupported"
    assert "compression 9999 is not decoded" in refused.message


@pytest.mark.parametrize("tile", [(32, 48), (16, 48), (32, 16)])
def test_tiles_larger_than_the_image_are_cut(tile: tuple[int, int]) -> None:
    for samples, planar in itertools.product((COLOUR, WIDE), (False, True)):
        assert np.array_equal(pixels(tiff(samples, 2, tile=tile, planar=planar)), COLOUR)


def pixels(data: bytes, **policy: str) -> np.ndarray:
    result = decode(data, DecodePolicy(**policy))  # type: ignore[arg-type]
    assert isinstance(result, Pixels), result
    return result.rgb_HWC


def test_colours_shared_by_pixels_are_not_taken_for_their_own() -> None:
    """YCbCr without compression, one colour for 2 x 2 pixels: Pillow's own reader takes them for other pixels."""
    luma = LIGHT[:20, :36]
    blocks = luma.reshape(10, 2, 18, 2).transpose(0, 2, 1, 3).reshape(10, 18, 4)
    shared = np.dstack([blocks, np.full((10, 18, 2), 128, np.uint8)]).tobytes()
    for subsampling in ({}, {SHARED: (SHORT, [2, 2])}):
        tags = {256: (LONG, [36]), 257: (LONG, [20]), 277: (SHORT, [3]), 258: (SHORT, [8, 8, 8]), 278: (LONG, [20]),
                279: (LONG, [len(shared)]), **subsampling}  # fmt: skip
        data = tiff(np.frombuffer(shared, np.uint8).reshape(1, -1, 1), 6, rows_per_strip=1, tags=tags)
        found = pixels(data)
        assert np.abs(found.astype(int) - luma[:, :, None]).max() <= 1


def test_what_pillow_writes_is_read_as_before() -> None:
    image = Image.fromarray(RGB)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA"):
        data = encode(image.convert(mode), "TIFF")
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))), mode
    data = encode(WIDE_LIGHT, "TIFF")
    assert np.array_equal(pixels(data), SHADES)


# --- pages -----------------------------------------------------------------------------------------------------------

SMALL = COLOUR[::4, ::4]
REDUCED: Tags = {254: (LONG, [1])}
SIZE: Tags = {256: (LONG, [37]), 257: (LONG, [21])}


def with_inner(first: Tags, inner: Tags, order: str = "<") -> bytes:
    """A small RGB page, and a directory below it."""
    plain = tiff(SMALL, 2, order=order, tags={**first, 330: (IFD, [0])})
    return tiff(SMALL, 2, order=order, tags={**first, 330: (IFD, [len(plain)])}) + directory(inner, order, len(plain))


def with_next(first: Tags, following: Tags, order: str = "<") -> bytes:
    plain = tiff(SMALL, 2, order=order, tags=first, second=b"")
    return plain + directory(following, order, len(plain))


PREVIEWS = {
    "DNG": tiff(SMALL, 2, tags={**REDUCED, 50706: (BYTE, b"\1\4\0\0")}),
    "DNG whose first page is the photo": tiff(SMALL, 2, tags={50706: (BYTE, b"\1\4\0\0")}),
    "NEF": with_inner(REDUCED, {**SIZE, 254: (LONG, [0]), 262: (SHORT, [32803])}),
    "NEF, big-endian": with_inner(REDUCED, {**SIZE, 262: (SHORT, [32803])}, ">"),
    "ARW": with_next(REDUCED, {**SIZE, 262: (SHORT, [32803])}),
    "a thumbnail that does not say so": with_inner({}, {**SIZE, 262: (SHORT, [2])}),
    "linear raw below": with_inner({}, {262: (SHORT, [34892])}),
    "raw behind": with_next({}, {262: (SHORT, [32803])}),
    "a thumbnail and the photo": with_next(REDUCED, {**SIZE, 262: (SHORT, [2])}),
    "an old thumbnail and the photo": with_next({255: (SHORT, [2])}, {**SIZE, 262: (SHORT, [2])}),
    "a mask and the photo": with_next({254: (LONG, [4])}, {**SIZE, 262: (SHORT, [2])}),
}


@pytest.mark.parametrize("name", PREVIEWS)
def test_a_preview_is_not_taken_for_the_picture(name: str) -> None:
    refused = decode(PREVIEWS[name])
    assert isinstance(refused, Rejection), refused
    assert refused.reason == "unsupported" and "convert" in refused.message


def test_a_canon_raw_photo_is_told_by_its_magic() -> None:
    data = tiff(SMALL, 2)
    cr2 = data[:4] + struct.pack("<I", 16) + b"CR\2\0" + bytes(4) + data[int.from_bytes(data[4:8], "little") :]
    refused = decode(cr2)
    assert isinstance(refused, Rejection) and "raw photo" in refused.message


@pytest.mark.parametrize("head", [b"IIRO\x08\0\0\0", b"IIRS\x08\0\0\0", b"IIU\0\x18\0\0\0", b"FUJIFILMCCD-RAW 0201",
                                  b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", b"\0MRM\0\1", b"FOVb\0\0"])  # fmt: skip
def test_raw_photos_of_other_makers_are_named(head: bytes) -> None:
    refused = decode(head + bytes(200))
    assert isinstance(refused, Rejection)
    assert refused.reason == "unsupported" and "raw" in refused.message


@pytest.mark.parametrize("order", ["<", ">"])
def test_pages_that_follow_a_picture_do_not_matter(order: str) -> None:
    smaller = {256: (LONG, [2]), 257: (LONG, [2]), 262: (SHORT, [2]), 254: (LONG, [1])}
    for data in (
        with_inner({}, smaller, order),
        with_next({}, smaller, order),
        with_next({}, {**SIZE, 262: (SHORT, [2])}, order),
    ):
        assert np.array_equal(pixels(data), SMALL)
    assert np.array_equal(pixels(tiff(SMALL, 2, order=order, tags=REDUCED)), SMALL)  # there is no other one


def test_pages_in_a_circle_end() -> None:
    data = tiff(SMALL, 2, second=b"")
    first = int.from_bytes(data[4:8], "little")
    end = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    assert np.array_equal(pixels(data[:end] + struct.pack("<I", first) + data[end + 4 :]), SMALL)


def test_an_invalid_orientation_turns_nothing() -> None:
    for stored in (0, 9, 16):
        for exif in ("apply", "ignore"):
            assert np.array_equal(pixels(tiff(COLOUR, 2, tags={274: (SHORT, [stored])}), exif=exif), COLOUR)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_end_of_a_directory_is_found_behind_the_pixels_of_a_large_file(order: str) -> None:
    """BigTIFF: offsets and counts have eight bytes, entries twenty."""
    start, count = 300, 3
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HHHQ", 43, 8, 0, start)
    data = head + b"\xff" * (start - len(head)) + struct.pack(f"{order}Q", count) + bytes(20 * count)
    assert _directory_end(memoryview(data)) == start + 8 + 20 * count
