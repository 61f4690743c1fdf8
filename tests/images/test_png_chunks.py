"""Check that a PNG's metadata never costs its picture, that it tells how the picture is turned, and that damage to what
decides pixels is found."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.schema import Pixels, Rejection
from tests.support.bad_images import PALETTE, PNG, RGB, chunk, encode, exif

BIG = zlib.compress(b"".join(b"%d " % number for number in range(220_000)))  # 1.4 MB
BEFORE, AFTER = PNG.index(b"IDAT") - 4, len(PNG) - 12


def with_chunks(*chunks: bytes, at: int = BEFORE, data: bytes = PNG) -> bytes:
    return data[:at] + b"".join(chunks) + data[at:]


def pixels(data: bytes, **policy: str) -> np.ndarray:
    result = decode(data, DecodePolicy(**policy))  # type: ignore[arg-type]
    assert isinstance(result, Pixels), result
    return result.rgb_HWC


HARMLESS = {
    "a large profile": chunk(b"iCCP", b"icc\0\0" + BIG),
    "a large compressed text": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "a large text of ComfyUI": chunk(b"iTXt", b"workflow\0\1\0\0\0" + BIG),
    "many large texts": b"".join(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) for _ in range(80)),
    "a profile of an unknown method": chunk(b"iCCP", b"icc\0\7" + BIG[:99]),
    "a text of an unknown method": chunk(b"zTXt", b"Comment\0\7abc"),
    "a broken profile": chunk(b"iCCP", b"icc\0\0\1\2\3"),
    "a text that is no text": chunk(b"tEXt", b"\xff\xfe"),
    "an empty text": chunk(b"tEXt", b""),
    "short values": b"".join(chunk(tag, b"") for tag in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"bKGD", b"acTL")),
    "an animation out of order": chunk(b"acTL", b"\0\0\0\1\0\0\0\0") + chunk(b"fcTL", b"\0\0\0\7" + bytes(22)),
    "a private chunk": chunk(b"caBX", bytes(3000)),
}  # fmt: skip


@pytest.mark.parametrize("at", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("name", HARMLESS)
def test_metadata_does_not_cost_the_picture(name: str, at: int) -> None:
    assert np.array_equal(pixels(with_chunks(HARMLESS[name], at=at)), RGB)


@pytest.mark.parametrize(
    "tag", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"pHYs", b"tIME", b"sRGB"]
)
def test_a_wrong_checksum_of_metadata_does_not_cost_the_picture(tag: bytes) -> None:
    assert np.array_equal(pixels(with_chunks(chunk(tag, b"abc\0\0def", checksum=7))), RGB)


def test_a_wrong_checksum_of_what_decides_pixels_does() -> None:
    palette = encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 16)))
    for data, tag in [(PNG, b"IHDR"), (PNG, b"IDAT"), (palette, b"PLTE"), (palette, b"tRNS")]:
        at = data.index(tag)
        end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
        refused = decode(data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :])
        assert isinstance(refused, Rejection), tag
        assert refused.reason == "corrupt_data"


def test_a_palette_that_is_not_there_is_damage() -> None:
    data = encode(PALETTE, "PNG")
    refused = decode(data.replace(b"PLTE", b"pLTE"))
    assert refused == Rejection("corrupt_data", "PNG: its colours are indices, and it has no palette")


@pytest.mark.parametrize(("frames", "is_first", "is_animated"), [(1, True, False), (1, False, True), (2, True, True)])
def test_a_single_frame_is_an_animation_where_the_picture_is_none_of_its_frames(
    frames: int, is_first: bool, is_animated: bool
) -> None:
    control = [chunk(b"acTL", frames.to_bytes(4, "big") + bytes(4))]
    control += [chunk(b"fcTL", bytes(26))] if is_first else []
    result = decode(with_chunks(*control))
    assert isinstance(result, Pixels) and result.warnings == (("animated",) if is_animated else ())


def test_a_png_for_iphones_is_not_decoded() -> None:
    refused = decode(with_chunks(chunk(b"CgBI", b"\x50\0\x20\x06"), at=8))
    assert isinstance(refused, Rejection) and refused.reason == "unsupported"


# --- how it is turned ------------------------------------------------------------------------------------------------


def profile(name: bytes, data: bytes) -> bytes:
    """ImageMagick's text form: a name, a length, hexadecimal digits."""
    digits = data.hex().encode()
    lines = b"\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return b"\n%s\n%8d\n%s\n" % (name, len(data), lines)


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def texts(keyword: bytes, text: bytes) -> dict[str, bytes]:
    return {
        "tEXt": chunk(b"tEXt", keyword + b"\0" + text),
        "zTXt": chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text)),
        "iTXt": chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text),
        "iTXt compressed": chunk(b"iTXt", keyword + b"\0\1\0\0\0" + zlib.compress(text)),
    }


XMP_APP1 = b"http://ns.adobe.com/xap/1.0/\0"
TURNED = {
    **{f"exif profile, {k}": v for k, v in texts(b"Raw profile type exif", profile(b"exif", exif(6))).items()},
    **{f"APP1 profile, {k}": v for k, v in texts(b"Raw profile type APP1", profile(b"exif", exif(6))).items()},
    "XMP in an APP1 profile": texts(b"Raw profile type APP1", profile(b"app1", XMP_APP1 + xmp(6)))["zTXt"],
    "XMP profile": texts(b"Raw profile type xmp", profile(b"xmp", xmp(6)))["zTXt"],
    **{f"XMP, {k}": v for k, v in texts(b"XML:com.adobe.xmp", xmp(6)).items() if k.startswith("iTXt")},
    "eXIf": chunk(b"eXIf", exif(6)[6:]),
    "eXIf before XMP": chunk(b"eXIf", exif(6)[6:]) + texts(b"XML:com.adobe.xmp", xmp(3))["iTXt"],
    "EXIF without orientation, and XMP": chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0")
    + texts(b"XML:com.adobe.xmp", xmp(6))["iTXt"],
}  # fmt: skip


@pytest.mark.parametrize("at", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("name", TURNED)
def test_every_place_of_the_orientation_is_read(name: str, at: int) -> None:
    data = with_chunks(TURNED[name], at=at)
    assert np.array_equal(pixels(data), np.rot90(RGB, k=-1))
    assert np.array_equal(pixels(data, exif="ignore"), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_raw_profile_turns_as_pillow_turns_it(orientation: int) -> None:
    data = with_chunks(texts(b"Raw profile type exif", profile(b"exif", exif(orientation)))["zTXt"])
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels(data), np.asarray(expected))


@pytest.mark.parametrize(
    "text", [b"", b"\nexif\n", profile(b"exif", exif(6))[:-40], b"\nexif\n  8\nno digits\n", b"\n" * 99]
)
def test_a_damaged_profile_turns_nothing(text: bytes) -> None:
    assert np.array_equal(pixels(with_chunks(texts(b"Raw profile type exif", text)["zTXt"])), RGB)


def test_a_profile_that_becomes_a_gigabyte_is_cut_off() -> None:
    bomb = texts(b"Raw profile type exif", profile(b"exif", exif(6) + bytes(40 << 20)))["zTXt"]
    assert np.array_equal(pixels(with_chunks(bomb)), np.rot90(RGB, k=-1))
