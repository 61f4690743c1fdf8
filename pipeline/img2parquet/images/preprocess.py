"""Resize and crop pixels to uint8 of the model's input size; rescale and normalise them on the device.

- The crop equals that of the checkpoint's own image processor in every uint8 value: of its torchvision backend, or with
  `preprocess: pil` of its PIL backend and of timm. `PreprocessSettings.pixels` says which.
- Bilinear and bicubic use torch's antialiased uint8 kernels; other filters, and `pil`, use Pillow. `describe` says so.
- Images without a resize or a crop to one size are compared with the size that is stated, and others rejected: each row
  of an output then has the same shape, whatever else is in its batch.
- A model of one channel gets Pillow's luma, one of four RGBA, in which an image without transparency is opaque.
- Keys that a processor's class does not read (`crop_pct`, `do_reduce_labels`, ...) change no pixel there and none here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from img2parquet.errors import CheckpointError, nearest
from img2parquet.schema import Pixels, Rejection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Resize = Literal["shortest_edge", "exact", "none"]
Arithmetic = Literal["torchvision", "pil", "timm"]
Pair = tuple[int, int]
Size = int | tuple[int, int] | list[int] | None
Covered = tuple[float, float] | None
Uint8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PreprocessSettings:
    """The steps of a checkpoint's processor for an RGB image, as effective values in pixels.

    resize: "shortest_edge" scales the short side to `resize_height`; "exact" squashes to height x width; "none" keeps
        the size.
    crop_height, crop_width: a centre crop (zero-padded where the image is smaller), or None.
    rescale_factor: 1 means no rescaling.
    max_resized_pixels: an image whose resize would hold more than this is rejected.
    longest_edge: with "shortest_edge", the most that the long side may have; the short side is then smaller.
    stated_HW: the size that a resize without a crop must give; an image that comes out at another one is rejected.
    channels: 1 for grey, 3 for RGB, 4 for RGBA.
    pixels: whose arithmetic is followed to the last bit: transformers' torchvision backend, its PIL backend, or timm's
        (Pillow too, but with torchvision's crop). They differ in the resize, the side that an odd margin is cut from or
        padded at, and the order of rescaling and normalising."""

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
    pixels: Arithmetic = "torchvision"
    longest_edge: int | None = None
    stated_HW: tuple[int, int] | None = None
    channels: int = 3

    @property
    def size_HW(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        if self.stated_HW is not None:
            return self.stated_HW
        if self.crop_height is not None and self.crop_width is not None:
            return self.crop_height, self.crop_width
        return self.resize_height, self.resize_width

    @property
    def shape_HWC(self) -> tuple[int, int, int]:
        """Height, width and channels of the model's input."""
        return *self.size_HW, self.channels

    @property
    def keeps_whole_image(self) -> bool:
        """Whether the model sees all of an image, and not a crop of it."""
        return self.crop_height is None or (self.resize == "exact" and self.size_HW == self.resized_HW)

    @property
    def resized_HW(self) -> tuple[int, int]:
        """Height and width of an `exact` resize."""
        return self.resize_height, self.resize_width

    @property
    def geometry(self) -> PreprocessSettings:
        """These settings without the steps on the device. Models with equal geometry share their crops."""
        return replace(self, rescale_factor=1.0, mean=(), std=(), do_normalize=False)

    @property
    def backend(self) -> Literal["torch", "pillow"]:
        """The library that resizes."""
        return "torch" if self.pixels == "torchvision" and self.resample in ("bilinear", "bicubic") else "pillow"


def describe(settings: PreprocessSettings) -> dict[str, Any]:
    """Return what the run's identity records about preprocessing, as JSON values."""
    values = {**asdict(settings), "mean": list(settings.mean), "std": list(settings.std)}
    values["stated_HW"] = list(settings.stated_HW or ())
    # identities from before there was a choice stay as they are
    before: dict[str, Any] = {"pixels": "torchvision", "longest_edge": None, "stated_HW": [], "channels": 3}
    values = {name: value for name, value in values.items() if name not in before or value != before[name]}
    return {**values, "backend": f"{settings.backend} uint8 antialiased", "crop_offset": "floor", "padding": "zero"}


class Preprocessor:
    """Resize and crop images as `settings` describe."""

    def __init__(self, settings: PreprocessSettings) -> None:
        self.settings = settings
        self._resize = _by_torch if settings.backend == "torch" else _by_pillow

    def __call__(self, pixels: Pixels, out: Uint8 | None = None) -> Uint8 | Rejection:
        """Return the uint8 crop (H, W, C), or a Rejection for an image that is too long and thin, or of a wrong size.

        The crop is written into `out` (H, W, C) if given."""
        source_HW = pixels.height, pixels.width
        size_HW = resized_size(source_HW, self.settings)
        if self.settings.stated_HW is not None and size_HW != self.settings.stated_HW:
            return _wrong_size(source_HW, size_HW, self.settings)
        if min(size_HW) < 1:
            return _too_long(source_HW, size_HW, self.settings.max_resized_pixels)
        # the kernels resize the width first: the intermediate image has the source's rows and the result's columns
        intermediate_pixels = source_HW[0] * size_HW[1]
        if max(size_HW[0] * size_HW[1], intermediate_pixels) > self.settings.max_resized_pixels:
            return _too_long(source_HW, size_HW, self.settings.max_resized_pixels)
        image_HWC = in_channels(pixels, self.settings.channels)
        if size_HW != source_HW:
            image_HWC = self._resize(image_HWC, size_HW, self.settings.resample, _covered(pixels))
        return center_crop(image_HWC, self.settings.size_HW, out, self.settings.pixels)


def resized_size(source_HW: tuple[int, int], settings: PreprocessSettings) -> tuple[int, int]:
    """Return height and width after the resize. The long side is truncated from float division, not rounded."""
    if settings.resize == "none":
        return source_HW
    if settings.resize == "exact":
        return settings.resize_height, settings.resize_width
    short, long = min(source_HW), max(source_HW)
    if settings.longest_edge is not None:
        return _bounded_size(source_HW, settings.resize_height, settings.longest_edge)
    new_short, new_long = settings.resize_height, int(settings.resize_height * long / short)
    return (new_long, new_short) if source_HW[1] <= source_HW[0] else (new_short, new_long)


def _bounded_size(source_HW: Pair, shortest: int, longest: int) -> Pair:
    """Return height and width after a resize of the short side to `shortest`, or less where the long side would have
    more than `longest`, rounded as the reference does."""
    short, long = min(source_HW), max(source_HW)
    edge: float = shortest
    if long / short * shortest > longest:
        edge = longest * float(short) / long
    new_short = round(edge)
    if new_short == short:
        return source_HW
    new_long = int(edge * long / short)
    return (new_long, new_short) if source_HW[1] < source_HW[0] else (new_short, new_long)


def in_channels(pixels: Pixels, channels: int) -> Uint8:
    """Return an image with the model's number of channels, (H, W, C): Pillow's luma, RGB, or RGBA."""
    if channels == 1:
        from PIL import Image

        return np.asarray(Image.fromarray(pixels.rgb_HWC).convert("L"))[..., None]
    if channels == 4:
        if pixels.rgba_HWC is not None:
            return pixels.rgba_HWC
        return np.pad(pixels.rgb_HWC, ((0, 0), (0, 0), (0, 1)), constant_values=255)
    return pixels.rgb_HWC


def center_crop(
    image_HWC: Uint8, size_HW: tuple[int, int], out: Uint8 | None = None, pixels: Arithmetic = "torchvision"
) -> Uint8:
    """Crop or zero-pad an image around its centre: (h, w, C) -> (H, W, C).

    An odd margin is cut and padded at the bottom right; but the PIL backend pads the top left by more, and timm cuts a
    margin of 3, 7, 11, ... at the top left by more."""
    (top, y, height), (left, x, width) = (
        _overlap(image, crop, pixels) for image, crop in zip(image_HWC.shape[:2], size_HW, strict=True)
    )
    crop_HWC = np.empty((*size_HW, image_HWC.shape[2]), np.uint8) if out is None else out
    if (height, width) != size_HW:
        crop_HWC[...] = 0
    crop_HWC[y : y + height, x : x + width] = image_HWC[top : top + height, left : left + width]
    return crop_HWC


def _overlap(image: int, crop: int, pixels: Arithmetic) -> tuple[int, int, int]:
    """Return, along one axis, the start of the overlap in the image, its start in the crop, and its length."""
    if image >= crop:
        return (round((image - crop) / 2) if pixels == "timm" else (image - crop) // 2), 0, crop
    return 0, (crop - image + (pixels == "pil")) // 2, image


def _too_long(source_HW: tuple[int, int], size_HW: tuple[int, int], limit: int) -> Rejection:
    (height, width), (new_height, new_width) = source_HW, size_HW
    limits = f"past {limit} pixels on the way" if new_height and new_width else "which leaves nothing of it"
    return Rejection("aspect_ratio", f"{width} x {height} would be resized to {new_width} x {new_height}, {limits}")


def _wrong_size(source_HW: Pair, size_HW: Pair, settings: PreprocessSettings) -> Rejection:
    (height, width), (wanted_height, wanted_width) = source_HW, settings.size_HW
    found = f"{width} x {height}"
    if settings.resize == "none":
        cause, instead = f"is not resized (`do_resize: false` in {FILE})", "`do_resize: true`"
    else:
        found, cause = f"{found}, resized to {size_HW[1]} x {size_HW[0]},", f"is not cropped ({FILE})"
        instead = '`"do_center_crop": true` and `crop_size`'
    message = f"{found} {cause}, and the model takes {wanted_width} x {wanted_height}"
    return Rejection("wrong_size", f"{message}: write {instead} there, or another `image_size` in the job")


def _covered(pixels: Pixels) -> Covered:
    """Return the height and width that the source covers in a smaller image, in its pixels; None at full size.

    1601 columns at half size are 801, of which the last is half covered. Without this, the resize would shift the right
    side by up to half a pixel of its result."""
    return None if pixels.shrunk == 1 else (pixels.height / pixels.shrunk, pixels.width / pixels.shrunk)


def _by_torch(image_HWC: Uint8, size_HW: Pair, resample: Resample, covered_HW: Covered = None) -> Uint8:
    import torch

    kernels = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa, "bicubic": torch.ops.aten._upsample_bicubic2d_aa}
    # torch takes no negative strides and warns about read-only memory
    usable_HWC = np.require(image_HWC, requirements=["C", "W"])
    # a channels-last view: a contiguous (C, H, W) copy costs several times more on large images. The batch dimension is
    # added first: otherwise torch does not see channels last, returns (C, H, W), and turning that doubles the time
    image_1CHW = torch.from_numpy(usable_HWC)[None].permute(0, 3, 1, 2)
    scales_HW = [size / covered for size, covered in zip(size_HW, covered_HW, strict=True)] if covered_HW else ()
    resized_1CHW = kernels[resample](image_1CHW, list(size_HW), False, *scales_HW)
    return cast(Uint8, resized_1CHW[0].permute(1, 2, 0).numpy())


def _by_pillow(image_HWC: Uint8, size_HW: Pair, resample: Resample, covered_HW: Covered = None) -> Uint8:
    from PIL import Image

    code, box = Image.Resampling[resample.upper()], (0, 0, *covered_HW[::-1]) if covered_HW else None
    image = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
    return np.asarray(image.resize(size_HW[::-1], code, box)).reshape(*size_HW, -1)


def normalize_on_device(x_BHWC: Tensor, settings: PreprocessSettings, dtype: torch.dtype) -> Tensor:
    """Rescale and normalise: uint8 (B, H, W, C) -> (B, C, H, W) in `dtype`, channels-last.

    The operations are in the reference's order: its torchvision backend does both in one, its PIL backend rescales in
    float64, and timm divides by 255."""
    import torch

    # a fresh copy, so that the in-place steps do not change the caller's pixels
    first = torch.float64 if settings.pixels == "pil" else torch.float32
    x_BCHW = x_BHWC.permute(0, 3, 1, 2).to(first, memory_format=torch.channels_last, copy=True)
    if settings.pixels == "timm":
        x_BCHW.div_(255)
    elif settings.pixels == "pil":
        x_BCHW = x_BCHW.mul_(settings.rescale_factor).to(torch.float32)
    elif not settings.do_normalize and settings.rescale_factor != 1:
        x_BCHW.mul_(settings.rescale_factor)
    if settings.do_normalize:
        mean_C11, std_C11 = _mean_and_std(settings, x_BCHW.device)
        x_BCHW.sub_(mean_C11).div_(std_C11)
    return x_BCHW.to(dtype)


@functools.lru_cache
def _mean_and_std(settings: PreprocessSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, each (C, 1, 1): in uint8 levels, or where rescaling comes first as they are.

    They are cached: moving them to a GPU for each batch would wait for the batch before."""
    import torch

    with torch.inference_mode(False):
        scale = 1.0 / settings.rescale_factor if settings.pixels == "torchvision" else 1.0
        levels = torch.tensor([settings.mean, settings.std], dtype=torch.float32) * scale
        mean_C11, std_C11 = levels.to(device)[..., None, None]
        return mean_C11, std_C11


# --- preprocessor_config.json ----------------------------------------------------------------------------------------

_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CODES: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
FILTERS = frozenset(_CODES.values())
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
FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square")
PROCESSORS: dict[str, Mapping[str, Any]] = {  # defaults of each class, for keys that a checkpoint leaves out
    "BeitImageProcessor": {**COMMON, **_HALF, "resample": 3},
    "BitImageProcessor": {**COMMON, **_EDGE_AND_CROP, **_CLIP},
    "BlipImageProcessor": {**COMMON, **_CLIP, "size": {"height": 384, "width": 384}, "resample": 3},
    "CLIPImageProcessor": {**COMMON, **_EDGE_AND_CROP, **_CLIP},
    "ChineseCLIPImageProcessor": {**COMMON, **_EDGE_AND_CROP, **_CLIP},
    "DeiTImageProcessor": {
        **COMMON, **_HALF, "size": {"height": 256, "width": 256}, "resample": 3, "do_center_crop": True
    },
    "LevitImageProcessor": {**COMMON, **_EDGE_AND_CROP, **IMAGENET, "edge_factor": 256 / 224},
    "MobileNetV1ImageProcessor": {**COMMON, **_EDGE_AND_CROP, **_HALF, "size": {"shortest_edge": 256}, "resample": 2},
    "PvtImageProcessor": {**COMMON, **IMAGENET, "resample": 3},
    "SegformerImageProcessor": {**COMMON, **IMAGENET, "size": {"height": 512, "width": 512}},
    "SiglipImageProcessor": {**COMMON, **_HALF, "resample": 3, "default_to_square": False},
    "ViTImageProcessor": {**COMMON, **_HALF, "crop_size": None},
    # these have rules of their own, which models/processor.py converts
    "ConvNextImageProcessor": {
        **COMMON, **_HALF, "size": {"shortest_edge": 384}, "resample": 3, "default_to_square": False
    },
    "DINOv3ViTImageProcessor": {**COMMON, **IMAGENET},
    "Mask2FormerImageProcessor": {**COMMON, **IMAGENET, "size": {"shortest_edge": 800}},
    "MaskFormerImageProcessor": {**COMMON, **IMAGENET, "size": {"shortest_edge": 800}},
}  # fmt: skip
FILE = "preprocessor_config.json"


def read_settings(
    config: Mapping[str, Any] | None,
    processor: str,
    image_size: Size = None,
    own_size: Size = None,
    channels: int = 3,
) -> PreprocessSettings:
    """Read the settings from a checkpoint's preprocessor_config.json, whatever version of transformers wrote it.

    processor: the class to assume when the file names none.
    image_size: one side, or height and width, to replace the size of the model's input. The share that is cropped away
    stays the same: LeViT's resize to 256 with a crop of 224 becomes 329 with 288. Without a crop or a fixed resize it
    is the one size that images must come out at.
    own_size: the size in config.json, which counts with `do_resize: false` if there is no `image_size`.
    channels: the model's `num_channels`.
    Raises CheckpointError for settings that are invalid or not supported."""
    given = section(config)
    defaults = PROCESSORS[processor_name(given, processor)]
    merged = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    merged |= {key: False for key in FLAGS if key in given and given[key] is None}  # as the reference reads null
    merged["edge_factor"] = defaults.get("edge_factor", 1)
    stated = {"image_size": image_size, "config.json: image_size": own_size}
    sizes_HW = [None if size is None else pair(name, size) for name, size in stated.items()]
    do_normalize = _flag(merged, "do_normalize")
    levels = merged if do_normalize or channels == 3 else {"image_mean": 0.0, "image_std": 1.0}
    settings = PreprocessSettings(
        **_geometry(merged, *sizes_HW),
        resample=_resample_name(merged["resample"]),
        rescale_factor=_positive("rescale_factor", merged["rescale_factor"]) if _flag(merged, "do_rescale") else 1.0,
        mean=_channels("image_mean", levels["image_mean"], channels),
        std=tuple(_positive("image_std", value) for value in _channels("image_std", levels["image_std"], channels)),
        do_normalize=do_normalize,
        channels=channels,
    )
    if merged.get("do_pad"):
        _refuse_padding(merged.get("pad_size"), settings.size_HW)
    return settings


def reduces_labels(config: Mapping[str, Any] | None) -> bool:
    """Whether the processor treats class 0 of a ground-truth map as background.

    The key's old name `reduce_labels` counts as well, although newer versions of the reference ignore it."""
    given = section(config)
    reduces = given.get("do_reduce_labels")
    return bool(given.get("reduce_labels") if reduces is None else reduces)


def section(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a file that is about images: newer files hold one section per modality."""
    given = dict(config or {})
    images = given.get("image_processor") or given
    if not isinstance(images, Mapping):
        raise CheckpointError(f"{FILE}: `image_processor` is {images!r}, not an object")
    return dict(images)


def processor_name(config: Mapping[str, Any], otherwise: str) -> str:
    """Return the class's name in its plain spelling: `ViTFeatureExtractor`, `ViTImageProcessorFast` and
    `ViTImageProcessorPil` are all `ViTImageProcessor`."""
    spelled = str(config.get("image_processor_type") or config.get("feature_extractor_type") or otherwise)
    name = spelled.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        hint = nearest(name, PROCESSORS) or f"set `image_processor_type` in {FILE} to an equivalent class"
        raise CheckpointError(f"{FILE}: unknown image processor `{spelled}`", known=PROCESSORS, hint=hint)
    return name


def _geometry(config: Mapping[str, Any], image_HW: Pair | None, own_HW: Pair | None) -> dict[str, Any]:
    """Return the settings of the resize and of the crop after it."""
    size = _size_dict("size", config["size"], square=bool(config["default_to_square"]))
    crop_HW = _crop_size(config)
    if crop_HW is None:
        return _geometry_without_crop(config, size, image_HW, own_HW)
    final_HW = image_HW or crop_HW
    if not _flag(config, "do_resize"):
        return _resize("none", final_HW, final_HW)
    if "shortest_edge" in size:
        shortest, longest = _edges(config, size)
        edge = max(map(_scaled, (shortest, shortest), crop_HW, final_HW))
        bound = {} if longest is None else {"longest_edge": max(1, longest * edge // shortest)}
        edge = int(config["edge_factor"] * edge)
        return {**_resize("shortest_edge", (edge, edge), final_HW), **bound}
    return _resize("exact", tuple(map(_scaled, _sides("size", size), crop_HW, final_HW)), final_HW)


def _geometry_without_crop(
    config: Mapping[str, Any], size: Mapping[str, Any], image_HW: Pair | None, own_HW: Pair | None
) -> dict[str, Any]:
    resizes = _flag(config, "do_resize")
    if resizes and "shortest_edge" not in size:
        return _resize("exact", image_HW or _sides("size", size), None)
    stated_HW = image_HW if resizes else image_HW or own_HW
    if stated_HW is None:
        message = f"{FILE}: without a fixed resize or a centre crop, images reach the model in different sizes"
        hint = "set `image_size: [height, width]` in the job, for images that all come out at that size, or "
        raise CheckpointError(message, hint=f'{hint}`"do_center_crop": true` and `crop_size` in {FILE}')
    if not resizes:
        return {**_resize("none", stated_HW, None), "stated_HW": stated_HW}
    shortest, longest = _edges(config, size)
    if longest is None:  # the stated size says what the short side is resized to
        shortest = min(stated_HW)
    elif not _is_reachable(stated_HW, shortest, longest):
        message = (
            f"image_size {stated_HW[0]}x{stated_HW[1]}: no image is resized to it by `size` {dict(size)} in {FILE}"
        )
        raise CheckpointError(message, hint="state the size that your images come out at, or change `size`")
    bound = {} if longest is None else {"longest_edge": longest}
    return {**_resize("shortest_edge", (shortest, shortest), None), **bound, "stated_HW": stated_HW}


def _refuse_padding(pad_size: Any, size_HW: Pair) -> None:
    """Raise CheckpointError if images would be padded. Without a `pad_size` the reference pads to the largest image of
    a batch, and here all have one size."""
    if pad_size is None:
        return
    size = _size_dict("pad_size", pad_size, square=True)
    if (size.get("height"), size.get("width")) != size_HW:
        message = f"{FILE}: `do_pad` with `pad_size` {pad_size!r}, where images have {size_HW[0]}x{size_HW[1]}"
        raise CheckpointError(message, hint="set `do_pad` to false there: images are not padded here")


def _resize(kind: Resize, size_HW: tuple[int, ...], crop_HW: Pair | None) -> dict[str, Any]:
    crop_height, crop_width = crop_HW or (None, None)
    sides = {"resize_height": size_HW[0], "resize_width": size_HW[1]}
    return {"resize": kind, **sides, "crop_height": crop_height, "crop_width": crop_width}


def _edges(config: Mapping[str, Any], size: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the shortest and the longest edge; LeViT's class does not look at the latter."""
    shortest = _whole("size.shortest_edge", size["shortest_edge"])
    if "longest_edge" not in size or config["edge_factor"] != 1:
        return shortest, None
    return shortest, _whole("size.longest_edge", size["longest_edge"])


def _is_reachable(size_HW: Pair, shortest: int, longest: int) -> bool:
    short, long = min(size_HW), max(size_HW)
    # the long side may lose a pixel when it is truncated
    return short <= shortest and long <= longest and (short == shortest or long >= longest - 1)


def _scaled(side: int, crop: int, final: int) -> int:
    """Scale a side by final / crop, so that it keeps its proportion to the crop; in integers, so 288 stays 288."""
    return max(1, side * final // crop)


def _crop_size(config: Mapping[str, Any]) -> Pair | None:
    if not _flag(config, "do_center_crop"):
        return None
    if config["crop_size"] is None:
        raise CheckpointError(f"{FILE}: `do_center_crop` without `crop_size`", hint=f"set `crop_size` in {FILE}")
    size = _size_dict("crop_size", config["crop_size"], square=True)
    if "shortest_edge" in size:
        message = f"{FILE}: `crop_size` needs a height and a width, not `shortest_edge`"
        raise CheckpointError(message, hint='write `"crop_size": {"height": 224, "width": 224}`, for example')
    return _sides("crop_size", size)


def _sides(name: str, size: Mapping[str, Any]) -> Pair:
    return _whole(f"{name}.height", size["height"]), _whole(f"{name}.width", size["width"])


def _size_dict(name: str, value: Any, square: bool) -> Mapping[str, Any]:
    """Return {"shortest_edge": s} or {"height": h, "width": w} for any spelling: such a dict, [h, w], or one side."""
    if isinstance(value, Mapping):
        given = {key: entry for key, entry in value.items() if entry is not None}
        if given.keys() in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"}):
            return given
        known = ['{"shortest_edge": s}', '{"shortest_edge": s, "longest_edge": l}', '{"height": h, "width": w}', "s"]
        raise CheckpointError(f"{FILE}: `{name}` is {dict(value)}", known=known)
    if isinstance(value, list | tuple):
        height, width = pair(name, value)
        return {"height": height, "width": width}
    return {"height": value, "width": value} if square else {"shortest_edge": value}


def pair(name: str, value: Any) -> Pair:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise CheckpointError(f"`{name}` is {value!r}", hint="write one side, or [height, width]")
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


def _channels(name: str, value: Any, count: int) -> tuple[float, ...]:
    """Read one number for all channels, or one for each. Equal numbers for another count of channels are one number."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) == 1 or (count != 3 and len(values) == 3 and len(set(map(str, values))) == 1):
        values = values[:1] * count
    if len(values) != count or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        colours = {1: "(grey)", 3: "or three (red, green, blue)", 4: "or four (red, green, blue, alpha)"}[count]
        because = "" if count == 3 else f", since config.json has `num_channels: {count}`"
        raise CheckpointError(f"{FILE}: `{name}` is {value!r}; it must be one number {colours}{because}")
    return tuple(map(float, values))


def _resample_name(value: Any) -> Resample:
    """Read a filter: Pillow's number, or a name such as `bicubic` or `PILImageResampling.BICUBIC`."""
    name = _CODES.get(value) if type(value) is int else str(value).rpartition(".")[-1].lower()
    if name not in FILTERS:
        known = [f"{code} ({name})" for code, name in _CODES.items()]
        raise CheckpointError(f"{FILE}: `resample` is {value!r}", known=known)
    return name
