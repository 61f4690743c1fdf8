"""A named checkpoint to a callable: images, or uint8 crops, to named features.

Shapes: B batch, H W the model's input size, C channels.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.device import as_tensor
from pipeline.errors import CheckpointError, InputError, OutputUnavailable, UnknownModel, nearest
from pipeline.models import FAMILIES, Backbone, Card, Family, Published
from pipeline.models.checkpoint import RandomWeights, Weights, check_depth, label_names, read_json, weight_files
from pipeline.models.external import External, is_external, open_external
from pipeline.models.hub import CONFIG, PREPROCESSOR, find
from pipeline.preprocess import Preprocessor, PreprocessSettings, normalize_on_device, read_settings, reduces_labels
from pipeline.schema import Bad, Pixels

if TYPE_CHECKING:
    from PIL import Image

Dtype = Literal["float32", "bfloat16", "float16"]
UInt8s = npt.NDArray[np.uint8]
DEFAULT_WANTS = ("pooled", "logits")


class Features(dict[str, Tensor]):
    """Features by name, also as attributes: `features.pooled`, `features["tokens:4"]`."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no feature `{name}` was asked for; there are {', '.join(self)}") from None


class Model:
    """A loaded checkpoint. Call it with images, or hand it crops with `forward_pixels`."""

    def __init__(self, card: Card, backbone: Backbone, dtype: torch.dtype, device: torch.device) -> None:
        self.card, self.backbone, self.dtype, self.device = card, backbone, dtype, device

    def __call__(self, images: Sequence[Image.Image | UInt8s], wants: Iterable[str] | None = None) -> Features:
        """PIL images or uint8 (H, W, 3) arrays of any size -> features on the host, float32. Without `wants`: the
        pooled vector and the logits, where the checkpoint has them."""
        asked = frozenset(DEFAULT_WANTS) & self.card.gives.keys() if wants is None else frozenset(wants)
        crops = [self._crop(index, image) for index, image in enumerate(images)]
        if not crops:
            raise InputError("no images were given")
        features = self.forward_pixels(np.stack(crops), asked)
        return Features({name: tensor.cpu() for name, tensor in features.items()})

    def forward_pixels(self, x_BHWC: UInt8s | Tensor, wants: frozenset[str], **inputs: Any) -> dict[str, Tensor]:
        """uint8 crops of the model's size -> the wanted features in float32, on the model's device. `inputs` are the
        backbone's further ones (`mask_BN`), tensors or arrays."""
        self.refuse_unknown(wants)
        pixels_BHWC = as_tensor(x_BHWC).to(self.device, non_blocking=True)
        self._refuse_other_sizes(pixels_BHWC)
        extra = {name: as_tensor(value).to(self.device) for name, value in inputs.items()}
        with torch.inference_mode():
            x_BCHW = normalize_on_device(pixels_BHWC, self.card.preprocess, self.dtype)
            features = self.backbone(x_BCHW, wants, **extra)
            return {name: features[name].float() for name in sorted(wants)}

    def refuse_unknown(self, wants: frozenset[str]) -> None:
        """Raises OutputUnavailable for a feature that this checkpoint cannot give, naming those that it can."""
        for name in sorted(wants - self.card.gives.keys()):
            message = f"`{self.card.name}` ({self.card.source}) cannot give `{name}`"
            hint = nearest(name, self.card.gives) or "ask for one of these, or take a checkpoint that has it"
            raise OutputUnavailable(message, known=_in_short(self.card.gives), hint=hint)

    def _refuse_other_sizes(self, pixels_BHWC: Tensor) -> None:
        height, width = self.card.preprocess.size_HW
        if (
            pixels_BHWC.dim() != 4
            or pixels_BHWC.dtype != torch.uint8
            or tuple(pixels_BHWC.shape[1:3]) != (height, width)
        ):
            got = f"{pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}"
            raise InputError(f"`{self.card.name}` takes uint8 crops (batch, {height}, {width}, channels), not {got}")

    @cached_property
    def _preprocessor(self) -> Preprocessor:
        return Preprocessor(self.card.preprocess)

    def _crop(self, index: int, image: Image.Image | UInt8s) -> UInt8s:
        crop = self._preprocessor(Pixels(rgb_of(index, image)))
        if isinstance(crop, Bad):
            raise InputError(f"images[{index}]: {crop.reason}: {crop.message}")
        return crop


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was found and read, but whose weights were not filled in."""

    name: str
    source: str
    family: Family
    config: Mapping[str, Any]
    preprocess: PreprocessSettings
    weights: Weights
    reduces_labels: bool = False

    @cached_property
    def module(self) -> Backbone:
        """The family's plain module on the meta device."""
        names = self.weights.names(self.family)
        settings = self.family.read_settings(self.config, self.preprocess.size_HW)
        with torch.device("meta"):
            return self.family.build(settings, names)

    def filled(self, dtype: torch.dtype, device: torch.device, fast: bool) -> Backbone:
        """The module with its weights, in its fast or its plain form."""
        module = cast(nn.Module, self.module)
        self.weights.fill(module, self.family)
        module.to(device)
        if not fast:
            return cast(Backbone, module.to(dtype))
        with torch.no_grad():
            return self.family.fold(self.module, dtype)

    def card(self) -> Card:
        """Raises CheckpointError where the weights do not fit what config.json says."""
        self.weights.check(cast(nn.Module, self.module), self.family)
        gives = self.module.gives()
        return Card(
            name=self.name,
            family=str(self.config.get("model_type", self.family.MODEL_TYPE)),
            source=self.source,
            weights_hash=self.weights.hash(),
            config=self.config,
            preprocess=self.preprocess,
            gives=gives,
            embedding=self.family.EMBEDDING if "pooled" in gives else "",
            labels=label_names(self.config) if {"logits", "segmentation"} & gives.keys() else (),
            parameters=sum(parameter.numel() for parameter in cast(nn.Module, self.module).parameters()),
            notes=tuple(getattr(self.module, "notes", ())),
            reduces_labels=self.reduces_labels,
        )


def load_model(
    model: str,
    *,
    name: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    storage_options: Mapping[str, object] | None = None,
    fast: bool = True,
) -> Model:
    """See `pipeline.models.load_model`."""
    place = _device(device)
    kind = _dtype(dtype, device)
    opened = open_checkpoint(model, name, image_size, weights, storage_options)
    card = opened.card()
    return Model(card, opened.filled(kind, place, fast), kind, place)


def read_card(
    model: str,
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Card:
    """See `pipeline.models.read_card`."""
    return open_checkpoint(model, name, image_size, weights, storage_options).card()


def open_checkpoint(
    model: str,
    name: str | None,
    image_size: int | tuple[int, int] | None,
    weights: str | None,
    storage_options: Mapping[str, object] | None,
) -> Opened | External:
    """Find the files, read what they say; no weight is read."""
    name = name or re.split(r"[/\\]", model.rstrip("/"))[-1].partition("@")[0].split(":")[-1]
    if is_external(model):
        return open_external(model, name, image_size, None if weights is None else _seed(weights), storage_options)
    if weights is not None:
        return _rehearsal(model, name, image_size, _seed(weights))
    repos = [entry.repo for _, entry in published()]
    found = find(model, storage_options, repos)
    config = read_json(found.folder / CONFIG)
    check_depth(config)
    family = family_of(config, found.source)
    channels = config.get("num_channels", 3)
    if channels != 3:
        raise CheckpointError(f"{found.source}: {CONFIG}: num_channels: `{channels}`, but images are read as RGB")
    written = found.folder / PREPROCESSOR
    processor = read_json(written) if written.is_file() else None
    preprocess = _preprocess(family, config, processor, image_size)
    return Opened(name, found.source, family, config, preprocess, weight_files(found.folder), reduces_labels(processor))


def published() -> list[tuple[Family, Published]]:
    """Every checkpoint that a family knows by name."""
    return [(family, entry) for family in dict.fromkeys(map(_family, FAMILIES)) for entry in family.PUBLISHED]


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that config.json names. Raises UnknownModel with the known ones and the nearest."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return _family(model_type)
    hint = nearest(str(model_type), FAMILIES) or "`model_type` in config.json names the architecture"
    said = "no `model_type`" if model_type is None else f"unknown family `{model_type}`"
    raise UnknownModel(f"{where}: {CONFIG}: {said}", known=FAMILIES, hint=hint)


def resolve_dtype(dtype: str, device: str = "cpu") -> str:
    """`auto` -> bfloat16 where the device multiplies it faster than float32 (GPUs, CPUs with matrix units)."""
    if dtype != "auto":
        return dtype
    if torch.device(device).type != "cpu":
        return "bfloat16"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def _dtype(dtype: str, device: str) -> torch.dtype:
    name = resolve_dtype(dtype, device)
    if name not in get_args(Dtype):
        known = ("auto", *get_args(Dtype))
        raise InputError(f"unknown dtype `{dtype}`", known=known, hint=nearest(dtype, known))
    return cast(torch.dtype, getattr(torch, name))


def _device(device: str) -> torch.device:
    """Raises InputError for a device that is not here. On GPUs, float32 is made to mean float32."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device `{device}` cannot be used: {first}", hint="leave it out, or say `cpu`") from None
    if place.type == "cuda":  # convolutions would use TF32, whose 10 bits break the promise of 1e-5
        torch.backends.cudnn.allow_tf32 = False
    return place


def _family(model_type: str) -> Family:
    return cast(Family, importlib.import_module(FAMILIES[model_type]))


def _preprocess(
    family: Family,
    config: Mapping[str, Any],
    written: Mapping[str, Any] | None,
    image_size: int | tuple[int, int] | None,
) -> PreprocessSettings:
    """The processor's own file, else its class's defaults at the model's own size."""
    if written is None and image_size is None:
        image_size = config.get("image_size")
    if isinstance(image_size, list):
        image_size = (image_size[0], image_size[1])
    return read_settings(written, family.PROCESSOR, image_size)


def _rehearsal(model: str, name: str, image_size: int | tuple[int, int] | None, seed: int) -> Opened:
    by_repo = {entry.repo: (family, entry) for family, entry in published()}
    repo = model.partition("@")[0]
    if repo not in by_repo:
        message = f"no published model `{repo}` to build with random weights"
        close = difflib.get_close_matches(repo, by_repo, n=1, cutoff=0.4)
        raise UnknownModel(message, known=by_repo, hint=f"did you mean `{close[0]}`?" if close else "")
    family, entry = by_repo[repo]
    config = {"model_type": family.MODEL_TYPE, "architectures": [entry.architecture], **entry.config}
    preprocess = _preprocess(family, config, entry.preprocessor, image_size)
    weights = RandomWeights(seed, str(config["model_type"]), entry.architecture, config)
    source = f"{repo} with random({seed}) weights"
    return Opened(name, source, family, config, preprocess, weights, reduces_labels(entry.preprocessor))


def _seed(weights: str) -> int:
    match = re.fullmatch(r"random\((\d+)\)", weights.strip())
    if not match:
        raise CheckpointError(f"weights: `{weights}` is not understood", hint="leave it out, or write `random(0)`")
    return int(match[1])


def _in_short(names: Iterable[str]) -> list[str]:
    """Names as they are, but runs of `tokens:0`, `tokens:1`, ... as one."""
    counts: dict[str, list[str]] = {}
    for name in names:
        stem, _, number = name.rpartition(":")
        counts.setdefault(stem if number.isdigit() else name, []).append(name)
    return [found[0] if len(found) == 1 else f"{found[0]} ... {found[-1]}" for found in counts.values()]


def rgb_of(index: int, image: Image.Image | UInt8s) -> UInt8s:
    """As a job's `decode` does it: upright, transparency on white. Raises InputError for `images[index]`."""
    if not isinstance(image, np.ndarray):
        return _rgb_of_pil(index, image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"images[{index}]: {image.dtype} {image.shape} is not a uint8 (height, width, 3) array")
    return image


def _rgb_of_pil(index: int, image: Image.Image) -> UInt8s:
    from PIL import Image as PILImage
    from PIL import ImageOps

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        message = f"images[{index}]: mode {image.mode} has more than 8 bits, of a range that is not known"
        raise InputError(message, hint="scale it to 8 bits first")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
