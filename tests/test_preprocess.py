"""Pixels to crops: bit for bit what transformers' torchvision backend made (stored), close to its PIL backend (run)."""

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

from pipeline.decode import decode
from pipeline.errors import CheckpointError
from pipeline.preprocess import (
    PROCESSORS,
    Preprocessor,
    PreprocessSettings,
    Resample,
    _by_torch,
    center_crop,
    describe,
    normalize_on_device,
    read_settings,
    resized_size,
)
from pipeline.schema import Bad, Pixels
from tests.bad_images import BAD_IMAGES
from tests.golden.crop_sources import CONFIGS, SIZES_HW, picture

GOLDEN = np.load(Path(__file__).parent / "golden" / "crops.npz")
ABOUT = json.loads(str(GOLDEN["about"]))
SQUARE = PreprocessSettings("exact", 8, 8, "bilinear", None, None)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def crop_of(image: Pixels, config: str) -> np.ndarray:
    return crop_by(read_settings(CONFIGS[config], "-"), image)


def crop_by(chosen: PreprocessSettings, image: Pixels) -> np.ndarray:
    result = Preprocessor(chosen)(image)
    assert not isinstance(result, Bad), result
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
    """Pillow's resize differs by up to 2 where the aspect is kept. Where it is squashed Pillow exchanges its two passes
    for some shapes: up to 8 in photographs, 12 in these pictures, which are noisier."""
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


@pytest.mark.parametrize("processor", PROCESSORS)
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
        ({"image_processor_type": "LevitImageProcessor", "size": None, "resample": None, "do_center_crop": None},
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
    ("config", "said"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "unknown image processor `ConvNextImageProcessor`"),
        ({"feature_extractor_type": "VitFeatureExtractor"}, "did you mean `ViTImageProcessor`?"),
        ({"size": {"longest_edge": 224}}, "`size` is {'longest_edge': 224}"),
        ({"size": {"shortest_edge": 224, "longest_edge": 900}}, "`size` is"),
        ({"size": "224"}, "`size.height` is '224'"),
        ({"size": 0}, "at least 1"),
        ({"size": {"height": True, "width": 3}}, "`size.height` is True"),
        ({"size": [1, 2, 3]}, "give one side, or height and width"),
        ({"size": {"shortest_edge": 224}}, "different sizes"),
        ({"do_resize": False}, "different sizes"),
        ({"do_center_crop": True}, "`do_center_crop` without `crop_size`"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "`crop_size` needs a height and a width"),
        ({"do_normalize": "yes"}, "must be true or false"),
        ({"resample": 7}, "known: 0 (nearest), 1 (lanczos)"),
        ({"resample": "bilinear"}, "`resample` is 'bilinear'"),
        ({"image_mean": [0.5, 0.5]}, "one number or three"),
        ({"image_std": [0.5, 0.0, 0.5]}, "above 0"),
        ({"rescale_factor": None, "image_mean": "half"}, "`image_mean` is 'half'"),
        ({"rescale_factor": 0}, "above 0"),
        ({"do_pad": True}, "`do_pad` is True"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_settings(config, "ViTImageProcessor")
    assert said in str(caught.value)


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
    assert isinstance(result, Bad)
    assert result.reason == "aspect_ratio"
    assert "would be resized to" in result.message
    assert peak < 1 << 20


def test_a_4000_to_1_strip_is_refused_and_a_400_to_1_strip_is_not() -> None:
    preprocess = Preprocessor(read_settings(None, "LevitImageProcessor"))
    assert isinstance(preprocess(Pixels(np.zeros((4000, 1, 3), np.uint8))), Bad)
    assert isinstance(preprocess(Pixels(np.zeros((400, 1, 3), np.uint8))), np.ndarray)


# --- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_resized_image_lies_in_memory_as_its_crop_does(resample: Resample) -> None:
    """Turning it from (C, H, W) took as long as the resize."""
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
        said = describe(s)
        assert json.loads(json.dumps(said)) == said
        seen.add(json.dumps(said, sort_keys=True))
        assert pickle.loads(pickle.dumps(Preprocessor(s))).settings == s
        assert hash(s) == hash(pickle.loads(pickle.dumps(s)))
    assert len(seen) == len({read_settings(config, "-") for config in CONFIGS.values()})


def test_importing_and_reading_settings_loads_no_torch() -> None:
    code = (
        "import sys, pipeline.preprocess as p, pipeline.decode as d\n"
        "p.describe(p.read_settings(None, 'LevitImageProcessor', 288)); d.describe(d.DecodePolicy())\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
