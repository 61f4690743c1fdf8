"""Check that defects which cost no pixel cost no picture, and that damage which looks like them is still found."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.schema import Pixels, Rejection
from tests.support.bad_images import (
    BAD_IMAGES,
    CMYK,
    GREY,
    JPEG,
    PROGRESSIVE,
    RGB,
    SCAN,
    encode,
    exif,
    segment,
    with_segment,
)

RESTARTS = encode(RGB, "JPEG", quality=90, restart_marker_blocks=2)
SOUND = {
    "colour": JPEG,
    "progressive": PROGRESSIVE,
    "grey": encode(GREY, "JPEG"),
    "cmyk": encode(CMYK, "JPEG"),
    "restart markers": RESTARTS,
    "turned": with_segment(JPEG, 0xE1, exif(6)),
}
ENTROPY = segment(JPEG, 0xDA)[1]


def padded(jpeg: bytes, count: int) -> bytes:
    return jpeg[:-2] + bytes(count) + jpeg[-2:]


def padded_everywhere(jpeg: bytes) -> bytes:
    """Add zeros before every restart marker and between scans."""
    start = segment(jpeg, 0xDA)[1]
    return jpeg[:start] + re.sub(rb"(?=\xff[\xd0-\xd7\xd9])", bytes(5), jpeg[start:])


def with_stray_bytes(jpeg: bytes) -> bytes:
    start = segment(jpeg, 0xDB)[0]
    return jpeg[:start] + b"\0\x11\0" + jpeg[start:]


def with_jfif_2(jpeg: bytes) -> bytes:
    return jpeg.replace(b"JFIF\0\1", b"JFIF\0\2", 1)


def with_spectral_range(jpeg: bytes, selected: bytes) -> bytes:
    end = segment(jpeg, 0xDA)[1]
    return jpeg[: end - 3] + selected + jpeg[end:]


HARMLESS = {
    "one zero": lambda jpeg: padded(jpeg, 1),
    "zeros": lambda jpeg: padded(jpeg, 16),
    "a block of zeros": lambda jpeg: padded(jpeg, 4096),
    "zeros everywhere": padded_everywhere,
    "zeros and fill bytes": lambda jpeg: jpeg[:-2] + bytes(9) + b"\xff\xff" + jpeg[-2:],
    "stray bytes": with_stray_bytes,
    "JFIF 2": with_jfif_2,
    "several": lambda jpeg: padded(with_stray_bytes(with_jfif_2(jpeg)), 3),
}


@pytest.mark.parametrize("defect", HARMLESS)
@pytest.mark.parametrize("kind", SOUND)
def test_a_harmless_defect_leaves_every_pixel(kind: str, defect: str) -> None:
    data = HARMLESS[defect](SOUND[kind])
    for shrink in (None, lambda source_HW: 2):
        found, clean = decode(data, shrink=shrink), decode(SOUND[kind], shrink=shrink)
        assert isinstance(found, Pixels) and isinstance(clean, Pixels), found
        assert np.array_equal(found.rgb_HWC, clean.rgb_HWC)
        assert (found.warnings, found.shrunk) == (clean.warnings, clean.shrunk)
    assert decode(data, DecodePolicy(salvage=True)).warnings == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("selected", [b"\0\0\0", b"\0\x3e\0", b"\1\x3f\x11"])
@pytest.mark.parametrize("kind", sorted(SOUND.keys() - {"progressive"}))
def test_the_spectral_range_of_a_sequential_scan_means_nothing(kind: str, selected: bytes) -> None:
    found = decode(padded(with_spectral_range(SOUND[kind], selected), 2))
    assert isinstance(found, Pixels), found
    assert np.array_equal(found.rgb_HWC, decode(SOUND[kind]).rgb_HWC)  # type: ignore[union-attr]


def test_the_spectral_range_of_a_progressive_scan_matters() -> None:
    assert isinstance(decode(with_spectral_range(PROGRESSIVE, b"\0\x3f\0")), Rejection)


@pytest.mark.parametrize("cut", range(40, len(JPEG) - SCAN - 40, 41))
def test_zeros_in_place_of_the_end_are_damage(cut: int) -> None:
    """However many of them there are: a decoder reads picture out of zeros until it has enough."""
    for zeros in (cut, cut + 333, 50_000):
        result = decode(JPEG[: -2 - cut] + bytes(zeros) + b"\xff\xd9")
        assert isinstance(result, Rejection), zeros
        assert result.reason in ("corrupt_data", "truncated")


@pytest.mark.parametrize("harmless", [with_stray_bytes, with_jfif_2, lambda jpeg: with_spectral_range(jpeg, bytes(3))])
def test_damage_is_found_beside_a_harmless_defect(harmless: Callable[[bytes], bytes]) -> None:
    assert isinstance(decode(harmless(JPEG)), Pixels)
    for name in ("jpeg_zeroed", "jpeg_burst", "jpeg_bytes_dropped"):
        damaged = next(odd.data for odd in BAD_IMAGES if odd.name == name)
        assert isinstance(decode(harmless(damaged)), Rejection), name


def test_bytes_other_than_zero_before_the_end_are_damage() -> None:
    for rest in (b"\x35\x9a\x11", JPEG[ENTROPY : ENTROPY + 60]):
        assert isinstance(decode(JPEG[:-2] + rest + JPEG[-2:]), Rejection), rest


def test_long_runs_of_zeros_are_repaired_in_linear_time() -> None:
    assert isinstance(decode(padded(JPEG, 20 << 20)), Pixels)
    assert isinstance(decode(JPEG[:ENTROPY] + bytes(20 << 20) + b"\x01\xff\xd9"), Rejection)
