"""What the image fuzzer mutates: the good and odd images that tests know, and more of each format's own ways."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image

from tests.harness.golden.crop_sources import picture as golden
from tests.support.bad_images import BAD_IMAGES, encode, exif, picture

MOST_BYTES = 200_000  # of one: what is large makes the fuzzer slow and no parser any wiser


@cache
def images() -> tuple[bytes, ...]:
    """Deterministic but for what an encoder's version changes."""
    small, tall = golden("small"), picture(260, 190)
    made = [
        *(image.data for image in BAD_IMAGES),
        *_jpegs(small),
        *_jpegs(tall),
        *_pngs(tall),
        *_tiffs(small),
        *(encode(small, "WEBP", quality=70, method=0), encode(np.dstack([small, small[:, :, 0]]), "WEBP", quality=60)),
        *(encode(golden("grey"), "GIF"), encode(Image.fromarray(small).quantize(200), "GIF", interlace=1)),
        *(encode(Image.fromarray(small).convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(encode(small, "AVIF", quality=40, speed=10), encode(np.dstack([small, small[:, :, 0]]), "AVIF", speed=10)),
    ]
    return tuple(data for data in made if len(data) <= MOST_BYTES)


def _jpegs(rgb: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
    grey = Image.fromarray(rgb).convert("L")
    return [
        *(encode(rgb, "JPEG", quality=80, subsampling=s) for s in (0, 1, 2)),
        encode(rgb, "JPEG", quality=60, progressive=True, exif=exif(6)),
        encode(grey, "JPEG", progressive=True),
        encode(rgb, "JPEG", restart_marker_rows=1, exif=exif(3)),
        simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=85, colorsubsampling="440"),
        simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=85, colorsubsampling="411"),
        encode(Image.fromarray(rgb).convert("CMYK"), "JPEG"),
    ]


def _pngs(rgb: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
    picture_ = Image.fromarray(rgb)
    modes = [picture_.convert(mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "I;16")]
    return [
        *(encode(image, "PNG") for image in modes),
        *(encode(picture_.quantize(2**bits), "PNG", bits=bits) for bits in (1, 2, 4, 8)),
        encode(rgb, "PNG", icc_profile=bytes(2000), exif=exif(8)),
    ]


def _tiffs(rgb: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
    picture_ = Image.fromarray(rgb)
    ways = ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate", "lzma", "zstd", "webp")
    bilevel = picture_.convert("1")
    return [
        *(data for way in ways if (data := _tiff(picture_, way))),
        *(data for way in ("group3", "group4", "tiff_ccitt") if (data := _tiff(bilevel, way))),
        encode(picture_.convert("CMYK"), "TIFF"),
        encode(picture_.convert("YCbCr"), "TIFF"),
        encode(picture_.convert("LAB"), "TIFF"),
        encode(rgb, "TIFF", big_tiff=True),
    ]


def _tiff(image: Image.Image, compression: str) -> bytes:
    """Empty where this build of libtiff cannot."""
    sink = io.BytesIO()
    try:
        image.save(sink, "TIFF", compression=compression)
    except (OSError, RuntimeError):
        return b""
    return sink.getvalue()
