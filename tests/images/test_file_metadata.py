"""What a file says beside its pixels: orientation wherever it lies, harmless faults, and forms that Pillow misreads."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.schema import Pixels, Rejection

RGB_HWC = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((64, 48))
)
GREY_HW = np.asarray(Image.fromarray(RGB_HWC).convert("L"))
BIG = zlib.compress(b"".join(b"%d " % i for i in range(220_000)))  # inflates to 1.4 MB


def encoded(kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(RGB_HWC).save(sink, kind, **options)
    return sink.getvalue()


def pixels(data: bytes, exif: Literal["apply", "ignore"] = "apply") -> np.ndarray:
    result = decode(data, DecodePolicy(exif=exif))
    assert isinstance(result, Pixels), result
    return result.rgb_HWC


def chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def with_chunks(*chunks: bytes) -> bytes:
    png = encoded("PNG")
    at = png.index(b"IDAT") - 4
    return png[:at] + b"".join(chunks) + png[at:]


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def raw_profile(orientation: int) -> bytes:
    """Write EXIF as ImageMagick does: a name, a length and hexadecimal lines."""
    block = exif_of(orientation)
    digits = block.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\nexif\n{len(block):8d}\n{lines}\n".encode()


def xmp_of(orientation: int, as_element: bool = False) -> bytes:
    value = f'tiff:Orientation="{orientation}"'
    inner = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if as_element else ""
    attribute = "" if as_element else value
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {attribute}>{inner}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def jpeg_with_xmp(orientation: int, exif: bytes = b"") -> bytes:
    data = encoded("JPEG", quality=95, **({"exif": exif} if exif else {}))
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp_of(orientation)
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return data[:2] + segment + data[2:]


TURNED = {
    "raw profile, deflated": lambda o: with_chunks(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(o)))
    ),
    "raw profile, plain": lambda o: with_chunks(chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(o))),
    "eXIf": lambda o: with_chunks(chunk(b"eXIf", exif_of(o).removeprefix(b"Exif\0\0"))),
    "XMP in a PNG": lambda o: with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(o))),
    "XMP element in a PNG": lambda o: with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(o, True))),
    "XMP in a JPEG": jpeg_with_xmp,
    "XMP in a WebP": lambda o: encoded("WEBP", lossless=True, xmp=xmp_of(o)),
}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", TURNED)
def test_orientation_is_obeyed_wherever_it_lies(form: str, orientation: int) -> None:
    """Pillow's `exif_transpose` is the reference."""
    data = TURNED[form](orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (pixels(data).shape[1], pixels(data).shape[0]) == upright.size
    assert np.abs(pixels(data).astype(int) - np.asarray(upright).astype(int)).max() <= 2
    assert pixels(data, "ignore").shape == RGB_HWC.shape


def test_exif_goes_before_xmp() -> None:
    assert pixels(jpeg_with_xmp(6, exif=exif_of(1))).shape == RGB_HWC.shape


METADATA = {
    "a profile above 1 MB": chunk(b"iCCP", b"icc\0\0" + BIG),
    "text above 1 MB": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "international text above 1 MB": chunk(b"iTXt", b"workflow\0\1\0\0\0" + BIG),
    "a wrong checksum": chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",
    "a text that is not deflated": chunk(b"zTXt", b"Comment\0\0" + b"nonsense"),
    "a profile that is none": chunk(b"iCCP", b"\0\0"),
    "an odd gamma": chunk(b"gAMA", b"\0"),
    "a damaged raw profile": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 5\nzz"),
}


@pytest.mark.parametrize("form", METADATA)
def test_metadata_costs_no_sound_picture(form: str) -> None:
    assert np.array_equal(pixels(with_chunks(METADATA[form])), RGB_HWC)


def test_a_critical_chunk_with_a_wrong_checksum_still_costs_it() -> None:
    png = encoded("PNG")
    result = decode(png[:-16] + bytes([png[-16] ^ 1]) + png[-15:])
    assert isinstance(result, Rejection) and result.reason == "corrupt_data"


# ---- JPEG --------------------------------------------------------------------------------------------------------


def scan_header_end(jpeg: bytes) -> int:
    at = jpeg.index(b"\xff\xda")
    return at + 2 + int(struct.unpack(">H", jpeg[at + 2 : at + 4])[0])


def test_padding_and_a_wrong_spectral_range_lose_no_pixel() -> None:
    jpeg = encoded("JPEG", quality=95)
    end = scan_header_end(jpeg)
    spectral = jpeg[: end - 3] + b"\0\0\0" + jpeg[end:]
    clean = pixels(jpeg)
    for data in (jpeg[:-2] + b"\0" * 16 + jpeg[-2:], jpeg[:-2] + b"\0" + jpeg[-2:], spectral):
        assert np.array_equal(pixels(data), clean)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize(("keep", "cut"), [(0.2, 20), (0.3, 60), (0.7, 60), (0.7, 200)])
def test_data_that_is_left_over_is_still_damage(keep: float, cut: int) -> None:
    """Cut bytes out of the scan: what remains before the end marker is no padding."""
    jpeg = encoded("JPEG", quality=95)
    start = scan_header_end(jpeg)
    middle = start + int((len(jpeg) - start) * keep)
    result = decode(jpeg[: middle - cut] + jpeg[middle:])
    assert isinstance(result, Rejection) and "extraneous bytes before marker 0xd9" in result.message


def test_a_jpeg_with_a_harmless_fault_and_a_real_one_is_not_salvaged_unasked() -> None:
    jpeg = encoded("JPEG", quality=95)
    end = scan_header_end(jpeg)
    spectral = jpeg[: end - 3] + b"\0\0\0" + jpeg[end:]
    middle = end + (len(spectral) - end) // 5
    damaged = spectral[: middle - 20] + spectral[middle:]
    result = decode(damaged)
    assert isinstance(result, Rejection) and result.reason == "corrupt_data"
    salvaged = decode(damaged, DecodePolicy(salvage=True))
    assert isinstance(salvaged, Pixels) and salvaged.warnings == ("salvaged",)


# ---- TIFF and BMP ------------------------------------------------------------------------------------------------


def tiff(values: np.ndarray, **options: object) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, **options)
    return sink.getvalue()


RGB16_HWC = RGB_HWC.astype(np.uint16) * 257
GREY16_HW = GREY_HW.astype(np.uint16) * 257
PLANES = {"planarconfig": "separate"}
TIFFS = {
    "rgb8": (RGB_HWC, {"photometric": "rgb"}),
    "rgb8 planes": (np.moveaxis(RGB_HWC, 2, 0).copy(), {"photometric": "rgb", **PLANES}),
    "rgb16": (RGB16_HWC, {"photometric": "rgb"}),
    "rgb16 planes": (np.moveaxis(RGB16_HWC, 2, 0).copy(), {"photometric": "rgb", **PLANES}),
    "rgb16 planes, deflated": (
        np.moveaxis(RGB16_HWC, 2, 0).copy(), {"photometric": "rgb", "compression": "zlib", **PLANES},
    ),
    "grey8": (GREY_HW, {"photometric": "minisblack"}),
    "grey8, white is 0": (255 - GREY_HW, {"photometric": "miniswhite"}),
    "grey16": (GREY16_HW, {"photometric": "minisblack"}),
    "grey16, white is 0": (65535 - GREY16_HW, {"photometric": "miniswhite"}),
    "int8": ((GREY_HW.astype(int) - 128).astype(np.int8), {"photometric": "minisblack"}),
    "int16": (GREY_HW.astype(np.int16), {"photometric": "minisblack"}),
}  # fmt: skip


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("form", TIFFS)
def test_a_tiff_is_read_rightly_or_refused(form: str, tile: tuple[int, int] | None, order: str) -> None:
    values, options = TIFFS[form]
    result = decode(tiff(values, byteorder=order, **options, **({"tile": tile} if tile else {})))
    right_HWC = RGB_HWC if "rgb" in form else np.repeat(GREY_HW[:, :, None], 3, 2)
    if isinstance(result, Rejection):
        assert result.reason == "unsupported"
        assert form in ("rgb16 planes", "int8", "int16") or (form, order) == ("grey16, white is 0", ">")
    else:
        assert np.array_equal(result.rgb_HWC, right_HWC)


@pytest.mark.parametrize("tags", [{50706: (1, 4, b"\1\4\0\0")}, {}])
def test_a_raw_photograph_is_not_its_thumbnail(tags: dict[int, tuple[int, int, bytes]]) -> None:
    sink = io.BytesIO()
    extra = [(tag, *value, True) for tag, value in tags.items()]
    with tifffile.TiffWriter(sink) as file:
        file.write(RGB_HWC[::8, ::8].copy(), photometric="rgb", subfiletype=1, subifds=1, extratags=extra)
        file.write(GREY16_HW, photometric="minisblack", subfiletype=0)
    result = decode(sink.getvalue())
    assert isinstance(result, Rejection) and result.reason == "unsupported" and "raw" in result.message


def bmp(alpha: int) -> bytes:
    """Write a 32-bit BMP with an alpha mask."""
    height, width, _ = RGB_HWC.shape
    values = np.dstack([RGB_HWC[..., ::-1], np.full((height, width), alpha, np.uint8)]).tobytes()
    head = struct.pack("<IiiHHIIiiII", 124, width, -height, 1, 32, 3, len(values), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    return b"BM" + struct.pack("<IHHI", 138 + len(values), 0, 0, 138) + head.ljust(124, b"\0") + values


def test_an_alpha_that_a_bmp_leaves_unset_hides_nothing() -> None:
    assert np.array_equal(pixels(bmp(0)), RGB_HWC) and np.array_equal(pixels(bmp(255)), RGB_HWC)
    assert not np.array_equal(pixels(bmp(128)), RGB_HWC)
