"""Test `preprocess: fast`: which JPEGs are decoded smaller, and how far pixels may differ from exact decoding."""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import img2parquet
from img2parquet.batch import Batch, Prepared, Work
from img2parquet.dataset import plan
from img2parquet.errors import RunMismatch
from img2parquet.images import jpeg_scaling
from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.images.headers import read_jpeg_header
from img2parquet.images.jpeg_scaling import shrink_for
from img2parquet.images.preprocess import Preprocessor, PreprocessSettings, read_settings, resized_size
from img2parquet.inference.steps import Preparer
from img2parquet.job import json_schema, parse_job
from img2parquet.models import ModelSpec, read_card
from img2parquet.results.reader import open_results
from img2parquet.schema import Pixels, Rejection, Row
from infra.bench import drift
from infra.bench.jpegs import ImageSet, generate
from tests.images.test_decode import mutated
from tests.support.bad_images import BAD_IMAGES, RGB, encode, exif, with_segment
from tests.support.small_job import add_member, job_dict

LEVIT, BEIT = read_settings(None, "LevitImageProcessor"), read_settings(None, "BeitImageProcessor")
ALWAYS_HALF = lambda source_HW: 2  # noqa: E731


def fast(data: bytes, *resizes: PreprocessSettings, **policy: Any) -> Pixels:
    result = decode(data, DecodePolicy(**policy), partial(shrink_for, resizes or (LEVIT,)))
    assert isinstance(result, Pixels), result
    return result


def exact(data: bytes) -> Pixels:
    result = decode(data)
    assert isinstance(result, Pixels), result
    return result


def crop(pixels: Pixels, settings: PreprocessSettings = LEVIT) -> np.ndarray:
    result = Preprocessor(settings)(pixels)
    assert not isinstance(result, Rejection), result
    return result


def photo(width: int, height: int, seed: int = 0) -> bytes:
    return generate(ImageSet("test", 1, (width, height), 0.0, 7.0, (90, 90)), 1, seed)[0]


def smooth(width: int, height: int, **options: Any) -> bytes:
    """Make a JPEG quickly, for tests of sizes."""
    y, x = np.mgrid[:height, :width]
    return encode(np.stack([x % 251, y % 241, (x + y) % 256], axis=2).astype(np.uint8), "JPEG", **options)


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source_HW", "resizes", "by"),
    [
        ((375, 420), [LEVIT], 1),
        ((1023, 5000), [LEVIT], 1),
        ((1024, 1024), [LEVIT], 2),
        ((1200, 1600), [LEVIT], 2),
        ((2047, 2047), [LEVIT], 2),
        ((2048, 4000), [LEVIT], 4),
        ((3024, 4032), [LEVIT], 4),
        ((9000, 9000), [LEVIT], 4),
        ((896, 896), [BEIT], 2),
        ((895, 4000), [BEIT], 1),
        ((4000, 895), [BEIT], 1),
        ((2048, 2048), [LEVIT, BEIT], 4),
        ((2048, 2048), [LEVIT, replace(BEIT, resize_height=384, resize_width=384)], 2),
        ((2048, 2048), [LEVIT, replace(BEIT, resize_height=640)], 1),
        ((2048, 2048), [LEVIT, replace(BEIT, resample="nearest")], 1),
        ((2048, 2048), [replace(LEVIT, resize="none")], 1),
    ],
)
def test_every_resize_of_the_job_is_left_twice_its_size(source_HW: Any, resizes: Any, by: int) -> None:
    assert shrink_for(resizes, source_HW) == by


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 700), st.sampled_from(["shortest_edge", "exact"]))
def test_the_most_that_leaves_twice_the_size_is_taken(height: int, width: int, edge: int, resize: Any) -> None:
    settings = PreprocessSettings(resize, edge, edge, "bicubic", None, None)
    by, size_HW = shrink_for([settings], (height, width)), resized_size((height, width), settings)
    left = min(side / size for side, size in zip((height, width), size_HW, strict=True))
    assert by in (1, 2, 4)
    assert by == 1 or left / by >= 2
    assert by == 4 or left / (2 * by) < 2


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [2, 4])
def test_powers_of_two_and_nothing_between(by: int) -> None:
    """Given only a minimum size, simplejpeg would choose factors such as 3/8."""
    rng = random.Random(3)
    for _ in range(40):
        width, height = rng.randint(16, 300), rng.randint(16, 300)
        small = decode(smooth(width, height, subsampling=rng.randint(0, 2)), shrink=lambda _: by)
        assert isinstance(small, Pixels)
        assert small.rgb_HWC.shape == (-(-height // by), -(-width // by), 3)
        assert (small.height, small.width, small.shrunk) == (height, width, by)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_turned_jpeg_is_judged_and_turned_upright(orientation: int) -> None:
    data = smooth(4000, 900)
    tagged = with_segment(data, 0xE1, exif(orientation))
    small = fast(tagged, replace(BEIT, resize_height=1000, resize_width=200))  # spares half of the upright one only
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(tagged)))
    assert (small.width, small.height) == upright.size
    assert small.shrunk == (2 if orientation >= 5 else 1)
    stored = fast(data, replace(BEIT, resize_height=200, resize_width=1000)).rgb_HWC
    with_tag = Image.fromarray(stored if small.shrunk == 2 else exact(data).rgb_HWC)
    with_tag.getexif()[274] = orientation
    assert np.array_equal(small.rgb_HWC, np.asarray(ImageOps.exif_transpose(with_tag)))
    ignored = fast(tagged, replace(BEIT, resize_height=200, resize_width=1000), exif="ignore")
    assert np.array_equal(ignored.rgb_HWC, stored)


def test_a_mirrored_jpeg_is_shrunk_only_where_no_column_is_left_over() -> None:
    for width, by in ((2048, 4), (2050, 2), (2051, 1)):
        assert fast(with_segment(smooth(width, 2048), 0xE1, exif(3))).shrunk == by
        assert fast(smooth(width, 2048)).shrunk == 4


def lossless_jpeg(rgb_HWC: np.ndarray) -> bytes:
    """Encode by process 14 of the standard, predictor 1 (the left neighbour), one table of 15 categories of 4 bits."""
    height, width, _ = rgb_HWC.shape
    sides = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    frame = b"\xff\xc3\0\x11\x08" + sides + b"\x03R\x11\0G\x11\0B\x11\0"
    table = b"\xff\xc4\0\x22\0" + bytes([0, 0, 0, 15, *[0] * 12]) + bytes(range(15))
    scan = b"\xff\xda\0\x0c\x03R\0G\0B\0\x01\0\0"
    predicted = np.full(rgb_HWC.shape, 128)
    predicted[1:, 0], predicted[:, 1:] = rgb_HWC[:-1, 0], rgb_HWC[:, :-1]
    text = ""
    for difference in (rgb_HWC.astype(int) - predicted).reshape(-1).tolist():
        size = abs(difference).bit_length()
        value = difference if difference > 0 else difference + (1 << size) - 1
        text += f"{size:04b}" + (f"{value:0{size}b}" if size else "")
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + frame + table + scan + coded + b"\xff\xd9"


def test_what_holds_no_coefficients_of_rgb_or_grey_goes_the_exact_way() -> None:
    lossless = lossless_jpeg(RGB)
    assert read_jpeg_header(memoryview(lossless)).lossless
    assert np.array_equal(exact(lossless).rgb_HWC, RGB)
    others = [odd.data for odd in BAD_IMAGES if odd.reason is None and not odd.name.startswith("jpeg")]
    named = [odd.data for odd in BAD_IMAGES if odd.name in ("jpeg_cmyk", "jpeg_ycck")]
    assert len(others) > 20 and len(named) == 2
    for data in (lossless, *others, *named):
        whole = decode(data, shrink=ALWAYS_HALF)
        assert isinstance(whole, Pixels)
        assert whole.shrunk == 1
        assert np.array_equal(whole.rgb_HWC, exact(data).rgb_HWC)


@pytest.mark.parametrize("marker", sorted(set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}))
def test_no_kind_of_frame_is_decoded_into_too_small_a_buffer(marker: int) -> None:
    """simplejpeg scales the buffer of a lossless JPEG but libjpeg not its pixels, which would crash the process."""
    for data in (encode(RGB, "JPEG"), encode(RGB, "JPEG", progressive=True), lossless_jpeg(RGB)):
        start = min(data.find(bytes([0xFF, kind])) % len(data) for kind in (0xC0, 0xC2, 0xC3))
        changed = data[: start + 1] + bytes([marker]) + data[start + 2 :]
        whole, small = decode(changed), decode(changed, shrink=ALWAYS_HALF)
        assert isinstance(whole, Rejection) == isinstance(small, Rejection)
        assert isinstance(whole, Rejection) or marker in (0xC0, 0xC1, 0xC2, 0xC3)


def test_grey_and_progressive_jpegs_are_shrunk() -> None:
    for data in (encode(Image.fromarray(RGB).convert("L"), "JPEG"), encode(RGB, "JPEG", progressive=True)):
        small = decode(data, shrink=ALWAYS_HALF)
        assert isinstance(small, Pixels)
        assert small.rgb_HWC.shape == (RGB.shape[0] // 2, RGB.shape[1] // 2, 3)
        halved = np.asarray(Image.fromarray(exact(data).rgb_HWC).reduce(2)).astype(int)
        assert np.abs(small.rgb_HWC - halved).mean() < 4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", BAD_IMAGES, ids=lambda odd: odd.name)
def test_the_same_images_are_refused_for_the_same_reasons(odd: Any) -> None:
    whole, small = decode(odd.data), decode(odd.data, shrink=ALWAYS_HALF)
    assert isinstance(whole, Rejection) == isinstance(small, Rejection)
    if isinstance(whole, Rejection) and isinstance(small, Rejection):
        assert small.reason == whole.reason
    elif isinstance(whole, Pixels) and isinstance(small, Pixels):
        assert (small.height, small.width, small.warnings) == (whole.height, whole.width, whole.warnings)
        assert type(Preprocessor(LEVIT)(small)) is type(Preprocessor(LEVIT)(whole))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_is_found_as_in_exact_decoding() -> None:
    rng, seen = random.Random(11), {"refused": 0, "accepted": 0}
    sound = [odd.data for odd in BAD_IMAGES if odd.reason is None and odd.name.startswith("jpeg")]
    for _ in range(1500):
        data = mutated(rng.choice(sound), rng)
        limits = DecodePolicy(max_pixels=4_000_000, salvage=rng.random() < 0.3)
        whole, small = decode(data, limits), decode(data, limits, ALWAYS_HALF)
        assert isinstance(whole, Rejection) == isinstance(small, Rejection), (whole, small)
        if isinstance(whole, Pixels) and isinstance(small, Pixels):
            assert (whole.height, whole.width) == (small.height, small.width)
        seen["refused" if isinstance(small, Rejection) else "accepted"] += 1
    assert min(seen.values()) > 200, seen


def test_max_pixels_is_of_the_source() -> None:
    data = smooth(2048, 2048)
    refused = decode(data, DecodePolicy(max_pixels=2048 * 2048 - 1), partial(shrink_for, [LEVIT]))
    assert isinstance(refused, Rejection) and refused.reason == "too_many_pixels"
    assert fast(data, max_pixels=2048 * 2048).shrunk == 4


# --- drift -----------------------------------------------------------------------------------------------------------

DRIFT_SIZES = [(1600, 1200), (1601, 1203), (1203, 1601), (1025, 1027), (2051, 2053), (1334, 1025)]
MOST, MEAN, SHIFT = 12, 0.9, 0.1  # levels: of any value, on average, and of a channel's mean
# measured: 9, 0.72 and 0.05 where exactly twice is left, 4, 0.37 and 0.02 at 1600 x 1200


def within_bounds(drifted: np.ndarray, reference: np.ndarray) -> bool:
    difference = drifted.astype(float) - reference
    shift = np.abs(difference.mean(axis=(0, 1))).max()
    return bool(np.abs(difference).max() <= MOST and np.abs(difference).mean() <= MEAN and shift <= SHIFT)


@pytest.mark.parametrize("size", DRIFT_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("settings", [LEVIT, BEIT, replace(LEVIT, resample="lanczos")], ids=["levit", "beit", "pillow"])
def test_pixels_move_by_little_whatever_the_size(size: tuple[int, int], settings: PreprocessSettings) -> None:
    data = photo(*size, seed=sum(size))
    small = fast(data, settings)
    assert small.shrunk > 1
    assert within_bounds(crop(small, settings), crop(exact(data), settings))


def as_simplejpeg_scales(data: bytes) -> Pixels:
    """Decode 5/8 of 1003 rows without recording that the last row is only partly covered."""
    smaller = simplejpeg.decode_jpeg(data, "RGB", min_height=512, min_width=512)
    assert smaller.shape == (627, 814, 3)
    return Pixels(smaller, (), 1, (1003, 1301))


NOT_DONE = {
    "n_eighths": as_simplejpeg_scales,
    "fastdct": lambda data: Pixels(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)),
    "once_the_size": lambda data: decode(data, shrink=lambda size_HW: 4),
    "whole_pixels": lambda data: replace(fast(data), shrunk=1),  # as if the source filled the last row and column
}


@pytest.mark.parametrize("way", NOT_DONE)
def test_the_bounds_hold_off_what_is_not_done(way: str) -> None:
    data = photo(*{"whole_pixels": (1601, 1203), "n_eighths": (1301, 1003)}.get(way, (1600, 1200)))
    assert not within_bounds(crop(NOT_DONE[way](data)), crop(exact(data)))
    assert within_bounds(crop(fast(data)), crop(exact(data)))


def test_the_grid_of_a_shrunk_image_is_the_sources() -> None:
    """A ramp keeps its values everywhere, up to the right edge, where one column of a block of four is covered."""
    ramp = np.broadcast_to(np.linspace(20, 235, 2049)[None, :, None], (2048, 2049, 3))
    data = encode(np.rint(ramp).astype(np.uint8), "JPEG", quality=100, subsampling=0)
    small = fast(data, BEIT)
    assert small.shrunk == 4
    difference = crop(small, BEIT)[:, 2:-2].astype(float) - crop(exact(data), BEIT)[:, 2:-2]
    assert np.abs(difference).max() <= 1
    assert abs(difference[:, -20:].mean()) < 0.06  # without what the source covers: 0.35 at the right edge


# --- a worker's step -------------------------------------------------------------------------------------------------


def work(checkpoint: Path, mode: str, *sizes: int) -> Work:
    """Make the worker settings of models with these input sizes; short sides are resized to 8/7 of them."""
    document = job_dict("none.tar", checkpoint, "out", preprocess=mode)
    model = document["models"][0]
    document["models"] = [{**model, "name": f"m{size}"} for size in sizes]
    card = read_card(ModelSpec(str(checkpoint)))
    cards = {f"m{size}": replace(card, preprocess=read_settings(None, "LevitImageProcessor", size)) for size in sizes}
    job = parse_job(document)
    return Work(job, cards, "float32", "cpu", batch_size=8, threads=1)


def prepared(work: Work, *images: bytes) -> Prepared:
    rows = tuple(Row(index, str(index), "none.tar", image) for index, image in enumerate(images))
    return Preparer(work)(Batch(0, 0, rows, rows_in=len(rows)))


def crops_of(made: Prepared, side: int) -> np.ndarray:
    return next(crops.pixels_BHWC for crops in made.crops.values() if crops.pixels_BHWC.shape[1] == side)


def test_a_crop_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    images = [photo(600, 500), smooth(300, 310), photo(901, 700), b"", smooth(80, 70)]
    together = prepared(work(checkpoint, "fast", 64), *images)
    assert together.sizes_HW == ((500, 600), (310, 300), (700, 901), (70, 80))
    alone = [prepared(work(checkpoint, "fast", 64), image) for image in images if image]
    assert np.array_equal(crops_of(together, 64), np.concatenate([crops_of(one, 64) for one in alone]))
    assert [reject.key for reject in together.rejects] == ["3"]
    whole = crops_of(prepared(work(checkpoint, "exact", 64), *images), 64)
    same = [np.array_equal(a, b) for a, b in zip(crops_of(together, 64), whole, strict=True)]
    assert same == [False, False, False, True]


def test_models_that_share_a_decode_are_all_left_enough(checkpoint: Path) -> None:
    data = photo(640, 640)
    alone = crops_of(prepared(work(checkpoint, "fast", 64), data), 64)
    for larger in (176, 192, 208, 224):
        beside = prepared(work(checkpoint, "fast", 64, larger), data)
        whole = prepared(work(checkpoint, "exact", 64, larger), data)
        assert not np.array_equal(alone, crops_of(whole, 64))
        for side in (64, larger):
            assert np.array_equal(crops_of(beside, side), crops_of(whole, side))


def test_an_image_that_one_geometry_refuses_keeps_its_place(checkpoint: Path) -> None:
    """Its slot in the buffer of crops goes to the next image."""
    thin = encode(np.zeros((8000, 2, 3), np.uint8), "PNG")
    made = prepared(work(checkpoint, "exact", 64, 224), smooth(90, 90), thin, smooth(100, 80))
    kept = {crops.pixels_BHWC.shape: crops.kept for crops in made.crops.values()}
    assert kept == {(3, 64, 64, 3): (0, 1, 2), (2, 224, 224, 3): (0, 2)}
    alone = prepared(work(checkpoint, "exact", 224), smooth(100, 80))
    assert np.array_equal(crops_of(made, 224)[1], crops_of(alone, 224)[0])


# --- the job ---------------------------------------------------------------------------------------------------------


def identities(work: Work) -> dict[str, dict[str, Any]]:
    return plan.identities(work.job, work.cards, "float32")


def test_the_identity_names_every_resize_that_shares_the_decode(checkpoint: Path) -> None:
    alone, beside = identities(work(checkpoint, "fast", 64)), identities(work(checkpoint, "fast", 64, 224))
    assert alone["m64"]["preprocess"]["mode"] == "fast"
    assert alone["m64"]["preprocess"]["shrink"]["decoded_for"] == [["shortest_edge", 73, 73, "bicubic"]]
    assert len(beside["m64"]["preprocess"]["shrink"]["decoded_for"]) == 2
    assert alone["m64"] != beside["m64"]
    exactly = identities(work(checkpoint, "exact", 64))
    assert exactly == {"m64": identities(work(checkpoint, "exact", 64, 224))["m64"]}
    assert "shrink" not in exactly["m64"]["preprocess"]
    assert jpeg_scaling.describe([LEVIT, BEIT]) == jpeg_scaling.describe([BEIT, LEVIT, BEIT])


def test_the_schema_offers_every_mode() -> None:
    assert json_schema()["properties"]["preprocess"]["enum"] == ["exact", "fast", "pil"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photos") / "photos.tar"
    with tarfile.open(path, "w") as tar:
        for index, size in enumerate([(700, 521), (520, 521), (90, 120)]):
            add_member(tar, f"{index}.jpg", photo(*size))
    return str(path)


def job_of(photos: str, checkpoint: Path | str, output: Path, mode: str) -> dict[str, Any]:
    document = job_dict(photos, checkpoint, str(output), preprocess=mode)
    return {**document, "input": {"kind": "webdataset", "uris": [photos]}}


@pytest.mark.parametrize(("first", "second"), [("exact", "fast"), ("fast", "exact")])
def test_a_run_is_not_resumed_in_the_other_mode(
    photos: str, checkpoint: Path, tmp_path: Path, first: str, second: str
) -> None:
    img2parquet.run(parse_job(job_of(photos, checkpoint, tmp_path, first)), "local")
    with pytest.raises(RunMismatch, match=f'preprocess.mode: "{second}", was "{first}"'):
        img2parquet.run(parse_job(job_of(photos, checkpoint, tmp_path, second)), "local")
    again = img2parquet.run(parse_job(job_of(photos, checkpoint, tmp_path, first)), "local")
    assert again.parts_done_before == again.parts == 1


def test_results_have_the_sources_size_whatever_the_batch(photos: str, checkpoint: Path, tmp_path: Path) -> None:
    tables: list[pa.Table] = []
    for batch_size in (1, 3):
        document = job_of(photos, checkpoint, tmp_path / str(batch_size), "fast")
        document["resources"] = {"workers": 1, "batch_size": batch_size}
        document["models"][0]["outputs"] = [{"kind": "embedding"}]
        img2parquet.run(parse_job(document), "local")
        tables.append(open_results(document["output"]["uri"]).to_table())
    assert tables[0]["width"].to_pylist() == [700, 520, 90]
    assert tables[0]["height"].to_pylist() == [521, 521, 120]
    vectors = [np.array(table["embedding"].to_pylist()) for table in tables]
    assert np.abs(vectors[0] - vectors[1]).max() <= 1e-5 * np.abs(vectors[0]).max()


def test_segmentation_is_at_the_sources_size(photos: str, tmp_path: Path) -> None:
    masks: dict[str, list[np.ndarray]] = {}
    for mode in ("exact", "fast"):
        document = job_of(photos, "infra/demo/checkpoints/beit-textures", tmp_path / mode, mode)
        document["models"][0]["outputs"] = [{"kind": "segmentation"}]
        img2parquet.run(parse_job(document), "local")
        column = open_results(document["output"]["uri"]).to_table()["mask"].to_pylist()
        masks[mode] = [np.asarray(Image.open(io.BytesIO(mask))) for mask in column]
    assert [mask.shape for mask in masks["fast"]] == [(521, 700), (521, 520), (120, 90)]
    agree = [float((a == b).mean()) for a, b in zip(masks["fast"], masks["exact"], strict=True)]
    assert min(agree) > 0.98 and agree[2] == 1


# --- trained models --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trained_models_see_the_same_as_exactly_and_would_not_by_what_is_not_offered() -> None:
    drifts = drift.measure(48)
    assert [one.way for one in drifts] == 2 * [drift.EXACT, *drift.WAYS]
    for one in drifts:
        close = (
            one.most_levels <= drift.MOST_LEVELS
            and one.mean_levels <= 0.4
            and one.mean_cosine >= 0.9999
            and one.least_cosine >= 0.995
            and one.agreement >= 0.97
        )
        assert close is not one.way.startswith("not offered"), one
