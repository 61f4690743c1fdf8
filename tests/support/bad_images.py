"""Bad and odd images, generated: each with what must become of it. `BAD_IMAGES` is for every test that needs one.

`reason` None means accepted, with `size_HW` and `warnings` as given. `stage` says who refuses: the two long thin ones
decode, and are refused by any preprocessing that scales them.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from img2parquet.schema import Reason

HEIGHT, WIDTH = 64, 96


@dataclass(frozen=True)
class OddImage:
    name: str
    data: bytes
    reason: Reason | None = None
    size_HW: tuple[int, int] = (HEIGHT, WIDTH)
    warnings: tuple[str, ...] = ()
    stage: Literal["decode", "preprocess"] = "decode"


def picture(height: int = HEIGHT, width: int = WIDTH) -> npt.NDArray[np.uint8]:
    """A ramp with texture (H, W, 3), different in every corner, so that no turn of it looks like another."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = 2 * x + y, 3 * y + (x * y) // 16, (x * 7 + y * 13) % 97 + x
    return np.stack([red, green, blue], axis=2).clip(0, 255).astype(np.uint8)


def moving(kind: str) -> bytes:
    """Three frames. Made anew: saving leaves one format's settings on an image, where the next one trips over them."""
    first, *others = [Image.fromarray(np.roll(picture(), shift, axis=1)) for shift in (0, 9, 18)]
    return encode(first, kind, save_all=True, append_images=others)


def encode(image: Image.Image | npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


# --- making and breaking ---------------------------------------------------------------------------------------------


def exif(orientation: int, order: Literal["<", ">"] = "<") -> bytes:
    """An EXIF block that says how the image is turned."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, 1) + entry + b"\0\0\0\0"


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def with_thumbnail(jpeg: bytes) -> bytes:
    """EXIF that carries a whole small JPEG, end marker included."""
    return with_segment(jpeg, 0xE1, exif(1) + encode(picture(16, 24), "JPEG"))


def segment(jpeg: bytes, *markers: int) -> tuple[int, int]:
    """Where the first segment with one of the markers begins and ends."""
    position = 2
    while jpeg[position + 1] not in markers:
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
    return position, position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")


def with_frame(jpeg: bytes, *, precision: int = 8, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """The same data under a frame header that says something else."""
    start, _ = segment(jpeg, 0xC0, 0xC1, 0xC2)
    return jpeg[: start + 4] + struct.pack(">BHH", precision, height, width) + jpeg[start + 9 :]


def without(jpeg: bytes, *markers: int) -> bytes:
    start, end = segment(jpeg, *markers)
    return jpeg[:start] + jpeg[end:]


def without_all_tables(jpeg: bytes) -> bytes:
    """As a frame of a Motion JPEG: the standard Huffman tables are understood."""
    for _ in range(4):
        jpeg = without(jpeg, 0xC4)
    return jpeg


def two_components(jpeg: bytes) -> bytes:
    start, end = segment(jpeg, 0xC0)
    body = jpeg[start + 4 : end - 3]
    return jpeg[:start] + struct.pack(">HH", 0xFFC0, len(body) + 2) + body[:5] + b"\x02" + body[6:] + jpeg[end:]


def overwritten(data: bytes, start: int, patch: bytes) -> bytes:
    return data[:start] + patch + data[start + len(patch) :]


def chunk(tag: bytes, body: bytes, checksum: int | None = None) -> bytes:
    return struct.pack(">I4s", len(body), tag) + body + struct.pack(">I", checksum or zlib.crc32(tag + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG of raw rows (each begins with its filter byte), with further chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def grey_rows(grey_HW: npt.NDArray[Any]) -> bytes:
    return b"".join(b"\0" + row.astype(grey_HW.dtype.newbyteorder(">")).tobytes() for row in grey_HW)


def box(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), tag) + body


RGB = picture()
GREY = RGB[:, :, 1]
ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
RGBA = np.dstack([RGB, ALPHA])
GREY_16 = (GREY.astype(np.uint16) << 8) + 77

JPEG = encode(RGB, "JPEG", quality=90)
SCAN = JPEG.index(b"\xff\xda")
MIDDLE = (SCAN + len(JPEG)) // 2
PROGRESSIVE = encode(RGB, "JPEG", quality=90, progressive=True)
PNG = encode(RGB, "PNG")
IDAT = PNG.index(b"IDAT") + 4
GIF = encode(Image.fromarray(RGB).quantize(64), "GIF")
BMP = encode(RGB, "BMP")
TIFF = encode(RGB, "TIFF")
TIFF_LZW = encode(RGB, "TIFF", compression="tiff_lzw")
WEBP = encode(RGB, "WEBP", lossless=True)
AVIF = encode(RGB, "AVIF", quality=90)
CMYK = Image.fromarray(RGB).convert("CMYK")
PALETTE = Image.fromarray(RGB).quantize(16)


def _jpegs() -> list[OddImage]:
    turned = {n: encode(RGB, "JPEG", exif=exif(n)) for n in range(1, 9)}
    return [
        OddImage("jpeg", JPEG),
        OddImage("jpeg_progressive", PROGRESSIVE),
        OddImage("jpeg_grey", encode(GREY, "JPEG")),
        OddImage("jpeg_rgb_stored_as_rgb", encode(RGB, "JPEG", keep_rgb=True)),
        OddImage("jpeg_cmyk", encode(CMYK, "JPEG")),
        OddImage("jpeg_ycck", simplejpeg.encode_jpeg(255 - np.asarray(CMYK), colorspace="CMYK")),
        OddImage("jpeg_restart_markers", encode(RGB, "JPEG", restart_marker_blocks=2)),
        OddImage("jpeg_no_huffman_tables", without_all_tables(JPEG)),
        OddImage("jpeg_trailing_garbage", JPEG + b"\0" * 99 + b"trailing"),
        OddImage("jpeg_fill_bytes", JPEG[:2] + b"\xff" * 7 + JPEG[2:]),
        OddImage("jpeg_mpo", moving("MPO")),
        *(OddImage(f"jpeg_exif_{n}", turned[n], None, (HEIGHT, WIDTH) if n < 5 else (WIDTH, HEIGHT)) for n in turned),
        OddImage("jpeg_exif_big_endian", with_segment(JPEG, 0xE1, exif(6, ">")), None, (WIDTH, HEIGHT)),
        OddImage("jpeg_exif_9", with_segment(JPEG, 0xE1, exif(9))),
        OddImage("jpeg_exif_garbage", with_segment(JPEG, 0xE1, b"Exif\0\0II*\0" + b"\xff" * 40)),
        OddImage("jpeg_exif_cut", with_segment(JPEG, 0xE1, exif(6)[:-12])),
        OddImage("jpeg_magic_only", b"\xff\xd8\xff", "truncated"),
        OddImage("jpeg_cut_in_header", JPEG[:200], "truncated"),
        OddImage("jpeg_cut_before_scan", JPEG[: SCAN + 4], "truncated"),
        OddImage("jpeg_cut_in_half", JPEG[:MIDDLE], "truncated"),
        OddImage("jpeg_with_thumbnail", with_thumbnail(JPEG)),
        OddImage("jpeg_with_thumbnail_cut", with_thumbnail(JPEG)[:-900], "truncated"),
        OddImage("jpeg_progressive_cut", PROGRESSIVE[: len(PROGRESSIVE) * 2 // 3], "truncated"),
        OddImage("jpeg_no_end_marker", JPEG[:-2], "truncated"),
        OddImage("jpeg_cmyk_cut", encode(CMYK, "JPEG")[:-300], "truncated"),
        OddImage("jpeg_zeroed", overwritten(JPEG, MIDDLE, bytes(400)), "corrupt_data"),
        OddImage("jpeg_burst", overwritten(JPEG, MIDDLE, bytes(range(1, 129))), "corrupt_data"),
        OddImage("jpeg_bytes_dropped", JPEG[:MIDDLE] + JPEG[MIDDLE + 256 :], "corrupt_data"),
        OddImage("jpeg_cmyk_zeroed", overwritten(encode(CMYK, "JPEG"), 1800, bytes(500)), "corrupt_data"),
        OddImage("jpeg_no_frame", without(JPEG, 0xC0), "corrupt_data"),
        OddImage("jpeg_segment_length_0", overwritten(JPEG, 4, b"\0\0"), "corrupt_data"),
        OddImage("jpeg_endless_header", JPEG[:2] + b"\xff\xfe\0\x02" * 20_000 + JPEG[2:], "corrupt_data"),
        OddImage("jpeg_end_before_scan", JPEG[:SCAN] + b"\xff\xd9" + b"\0" * 9, "corrupt_data"),
        OddImage("jpeg_width_0", with_frame(JPEG, width=0), "corrupt_data"),
        OddImage("jpeg_larger_than_its_data", with_frame(JPEG, height=3000, width=3000), "corrupt_data"),
        OddImage("jpeg_4_gigapixels", with_frame(JPEG, height=65_500, width=65_500), "too_many_pixels"),
        OddImage("jpeg_12_bit", with_frame(JPEG, precision=12), "unsupported"),
        OddImage("jpeg_height_later", with_frame(JPEG, height=0), "unsupported"),
        OddImage("jpeg_two_components", two_components(JPEG), "unsupported"),
    ]


def _pngs() -> list[OddImage]:
    wrong = chunk(b"IDAT", PNG[IDAT:-16], checksum=1)
    broken_stream = chunk(b"IDAT", overwritten(PNG[IDAT:-16], 300, b"\xff" * 60))
    bit_rows = (b"\0" + bytes(10_000 // 8)) * 10_000
    return [
        OddImage("png", PNG),
        OddImage("png_rgba", encode(RGBA, "PNG")),
        OddImage("png_grey_alpha", encode(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG")),
        OddImage("png_palette_alpha", encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 16)))),
        OddImage("png_transparent_colour", encode(RGB, "PNG", transparency=tuple(int(v) for v in RGB[3, 4]))),
        OddImage("png_1_bit", encode(Image.fromarray(GREY).convert("1"), "PNG")),
        OddImage("png_16_bit_grey", encode(GREY_16, "PNG"), warnings=("16bit_scaled",)),
        OddImage("png_16_bit_rgb", png(2, 1, 16, 2, b"\0" + bytes(range(12))), size_HW=(1, 2)),
        OddImage("png_exif_6", encode(RGB, "PNG", exif=exif(6)), size_HW=(WIDTH, HEIGHT)),
        OddImage("png_animated", moving("PNG"), warnings=("animated",)),
        OddImage("png_one_pixel", encode(RGB[:1, :1], "PNG"), size_HW=(1, 1)),
        OddImage("png_cut", PNG[: len(PNG) // 2], "truncated"),
        OddImage("png_no_end", PNG[:-12], "truncated"),
        OddImage("png_signature_only", PNG[:8], "truncated"),
        OddImage("png_flipped_bit", overwritten(PNG, IDAT + 500, bytes([PNG[IDAT + 500] ^ 4])), "corrupt_data"),
        OddImage("png_wrong_checksum", PNG[: IDAT - 8] + wrong + PNG[-12:], "corrupt_data"),
        OddImage("png_broken_stream", PNG[: IDAT - 8] + broken_stream + PNG[-12:], "corrupt_data"),
        OddImage("png_width_0", png(0, 9, 8, 0, b""), "corrupt_data"),
        OddImage("png_100_megapixels", png(10_000, 10_000, 1, 0, bit_rows), "too_many_pixels"),
        OddImage("png_text_bomb", png(1, 1, 8, 0, b"\0\0", _text_bomb()), None, (1, 1)),
        OddImage("png_tall_line", png(1, 300_000, 8, 0, b"\0\x80" * 300_000), "aspect_ratio", stage="preprocess"),
        OddImage("png_wide_line", png(300_000, 1, 8, 0, b"\0" + bytes(300_000)), "aspect_ratio", stage="preprocess"),
    ]


def _text_bomb() -> bytes:
    return chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(8 << 20), 9))


def _gifs_and_bmps() -> list[OddImage]:
    clear = encode(PALETTE, "GIF", transparency=3)
    return [
        OddImage("gif", GIF),
        OddImage("gif_transparent", clear),
        OddImage("gif_animated", moving("GIF"), warnings=("animated",)),
        OddImage("gif_second_frame_damaged", moving("GIF")[:-900], warnings=("animated",)),
        OddImage("gif_cut", GIF[: len(GIF) // 2], "truncated"),
        OddImage("gif_header_only", GIF[:13], "truncated"),
        OddImage("gif_4_gigapixels", overwritten(GIF, 6, b"\xff\xff\xff\xff"), "too_many_pixels"),
        OddImage("bmp", BMP),
        OddImage("bmp_cut", BMP[: len(BMP) // 2], "truncated"),
        OddImage("bmp_unknown_compression", overwritten(BMP, 30, b"\x09"), "unsupported"),
        OddImage("bmp_gigapixels", overwritten(BMP, 18, struct.pack("<ii", 40_000, 40_000)), "too_many_pixels"),
        OddImage("bmp_only_by_two_letters", b"BMW and other makers of motor cars, a list", "not_an_image"),
    ]


def _tiffs() -> list[OddImage]:
    floats = encode(Image.fromarray(GREY.astype(np.float32)), "TIFF")
    return [
        OddImage("tiff", TIFF),
        OddImage("tiff_lzw", TIFF_LZW),
        OddImage("tiff_16_bit_grey", encode(GREY_16, "TIFF"), warnings=("16bit_scaled",)),
        OddImage("tiff_exif_6", encode(RGB, "TIFF", tiffinfo={274: 6}), size_HW=(WIDTH, HEIGHT)),
        OddImage("tiff_pages", moving("TIFF"), warnings=("animated",)),
        OddImage("tiff_float", floats, "unsupported"),
        OddImage("tiff_32_bit", encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "unsupported"),
        OddImage("tiff_cut", TIFF_LZW[: len(TIFF_LZW) // 2], "truncated"),
        OddImage("tiff_header_only", TIFF[:8], "truncated"),
    ]


def _webps_and_avifs() -> list[OddImage]:
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (11_999).to_bytes(3, "little") * 2
    return [
        OddImage("webp", WEBP),
        OddImage("webp_alpha", encode(RGBA, "WEBP", lossless=True)),
        OddImage("webp_animated", moving("WEBP"), warnings=("animated",)),
        OddImage("webp_exif_8", encode(RGB, "WEBP", exif=exif(8)), size_HW=(WIDTH, HEIGHT)),
        OddImage("webp_cut", WEBP[: len(WEBP) // 2], "truncated"),
        OddImage("webp_header_only", WEBP[:16], "truncated"),
        OddImage("webp_damaged", overwritten(WEBP, 60, b"\xff" * 60), "corrupt_data"),
        OddImage("webp_144_megapixels", b"RIFF" + struct.pack("<I", 22) + b"WEBP" + canvas, "too_many_pixels"),
        OddImage("avif", AVIF),
        OddImage("avif_cut", AVIF[:-200], "truncated"),
        OddImage("avif_damaged", AVIF[:100] + bytes(len(AVIF) - 100), "corrupt_data"),
    ]


def _no_images() -> list[OddImage]:
    return [
        OddImage("nothing", b"", "empty"),
        OddImage("one_byte", b"\xff", "not_an_image"),
        OddImage("html", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
        OddImage("text", b"Access denied", "not_an_image"),
        OddImage("json", b'{"error": "quota exceeded"}', "not_an_image"),
        OddImage("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_an_image"),
        OddImage("pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not_an_image"),
        OddImage("zip", b"PK\x03\x04" + bytes(40), "not_an_image"),
        OddImage("zeros", bytes(4096), "not_an_image"),
        OddImage("noise", bytes((i * 167 + 13) % 251 for i in range(4096)), "not_an_image"),
        OddImage("mp4", box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41"), "not_an_image"),
        OddImage("heic", box(b"ftyp", b"heic\0\0\0\0mif1heic") + bytes(99), "unsupported"),
        OddImage("jpeg_xl", b"\xff\x0a" + bytes(99), "unsupported"),
        OddImage("jpeg_2000", b"\0\0\0\x0cjP  \r\n\x87\n", "unsupported"),
        OddImage("photoshop", b"8BPS\0\1" + bytes(99), "unsupported"),
        OddImage("icon", b"\0\0\1\0\1\0" + bytes(99), "unsupported"),
        OddImage("netpbm", b"P6\n2 1\n255\n" + bytes(6), "unsupported"),
    ]


BAD_IMAGES: tuple[OddImage, ...] = (
    *_no_images(),
    *_jpegs(),
    *_pngs(),
    *_gifs_and_bmps(),
    *_tiffs(),
    *_webps_and_avifs(),
)
