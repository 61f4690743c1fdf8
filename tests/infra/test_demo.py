"""The demo's data and checkpoint: what was trained on is not what is asked about, and both can be made again."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from img2parquet import load_model

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "infra" / "demo"
CHECKPOINTS = DEMO / "checkpoints"


@pytest.fixture(scope="module")
def photos() -> Iterator[ModuleType]:
    yield from demo_module("photos")


@pytest.fixture(scope="module")
def shards() -> Iterator[ModuleType]:
    yield from demo_module("make_shards")


@pytest.fixture(scope="module")
def pixels(photos: ModuleType) -> dict[str, npt.NDArray[np.uint8]]:
    return {photo.name: photo.pixels() for photo in photos.PHOTOS}


def demo_module(name: str) -> Iterator[ModuleType]:
    """A script of the demo as a module: scripts find each other in their own folder."""
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module(name)
    sys.path.remove(str(DEMO))


# -- photos --------------------------------------------------------------------------------------------------------


def test_held_out_pixels_are_never_trained_on(photos: ModuleType, pixels: dict[str, npt.NDArray[np.uint8]]) -> None:
    for photo in photos.PHOTOS:
        height, width, _ = pixels[photo.name].shape
        trained = np.zeros((height, width), bool)
        for box in photos.train_boxes(photo, width, height):
            assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height
            trained[box.top : box.bottom, box.left : box.right] = True
        held = photos.held_out_box(photo, width, height)
        gap = photos.GAP
        near = trained[max(0, held.top - gap) : held.bottom + gap, max(0, held.left - gap) : held.right + gap]
        assert not near.any(), photo.name
        assert held.width * held.height > 0.2 * width * height
        assert trained.mean() > 0.6


def test_there_are_enough_photos_with_names_of_their_own(pixels: dict[str, npt.NDArray[np.uint8]]) -> None:
    assert len(pixels) >= 10
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in pixels.values())


# -- shards --------------------------------------------------------------------------------------------------------


def test_shards_are_the_same_bytes_every_time(shards: ModuleType, tmp_path: Path) -> None:
    small = shards.Recipe(crops=48, shards=2)
    manifests = [shards.make_shards(tmp_path / name, small) for name in ("one", "two")]
    assert manifests[0] == manifests[1]
    assert manifests[0]["made"] and len(manifests[0]["files"]) == 2
    for name, digest in manifests[0]["files"].items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == digest
    other = shards.make_shards(tmp_path / "three", shards.Recipe(crops=48, shards=2, seed=1))
    assert other["files"] != manifests[0]["files"]


def test_a_complete_folder_is_kept_and_a_damaged_one_made_again(shards: ModuleType, tmp_path: Path) -> None:
    small = shards.Recipe(crops=32, shards=2)
    shards.make_shards(tmp_path, small)
    (tmp_path / "mine.txt").write_text("kept")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert not shards.make_shards(tmp_path, small)["made"]
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before

    (tmp_path / "photos-01.tar").write_bytes(b"half")
    assert shards.make_shards(tmp_path, small)["made"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {k: v[1] for k, v in before.items()}
    assert shards.make_shards(tmp_path, shards.Recipe(crops=40, shards=2))["made"]


def test_crops_come_from_the_held_out_region_and_say_so(
    photos: ModuleType, shards: ModuleType, pixels: dict[str, npt.NDArray[np.uint8]], tmp_path: Path
) -> None:
    shards.make_shards(tmp_path, shards.Recipe(crops=64, shards=2))
    by_name = dict(zip(photos.NAMES, photos.PHOTOS, strict=True))
    with tarfile.open(tmp_path / "photos-00.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    keys = [name.removesuffix(".jpg") for name in members if name.endswith(".jpg") and name.count("-") == 1]
    assert len(keys) == 32
    for key in keys:
        facts = json.loads(members[f"{key}.json"])
        photo, source = by_name[facts["label"]], pixels[facts["label"]]
        height, width, _ = source.shape
        held, box = photos.held_out_box(photo, width, height), photos.Box(*facts["box"])
        assert held.left <= box.left and held.top <= box.top and box.right <= held.right and box.bottom <= held.bottom
        image = np.asarray(Image.open(io.BytesIO(members[f"{key}.jpg"])), np.float32)
        assert image.shape[:2] == (box.height, box.width)
        assert abs(image - source[box.top : box.bottom, box.left : box.right]).mean() < 12
        assert int(members[f"{key}.cls"]) == photos.NAMES.index(facts["label"])


def test_what_is_broken_is_counted(shards: ModuleType, tmp_path: Path) -> None:
    broken = shards.make_shards(tmp_path, shards.Recipe(crops=64, shards=2))["broken"]
    kinds = {how.__name__: 2 for how in shards.REJECTED}
    assert broken == kinds | {"key twice": 1, "damaged tar header": 1}
    readable = []
    for name in ("photos-00.tar", "photos-01.tar"):
        with tarfile.open(tmp_path / name) as tar:
            readable.append(len(tar.getnames()))
    assert readable[0] == 3 * (32 + len(shards.REJECTED + shards.UNUSUAL) + 1)
    assert readable[1] < 3 * 32  # tarfile takes the damaged header for the end, and says nothing


# -- mosaics -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosaics() -> Iterator[ModuleType]:
    yield from demo_module("mosaics")


@pytest.mark.parametrize("region", ["train", "held_out"])
def test_every_pixel_of_a_mosaic_is_of_its_texture_and_region(mosaics: ModuleType, region: str) -> None:
    drawn = mosaics.Mosaics(region)
    for texture, (image, boxes) in enumerate(zip(drawn.images, drawn.boxes, strict=True)):
        painted = np.full_like(image, 255)  # outside of the region
        for box in boxes:
            painted[box.top : box.bottom, box.left : box.right] = texture
        drawn.images[texture] = painted
    for seed in range(20):
        mosaic, truth = drawn(np.random.default_rng(seed), 64)
        assert np.array_equal(mosaic, np.repeat(truth[..., None], 3, axis=2))
        assert 2 <= len(np.unique(truth)) <= 5


def test_mosaics_are_kept_until_something_is_missing(mosaics: ModuleType, tmp_path: Path) -> None:
    assert mosaics.make_mosaics(tmp_path, count=3)["made"]
    assert not mosaics.make_mosaics(tmp_path, count=3)["made"]
    truth = np.asarray(Image.open(tmp_path / "truth" / "mosaic-0001.png"))
    assert truth.shape == (mosaics.SIZE, mosaics.SIZE)
    (tmp_path / "truth" / "mosaic-0001.png").unlink()
    assert mosaics.make_mosaics(tmp_path, count=3)["made"]


def test_mean_iou_counts_each_class_once(mosaics: ModuleType) -> None:
    truth, answer = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    truth[2:], answer[3:] = 1, 1
    confusion = mosaics.Confusion()
    confusion.add(truth, answer)
    assert confusion.mean_iou() == pytest.approx((8 / 12 + 4 / 8) / 2)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_checkpoints_are_small_and_named_after_the_photos(photos: ModuleType, mosaics: ModuleType) -> None:
    expected = {"levit-photos": (photos.NAMES, 3_000_000), "beit-textures": (mosaics.TEXTURES, 4_000_000)}
    assert {folder.name for folder in CHECKPOINTS.iterdir()} == set(expected)
    for name, (labels, most_bytes) in expected.items():
        folder = CHECKPOINTS / name
        config = json.loads((folder / "config.json").read_text())
        assert tuple(config["id2label"].values()) == labels
        assert sum(path.stat().st_size for path in folder.iterdir()) < most_bytes
        assert str(config["image_size"]) in (folder / "preprocessor_config.json").read_text()


def test_levit_tells_held_out_crops_apart(shards: ModuleType) -> None:
    """With this package's model, as the demo runs it; transformers' own loads it below."""
    model = load_model(str(CHECKPOINTS / "levit-photos"), dtype="float32")
    samples = list(shards.all_samples(shards.Recipe(crops=320, seed=99)))
    best = model([picture(sample.image) for sample in samples])["logits"].argmax(1).tolist()
    assert sum(a == sample.class_id for a, sample in zip(best, samples, strict=True)) / len(samples) > 0.85


@pytest.mark.slow  # importing transformers takes most of it
def test_transformers_takes_both_checkpoints_whole() -> None:
    transformers = pytest.importorskip("transformers")
    classes = {
        "levit-photos": transformers.LevitForImageClassificationWithTeacher,
        "beit-textures": transformers.BeitForSemanticSegmentation,
    }
    for name, kind in classes.items():
        _, report = kind.from_pretrained(CHECKPOINTS / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_beit_segments_held_out_mosaics(mosaics: ModuleType) -> None:
    model = load_model(str(CHECKPOINTS / "beit-textures"), dtype="float32")
    drawn, confusion = mosaics.Mosaics("held_out"), mosaics.Confusion()
    pairs = [drawn(np.random.default_rng([99, i])) for i in range(32)]
    maps = model([Image.fromarray(mosaic) for mosaic, _ in pairs], wants=["segmentation"])["segmentation"].argmax(1)
    for (_, truth), found in zip(pairs, maps.numpy(), strict=True):
        step = truth.shape[0] // found.shape[0]
        confusion.add(truth[step // 2 :: step, step // 2 :: step], found)
    assert confusion.mean_iou() > 0.6


def picture(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")
