"""Open a checkpoint by name and load it as a callable from images, or uint8 crops, to named features.

Shapes: B batch, H W the model's input size, C channels.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from img2parquet.errors import CheckpointError, InputError, OutputUnavailable, UnknownModel, nearest
from img2parquet.images.preprocess import (
    Preprocessor,
    PreprocessSettings,
    normalize_on_device,
)
from img2parquet.models.checkpoint import RandomWeights, Weights, check_depth, known_labels, read_json, weight_files
from img2parquet.models.dtypes import resolve_dtype, torch_dtype
from img2parquet.models.external import External, is_external, open_external
from img2parquet.models.family import FAMILIES, Backbone, Card, Family, ModelSpec, Published, TextFamily, head_notes
from img2parquet.models.hub import CONFIG, OPEN_CLIP_CONFIG, find
from img2parquet.models.open_clip import read_open_clip
from img2parquet.models.processor import Processor, open_processor, pixels_of, read_processor
from img2parquet.models.prompts import ClassPrompts
from img2parquet.models.tensors import as_tensor
from img2parquet.models.text import Text, Tokenizer
from img2parquet.models.two_towers import TextTower
from img2parquet.models.zero_shot import ZeroShot
from img2parquet.schema import Pixels, Rejection

if TYPE_CHECKING:
    from PIL import Image

UInt8s = npt.NDArray[np.uint8]
DEFAULT_WANTS = ("pooled", "logits")


class Features(dict[str, Tensor]):
    """Features by name, also as attributes: `features.pooled`, `features["tokens:4"]`."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"feature `{name}` was not requested; there are {', '.join(self)}") from None


class Model:
    """A loaded checkpoint. Call it with images, or pass crops to `forward_pixels`."""

    def __init__(
        self,
        card: Card,
        backbone: Backbone,
        dtype: torch.dtype,
        device: torch.device,
        open_text: Callable[[], Text] | None = None,
    ) -> None:
        """open_text: loads the text tower, where the checkpoint has one."""
        self.card, self.backbone, self.dtype, self.device = card, backbone, dtype, device
        self._open_text = open_text

    def __call__(
        self, images: Sequence[Image.Image | UInt8s], wants: Iterable[str] | None = None, mask: Any = None
    ) -> Features:
        """PIL images or uint8 (H, W, 3) arrays of any size -> features on the host, float32.

        A model of grey images also takes arrays (H, W), one of RGBA images arrays (H, W, 4).

        wants: names of features; default: the pooled vector and the logits, where the checkpoint has them.
        mask: for each image, which patches are hidden from the model, row by row: (B, N) of 0 and 1, the reference's
        `bool_masked_pos`. Raises InputError for an image or a mask that cannot be used, OutputUnavailable for a feature
        that the checkpoint cannot give."""
        names = frozenset(DEFAULT_WANTS) & self.card.gives.keys() if wants is None else frozenset(wants)
        crops = [self._crop(index, image) for index, image in enumerate(images)]
        if not crops:
            raise InputError("no images were given")
        inputs = {} if mask is None else {"mask_BN": self._mask(mask, len(crops))}
        features = self.forward_pixels(np.stack(crops), names, **inputs)
        return Features({name: tensor.cpu() for name, tensor in features.items()})

    def forward_pixels(self, x_BHWC: UInt8s | Tensor, wants: frozenset[str], **inputs: Any) -> dict[str, Tensor]:
        """uint8 crops of the model's size -> the wanted features in float32, on the model's device.

        inputs: further inputs of the backbone (`mask_BN`), tensors or arrays."""
        self.refuse_unknown(wants)
        pixels_BHWC = as_tensor(x_BHWC).to(self.device, non_blocking=True)
        self._refuse_other_sizes(pixels_BHWC)
        extra = {name: as_tensor(value).to(self.device) for name, value in inputs.items()}
        with torch.inference_mode():
            x_BCHW = normalize_on_device(pixels_BHWC, self.card.preprocess, self.dtype)
            features = self.backbone(x_BCHW, wants, **extra)
            return {name: features[name].float() for name in sorted(wants)}

    def _mask(self, mask: Any, count: int) -> npt.NDArray[np.bool_]:
        patches = self.card.maskable_patches
        if not patches:
            raise InputError(
                f"mask: `{self.card.name}` has no mask token", hint="leave it out, or take one that has it"
            )
        mask_BN = np.asarray(mask)
        if mask_BN.shape != (count, patches) or not np.isin(mask_BN, (0, 1)).all():
            raise InputError(
                f"mask: {mask_BN.dtype} {mask_BN.shape} is not 0 or 1 for each patch, ({count}, {patches})"
            )
        return mask_BN.astype(bool)

    @cached_property
    def text(self) -> Text:
        """The text tower, which is loaded when it is first asked for. Raises OutputUnavailable if there is none."""
        if self._open_text is None:
            native = "leave out the prefix `transformers:`" if self.card.implementation != "native" else ""
            hint = native or "use a whole CLIP or SigLIP; `img2parquet models` lists them"
            raise OutputUnavailable(f"`{self.card.name}` ({self.card.source}) has no text tower", hint=hint)
        return self._open_text()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Prompts -> vectors (n, E) in the space of `pooled`, on the host, float32, not normalised.

        They are the reference's `get_text_features`. Raises InputError, naming the prompt, for one that is empty or
        longer than the model reads, OutputUnavailable without a text tower, CheckpointError without a tokenizer that
        fits it, MissingDependency without the package tokenizers."""
        return self.text(texts)

    def refuse_unknown(self, wants: frozenset[str]) -> None:
        """Raise OutputUnavailable for a feature that this checkpoint cannot give, naming those that it can."""
        for name in sorted(wants - self.card.gives.keys()):
            message = f"`{self.card.name}` ({self.card.source}) cannot give `{name}`"
            hint = nearest(name, self.card.gives) or "choose one of these, or use a checkpoint that has it"
            raise OutputUnavailable(message, known=_in_short(self.card.gives), hint=hint)

    def _refuse_other_sizes(self, pixels_BHWC: Tensor) -> None:
        shape_HWC = self.card.preprocess.shape_HWC
        if pixels_BHWC.dtype != torch.uint8 or tuple(pixels_BHWC.shape[1:]) != shape_HWC:
            wanted, got = ", ".join(map(str, shape_HWC)), f"{pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}"
            raise InputError(f"`{self.card.name}` takes uint8 crops (batch, {wanted}), not {got}")

    @cached_property
    def _preprocessor(self) -> Preprocessor:
        return Preprocessor(self.card.preprocess)

    def _crop(self, index: int, image: Image.Image | UInt8s) -> UInt8s:
        crop = self._preprocessor(pixels_of_image(index, image, self.card.preprocess.channels))
        if isinstance(crop, Rejection):
            raise InputError(f"images[{index}]: {crop.reason}: {crop.message}")
        return crop


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose files were found and read, but whose weights are not loaded."""

    name: str
    source: str
    family: Family
    config: Mapping[str, Any]
    preprocess: PreprocessSettings
    weights: Weights
    reduces_labels: bool = False
    notes: tuple[str, ...] = ()  # what was assumed about its images
    folder: Path | None = None  # None: random weights
    prompts: ClassPrompts | None = None

    @cached_property
    def module(self) -> Backbone:
        """The family's plain module on the meta device."""
        names = self.weights.names(self.family)
        settings = self.family.read_settings(self.config, self.preprocess.size_HW)
        with torch.device("meta"):
            return self.family.build(settings, names)

    def filled(self, dtype: torch.dtype, device: torch.device, fast: bool) -> Backbone:
        """Load the weights and return the module, in its fast or its plain form."""
        module = cast(nn.Module, self.module)
        self.weights.fill(module, self.family)
        module.to(device)
        if not fast:
            return cast(Backbone, module.to(dtype))
        with torch.no_grad():
            return self.family.fold(self.module, dtype)

    @cached_property
    def text_module(self) -> TextTower | None:
        """The plain text tower on the meta device, if the checkpoint has one."""
        of_text: TextFamily | None = getattr(self.family, "TEXT", None)
        if of_text is None:
            return None
        with torch.device("meta"):
            return cast("TextTower | None", of_text.build(self.config, self.weights.names(self.family)))

    def text(self, dtype: torch.dtype, device: torch.device, fast: bool) -> Text:
        """Load the text tower and its tokenizer, whose file is read with the first prompt."""
        of_text, module = cast(Any, self.family).TEXT, self.text_module
        assert module is not None
        self.weights.fill(module, of_text)
        scale, bias = float(module.logit_scale.exp()), 0.0 if module.logit_bias is None else float(module.logit_bias)
        module.to(device)
        with torch.no_grad():
            tower = of_text.fold(module, dtype) if fast else module.to(dtype)
        tokenizer = Tokenizer(self.folder, self.source, module.settings)
        return Text(tokenizer, tower, device, scale, bias, of_text.problem)

    def card(self) -> Card:
        """Describe the model. Raises CheckpointError when the weights do not fit config.json."""
        self.weights.check(cast(nn.Module, self.module), self.family)
        if self.text_module is not None:
            self.weights.check(self.text_module, cast(Any, self.family).TEXT)
        gives = self.module.gives()
        if self.prompts is not None:
            return self._card_of_prompts(self.prompts, replace(self, prompts=None).card())
        labels = known_labels(self.config) if {"logits", "segmentation"} & gives.keys() else ()
        module_notes: tuple[str, ...] = getattr(self.module, "notes", ())
        return Card(
            name=self.name,
            family=str(self.config.get("model_type", self.family.MODEL_TYPE)),
            source=self.source,
            weights_hash=self.weights.hash(),
            config=self.config,
            preprocess=self.preprocess,
            gives=gives,
            embedding=self.family.EMBEDDING if "pooled" in gives else "",
            labels=labels,
            parameters=_parameters(self.module) + _parameters(self.text_module),
            notes=(*module_notes, *self.weights.notes, *head_notes(self.config, gives, labels), *self.notes),
            reduces_labels=self.reduces_labels,
            maskable_patches=getattr(self.module, "maskable_patches", 0),
            has_text=self.text_module is not None,
        )

    def _card_of_prompts(self, prompts: ClassPrompts, card: Card) -> Card:
        """Describe the model as a classifier of these prompts.

        Raises OutputUnavailable for one that knows no words, and InputError for a prompt that it cannot read."""
        if self.text_module is None or "pooled" not in card.gives:
            message = f"`prompts`: model `{card.name}` ({card.family}) has no text tower"
            raise OutputUnavailable(message, hint="use a whole CLIP or SigLIP; `img2parquet models` lists them")
        if "logits" in card.gives:
            message = f"`prompts`: model `{card.name}` has classes of its own"
            raise OutputUnavailable(message, hint="remove `prompts`, or use the model that it was made from")
        problem = cast(Any, self.family).TEXT.problem
        prompts.check_choice(problem)
        tokenizer = Tokenizer(self.folder, self.source, self.text_module.settings)
        tokenizer(prompts.all)
        digest = hashlib.sha256(f"{prompts.sha256} {tokenizer.sha256}".encode()).hexdigest()
        names = {str(id): name for id, name in enumerate(prompts.names)}
        config = {**self.config, "id2label": names, "problem_type": problem}
        note = f"its {len(names)} classes are {len(prompts.all)} prompts"
        return replace(
            card,
            config=config,
            gives={**card.gives, "logits": (len(names),)},
            labels=prompts.names,
            notes=(*card.notes, note),
            prompts=digest,
        )


def load_model(spec: ModelSpec, dtype: str, device: str, fast: bool = True) -> Model:
    """Open a checkpoint and load its weights; see `img2parquet.models.load_model`."""
    place = _device(device)
    kind = torch_dtype(resolve_dtype(dtype, device))
    opened = open_checkpoint(spec)
    card = opened.card()
    open_text = partial(opened.text, kind, place, fast) if isinstance(opened, Opened) and card.has_text else None
    model = Model(card, opened.filled(kind, place, fast), kind, place, open_text)
    if spec.prompts is not None:
        given, prompts = spec.class_weights, spec.prompts
        weights = (lambda: prompts.weights(model.text)) if given is None else lambda: given
        model.backbone = ZeroShot(model.backbone, len(prompts.names), weights)
    return model


def open_checkpoint(spec: ModelSpec) -> Opened | External:
    """Find a checkpoint's files and read its settings; no weight is read."""
    seed = None if spec.weights is None else _seed(spec.weights)
    if is_external(spec.model):
        if spec.prompts is not None:
            message = f"`prompts`: {spec.model} is computed by its library, which gives no vectors of words here"
            raise OutputUnavailable(message, hint="leave out the prefix for a CLIP or SigLIP")
        return open_external(spec, seed)
    if seed is not None:
        return _with_random_weights(spec, seed)
    repos = [entry.repo for _, entry in published()]
    found = find(spec.model, spec.storage_options, repos)
    is_open_clip = not (found.folder / CONFIG).is_file() and (found.folder / OPEN_CLIP_CONFIG).is_file()
    config, written = read_open_clip(found.folder) if is_open_clip else (read_json(found.folder / CONFIG), None)
    check_depth(config)
    family = family_of(config, found.source)
    if is_open_clip:
        processor = read_processor(written, config, family.PROCESSOR, spec.image_size, pixels_of(spec))
    else:
        processor = open_processor(found.folder, config, family.PROCESSOR, spec.image_size, pixels_of(spec))
    weights = weight_files(found.folder)
    return replace(_opened(spec, found.source, family, config, processor, weights), folder=found.folder)


def published() -> list[tuple[Family, Published]]:
    """List every checkpoint that a family knows by name."""
    return [(family, entry) for family in dict.fromkeys(map(_family, FAMILIES)) for entry in family.PUBLISHED]


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family that config.json names. Raises UnknownModel with the known ones and the nearest."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return _family(model_type)
    hint = nearest(str(model_type), FAMILIES) or "`model_type` in config.json names the architecture"
    problem = "no `model_type`" if model_type is None else f"unknown family `{model_type}`"
    raise UnknownModel(f"{where}: {CONFIG}: {problem}", known=FAMILIES, hint=hint)


def _device(device: str) -> torch.device:
    """Open a torch device. On GPUs, switch off TF32 for float32. Raises InputError for a device that cannot be used."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device `{device}` cannot be used: {first}", hint="leave it out, or use `cpu`") from None
    if place.type == "cuda":  # else convolutions use TF32, whose 10 bits break the promise of 1e-5
        torch.backends.cudnn.allow_tf32 = False
    return place


def _family(model_type: str) -> Family:
    return cast(Family, importlib.import_module(FAMILIES[model_type]))


def _with_random_weights(spec: ModelSpec, seed: int) -> Opened:
    """Build a published model by its name alone."""
    by_repo = {entry.repo: (family, entry) for family, entry in published()}
    repo = spec.model.partition("@")[0]
    if repo not in by_repo:
        message = f"no published model `{repo}` to build with random weights"
        close = difflib.get_close_matches(repo, by_repo, n=1, cutoff=0.4)
        raise UnknownModel(message, known=by_repo, hint=f"did you mean `{close[0]}`?" if close else "")
    family, entry = by_repo[repo]
    config = {"model_type": family.MODEL_TYPE, "architectures": [entry.architecture], **entry.config}
    processor = read_processor(entry.preprocessor, config, family.PROCESSOR, spec.image_size, pixels_of(spec))
    weights = RandomWeights(seed, str(config["model_type"]), entry.architecture, config)
    source = f"{repo} with random({seed}) weights"
    return _opened(spec, source, family, config, processor, weights)


def _parameters(module: object) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if isinstance(module, nn.Module) else 0


def _opened(
    spec: ModelSpec, source: str, family: Family, config: Mapping[str, Any], processor: Processor, weights: Weights
) -> Opened:
    settings, reduces, notes = processor.settings, processor.reduces_labels, processor.notes
    found = Opened(spec.resolved_name, source, family, config, settings, weights, reduces, notes)
    return replace(found, prompts=spec.prompts)


def _seed(weights: str) -> int:
    match = re.fullmatch(r"random\((\d+)\)", weights.strip())
    if not match:
        raise CheckpointError(f"weights: `{weights}` is not valid", hint="leave it out, or write `random(0)`")
    return int(match[1])


def _in_short(names: Iterable[str]) -> list[str]:
    """Shorten runs of `tokens:0`, `tokens:1`, ... to one entry."""
    counts: dict[str, list[str]] = {}
    for name in names:
        stem, _, number = name.rpartition(":")
        counts.setdefault(stem if number.isdigit() else name, []).append(name)
    return [found[0] if len(found) == 1 else f"{found[0]} ... {found[-1]}" for found in counts.values()]


def pixels_of_image(index: int, image: Image.Image | UInt8s, channels: int = 3) -> Pixels:
    """Take an image as a job's `decode` would give it: upright, in RGB with transparency on white.

    channels: of the model. For 1, a grey array (H, W) is an image too, for 4 an array (H, W, 4), and transparency is
    kept. Raises InputError, naming `images[index]`, for an image that cannot be converted."""
    if not isinstance(image, np.ndarray):
        return _pixels_of_pil(index, image, channels)
    shapes: dict[int, tuple[tuple[int, ...], ...]] = {1: ((), (1,), (3,)), 4: ((3,), (4,))}
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in shapes.get(channels, ((3,),)):
        wanted = {1: "(height, width)", 4: "(height, width, 4)"}.get(channels, "(height, width, 3)")
        raise InputError(f"images[{index}]: {image.dtype} {image.shape} is not a uint8 {wanted} array")
    if image.shape[2:] == (4,):
        return Pixels(image[..., :3], rgba_HWC=image)
    return Pixels(image if image.shape[2:] == (3,) else np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2))


def _pixels_of_pil(index: int, image: Image.Image, channels: int) -> Pixels:
    from PIL import Image as PILImage
    from PIL import ImageOps

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        message = f"images[{index}]: mode {image.mode} has more than 8 bits per channel, in an unknown range"
        raise InputError(message, hint="scale it to 8 bits first")
    image, rgba = ImageOps.exif_transpose(image), None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), rgba)
    kept = np.asarray(rgba) if rgba is not None and channels == 4 else None
    return Pixels(np.asarray(image.convert("RGB")), rgba_HWC=kept)
