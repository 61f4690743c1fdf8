"""Check the orientation that EXIF and XMP state, and which of them counts."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.images.orientation import read_orientation
from img2parquet.schema import Pixels
from tests.support.bad_images import AVIF, JPEG, RGB, encode, exif, with_segment

PACKET = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description %s</rdf:RDF></x:xmpmeta>'
ATTRIBUTE, ELEMENT = b'tiff:Orientation="%d"/>', b"><tiff:Orientation>%d</tiff:Orientation></rdf:Description>"


def entry(kind: int, value: bytes, order: str = "<") -> bytes:
    """EXIF with one orientation tag of any type."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IHHHI", 8, 1, 0x0112, kind, 1) + value.ljust(4, b"\0") + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(1, "B"), (3, "H"), (4, "I"), (6, "b"), (8, "h"), (9, "i")])
def test_every_integer_type_is_read(kind: int, code: str, order: str) -> None:
    assert read_orientation(entry(kind, struct.pack(order + code, 6), order)) == 6


@pytest.mark.parametrize("text", [ATTRIBUTE, ELEMENT, b"tiff:Orientation='%d'/>", b'tiff:Orientation = "%d" />'])
def test_xmp_counts_where_exif_says_nothing(text: bytes) -> None:
    packet = PACKET % (text % 6)
    assert read_orientation(b"", packet) == 6
    assert read_orientation(b"II*\0\x08\0\0\0\0\0", packet) == 6
    assert read_orientation(exif(3), packet) == 3
    assert read_orientation(exif(9), packet) == 1  # there, but invalid


@pytest.mark.parametrize("said", [b"0", b"9", b"16", b"", b"x"])
def test_an_invalid_xmp_value_turns_nothing(said: bytes) -> None:
    assert read_orientation(b"", PACKET % (b'tiff:Orientation="' + said + b'"/>')) == 1


def files(orientation: int) -> dict[str, bytes]:
    packet = PACKET % (ATTRIBUTE % orientation)
    return {
        "JPEG": with_segment(JPEG, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet),
        "WEBP": encode(RGB, "WEBP", lossless=True, xmp=packet),
        "TIFF": encode(RGB, "TIFF", tiffinfo={700: packet}),
        "TIFF deflate": encode(RGB, "TIFF", tiffinfo={700: packet}, compression="tiff_adobe_deflate"),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", files(1))
def test_orientation_in_xmp_alone_turns_as_pillow_turns_it(kind: str, orientation: int) -> None:
    data = files(orientation)[kind]
    for policy, expected in (
        (DecodePolicy(), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))),
        (DecodePolicy(exif="ignore"), Image.open(io.BytesIO(files(1)[kind]))),
    ):
        found = decode(data, policy)
        assert isinstance(found, Pixels)
        assert np.array_equal(found.rgb_HWC, np.asarray(expected.convert("RGB")))


def test_fast_decoding_is_turned_alike() -> None:
    found = decode(files(6)["JPEG"], shrink=lambda source_HW: 2)
    assert isinstance(found, Pixels)
    assert (found.rgb_HWC.shape, found.source_HW) == ((48, 32, 3), (96, 64))


def test_avif_is_turned_by_its_boxes_alone() -> None:
    """The standard says that EXIF and XMP are only informative."""
    data = encode(RGB, "AVIF", quality=90, xmp=PACKET % (ATTRIBUTE % 6))
    assert np.array_equal(decode(data).rgb_HWC, decode(AVIF).rgb_HWC)  # type: ignore[union-attr]
    turned = encode(RGB, "AVIF", quality=90, exif=exif(6))  # Pillow writes the boxes too
    assert np.array_equal(decode(turned).rgb_HWC, np.rot90(decode(AVIF).rgb_HWC, k=-1))  # type: ignore[union-attr]


def test_the_first_of_several_exif_segments_counts() -> None:
    data = with_segment(with_segment(JPEG, 0xE1, exif(3)), 0xE1, exif(6))
    assert decode(data).rgb_HWC.shape == (96, 64, 3)  # type: ignore[union-attr]
