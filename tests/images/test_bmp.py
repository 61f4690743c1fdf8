"""Check BMPs of every depth, mask and use of alpha against their own pixels."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.schema import Pixels
from tests.support.bad_images import RGB

SMALL = RGB[:7, :13]
BGRA = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
RGBA = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
BGAR = (0xFF000000, 0xFF00, 0xFF, 0xFF0000)


def bmp(words_HW: np.ndarray, bits: int, masks: tuple[int, ...] = (), *, palette: bytes = b"", used: int = 0,
        top_down: bool = False, header: int = 124) -> bytes:  # fmt: skip
    """Return a BMP of the pixels' words: indices for 1 to 8 bits, colours under the masks for 16 and 32."""
    height, width = words_HW.shape
    rows = words_HW if top_down else words_HW[::-1]
    if bits < 8:
        digits = rows[:, :, None] >> np.arange(bits - 1, -1, -1) & 1
        packed = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        packed = rows.astype(f"<u{bits // 8}").view(np.uint8).reshape(height, -1)
    body = b"".join(row.tobytes() + bytes(-len(row) % 4) for row in packed)
    info = struct.pack("<IiiHHIIiiII", header, width, -height if top_down else height, 1, bits, 3 if masks else 0,
                       len(body), 0, 0, used, 0)  # fmt: skip
    info = (info + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0") + palette
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(body), 0, 0, 14 + len(info)) + info + body


def words(rgb_HWC: np.ndarray, alpha_HW: np.ndarray | int, masks: tuple[int, ...]) -> np.ndarray:
    """Place 8-bit samples under masks of any width."""
    channels = [*np.moveaxis(rgb_HWC, 2, 0), np.broadcast_to(alpha_HW, rgb_HWC.shape[:2])]
    placed = np.zeros(rgb_HWC.shape[:2], np.uint64)
    for channel, mask in zip(channels, masks, strict=False):
        if mask:
            shift, bits = (mask & -mask).bit_length() - 1, mask.bit_count()
            placed |= (channel.astype(np.uint64) >> np.uint64(8 - bits)) << np.uint64(shift)
    return placed


def pixels(data: bytes, alpha: str = "white") -> np.ndarray:
    result = decode(data, DecodePolicy(alpha=alpha))  # type: ignore[arg-type]
    assert isinstance(result, Pixels), result
    return result.rgb_HWC


@pytest.mark.parametrize("masks", [BGRA, RGBA, BGAR], ids=["BGRA", "RGBA", "BGAR"])
def test_an_alpha_channel_that_is_nowhere_set_does_not_hide_the_picture(masks: tuple[int, ...]) -> None:
    assert np.array_equal(pixels(bmp(words(SMALL, 0, masks), 32, masks)), SMALL)
    assert np.array_equal(pixels(bmp(words(SMALL, 255, masks), 32, masks)), SMALL)


def test_an_alpha_channel_that_is_set_somewhere_counts() -> None:
    alpha = np.zeros(SMALL.shape[:2], np.uint8)
    alpha[2, 3] = 255
    data = bmp(words(SMALL, alpha, BGRA), 32, BGRA)
    expected = np.full_like(SMALL, 255)
    expected[2, 3] = SMALL[2, 3]
    assert np.array_equal(pixels(data), expected)
    assert np.array_equal(pixels(data, "drop"), SMALL)


def test_a_fourth_byte_without_a_mask_is_padding() -> None:
    assert np.array_equal(pixels(bmp(words(SMALL, 9, BGRA), 32)), SMALL)
    assert np.array_equal(pixels(bmp(words(SMALL, 9, BGRA), 32, BGRA[:3], header=40 + 12)), SMALL)


@pytest.mark.parametrize("top_down", [False, True])
def test_the_alpha_bit_of_16_bit_pixels_counts_where_it_is_set_somewhere(top_down: bool) -> None:
    masks = (0x7C00, 0x3E0, 0x1F, 0x8000)
    plain = pixels(bmp(words(SMALL, 0, masks[:3]), 16, masks[:3]))
    assert np.abs(plain.astype(int) - SMALL).max() < 8
    alpha = np.full(SMALL.shape[:2], 255, np.uint8)
    alpha[5, 1] = alpha[0, 12] = 0
    data = bmp(words(SMALL, alpha, masks), 16, masks, top_down=top_down)
    expected = plain.copy()
    expected[5, 1] = expected[0, 12] = 255
    assert np.array_equal(pixels(data), expected)
    assert np.array_equal(pixels(data, "drop"), plain)
    for same in (0, 255):
        assert np.array_equal(pixels(bmp(words(SMALL, same, masks), 16, masks)), plain)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("greys", [[0, 255], [255, 0], [0, 1, 2], [9, 200]], ids=str)
def test_few_greys_are_read_at_the_depth_of_the_header(bits: int, greys: list[int]) -> None:
    greys = greys[: 1 << bits]
    index_HW = (SMALL[:, :, 0].astype(int) + SMALL[:, :, 1]) % len(greys)
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in greys)
    found = pixels(bmp(index_HW, bits, palette=palette, used=len(greys), header=40))
    assert np.array_equal(found, np.repeat(np.array(greys, np.uint8)[index_HW][:, :, None], 3, axis=2))
