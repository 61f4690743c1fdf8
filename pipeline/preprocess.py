"""Pixels to the uint8 crop of a model's size; rescale and normalise happen on the device.

- Geometry and arithmetic equal the checkpoint's own image processor (its torchvision backend) to the last uint8.
- Bilinear and bicubic use torch's antialiased uint8 kernels; any other filter uses Pillow, and `describe` says so.
- What a processor's class does not read (`crop_pct`, `do_reduce_labels`, ...) changes no pixel there and none here.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import CheckpointError, nearest
from pipeline.schema import Bad, Pixels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Resize = Literal["shortest_edge", "exact", "none"]
Pair = tuple[int, int]
Covered = tuple[float, float] | None
Uint8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PreprocessSettings:
    """What a checkpoint's processor does to an RGB image; the values as they are used, not as they are spelled.

    resize: "shortest_edge" scales so that the short side is `resize_height`; "exact" squashes to height x width;
    "none" leaves it. crop is None or a centre crop (zero-padded where the image is smaller). Without rescaling,
    `rescale_factor` is 1. An image whose resize would hold more than `max_resized_pixels` is refused."""

    resize: Resize
    resize_height: int
    resize_width: int
    resample: Resample
    crop_height: int | None
    crop_width: int | None
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    do_normalize: bool = True
    max_resized_pixels: int = 1 << 25

    @property
    def size_HW(self) -> tuple[int, int]:
        """Height and width of what reaches the model."""
        if self.crop_height is not None and self.crop_width is not None:
            return self.crop_height, self.crop_width
        return self.resize_height, self.resize_width

    @property
    def geometry(self) -> PreprocessSettings:
        """The same without what happens on the device: models that share it share their crops."""
        return replace(self, rescale_factor=1.0, mean=(), std=(), do_normalize=False)

    @property
    def backend(self) -> Literal["torch", "pillow"]:
        """Which library resizes."""
        return "torch" if self.resample in ("bilinear", "bicubic") else "pillow"


def describe(settings: PreprocessSettings) -> dict[str, Any]:
    """What the run's identity records of preprocessing, as JSON values."""
    values = {**asdict(settings), "mean": list(settings.mean), "std": list(settings.std)}
    return {**values, "backend": f"{settings.backend} uint8 antialiased", "crop_offset": "floor", "padding": "zero"}


class Preprocessor:
    """Pixels -> the uint8 crop (H, W, 3) that `settings` describe, or Bad where the image is too long and thin."""

    def __init__(self, settings: PreprocessSettings) -> None:
        self.settings = settings
        self._resize = _by_torch if settings.backend == "torch" else _by_pillow

    def __call__(self, pixels: Pixels, out: Uint8 | None = None) -> Uint8 | Bad:
        """The crop is written into `out` (H, W, 3) where that is given."""
        source_HW = pixels.height, pixels.width
        size_HW = resized_size(source_HW, self.settings)
        # the kernels resize width first: rows of the source by columns of the result is what lies in between
        held = max(size_HW[0] * size_HW[1], source_HW[0] * size_HW[1])
        if held > self.settings.max_resized_pixels:
            return _too_long(source_HW, size_HW, self.settings.max_resized_pixels)
        image_HWC = pixels.rgb_HWC
        if size_HW != source_HW:
            image_HWC = self._resize(image_HWC, size_HW, self.settings.resample, _covered(pixels))
        return center_crop(image_HWC, self.settings.size_HW, out)


def resized_size(source_HW: tuple[int, int], settings: PreprocessSettings) -> tuple[int, int]:
    """Height and width after the resize. The long side is truncated from Python's float division, not rounded."""
    if settings.resize == "none":
        return source_HW
    if settings.resize == "exact":
        return settings.resize_height, settings.resize_width
    short, long = min(source_HW), max(source_HW)
    new_short, new_long = settings.resize_height, int(settings.resize_height * long / short)
    return (new_long, new_short) if source_HW[1] <= source_HW[0] else (new_short, new_long)


def center_crop(image_HWC: Uint8, size_HW: tuple[int, int], out: Uint8 | None = None) -> Uint8:
    """Offsets and padding are rounded towards the top left; what the image does not cover is zero."""
    (top, y, height), (left, x, width) = map(_overlap, image_HWC.shape[:2], size_HW)
    crop_HWC = np.empty((*size_HW, 3), np.uint8) if out is None else out
    if (height, width) != size_HW:
        crop_HWC[...] = 0
    crop_HWC[y : y + height, x : x + width] = image_HWC[top : top + height, left : left + width]
    return crop_HWC


def _overlap(image: int, crop: int) -> tuple[int, int, int]:
    """Along one axis: where the overlap begins in the image, where in the crop, and how long it is."""
    return ((image - crop) // 2, 0, crop) if image >= crop else (0, (crop - image) // 2, image)


def _too_long(source_HW: tuple[int, int], size_HW: tuple[int, int], limit: int) -> Bad:
    (height, width), (new_height, new_width) = source_HW, size_HW
    message = f"{width} x {height} would be resized to {new_width} x {new_height}, past {limit} pixels on the way"
    return Bad("aspect_ratio", message)


def _covered(pixels: Pixels) -> Covered:
    """Height and width of the part of a smaller image that its source fills, in its own pixels; None for a whole one.

    1601 columns at half size are 801, the last one half: without this the resize would shift the right side by up to
    half a pixel of what it makes."""
    return None if pixels.shrunk == 1 else (pixels.height / pixels.shrunk, pixels.width / pixels.shrunk)


def _by_torch(image_HWC: Uint8, size_HW: Pair, resample: Resample, covered_HW: Covered = None) -> Uint8:
    import torch

    kernels = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa, "bicubic": torch.ops.aten._upsample_bicubic2d_aa}
    # torch takes no negative strides and warns of read-only memory
    usable_HWC = np.require(image_HWC, requirements=["C", "W"])
    # the channels-last view: a contiguous (C, H, W) copy costs several times more on large images. The batch goes in
    # front first: else its stride is none of channels last, torch gives (C, H, W), and to turn it takes as long again
    image_1CHW = torch.from_numpy(usable_HWC)[None].permute(0, 3, 1, 2)
    scales_HW = [size / covered for size, covered in zip(size_HW, covered_HW, strict=True)] if covered_HW else ()
    resized_1CHW = kernels[resample](image_1CHW, list(size_HW), False, *scales_HW)
    return cast(Uint8, resized_1CHW[0].permute(1, 2, 0).numpy())


def _by_pillow(image_HWC: Uint8, size_HW: Pair, resample: Resample, covered_HW: Covered = None) -> Uint8:
    from PIL import Image

    code, box = Image.Resampling[resample.upper()], (0, 0, *covered_HW[::-1]) if covered_HW else None
    return np.asarray(Image.fromarray(image_HWC).resize(size_HW[::-1], code, box))


def normalize_on_device(x_BHWC: Tensor, settings: PreprocessSettings, dtype: torch.dtype) -> Tensor:
    """x_BHWC uint8 -> x_BCHW in `dtype`, channels-last, by float32 arithmetic in the reference's own order."""
    import torch

    # a fresh float32 copy, so that the in-place steps leave the caller's pixels alone
    x_BCHW = x_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last, copy=True)
    if settings.do_normalize:
        mean_C11, std_C11 = _mean_and_std(settings, x_BCHW.device)
        x_BCHW.sub_(mean_C11).div_(std_C11)
    elif settings.rescale_factor != 1:
        x_BCHW.mul_(settings.rescale_factor)
    return x_BCHW.to(dtype)


@functools.lru_cache
def _mean_and_std(settings: PreprocessSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of uint8 levels, each (C, 1, 1). Kept: moving them to a GPU in each batch would wait for the one before."""
    import torch

    with torch.inference_mode(False):
        levels = torch.tensor([settings.mean, settings.std], dtype=torch.float32) * (1.0 / settings.rescale_factor)
        mean_C11, std_C11 = levels.to(device)[..., None, None]
        return mean_C11, std_C11


# --- preprocessor_config.json ----------------------------------------------------------------------------------------

_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CODES: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_EDGE_AND_CROP = {"size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "default_to_square": False}
COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "size": {"height": 224, "width": 224},
    "crop_size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": 2,
}
PROCESSORS: dict[str, Mapping[str, Any]] = {  # what each class does where a checkpoint says nothing
    "BitImageProcessor": {**COMMON, **_EDGE_AND_CROP, **_CLIP},
    "BeitImageProcessor": {**COMMON, **_HALF, "resample": 3},
    "LevitImageProcessor": {**COMMON, **_EDGE_AND_CROP, **IMAGENET, "edge_factor": 256 / 224},
    "ViTImageProcessor": {**COMMON, **_HALF, "crop_size": None},
    # of models that other libraries compute; two more, with rules of their own, are in models/external.py
    "CLIPImageProcessor": {**COMMON, **_EDGE_AND_CROP, **_CLIP},
    "SiglipImageProcessor": {**COMMON, **_HALF, "resample": 3, "default_to_square": False},
    "SegformerImageProcessor": {**COMMON, **IMAGENET, "size": {"height": 512, "width": 512}},
}
FILE = "preprocessor_config.json"


def read_settings(
    config: Mapping[str, Any] | None,
    processor: str,
    image_size: int | tuple[int, int] | None = None,
    known: Mapping[str, Mapping[str, Any]] = PROCESSORS,
) -> PreprocessSettings:
    """A checkpoint's preprocessor_config.json of any era -> settings. `processor` names the class where it does not,
    `known` has the defaults of each.

    image_size (one side, or height and width) replaces the size that reaches the model; what is cut off keeps its
    proportion: LeViT's 256 -> 224 becomes 329 -> 288. Raises CheckpointError for what cannot be done."""
    given = dict(config or {})
    given = dict(given.get("image_processor") or given)  # newer files hold one section per modality
    defaults = known[_processor_name(given, processor, known)]
    merged = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    merged["edge_factor"] = defaults.get("edge_factor", 1)
    if merged.get("do_pad"):
        raise CheckpointError(f"{FILE}: `do_pad` is {merged['do_pad']!r}", hint="these models' images are never padded")
    resize, (height, width), crop = _geometry(merged, None if image_size is None else _pair("image_size", image_size))
    return PreprocessSettings(
        resize=resize,
        resize_height=height,
        resize_width=width,
        resample=_resample_name(merged["resample"]),
        crop_height=crop[0] if crop else None,
        crop_width=crop[1] if crop else None,
        rescale_factor=_positive("rescale_factor", merged["rescale_factor"]) if _flag(merged, "do_rescale") else 1.0,
        mean=_channels("image_mean", merged["image_mean"]),
        std=tuple(_positive("image_std", value) for value in _channels("image_std", merged["image_std"])),
        do_normalize=_flag(merged, "do_normalize"),
    )


def reduces_labels(config: Mapping[str, Any] | None) -> bool:
    """Whether the processor takes class 0 of a segmentation's truth for background; also under the key's old name,
    which the reference has come to ignore."""
    given = dict(config or {})
    given = given.get("image_processor") or given
    said = given.get("do_reduce_labels")
    return bool(given.get("reduce_labels") if said is None else said)


def _processor_name(config: Mapping[str, Any], otherwise: str, known: Collection[str]) -> str:
    """`ViTFeatureExtractor`, `ViTImageProcessorFast` and `ViTImageProcessorPil` are all `ViTImageProcessor`."""
    spelled = str(config.get("image_processor_type") or config.get("feature_extractor_type") or otherwise)
    name = spelled.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in known:
        hint = nearest(name, known) or f"set `image_processor_type` in {FILE} to a class that does the same"
        raise CheckpointError(f"{FILE}: unknown image processor `{spelled}`", known=known, hint=hint)
    return name


def _geometry(config: Mapping[str, Any], image_HW: Pair | None) -> tuple[Resize, Pair, Pair | None]:
    """How to resize, to what, and the crop after it."""
    size = _size_dict("size", config["size"], square=bool(config["default_to_square"]))
    crop_HW = _crop_size(config)
    if crop_HW is None:
        return _geometry_without_crop(config, size, image_HW)
    final_HW = image_HW or crop_HW
    if not _flag(config, "do_resize"):
        return "none", final_HW, final_HW
    if "shortest_edge" in size:
        edge = _whole("size.shortest_edge", size["shortest_edge"])
        edge = int(config["edge_factor"] * max(map(_scaled, (edge, edge), crop_HW, final_HW)))
        return "shortest_edge", (edge, edge), final_HW
    height, width = map(_scaled, _sides("size", size), crop_HW, final_HW)
    return "exact", (height, width), final_HW


def _geometry_without_crop(
    config: Mapping[str, Any], size: Mapping[str, Any], image_HW: Pair | None
) -> tuple[Resize, Pair, None]:
    if "shortest_edge" in size or not _flag(config, "do_resize"):
        message = f"{FILE}: without a fixed resize or a centre crop, images reach the model in different sizes"
        raise CheckpointError(message, hint=f'set `"do_center_crop": true` and `crop_size` in {FILE}')
    return "exact", image_HW or _sides("size", size), None


def _scaled(side: int, crop: int, final: int) -> int:
    """The side that stands to the final size as the checkpoint's stood to its crop; in integers, so 288 stays 288."""
    return max(1, side * final // crop)


def _crop_size(config: Mapping[str, Any]) -> Pair | None:
    if not _flag(config, "do_center_crop"):
        return None
    if config["crop_size"] is None:
        raise CheckpointError(f"{FILE}: `do_center_crop` without `crop_size`", hint=f"set `crop_size` in {FILE}")
    size = _size_dict("crop_size", config["crop_size"], square=True)
    if "shortest_edge" in size:
        raise CheckpointError(f"{FILE}: `crop_size` needs a height and a width, not `shortest_edge`")
    return _sides("crop_size", size)


def _sides(name: str, size: Mapping[str, Any]) -> Pair:
    return _whole(f"{name}.height", size["height"]), _whole(f"{name}.width", size["width"])


def _size_dict(name: str, value: Any, square: bool) -> Mapping[str, Any]:
    """224, [224, 224] (height first), {"shortest_edge": 224} or {"height": 224, "width": 224} -> one of the dicts."""
    if isinstance(value, Mapping):
        given = {key: entry for key, entry in value.items() if entry is not None}
        if given.keys() in ({"shortest_edge"}, {"height", "width"}):
            return given
        raise CheckpointError(
            f"{FILE}: `{name}` is {dict(value)}", known=['{"shortest_edge": s}', '{"height": h, "width": w}', "s"]
        )
    if isinstance(value, list | tuple):
        height, width = _pair(name, value)
        return {"height": height, "width": width}
    return {"height": value, "width": value} if square else {"shortest_edge": value}


def _pair(name: str, value: Any) -> Pair:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise CheckpointError(f"`{name}` is {value!r}", hint="give one side, or height and width")
    return _whole(name, sides[0]), _whole(name, sides[1])


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"`{name}` is {value!r}; it must be a whole number of pixels, at least 1")
    return value


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config[name]
    if not isinstance(value, bool):
        raise CheckpointError(f"{FILE}: `{name}` is {value!r}; it must be true or false")
    return value


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{FILE}: `{name}` is {value!r}; it must be a number above 0")
    return float(value)


def _channels(name: str, value: Any) -> tuple[float, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise CheckpointError(f"{FILE}: `{name}` is {value!r}; it must be one number or three (red, green, blue)")
    return tuple(map(float, values))


def _resample_name(value: Any) -> Resample:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _CODES:
        known = [f"{code} ({name})" for code, name in _CODES.items()]
        raise CheckpointError(f"{FILE}: `resample` is {value!r}", known=known)
    return _CODES[value]
