"""Check that odd images have the expected outcome, that nothing raises, and that bad images cost no memory."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from img2parquet.images.decode import DecodePolicy, decode, describe
from img2parquet.schema import Pixels, Reason, Rejection
from tests.harness.golden.crop_sources import picture as golden_picture
from tests.support.bad_images import (
    ALPHA,
    AVIF,
    BAD_IMAGES,
    BMP,
    CMYK,
    GIF,
    GREY,
    GREY_16,
    JPEG,
    PALETTE,
    PNG,
    PROGRESSIVE,
    RGB,
    RGBA,
    TIFF,
    TIFF_LZW,
    WEBP,
    OddImage,
    encode,
    exif,
    grey_rows,
    moving,
    png,
    with_frame,
    with_segment,
    without,
)

BY_NAME = {odd.name: odd for odd in BAD_IMAGES}
REASONS = set(Reason.__args__)  # type: ignore[attr-defined]


def pixels(data: bytes, **policy: object) -> np.ndarray:
    result = decode(data, DecodePolicy(**policy))  # type: ignore[arg-type]
    assert isinstance(result, Pixels), result
    return result.rgb_HWC


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# --- the corpus ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", BAD_IMAGES, ids=lambda odd: odd.name)
def test_each_odd_image_has_its_outcome(odd: OddImage) -> None:
    result = decode(odd.data)
    if odd.stage == "decode" and odd.reason:
        assert isinstance(result, Rejection), f"accepted: {result}"
        assert result.reason == odd.reason, result
        assert result.message
        assert len(result.message) < 400
    elif odd.stage == "decode":
        assert isinstance(result, Pixels), result
        assert (result.height, result.width, result.warnings) == (*odd.size_HW, odd.warnings)
        assert str(result.rgb_HWC.dtype) == "uint8"
        assert result.rgb_HWC.shape[2:] == (3,)
        assert result.rgb_HWC.flags["C_CONTIGUOUS"]
    else:
        assert isinstance(result, Pixels), result


def test_the_corpus_is_large_and_names_are_unique() -> None:
    assert len(BY_NAME) == len(BAD_IMAGES) >= 40
    ours = {"empty", "not_an_image", "truncated", "corrupt_data", "too_many_pixels", "aspect_ratio", "unsupported"}
    assert {odd.reason for odd in BAD_IMAGES} == ours | {None}


def test_a_memoryview_decodes_like_bytes() -> None:
    inside = memoryview(b"left" + JPEG + b"right")[4:-5]
    assert np.array_equal(pixels(JPEG), decode(inside).rgb_HWC)  # type: ignore[union-attr]


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE, BY_NAME["jpeg_grey"].data, BY_NAME["jpeg_cmyk"].data])
def test_jpeg_pixels_equal_pillows(data: bytes) -> None:
    assert np.array_equal(pixels(data), by_pillow(data))


def test_jpeg_odd_sizes_and_subsamplings_equal_pillows() -> None:
    for height, width in [(1, 1), (7, 3), (17, 33), (101, 57)]:
        for subsampling in (0, 1, 2):
            data = encode(np.resize(RGB, (height, width, 3)), "JPEG", subsampling=subsampling)
            assert np.array_equal(pixels(data), by_pillow(data)), (height, width, subsampling)


@pytest.mark.parametrize("data", [PNG, BMP, TIFF, TIFF_LZW, WEBP], ids=["png", "bmp", "tiff", "lzw", "webp"])
def test_lossless_formats_give_back_the_picture(data: bytes) -> None:
    assert np.array_equal(pixels(data), RGB)


@pytest.mark.parametrize("data", [GIF, AVIF], ids=["gif", "avif"])
def test_lossy_formats_equal_pillows(data: bytes) -> None:
    assert np.array_equal(pixels(data), by_pillow(data))


def test_a_large_image_is_converted_in_strips() -> None:
    rgba = np.resize(RGBA, (1500, 900, 4))
    white = Image.new("RGBA", (900, 1500), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))
    assert np.array_equal(pixels(encode(rgba, "PNG", compress_level=1)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_the_image_upright_unless_ignored(orientation: int, kind: str) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    tag = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    data = encode(RGB, kind, **lossless, **tag)
    plain = encode(RGB, kind, **lossless)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(pixels(data), upright)
    assert np.array_equal(pixels(data, exif="ignore"), pixels(plain))


def test_the_first_valid_orientation_of_either_byte_order_counts() -> None:
    turned = np.rot90(pixels(JPEG), k=-1)
    assert np.array_equal(pixels(BY_NAME["jpeg_exif_big_endian"].data), turned)
    for name in ("jpeg_exif_9", "jpeg_exif_garbage", "jpeg_exif_cut"):
        assert np.array_equal(pixels(BY_NAME[name].data), pixels(JPEG)), name


def over_white(colour_HWC: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    alpha = alpha_HW[:, :, None] / 255
    return np.rint(colour_HWC * alpha + 255 * (1 - alpha))


@pytest.mark.parametrize("kind", ["png_rgba", "webp_alpha"])
def test_alpha_is_composited_on_white_or_dropped(kind: str) -> None:
    data = BY_NAME[kind].data
    assert np.abs(pixels(data) - over_white(RGB, ALPHA)).max() <= 1
    visible = ALPHA > 0  # WebP keeps no colour where nothing is seen
    assert np.array_equal(pixels(data, alpha="drop")[visible], RGB[visible])


def test_grey_alpha_palette_alpha_and_a_transparent_colour() -> None:
    grey = BY_NAME["png_grey_alpha"].data
    assert np.abs(pixels(grey)[:, :, 1] - over_white(GREY[:, :, None], ALPHA)[:, :, 0]).max() <= 1
    assert np.array_equal(pixels(grey, alpha="drop")[:, :, 2], GREY)

    palette = BY_NAME["png_palette_alpha"].data
    index_HW, colours = np.asarray(PALETTE), np.asarray(PALETTE.convert("RGB"))
    assert np.abs(pixels(palette) - over_white(colours, index_HW * 16.0)).max() <= 1
    assert np.array_equal(pixels(palette, alpha="drop"), colours)

    colour = BY_NAME["png_transparent_colour"].data
    hidden = (RGB[3, 4] == RGB).all(axis=2)
    assert hidden.any()
    assert np.array_equal(pixels(colour), np.where(hidden[:, :, None], 255, RGB))
    assert np.array_equal(pixels(colour, alpha="drop"), RGB)

    gif = BY_NAME["gif_transparent"].data
    assert (pixels(gif)[index_HW == 3] == 255).all()


ALPHAS = ["png_rgba", "webp_alpha", "png_grey_alpha", "png_palette_alpha", "png_transparent_colour", "gif_transparent"]


@pytest.mark.parametrize("name", ALPHAS)
def test_transparency_is_kept_beside_rgb_when_asked_for(name: str) -> None:
    data = BY_NAME[name].data
    both, plain = decode(data, with_alpha=True), decode(data)
    assert isinstance(both, Pixels) and both.rgba_HWC is not None and isinstance(plain, Pixels)
    assert np.array_equal(both.rgb_HWC, plain.rgb_HWC) and plain.rgba_HWC is None
    assert np.array_equal(both.rgba_HWC, np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))


def test_an_image_without_transparency_keeps_none() -> None:
    for odd in BAD_IMAGES:
        result = decode(odd.data, with_alpha=True)
        if isinstance(result, Pixels) and result.rgba_HWC is not None:
            assert odd.name in ALPHAS or result.rgba_HWC.shape == (*result.rgb_HWC.shape[:2], 4), odd.name
    for data in (JPEG, PNG, BMP, TIFF, WEBP, GIF):
        assert decode(data, with_alpha=True).rgba_HWC is None  # type: ignore[union-attr]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_transparency_is_turned_with_its_image(orientation: int) -> None:
    data = encode(RGBA, "PNG", exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data, with_alpha=True).rgba_HWC, upright)  # type: ignore[union-attr, arg-type]


def test_a_transparent_grey_of_16_bits_is_kept() -> None:
    sink = io.BytesIO()
    Image.fromarray(GREY_16).save(sink, "PNG", transparency=int(GREY_16[3, 4]))
    result = decode(sink.getvalue(), with_alpha=True)
    assert isinstance(result, Pixels) and result.rgba_HWC is not None
    assert np.array_equal(result.rgba_HWC[..., 3] == 0, GREY_16[3, 4] == GREY_16)
    assert np.array_equal(result.rgba_HWC[..., 1], GREY_16 >> 8)


@pytest.mark.parametrize(("depth", "colour"), [(1, 1), (2, 2), (4, 9)])
def test_a_transparent_grey_below_8_bits_is_found(depth: int, colour: int) -> None:
    rows = b"\0" + bytes([0b10_01_11_00 if depth == 2 else 0b1001_0110])
    hidden = {1: [0, 3, 5, 6], 2: [0], 4: [0]}[depth]
    transparency = b"\0\0\0\2tRNS" + colour.to_bytes(2, "big")
    crc = zlib.crc32(transparency[4:]).to_bytes(4, "big")
    opaque = png(8 // depth, 1, depth, 0, rows)
    data = png(8 // depth, 1, depth, 0, rows, transparency + crc)
    expected = pixels(opaque).copy()
    expected[0, hidden] = 255
    assert not np.array_equal(expected, pixels(opaque)) or depth == 1
    assert np.array_equal(pixels(data), expected)
    assert np.array_equal(pixels(data, alpha="drop"), pixels(opaque))


@pytest.mark.parametrize("name", ["png_16_bit_grey", "tiff_16_bit_grey"])
def test_16_bit_grey_keeps_its_upper_byte(name: str) -> None:
    assert np.array_equal(pixels(BY_NAME[name].data), np.repeat((GREY_16 >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_a_transparent_16_bit_grey_is_white() -> None:
    transparency = b"tRNS" + int(GREY_16[3, 4]).to_bytes(2, "big")
    extra = b"\0\0\0\2" + transparency + zlib.crc32(transparency).to_bytes(4, "big")
    data = png(96, 64, 16, 0, grey_rows(GREY_16), extra)
    hidden = GREY_16[3, 4] == GREY_16
    assert np.array_equal(pixels(data)[:, :, 0], np.where(hidden, 255, GREY_16 >> 8))
    assert np.array_equal(pixels(data, alpha="drop")[:, :, 0], GREY_16 >> 8)


def test_big_endian_16_bit_tiff() -> None:
    data = encode(Image.frombytes("I;16B", (96, 64), GREY_16.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(pixels(data)[:, :, 0], GREY_16 >> 8)


def test_16_bit_colour_keeps_its_upper_bytes() -> None:
    assert pixels(BY_NAME["png_16_bit_rgb"].data).tolist() == [[[0, 2, 4], [6, 8, 10]]]


def test_cmyk_is_converted_as_pillow_does_it() -> None:
    ycck = BY_NAME["jpeg_ycck"].data
    assert np.array_equal(pixels(ycck), by_pillow(ycck))
    assert np.abs(pixels(ycck).astype(int) - np.asarray(CMYK.convert("RGB"))).mean() < 6


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    data = moving(kind)
    result = decode(data)
    assert isinstance(result, Pixels)
    assert result.warnings == ("animated",)
    assert np.array_equal(result.rgb_HWC, by_pillow(data))
    assert np.abs(result.rgb_HWC.astype(int) - RGB).mean() < 8


# --- policy ----------------------------------------------------------------------------------------------------------


def test_max_pixels_is_the_jobs_and_not_pillows() -> None:
    for data in (JPEG, PNG, GIF, BMP, TIFF, WEBP, AVIF):
        assert isinstance(decode(data, DecodePolicy(max_pixels=96 * 64)), Pixels)
        refused = decode(data, DecodePolicy(max_pixels=96 * 64 - 1))
        assert isinstance(refused, Rejection)
        assert refused.reason == "too_many_pixels"
        assert "max_pixels = 6143" in refused.message


def test_a_limit_above_pillows_own_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow would raise above 2000
    for data in (JPEG, PNG, BMP, AVIF, BY_NAME["jpeg_cmyk"].data):
        assert isinstance(decode(data), Pixels)


@pytest.mark.parametrize("name", ["jpeg_cut_in_half", "jpeg_no_end_marker", "jpeg_zeroed", "jpeg_cmyk_cut"])
def test_salvage_accepts_a_damaged_jpeg_with_a_warning(name: str) -> None:
    result = decode(BY_NAME[name].data, DecodePolicy(salvage=True))
    if name == "jpeg_cmyk_cut":  # goes through Pillow, which has no such mode for one image
        assert isinstance(result, Rejection)
        assert result.reason == "truncated"
        return
    assert isinstance(result, Pixels), result
    assert result.warnings == ("salvaged",)
    assert np.array_equal(result.rgb_HWC[:8, :16], pixels(JPEG)[:8, :16])


def test_salvage_changes_nothing_for_a_sound_image() -> None:
    assert decode(JPEG, DecodePolicy(salvage=True)).warnings == ()  # type: ignore[union-attr]


def test_describe_tells_policies_apart_and_is_json() -> None:
    import json

    plain = DecodePolicy()
    assert json.loads(json.dumps(describe(plain))) == describe(plain)
    for other in (replace(plain, exif="ignore"), replace(plain, alpha="drop"), replace(plain, salvage=True)):
        assert describe(other) != describe(plain)


def test_no_process_wide_setting_is_touched() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    for odd in BAD_IMAGES:
        decode(odd.data, DecodePolicy(salvage=True, alpha="drop"))
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, 89_478_485)


# --- nothing raises --------------------------------------------------------------------------------------------------

SOUND = [odd.data for odd in BAD_IMAGES if odd.reason is None and odd.name != "jpeg_endless_header"]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage an image one to three times: change a byte, zero, drop, double or randomise a stretch, or cut the end."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(changed) or 1), rng.randint(1, 64)
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + length] = bytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at : at + length] = rng.randbytes(length)
            case 5:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_images_never_raise() -> None:
    rng, seen = random.Random(20_261_120), dict[str, int]()
    limited = DecodePolicy(max_pixels=4_000_000)
    for _ in range(4000):
        data = mutated(rng.choice(SOUND), rng)
        result = decode(data, replace(limited, salvage=rng.random() < 0.3, alpha=rng.choice(["white", "drop"])))
        outcome = result.reason if isinstance(result, Rejection) else "accepted"
        assert outcome in REASONS | {"accepted"}
        seen[outcome] = seen.get(outcome, 0) + 1
    assert {"accepted", "truncated", "corrupt_data", "not_an_image"} <= set(seen), seen


MAGIC = [b"\xff\xd8\xff", PNG[:8], PNG[:41], GIF[:13], BMP[:54], TIFF[:8], b"MM\0*", WEBP[:30], AVIF[:40], JPEG[:180]]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"", *MAGIC]), st.binary(max_size=300))
def test_raw_bytes_never_raise(start: bytes, rest: bytes) -> None:
    assert isinstance(decode(start + rest, DecodePolicy(max_pixels=1_000_000)), Rejection | Pixels)


def test_threads_decode_alike() -> None:
    expected = [decode(data) for data in SOUND]
    failures: list[str] = []

    def work() -> None:
        for data, want in zip(SOUND, expected, strict=True):
            got = decode(data)
            if not np.array_equal(got.rgb_HWC, want.rgb_HWC):  # type: ignore[union-attr]
                failures.append(repr(data[:20]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- damage is found -------------------------------------------------------------------------------------------------


def test_every_cut_of_a_jpeg_and_a_png_is_truncated() -> None:
    for data in (JPEG, PROGRESSIVE, PNG):
        for end in range(16, len(data) - 1, 37):
            result = decode(data[:end])
            assert isinstance(result, Rejection), end
            assert result.reason == "truncated", (end, result)


def test_a_cut_is_found_behind_an_empty_box() -> None:
    first = int.from_bytes(AVIF[:4], "big")
    data = AVIF[:first] + b"\0\0\0\x08free" + AVIF[first:]
    message = f"AVIF: says that it has {len(data)} bytes, there are {len(data) - 200}"
    assert decode(data[:-200]) == Rejection("truncated", message)


def test_a_jpeg_without_a_frame_says_so() -> None:
    result = decode(without(JPEG, 0xC0))
    assert result == Rejection("corrupt_data", "JPEG: no frame header before the first scan")


def test_most_bursts_in_a_jpeg_and_every_changed_bit_of_a_png_are_found() -> None:
    rng, data = random.Random(5), encode(golden_picture("landscape"), "JPEG", quality=90)
    bursts = [
        isinstance(decode(data[:at] + rng.randbytes(64) + data[at + 64 :]), Rejection)
        for at in range(len(data) // 10, len(data) - 80, 401)
    ]
    assert sum(bursts) / len(bursts) > 0.9, (sum(bursts), len(bursts))  # Pillow finds a fifth
    for at in range(8, len(PNG), 41):
        assert isinstance(decode(PNG[:at] + bytes([PNG[at] ^ 1]) + PNG[at + 1 :]), Rejection), at


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from img2parquet.images.decode import decode, DecodePolicy
from img2parquet.schema import Rejection
decode(Path(sys.argv[1]).read_bytes())  # a good image, so that libraries are loaded
files = [Path(name).read_bytes() for name in sys.argv[2:]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
space = 400 << 20
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + space, used + space))
for data in files:
    decode(data)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    bombs = [odd.data for odd in BAD_IMAGES if odd.reason == "too_many_pixels"]
    bombs += [BY_NAME["png_text_bomb"].data, BY_NAME["jpeg_endless_header"].data]
    bombs += [encode(RGB, "TIFF").replace(b"\x60\0\0\0", b"\xff\xff\xff\x0f", 1)]  # its width
    names = [tmp_path / str(i) for i in range(len(bombs) + 1)]
    for name, data in zip(names, [JPEG, *bombs], strict=True):
        name.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, names)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24, f"{done.stdout} MiB"


def test_a_frame_larger_than_its_data_is_refused_within_its_own_size() -> None:
    refused = decode(with_frame(JPEG, height=2000, width=2000))
    assert isinstance(refused, Rejection)
    assert refused.reason == "corrupt_data"


def test_an_exif_block_of_many_entries_is_walked_quickly() -> None:
    body = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x01\x00\x03\x00\x01\0\0\0\0\0\0\0" * 5000
    assert isinstance(decode(with_segment(JPEG, 0xE1, body)), Pixels)
