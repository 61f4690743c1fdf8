"""Find a checkpoint's image processor on disk, and read it as our settings: files -> sizes, filter, mean, std, notes.

* transformers 5 writes `processor_config.json` with a section for images; older versions, and image processors saved
  alone, write `preprocessor_config.json`. As in the reference, that section comes first.
* Two classes have rules of their own, converted here; `images.preprocess.PROCESSORS` has the defaults of the others.
* What is assumed because no file says it ends up in the notes, which `Card` carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from img2parquet.errors import CheckpointError
from img2parquet.images.preprocess import (
    FILE,
    PROCESSORS,
    Arithmetic,
    PreprocessSettings,
    Size,
    processor_name,
    read_settings,
    reduces_labels,
    section,
)
from img2parquet.models.checkpoint import read_json
from img2parquet.models.family import ModelSpec

PROCESSOR = "processor_config.json"
PROCESSOR_FILES = (PROCESSOR, FILE)
UNREAD = {"SegformerImageProcessor": ("do_center_crop",)}  # keys that a class of the reference does not look at
COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}
STEPS = {
    "size": "do_resize", "resample": "do_resize", "crop_size": "do_center_crop", "rescale_factor": "do_rescale",
    "image_mean": "do_normalize", "image_std": "do_normalize",
}  # fmt: skip


def pixels_of(spec: ModelSpec) -> Arithmetic:
    """Return whose arithmetic a model of transformers, or of ours, follows with the job's `preprocess`."""
    return "pil" if spec.preprocess == "pil" else "torchvision"


@dataclass(frozen=True)
class Processor:
    """A checkpoint's image processor as our settings. notes: what was assumed, or differs from the reference."""

    settings: PreprocessSettings
    reduces_labels: bool
    notes: tuple[str, ...] = ()


def open_processor(
    folder: Path, config: Mapping[str, Any], otherwise: str, image_size: Size = None, pixels: Arithmetic = "torchvision"
) -> Processor:
    """Read the image processor of a checkpoint's folder. Raises CheckpointError, naming the file.

    config: its config.json, whose image size counts where there is no processor. otherwise: the class to assume.
    image_size, pixels: what the job asks for, see `read_processor`."""
    name, written = _written(folder)
    try:
        return read_processor(written, config, otherwise, image_size, pixels)
    except CheckpointError as error:
        message, hint = (text.replace(FILE, name) for text in (error.message, error.hint))
        raise CheckpointError(message, known=error.known, hint=hint) from None


def read_processor(
    written: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    otherwise: str,
    image_size: Size = None,
    pixels: Arithmetic = "torchvision",
) -> Processor:
    """Read an image processor as its file has it, or the defaults of the class `otherwise` if there is none.

    image_size: one side, or height and width, in place of the model's own. pixels: whose arithmetic to follow,
    `torchvision`, `pil` or `timm`. Raises CheckpointError for settings that are invalid or not supported."""
    given = section(written)
    kind = processor_name(given, otherwise)
    nulls = _nulls(given, PROCESSORS[kind])
    given = {key: value for key, value in given.items() if key not in UNREAD.get(kind, ())}
    if written is None and image_size is None:
        image_size = _own_size(config)
    if kind == "ConvNextImageProcessor":
        given = _convnext(given, image_size)
        image_size = image_size if given.get("do_resize") is False else None
    elif kind in ("Mask2FormerImageProcessor", "MaskFormerImageProcessor"):
        given, image_size, otherwise = _mask2former(given, image_size), None, "SegformerImageProcessor"
    read = read_settings(given, otherwise, image_size, _own_size(config), channels_of(config))
    settings = replace(read, pixels=pixels)
    notes = [f"{FILE}: `{key}` is null: the default of {kind} is used" for key in nulls]
    return Processor(settings, reduces_labels(written), (*notes, *_notes(written, kind, settings)))


def _written(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """Return the name of the file that has the image processor, and the processor; None if no file has it."""
    if (folder / PROCESSOR).is_file():
        images = read_json(folder / PROCESSOR).get("image_processor")
        if images is not None:
            return PROCESSOR, {"image_processor": images}
    return FILE, read_json(folder / FILE) if (folder / FILE).is_file() else None


def _nulls(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """List the settings of steps that are done whose value is null: transformers 5 refuses them."""
    steps = {**defaults, **given}
    return [key for key, step in STEPS.items() if key in given and given[key] is None and steps[step]]


def channels_of(config: Mapping[str, Any]) -> int:
    """Return the number of channels that a model, or its image tower, takes: 1, 3 or 4. Raises CheckpointError."""
    vision = config.get("vision_config")
    channels = config.get("num_channels") or (vision.get("num_channels") if isinstance(vision, Mapping) else None) or 3
    if isinstance(channels, bool) or channels not in COLOURS:
        known = [f"{count} ({colours})" for count, colours in COLOURS.items()]
        hint = "an image file has no other channels: use a checkpoint with one of these"
        raise CheckpointError(f"config.json: num_channels: `{channels}`", known=known, hint=hint)
    return int(channels)


def _own_size(config: Mapping[str, Any]) -> Any:
    """Return the image size in config.json: the model's, or that of its image tower."""
    vision = config.get("vision_config")
    return config.get("image_size") or (vision.get("image_size") if isinstance(vision, Mapping) else None)


def _notes(written: Mapping[str, Any] | None, kind: str, settings: PreprocessSettings) -> list[str]:
    notes = []
    if written is None:
        notes.append(f"no {FILE}: the defaults of {kind} are used, {_in_words(settings)}")
    if settings.channels != 3:
        notes.append(
            f"images reach the model as {COLOURS[settings.channels]}: config.json has {settings.channels} channels"
        )
    if settings.stated_HW is not None:
        height, width = settings.stated_HW
        how = "are not resized (`do_resize: false`)" if settings.resize == "none" else "keep their shape"
        notes.append(f"images {how}: those that are not {width} x {height} pixels then are rejected (`wrong_size`)")
    if settings.pixels == "pil":
        notes.append("pixels are Pillow's, as the PIL backend of its processor makes them (`preprocess: pil`)")
    if kind.startswith("DINOv3"):
        notes.append(
            "its own processor resizes in floating point, ours in 8 bits: up to half a level apart (bilinear), more "
            "where bicubic overshoots"
        )
    if kind.startswith("Mask"):
        notes.append("images are squashed to one size, where its own processor keeps their shape")
    return notes


def _in_words(settings: PreprocessSettings) -> str:
    (height, width), edge = settings.size_HW, settings.resize_height
    resize = {"shortest_edge": f", cut from a short side of {edge}", "none": ", without a resize"}.get(
        settings.resize, ""
    )
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (settings.mean, settings.std))
    return f"{height}x{width}{resize}, {settings.resample}, mean ({mean}), std ({std})"


def _convnext(config: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """Convert ConvNeXt's rule: below 384 a crop out of `size / crop_pct`, from there on a squash."""
    rest = {key: value for key, value in config.items() if key not in ("size", "crop_pct")}
    if not config.get("do_resize", True):
        return {**rest, "size": 1, "do_resize": False}
    size = config.get("size") or 384
    edge = image_size or (size.get("shortest_edge") if isinstance(size, Mapping) else size)
    share = config.get("crop_pct") or 224 / 256
    if isinstance(edge, list | tuple) and len(set(edge)) == 1:
        edge = edge[0]
    if not isinstance(edge, int) or edge < 1 or not isinstance(share, int | float) or not 0 < share <= 1:
        hint = "its images are square: use one number"
        raise CheckpointError(f"{FILE}: size `{size}`, image_size `{image_size}`, crop_pct `{share}`", hint=hint)
    if edge >= 384:
        return {**rest, "size": {"height": edge, "width": edge}, "do_center_crop": False}
    crop = {"do_center_crop": True, "crop_size": {"height": edge, "width": edge}}
    return {**rest, **crop, "size": {"shortest_edge": int(edge / share)}}


def _mask2former(config: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """Resize all images to one size; Mask2Former's own resize keeps the aspect ratio, so that sizes differ."""
    left = ("size", "size_divisor", "do_pad", "image_processor_type", "feature_extractor_type")
    rest = {key: value for key, value in config.items() if key not in left}
    size: Any = config.get("size")
    if image_size is not None:
        height, width = image_size if isinstance(image_size, list | tuple) else (image_size, image_size)
        size = {"height": height, "width": width}
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        message = f"{FILE}: `size` is {size}: its images reach the model in different sizes"
        raise CheckpointError(
            message, hint="set `image_size: [512, 512]` in the job; all images are squashed to that size"
        )
    return {**rest, "size": dict(size)}
