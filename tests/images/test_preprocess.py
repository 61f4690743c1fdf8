"""Check that crops equal stored ones of transformers' torchvision backend, and are close to its PIL backend."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2parquet.errors import CheckpointError
from img2parquet.images.decode import decode
from img2parquet.images.preprocess import (
    PROCESSORS,
    Preprocessor,
    PreprocessSettings,
    Resample,
    _by_torch,
    center_crop,
    describe,
    in_channels,
    normalize_on_device,
    read_settings,
    resized_size,
)
from img2parquet.models import external
from img2parquet.models.model import pixels_of_image
from img2parquet.models.processor import read_processor
from img2parquet.schema import Pixels, Rejection
from tests.harness.golden.crop_sources import CONFIGS, SIZES_HW, picture, picture_in
from tests.support.bad_images import BAD_IMAGES

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "crops.npz")
ABOUT = json.loads(str(GOLDEN["about"]))
OWN_RULES = {"DINOv3ViTImageProcessor", "Mask2FormerImageProcessor", "MaskFormerImageProcessor"}
SQUARE = PreprocessSettings("exact", 8, 8, "bilinear", None, None)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def crop_of(image: Pixels, config: str) -> np.ndarray:
    return crop_by(read_settings(CONFIGS[config], "-"), image)


def crop_by(chosen: PreprocessSettings, image: Pixels) -> np.ndarray:
    result = Preprocessor(chosen)(image)
    assert not isinstance(result, Rejection), result
    return result


@pytest.fixture(scope="module")
def images() -> dict[str, Pixels]:
    decoded = decode(GOLDEN["jpeg"].tobytes())
    assert isinstance(decoded, Pixels)
    return {"jpeg": decoded, **{name: Pixels(picture(name)) for name in SIZES_HW}}


# --- the reference ---------------------------------------------------------------------------------------------------


def test_the_pictures_are_those_the_goldens_were_made_from() -> None:
    assert {name: sha256(picture(name)) for name in SIZES_HW} == ABOUT["sources"]
    assert ABOUT["versions"]["transformers"] == "5.23.0"


@pytest.mark.parametrize("config", CONFIGS)
def test_crops_and_normalised_pixels_equal_the_stored_goldens(config: str, images: dict[str, Pixels]) -> None:
    import torch

    chosen = read_settings(CONFIGS[config], "-")
    for name, expected in ABOUT["hashes"][config].items():
        crop = crop_of(images[name], config)
        assert np.array_equal(crop[::16, ::16], GOLDEN[f"sample/{config}/{name}"]), name
        assert sha256(crop) == expected["uint8"], name
        x_BCHW = normalize_on_device(torch.from_numpy(crop[None]), chosen, torch.float32)
        assert sha256(x_BCHW[0].numpy()) == expected["float32"], name


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if key.startswith("whole/")])
def test_crops_stored_whole(key: str, images: dict[str, Pixels]) -> None:
    _, config, name = key.split("/")
    assert np.array_equal(crop_of(images[name], config), GOLDEN[key])


@pytest.mark.parametrize("config", CONFIGS)
def test_crops_are_close_to_the_pil_backend(config: str, images: dict[str, Pixels]) -> None:
    """Pillow's resize differs by up to 2 levels where the aspect ratio is kept. Where the image is squashed, Pillow
    exchanges its two passes for some shapes: up to 8 in photographs, 12 in these pictures, which are noisier."""
    import transformers
    from PIL import Image

    spelled = CONFIGS[config].get("image_processor_type") or CONFIGS[config]["feature_extractor_type"]
    kind = getattr(transformers, spelled.replace("FeatureExtractor", "ImageProcessor") + "Pil")
    processor = kind.from_dict(CONFIGS[config])
    chosen = read_settings(CONFIGS[config], "-")
    for name in ("landscape", "portrait", "odd_margin", "exact_224", "grey", "jpeg"):
        image = Image.fromarray(images[name].rgb_HWC)
        theirs = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0].transpose(1, 2, 0)
        ours = crop_of(images[name], config)
        # where the image is smaller than the crop, that backend pads an odd deficit the other way: one pixel's shift
        for axis, (side, length) in enumerate(zip(resized_size(image.size[::-1], chosen), ours.shape, strict=False)):
            if side < length and (length - side) % 2:
                ours, theirs = ours.take(range(length - 1), axis), theirs.take(range(1, length), axis)
        difference = np.abs(ours.astype(int) - theirs.astype(int))
        assert difference.max() <= (2 if chosen.resize == "shortest_edge" else 12), name
        assert difference.mean() < 0.3, name


@pytest.mark.parametrize("processor", sorted(PROCESSORS.keys() - OWN_RULES))
def test_defaults_equal_the_reference_classes(processor: str) -> None:
    import transformers

    theirs = getattr(transformers, processor + "Pil")()
    ours = PROCESSORS[processor]
    assert dict(theirs.size) == dict(ours["size"])
    assert dict(theirs.crop_size or {}) == dict(ours["crop_size"] or {}) or not ours["do_center_crop"]
    assert bool(theirs.do_center_crop) == ours["do_center_crop"]
    assert (int(theirs.resample), theirs.rescale_factor) == (ours["resample"], ours["rescale_factor"])
    assert (list(theirs.image_mean), list(theirs.image_std)) == (ours["image_mean"], ours["image_std"])
    assert all(bool(getattr(theirs, flag)) for flag in ("do_resize", "do_rescale", "do_normalize"))
    assert theirs.default_to_square == ours["default_to_square"]


# --- the PIL backend's pixels ---


DIALECTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "null flags": {"do_rescale": None, "do_normalize": None},
    "not rescaled": {"do_rescale": False, "image_mean": [90.0, 100.0, 110.0], "image_std": 50.0},
    "not normalised": {"do_normalize": False, "rescale_factor": 1 / 127.5},
    "a crop of odd size": {"size": {"height": 61, "width": 48}, "do_center_crop": True, "crop_size": [40, 75]},
    "one side": {"size": 50, "crop_size": 45, "do_center_crop": True},
    **{f"filter {code}": {"resample": code} for code in range(6)},
}
SMALL = {"image_processor_type": "-", "size": {"height": 40, "width": 56}, "crop_size": {"height": 44, "width": 52}}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("processor", sorted(PROCESSORS.keys() - OWN_RULES - {"ConvNextImageProcessor"}))
def test_pil_equals_the_pil_backend_to_the_last_bit(processor: str, dialect: str) -> None:
    """Compare crops and normalised pixels with every class's own, for every filter, flag and rounding."""
    import torch
    import transformers
    from PIL import Image

    written = {**SMALL, "image_processor_type": processor, **DIALECTS[dialect]}
    theirs = getattr(transformers, processor + "Pil").from_dict(written)
    ours = read_processor(written, {}, "-", pixels="pil").settings
    for name in ("odd_margin", "small", "tall_strip", "one_pixel"):
        image = picture(name)
        crop = crop_by(ours, Pixels(image))
        expected = theirs(Image.fromarray(image), do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert np.array_equal(crop.transpose(2, 0, 1), expected), name
        x_BCHW = normalize_on_device(torch.from_numpy(crop[None]), ours, torch.float32)
        expected = theirs(Image.fromarray(image))["pixel_values"][0]
        assert np.array_equal(x_BCHW[0].numpy(), expected), name


@pytest.mark.parametrize("edge", [32, 48, 384])
def test_pil_equals_convnext_s(edge: int) -> None:
    import transformers
    from PIL import Image

    written = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": edge}}
    theirs = transformers.ConvNextImageProcessorPil.from_dict(written)
    crop = crop_by(read_processor(written, {}, "-", pixels="pil").settings, Pixels(picture("odd_margin")))
    expected = theirs(Image.fromarray(picture("odd_margin")), do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(crop.transpose(2, 0, 1), expected)


def test_timm_s_pixels_equal_stored_ones() -> None:
    """The goldens come from timm's own transforms, see tests/harness/golden/make_timm_crops.py."""
    import torch

    stored = json.loads((Path(__file__).parents[1] / "golden" / "timm_crops.json").read_text())
    for case in stored["cases"]:
        ours = external._timm_preprocess(case["pretrained_cfg"], None, "timm").settings
        crop = crop_by(ours, Pixels(picture(case["picture"])))
        assert sha256(crop) == case["uint8"], case
        x_BCHW = normalize_on_device(torch.from_numpy(crop[None]), ours, torch.float32)
        assert sha256(x_BCHW[0].numpy()) == case["float32"], case


STORED = json.loads((Path(__file__).parents[1] / "golden" / "channel_crops.json").read_text())["cases"]
CHANNELS = {1: "grey", 3: "without one size", 4: "RGBA"}


@pytest.mark.parametrize("channels", CHANNELS, ids=list(CHANNELS.values()))
def test_channels_and_stated_sizes_equal_stored_goldens(channels: int) -> None:
    """The goldens come from the torchvision backend, see tests/harness/golden/make_channel_crops.py."""
    import torch

    for case in (case for case in STORED if case["channels"] == channels):
        stated = case["size_HW"] if channels == 3 else None
        ours = read_settings(case["config"], "-", stated, channels=channels)
        crop = crop_by(ours, pixels_of_image(0, picture_in(case["picture"], channels), channels))
        assert sha256(crop) == case["uint8"], case
        x_BCHW = normalize_on_device(torch.from_numpy(crop[None]), ours, torch.float32)
        assert sha256(x_BCHW[0].numpy()) == case["float32"], case


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("channels", [1, 4])
def test_pil_equals_the_pil_backend_in_every_channel(channels: int, resample: int) -> None:
    """Pillow weighs colours by their transparency when it resizes RGBA."""
    import torch
    import transformers
    from PIL import Image

    levels = {"image_mean": [0.2, 0.3, 0.4, 0.1][:channels], "image_std": [0.5, 0.6, 0.7, 0.9][:channels]}
    written = {"size": {"height": 40, "width": 56}, "resample": resample, **levels}
    theirs = transformers.ViTImageProcessorPil.from_dict(written)
    ours = read_processor(written, {"num_channels": channels}, "ViTImageProcessor", pixels="pil").settings
    for name in ("odd_margin", "small", "tall_strip", "one_pixel"):
        array = picture_in(name, channels)
        crop = crop_by(ours, pixels_of_image(0, array, channels))
        x_BCHW = normalize_on_device(torch.from_numpy(crop[None]), ours, torch.float32)
        assert np.array_equal(x_BCHW[0].numpy(), theirs(Image.fromarray(array))["pixel_values"][0]), name


def test_colours_become_pillow_s_luma_or_opaque() -> None:
    from PIL import Image

    image = picture("small")
    assert np.array_equal(in_channels(Pixels(image), 1)[..., 0], np.asarray(Image.fromarray(image).convert("L")))
    assert np.array_equal(in_channels(Pixels(image), 4), np.asarray(Image.fromarray(image).convert("RGBA")))


@pytest.mark.parametrize(
    ("config", "channels", "message"),
    [
        ({}, 1, "`image_mean` is [0.485, 0.456, 0.406]; it must be one number (grey), since config.json has `num_ch"),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}, 4, "one number or four (red, green, blue, alpha)"),
        ({"image_mean": 0.5, "image_std": [0.5, 0.5]}, 1, "`image_std` is [0.5, 0.5]"),
    ],
)
def test_levels_of_another_number_of_channels(config: dict[str, Any], channels: int, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_settings(config, "LevitImageProcessor", channels=channels)
    assert message in str(caught.value)
    same = read_settings({"image_mean": [0.5] * 3, "image_std": 0.25}, "LevitImageProcessor", channels=channels)
    assert (same.mean, same.std) == ((0.5,) * channels, (0.25,) * channels)
    read_settings({**config, "do_normalize": False}, "LevitImageProcessor", channels=channels)


UNSIZED: dict[str, tuple[dict[str, Any], tuple[int, int], str]] = {  # settings, a size that does not come out, why
    "not resized": ({"do_resize": False}, (97, 150), "is not resized (`do_resize: false` in preprocessor_config.json)"),
    "short side": ({"size": {"shortest_edge": 60}}, (60, 61), "97 x 150, resized to 60 x 92, is not cropped"),
    "bounded": ({"size": {"shortest_edge": 60, "longest_edge": 70}}, (60, 60), "97 x 150, resized to 45 x 70, is not"),
}


@pytest.mark.parametrize("case", UNSIZED)
def test_images_that_come_out_at_another_size_are_rejected(case: str) -> None:
    config, size_HW, message = UNSIZED[case]
    rejected = Preprocessor(read_settings(config, "ViTImageProcessor", size_HW))(Pixels(picture("small")))
    assert isinstance(rejected, Rejection) and rejected.reason == "wrong_size"
    assert message in rejected.message and f"the model takes {size_HW[1]} x {size_HW[0]}" in rejected.message
    assert "another `image_size` in the job" in rejected.message
    with pytest.raises(CheckpointError, match="image_size: \\[height, width\\]"):
        read_settings(config, "ViTImageProcessor")


def test_not_resizing_takes_the_size_of_the_model() -> None:
    ours = read_processor({"do_resize": False}, {"image_size": [150, 97]}, "ViTImageProcessor")
    assert np.array_equal(crop_by(ours.settings, Pixels(picture("small"))), picture("small"))
    assert "those that are not 97 x 150 pixels then are rejected (`wrong_size`)" in ours.notes[0]


def test_a_size_that_no_image_comes_out_at_is_refused() -> None:
    for size_HW in ((59, 60), (61, 70), (60, 71)):
        with pytest.raises(CheckpointError, match=f"image_size {size_HW[0]}x{size_HW[1]}: no image is resized to it"):
            read_settings({"size": {"shortest_edge": 60, "longest_edge": 70}}, "ViTImageProcessor", size_HW)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 300), st.integers(1, 300))
def test_a_bounded_resize_is_the_references(height: int, width: int, edge: int, longest: int) -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio

    s = PreprocessSettings("shortest_edge", edge, edge, "bilinear", 1, 1, longest_edge=longest)
    assert resized_size((height, width), s) == get_size_with_aspect_ratio((height, width), edge, longest)


def test_nothing_may_be_left_of_an_image() -> None:
    s = PreprocessSettings("shortest_edge", 9, 9, "bilinear", 4, 4, longest_edge=9)
    rejected = Preprocessor(s)(Pixels(np.zeros((1, 900, 3), np.uint8)))
    assert isinstance(rejected, Rejection) and rejected.reason == "aspect_ratio"
    assert "which leaves nothing of it" in rejected.message


def test_the_identity_says_whose_pixels_unless_they_are_the_default() -> None:
    assert "pixels" not in describe(SQUARE)
    pil = describe(replace(SQUARE, pixels="pil"))
    assert pil["pixels"] == "pil" and pil["backend"] == "pillow uint8 antialiased"
    assert not {"channels", "longest_edge", "stated_HW"} & describe(SQUARE).keys()
    for changed in ({"channels": 1}, {"longest_edge": 9}, {"stated_HW": (8, 8)}):
        description = describe(replace(SQUARE, **changed))
        assert description != describe(SQUARE) and json.loads(json.dumps(description)) == description


# --- reading preprocessor_config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_processor_type": "BitImageProcessor"}, ("shortest_edge", 224, 224, "bicubic", 224, 224)),
        ({"image_processor_type": "BeitImageProcessor"}, ("exact", 224, 224, "bicubic", None, None)),
        ({"image_processor_type": "LevitImageProcessor"}, ("shortest_edge", 256, 256, "bicubic", 224, 224)),
        ({"image_processor_type": "ViTImageProcessorFast"}, ("exact", 224, 224, "bilinear", None, None)),
        ({"image_processor_type": "ViTImageProcessorPil", "size": 384}, ("exact", 384, 384, "bilinear", None, None)),
        ({"feature_extractor_type": "LevitFeatureExtractor", "size": 240},
         ("shortest_edge", 274, 274, "bicubic", 224, 224)),
        ({"feature_extractor_type": "BitFeatureExtractor", "size": 448, "crop_size": 440, "resample": 2},
         ("shortest_edge", 448, 448, "bilinear", 440, 440)),
        ({"feature_extractor_type": "BeitFeatureExtractor", "size": [200, 300]},
         ("exact", 200, 300, "bicubic", None, None)),
        ({"image_processor_type": "LevitImageProcessor", "size": {"height": 256, "width": 248}},
         ("exact", 256, 248, "bicubic", 224, 224)),
        ({"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 256}, "do_center_crop": True,
          "crop_size": {"height": 224, "width": 192}}, ("shortest_edge", 256, 256, "bilinear", 224, 192)),
        ({"image_processor_type": "BitImageProcessor", "do_resize": False}, ("none", 224, 224, "bicubic", 224, 224)),
        ({"image_processor_type": "ViTImageProcessor", "resample": 1}, ("exact", 224, 224, "lanczos", None, None)),
        ({"image_processor_type": "BeitImageProcessor", "size": {"height": 64, "width": 96, "shortest_edge": None},
          "crop_pct": 0.9, "do_reduce_labels": True, "reduce_labels": True, "do_convert_rgb": None, "rescale": 1},
         ("exact", 64, 96, "bicubic", None, None)),
        ({"image_processor_type": "LevitImageProcessor", "size": None, "resample": None, "crop_size": None},
         ("shortest_edge", 256, 256, "bicubic", 224, 224)),
        ({"image_processor": {"image_processor_type": "BitImageProcessor", "size": 300}, "processor_class": "X"},
         ("shortest_edge", 300, 300, "bicubic", 224, 224)),
    ],
)  # fmt: skip
def test_every_spelling_of_a_size(config: dict[str, Any], expected: tuple[Any, ...]) -> None:
    s = read_settings(config, "ViTImageProcessor")
    assert (s.resize, s.resize_height, s.resize_width, s.resample, s.crop_height, s.crop_width) == expected


def test_without_a_file_the_familys_processor_decides() -> None:
    assert read_settings(None, "LevitImageProcessor") == read_settings({}, "LevitFeatureExtractor")
    assert read_settings(None, "BeitImageProcessor").size_HW == (224, 224)


def test_scale_mean_and_std() -> None:
    s = read_settings({"image_mean": 0.25, "image_std": [0.1, 0.2, 0.3], "rescale_factor": 0.5}, "ViTImageProcessor")
    assert (s.mean, s.std, s.rescale_factor) == ((0.25,) * 3, (0.1, 0.2, 0.3), 0.5)
    assert read_settings({"do_rescale": False}, "ViTImageProcessor").rescale_factor == 1.0
    assert not read_settings({"do_normalize": False}, "ViTImageProcessor").do_normalize
    one = read_settings({"image_mean": [0.25], "image_std": [0.2]}, "ViTImageProcessor")
    assert (one.mean, one.std) == ((0.25,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("pad_size", [None, 224, {"height": 224, "width": 224}])
def test_padding_to_the_size_that_all_images_have_is_none(pad_size: Any) -> None:
    import transformers

    written = {"do_pad": True, "pad_size": pad_size}
    assert read_settings(written, "ViTImageProcessor") == read_settings({}, "ViTImageProcessor")
    theirs = [transformers.ViTImageProcessorPil(**more)(picture("small"))["pixel_values"][0] for more in (written, {})]
    assert np.array_equal(*theirs)


@pytest.mark.parametrize("filter_", [3, "bicubic", "BICUBIC", "PILImageResampling.BICUBIC"])
def test_a_filter_by_number_or_name(filter_: Any) -> None:
    assert read_settings({"resample": filter_}, "ViTImageProcessor").resample == "bicubic"


@pytest.mark.parametrize(
    ("config", "image_size", "expected"),
    [
        ("levit_default", 288, ("shortest_edge", 329, (288, 288))),
        ("levit_default", 224, ("shortest_edge", 256, (224, 224))),
        ("bit_hub", 320, ("shortest_edge", 320, (320, 320))),
        ("bit_default", (160, 320), ("shortest_edge", 320, (160, 320))),
        ("bit_padded", 450, ("shortest_edge", 400, (450, 450))),
        ("beit_ade", (512, 384), ("exact", 512, (512, 384))),
        ("beit_cropped", 448, ("exact", 512, (448, 448))),
        ("bit_padded", 101, ("shortest_edge", 89, (101, 101))),  # 89.8
        ("bit_padded", 1, ("shortest_edge", 1, (1, 1))),
        ("vit_msn", 98, ("exact", 98, (98, 98))),
    ],
)
def test_another_image_size_keeps_the_proportion(config: str, image_size: Any, expected: tuple[Any, ...]) -> None:
    s = read_settings(CONFIGS[config], "-", image_size)
    assert (s.resize, s.resize_height, s.size_HW) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "FooImageProcessor"}, "unknown image processor `FooImageProcessor`"),
        ({"image_processor": "ViTImageProcessor"}, "`image_processor` is 'ViTImageProcessor', not an object"),
        ({"feature_extractor_type": "VitFeatureExtractor"}, "did you mean `ViTImageProcessor`?"),
        ({"size": {"longest_edge": 224}}, "`size` is {'longest_edge': 224}"),
        ({"size": {"shortest_edge": 224, "longest_edge": 900}}, "different sizes"),
        ({"size": {"shortest_edge": 224, "longest_edge": 0}, "do_center_crop": True, "crop_size": 9}, "longest_edge"),
        ({"size": "224"}, "`size.height` is '224'"),
        ({"size": 0}, "at least 1"),
        ({"size": {"height": True, "width": 3}}, "`size.height` is True"),
        ({"size": [1, 2, 3]}, "write one side, or [height, width]"),
        ({"size": {"shortest_edge": 224}}, "different sizes"),
        ({"do_resize": False}, "different sizes"),
        ({"do_center_crop": True}, "`do_center_crop` without `crop_size`"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "`crop_size` needs a height and a width"),
        ({"do_normalize": "yes"}, "must be true or false"),
        ({"resample": 7}, "known: 0 (nearest), 1 (lanczos)"),
        ({"resample": "nearest-exact"}, "`resample` is 'nearest-exact'"),
        ({"resample": True}, "`resample` is True"),
        ({"do_resize": None}, "different sizes"),
        ({"do_center_crop": None, "size": {"shortest_edge": 224}}, "different sizes"),
        ({"image_mean": [0.5, 0.5]}, "one number or three"),
        ({"image_std": [0.5, 0.0, 0.5]}, "above 0"),
        ({"rescale_factor": None, "image_mean": "half"}, "`image_mean` is 'half'"),
        ({"rescale_factor": 0}, "above 0"),
        ({"do_pad": True, "pad_size": {"height": 230, "width": 224}}, "`do_pad` with `pad_size` {'height': 230, 'wid"),
        ({"do_pad": True, "pad_size": {"shortest_edge": 230}}, "`do_pad` with `pad_size` {'shortest_edge': 230}"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_settings(config, "ViTImageProcessor")
    assert message in str(caught.value)


def test_an_image_size_that_cannot_work_is_refused() -> None:
    sizes: list[Any] = [-3, (224, 0), (1, 2, 3), 0.5, True, 0]
    for size in sizes:
        with pytest.raises(CheckpointError, match="image_size"):
            read_settings(None, "ViTImageProcessor", size)


# --- geometry --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 700))
def test_resized_size_is_the_references(height: int, width: int, edge: int) -> None:
    from transformers.image_transforms import get_resize_output_image_size

    s = PreprocessSettings("shortest_edge", edge, edge, "bilinear", 1, 1)
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    expected = get_resize_output_image_size(image, edge, default_to_square=False, input_data_format="channels_first")
    assert resized_size((height, width), s) == expected


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_crop_keeps_the_middle_and_pads_with_zero(height: int, width: int, new_height: int, new_width: int) -> None:
    image = np.full((height, width, 3), 7, np.uint8)
    image[height // 2, width // 2] = 9
    crop = center_crop(image, (new_height, new_width))
    assert crop.shape == (new_height, new_width, 3)
    assert (crop > 0).all(axis=2).sum() == min(height, new_height) * min(width, new_width)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    if top >= 0 and left >= 0:
        assert np.array_equal(crop, image[top : top + new_height, left : left + new_width])


@pytest.mark.parametrize("config", ["levit_default", "beit_default", "bit_padded"])
def test_out_is_filled_completely_and_returned(config: str, images: dict[str, Pixels]) -> None:
    expected = crop_of(images["tall_strip"], config)
    batch = np.full((2, *expected.shape), 201, np.uint8)
    preprocess = Preprocessor(read_settings(CONFIGS[config], "-"))
    result = preprocess(images["tall_strip"], out=batch[1])
    assert np.shares_memory(result, batch)
    assert np.array_equal(batch[1], expected)
    assert (batch[0] == 201).all()


def test_the_source_is_left_alone_and_need_not_be_writable_or_contiguous() -> None:
    image = picture("small")
    before = image.copy()
    image.flags.writeable = False
    mirrored, copied = Pixels(image[::-1, ::-1]), Pixels(image[::-1, ::-1].copy())
    assert np.array_equal(crop_of(mirrored, "levit_default"), crop_of(copied, "levit_default"))
    same_size = crop_by(PreprocessSettings("none", 150, 97, "bilinear", 150, 97), Pixels(image))
    assert np.array_equal(same_size, before)
    assert not np.shares_memory(same_size, image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "box", "hamming"])
def test_other_filters_are_pillows_and_say_so(resample: Any) -> None:
    from PIL import Image

    s = replace(SQUARE, resample=resample, resize_height=20, resize_width=30)
    expected = Image.fromarray(picture("small")).resize((30, 20), Image.Resampling[resample.upper()])
    assert np.array_equal(crop_by(s, Pixels(picture("small"))), np.asarray(expected))
    assert describe(s)["backend"] == "pillow uint8 antialiased"
    assert describe(SQUARE)["backend"] == "torch uint8 antialiased"


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["levit_default", "beit_default", "bit_hub"])
@pytest.mark.parametrize("odd", [odd for odd in BAD_IMAGES if odd.stage == "preprocess"], ids=lambda odd: odd.name)
def test_long_thin_images_are_refused_before_anything_is_allocated(config: str, odd: Any) -> None:
    pixels = decode(odd.data)
    assert isinstance(pixels, Pixels)
    preprocess = Preprocessor(read_settings(CONFIGS[config], "-"))
    if config == "beit_default" and odd.name == "png_wide_line":  # one row squashed to 224 columns is cheap
        assert isinstance(preprocess(pixels), np.ndarray)
        return
    tracemalloc.start()
    result = preprocess(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(result, Rejection)
    assert result.reason == "aspect_ratio"
    assert "would be resized to" in result.message
    assert peak < 1 << 20


def test_a_4000_to_1_strip_is_refused_and_a_400_to_1_strip_is_not() -> None:
    preprocess = Preprocessor(read_settings(None, "LevitImageProcessor"))
    assert isinstance(preprocess(Pixels(np.zeros((4000, 1, 3), np.uint8))), Rejection)
    assert isinstance(preprocess(Pixels(np.zeros((400, 1, 3), np.uint8))), np.ndarray)


# --- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_resized_image_lies_in_memory_as_its_crop_does(resample: Resample) -> None:
    """Otherwise transposing it from (C, H, W) took as long as the resize."""
    image_HWC = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    assert _by_torch(image_HWC, (32, 36), resample).flags.c_contiguous


def test_normalisation_is_channels_last_and_leaves_its_input_alone() -> None:
    import torch

    crops_BHWC = torch.from_numpy(np.stack([picture("exact_224"), picture("exact_224")[::-1]]))
    before = crops_BHWC.clone()
    s = read_settings(None, "LevitImageProcessor")
    x_BCHW = normalize_on_device(crops_BHWC, s, torch.float32)
    assert x_BCHW.shape == (2, 3, 224, 224)
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(crops_BHWC, before)
    mean, std = np.array(s.mean), np.array(s.std)
    expected = (crops_BHWC.numpy() / 255 - mean) / std
    assert np.abs(x_BCHW.numpy().transpose(0, 2, 3, 1) - expected).max() < 2e-6


def test_bfloat16_is_rounded_once_from_float32() -> None:
    import torch

    crop_BHWC = torch.from_numpy(picture("exact_224"))[None]
    for flag in (True, False):
        s = replace(read_settings(None, "BeitImageProcessor"), do_normalize=flag)
        exact = normalize_on_device(crop_BHWC, s, torch.float32)
        assert torch.equal(normalize_on_device(crop_BHWC, s, torch.bfloat16), exact.to(torch.bfloat16))


def test_without_normalisation_pixels_are_only_scaled() -> None:
    import torch

    crop_BHWC = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3)
    plain = normalize_on_device(crop_BHWC, replace(SQUARE, do_normalize=False, rescale_factor=1.0), torch.float32)
    assert torch.equal(plain, crop_BHWC.permute(0, 3, 1, 2).float())
    scaled = normalize_on_device(crop_BHWC, replace(SQUARE, do_normalize=False), torch.float32)
    assert torch.equal(scaled, crop_BHWC.permute(0, 3, 1, 2) * (1 / 255))


# --- as a part of the whole ------------------------------------------------------------------------------------------


def test_settings_describe_themselves_as_json_and_travel() -> None:
    seen = set()
    for config in CONFIGS.values():
        s = read_settings(config, "-")
        description = describe(s)
        assert json.loads(json.dumps(description)) == description
        seen.add(json.dumps(description, sort_keys=True))
        assert pickle.loads(pickle.dumps(Preprocessor(s))).settings == s
        assert hash(s) == hash(pickle.loads(pickle.dumps(s)))
    assert len(seen) == len({read_settings(config, "-") for config in CONFIGS.values()})


def test_importing_and_reading_settings_loads_no_torch() -> None:
    code = (
        "import sys, img2parquet.images.preprocess as p, img2parquet.images.decode as d\n"
        "p.describe(p.read_settings(None, 'LevitImageProcessor', 288)); d.describe(d.DecodePolicy())\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
