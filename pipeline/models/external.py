"""`transformers:<repo, folder or URI>` and `timm:<name>`: another library's own code behind our `Model`.

* Marked `reference`: its numbers are that library's, not folded and not faster than it; the library's version is part
  of the run's identity. For `model_type`s that we have natively, leave the prefix out.
* Files are found, pinned to a commit and hashed as those of native models; the library is handed a local folder, runs
  no code out of it, and every weight of the model must be in the files, none of them left over but what `ignored` says.
* Preprocessing is ours, read from the checkpoint's own settings (`preprocessor_config.json`, timm's `pretrained_cfg`),
  so an image is still decoded once for all models; where ours cannot do the same the model is refused. No processor of
  transformers runs, so torchvision is not needed for it; timm itself imports torchvision.
* What a model gives is found by running it once on a black image.

Shapes: B batch, T tokens, D width, K classes, Q queries of a mask classifier, C h w a feature map.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import CheckpointError, MissingDependency, UnknownModel, nearest
from pipeline.models import Backbone, Card
from pipeline.models.checkpoint import FileWeights, RandomWeights, check_depth, label_names, read_json, weight_files
from pipeline.models.flax_file import SUFFIX as FLAX
from pipeline.models.hub import CONFIG, PREPROCESSOR, find
from pipeline.preprocess import COMMON, IMAGENET, PROCESSORS, PreprocessSettings, read_settings, reduces_labels

Size = int | tuple[int, int] | None
CLASS_FIRST, PATCHES, MAPS, QUERIES = "class token, registers, patches", "patches", "maps", "masks of queries"


@dataclass(frozen=True)
class Architecture:
    """What is known of a `model_type` of transformers: classes by what config.json's `architectures` says, the first
    of them where it says nothing; how its hidden states lie; what `pooled` is."""

    classes: Mapping[str, str]
    layout: str
    embedding: str
    processor: str = "ViTImageProcessor"
    ignored: tuple[str, ...] = ()  # regular expressions of names in the file that this part of it does not have


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_TEXT = (r"text_model\.", r"text_projection\.", r"logit_scale$", r"logit_bias$", r".*position_ids$")
_CLS, _CLASS_TOKEN = "ForImageClassification", "the class token after the last layer norm"
_PROJECTED = "the image's vector in the space shared with text (`image_embeds`); of a bare tower its `pooler_output`"
_MEAN = "`pooler_output`: the normed mean over the last stage"
_CLIP = Architecture(
    {"CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection", "CLIPModel": "CLIPVisionModelWithProjection",
     "CLIPVisionModel": "CLIPVisionModel"},
    CLASS_FIRST, _PROJECTED, "CLIPImageProcessor", _TEXT,
)  # fmt: skip
_SIGLIP = Architecture(
    {"SiglipVisionModel": "SiglipVisionModel", "SiglipModel": "SiglipVisionModel"},
    PATCHES, "`pooler_output`: attention pooling over the patches", "SiglipImageProcessor", _TEXT,
)  # fmt: skip
TRANSFORMERS: Mapping[str, Architecture] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": Architecture(_same("ViTModel", "ViT" + _CLS), CLASS_FIRST, _CLASS_TOKEN + ", through the pooling layer"),
    "dinov2": Architecture(_same("Dinov2Model", "Dinov2" + _CLS), CLASS_FIRST, _CLASS_TOKEN, "BitImageProcessor"),
    "dinov2_with_registers": Architecture(
        _same("Dinov2WithRegistersModel", "Dinov2WithRegisters" + _CLS), CLASS_FIRST, _CLASS_TOKEN, "BitImageProcessor"
    ),
    "dinov3_vit": Architecture(_same("DINOv3ViTModel"), CLASS_FIRST, _CLASS_TOKEN, "DINOv3ViTImageProcessor"),
    "dinov3_convnext": Architecture(_same("DINOv3ConvNextModel"), CLASS_FIRST, _MEAN, "DINOv3ViTImageProcessor"),
    "convnext": Architecture(_same("ConvNextModel", "ConvNext" + _CLS), MAPS, _MEAN, "ConvNextImageProcessor"),
    "convnextv2": Architecture(_same("ConvNextV2Model", "ConvNextV2" + _CLS), MAPS, _MEAN, "ConvNextImageProcessor"),
    "swin": Architecture(_same("SwinModel", "Swin" + _CLS), PATCHES, _MEAN),
    "swinv2": Architecture(_same("Swinv2Model", "Swinv2" + _CLS), PATCHES, _MEAN),
    "segformer": Architecture(
        _same("SegformerModel", "SegformerForSemanticSegmentation", "Segformer" + _CLS),
        MAPS,
        "none: `pool: mean` is the mean over the last stage",
        "SegformerImageProcessor",
    ),
    "mask2former": Architecture(
        _same("Mask2FormerForUniversalSegmentation"),
        QUERIES,
        "none",
        "Mask2FormerImageProcessor",
        (r".*position_ids$", r"criterion\."),
    ),
}
PREFIXES = ("transformers:", "timm:")


def is_external(model: str) -> bool:
    return model.startswith(PREFIXES)


def open_external(
    model: str, name: str, image_size: Size, seed: int | None, storage_options: Mapping[str, object] | None
) -> External:
    """A prefixed name -> what was found under it, settings and all; no weight is read. `seed`: random weights."""
    library, _, rest = model.partition(":")
    opened = _open_transformers if library == "transformers" else _open_timm
    return opened(rest, name, image_size, seed, storage_options)


@dataclass(frozen=True)
class External:
    """As `pipeline.models.model.Opened`, of a model that another library computes."""

    name: str
    source: str
    library: str
    family: str
    config: Mapping[str, Any]
    preprocess: PreprocessSettings
    weights: FileWeights | RandomWeights
    embedding: str
    make: Callable[[], Backbone]  # the module with its weights, float32, on the CPU
    reduces_labels: bool = False
    notes: tuple[str, ...] = ()

    @cached_property
    def module(self) -> Backbone:
        return self.make()

    def filled(self, dtype: torch.dtype, device: torch.device, fast: bool) -> Backbone:
        """`fast` says nothing here: there is one form."""
        module = self.module
        assert isinstance(module, Reference)
        module.model.to(device=device, dtype=dtype)
        return module

    def card(self) -> Card:
        """Raises CheckpointError where the weights do not fit what config.json says."""
        gives, module = self.module.gives(), self.module
        assert isinstance(module, Reference)
        return Card(
            name=self.name,
            family=self.family,
            source=self.source,
            weights_hash=self.weights.hash(),
            config=self.config,
            preprocess=self.preprocess,
            gives=gives,
            embedding=self.embedding if "pooled" in gives else "",
            labels=_labels(self.config, gives) if {"logits", "segmentation"} & gives.keys() else (),
            parameters=sum(parameter.numel() for parameter in module.model.parameters()),
            notes=(f"computed by {self.library} itself, as the reference does", *self.notes),
            reduces_labels=self.reduces_labels,
            implementation=f"reference ({self.library})",
        )


class Reference:
    """A library's module, and how to read its output: a `Backbone`."""

    def __init__(self, model: nn.Module, read: Callable[[nn.Module, Tensor, bool], dict[str, Tensor]]) -> None:
        self.model, self.read = model.eval().requires_grad_(False), read
        self.lock = threading.Lock()  # reading puts a hook into the module for the time of a pass
        self.shapes: dict[str, tuple[int, ...]] = {}

    def measure(self, size_HW: tuple[int, int], source: str) -> Reference:
        """Find out what the model gives for images of this size. Raises CheckpointError where it takes none such."""
        x_BCHW = torch.zeros(1, 3, *size_HW, dtype=next(self.model.parameters()).dtype)
        try:
            with torch.inference_mode():
                found = self.read(self.model, x_BCHW, True)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "leave `image_size` out, or give the one that it was trained with"
            message = f"{source}: the model takes no image of {size_HW[0]}x{size_HW[1]}: {said}"
            raise CheckpointError(message, hint=hint) from None
        self.shapes = {name: tuple(feature.shape[1:]) for name, feature in found.items()}
        return self

    def gives(self) -> dict[str, tuple[int, ...]]:
        return dict(self.shapes)

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], **inputs: Tensor) -> dict[str, Tensor]:
        if inputs:
            raise CheckpointError("a model of another library takes no mask", hint="leave the output's mask out")
        with self.lock:
            found = self.read(self.model, x_BCHW, any(":" in name for name in wants))
        return {name: found[name] for name in wants}


# --- transformers ---


def _open_transformers(
    model: str, name: str, image_size: Size, seed: int | None, storage_options: Mapping[str, object] | None
) -> External:
    library, config = _library("transformers"), dict[str, Any]()
    if seed is not None and model in TRANSFORMERS:
        folder, source, config = None, f"transformers' own `{model}`", {"model_type": model}
    else:
        found = find(model, storage_options)
        folder, source, config = found.folder, found.source, read_json(found.folder / CONFIG)
    check_depth(config)
    for part in ("vision_config", "backbone_config"):
        check_depth(config[part] if isinstance(config.get(part), Mapping) else {})
    kind = _architecture(config, source)
    cls = _class(library, kind, config, source)
    weights: FileWeights | RandomWeights
    if seed is None:
        assert folder is not None
        weights = _torch_weights(folder)
    else:
        weights, source = RandomWeights(seed, config["model_type"], cls.__name__, config), f"{source}, random({seed})"
    written = folder / PREPROCESSOR if folder else None
    processor = read_json(written) if written and written.is_file() else None
    preprocess = read_processor(processor, kind.processor, image_size or _own_size(config, processor))

    def make() -> Backbone:
        module = _seeded(cls, config, folder, seed) if seed is not None else _loaded(cls, folder, kind, source)
        first = 1 + int(getattr(module.config, "num_register_tokens", 0) or 0)
        reader = _reader(module, kind.layout, first, preprocess.size_HW)
        return Reference(module, reader).measure(preprocess.size_HW, source)

    return External(
        name, source, f"transformers {version('transformers')}", f"transformers/{config['model_type']}", config,
        preprocess, weights, kind.embedding, make, reduces_labels(processor),
        _processor_notes(processor, kind.processor),
    )  # fmt: skip


def _architecture(config: Mapping[str, Any], source: str) -> Architecture:
    said = config.get("model_type")
    if isinstance(said, str) and said in TRANSFORMERS:
        return TRANSFORMERS[said]
    what = f"`{said}` is no architecture that is known here" if said else "no `model_type`"
    hint = nearest(str(said), TRANSFORMERS) or "ask for one of these, or add it to the table in models/external.py"
    raise UnknownModel(f"{source}: {CONFIG}: {what}", known=TRANSFORMERS, hint=hint)


def _class(library: Any, kind: Architecture, config: Mapping[str, Any], source: str) -> Any:
    said = (config.get("architectures") or [next(iter(kind.classes))])[0]
    if said not in kind.classes:
        hint = nearest(str(said), kind.classes) or "its other heads have no output here"
        raise UnknownModel(f"{source}: {CONFIG}: architectures: `{said}`", known=kind.classes, hint=hint)
    try:
        return getattr(library, kind.classes[said])
    except (AttributeError, ImportError):
        have = version("transformers")
        message = f"transformers {have} has no `{kind.classes[said]}`"
        raise MissingDependency(message, hint="pip install --upgrade 'img2parquet[transformers]'") from None


def _torch_weights(folder: Path) -> FileWeights:
    weights = weight_files(folder)
    if weights.files[0].suffix == FLAX:
        hint = "without the prefix `transformers:` the native families read it"
        raise CheckpointError(f"{folder}: transformers no longer reads Flax's files", hint=hint)
    return weights


def _loaded(cls: Any, folder: Path | None, kind: Architecture, source: str) -> Any:
    """The module from its files, all or nothing."""
    try:
        model, info = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{source}: transformers cannot load it: {said}") from None
    surplus = [name for name in info["unexpected_keys"] if not any(re.match(one, name) for one in kind.ignored)]
    faults = {"missing": info["missing_keys"], "unexpected": surplus, "misshapen": info["mismatched_keys"]}
    lines = [
        f"  {len(names)} {fault}: {', '.join(map(str, sorted(names)[:4]))}" for fault, names in faults.items() if names
    ]
    if lines:
        message = f"{source}: the weights do not fit `{cls.__name__}` as config.json says"
        raise CheckpointError("\n".join([message, *lines]), hint="take config.json and weights from the same place")
    return model


def _seeded(cls: Any, config: Mapping[str, Any], folder: Path | None, seed: int) -> Any:
    settings = cls.config_class.from_pretrained(folder) if folder else cls.config_class()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(settings).float()


def _reader(
    module: Any, layout: str, first: int, size_HW: tuple[int, int]
) -> Callable[[nn.Module, Tensor, bool], dict[str, Tensor]]:
    trained = getattr(module.config, "image_size", None)
    takes = inspect.signature(module.forward).parameters
    other = trained is not None and tuple(trained if isinstance(trained, list | tuple) else (trained,) * 2) != size_HW
    more = {"interpolate_pos_encoding": True} if other and "interpolate_pos_encoding" in takes else {}

    def read(model: Any, x_BCHW: Tensor, with_states: bool) -> dict[str, Tensor]:
        if layout == QUERIES:
            return {"segmentation": semantic_maps(model(pixel_values=x_BCHW))}
        base, kept = getattr(model, model.base_model_prefix, model), list[Any]()
        hook = base.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            out = model(pixel_values=x_BCHW, output_hidden_states=with_states, return_dict=True, **more)
        finally:
            hook.remove()
        whole = getattr(out, "last_hidden_state", None) is not None  # DINOv3's "base" is its encoder, without the norm
        return features_of(out, out if whole or not kept else kept[-1], layout, first, model.config)

    return read


def features_of(out: Any, base: Any, layout: str, first: int, config: Any) -> dict[str, Tensor]:
    """What a model and its base model gave, by our names."""
    found: dict[str, Tensor] = {}
    logits, last = getattr(out, "logits", None), getattr(base, "last_hidden_state", None)
    if logits is not None:
        found["segmentation" if logits.dim() == 4 else "logits"] = logits
    pooled = getattr(out, "image_embeds", None)
    pooled = getattr(base, "pooler_output", None) if pooled is None else pooled
    if last is not None and last.dim() == 3:
        found["tokens"] = last
        found["pooled:mean"] = (last[:, first:] if layout == CLASS_FIRST else last).mean(dim=1)
        if layout == CLASS_FIRST:
            found["pooled:cls"] = last[:, 0]
            pooled = last[:, 0] if pooled is None else pooled
    elif last is not None:
        found["pooled:mean"] = last.mean(dim=(2, 3))
    if pooled is not None:
        found["pooled"] = pooled.flatten(1)
    return found | _states(out, base, config)


def _states(out: Any, base: Any, config: Any) -> dict[str, Tensor]:
    """Hidden states: `tokens:<k>`, and as maps `feature_maps:<stage>`."""
    states = getattr(base, "hidden_states", None) or getattr(out, "hidden_states", None) or ()
    maps = getattr(base, "reshaped_hidden_states", None) or [state for state in states if state.dim() == 4]
    found = {f"tokens:{k}": state for k, state in enumerate(states) if state.dim() == 3}
    stages = len(getattr(config, "depths", None) or ()) or len(maps)
    begins = 0 if len(maps) > stages else 1  # some give what enters the first stage, too
    return found | {f"feature_maps:{f'stage{k}' if k else 'stem'}": map_ for k, map_ in enumerate(maps, begins)}


def semantic_maps(out: Any) -> Tensor:
    """Mask2Former's queries -> (B, K, 384, 384), as its processor's `post_process_semantic_segmentation` does it."""
    masks_BQhw = F.interpolate(out.masks_queries_logits, size=(384, 384), mode="bilinear", align_corners=False)
    classes_BQK = out.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last one is "nothing"
    return torch.einsum("bqc,bqhw->bchw", classes_BQK, masks_BQhw.sigmoid())


# --- their processors ---

KNOWN = {
    **PROCESSORS,
    "ConvNextImageProcessor": {**COMMON, **IMAGENET, "resample": 3},  # its sizes have a rule of their own
    "DINOv3ViTImageProcessor": {**COMMON, **IMAGENET},
}


def read_processor(given: Mapping[str, Any] | None, otherwise: str, image_size: Size) -> PreprocessSettings:
    """preprocessor_config.json -> our settings; the two classes with rules of their own are put into common terms."""
    said = dict(given or {})
    said = dict(said.get("image_processor") or said)
    spelled = str(said.get("image_processor_type") or said.get("feature_extractor_type") or otherwise)
    kind = spelled.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind == "ConvNextImageProcessor":
        return read_settings(_convnext(said, image_size), kind, None, KNOWN)
    if kind in ("Mask2FormerImageProcessor", "MaskFormerImageProcessor"):
        return read_settings(_mask2former(said, image_size), "SegformerImageProcessor", None)
    return read_settings(said, otherwise, image_size, KNOWN)


def _convnext(said: Mapping[str, Any], image_size: Size) -> dict[str, Any]:
    """Below 384 a crop out of `size / crop_pct`, from there on a squash."""
    size = said.get("size", 384)
    edge = image_size or (size.get("shortest_edge") if isinstance(size, Mapping) else size)
    share = said.get("crop_pct") or 224 / 256
    if isinstance(edge, list | tuple) and len(set(edge)) == 1:
        edge = edge[0]
    if not isinstance(edge, int) or edge < 1 or not isinstance(share, int | float) or not 0 < share <= 1:
        hint = "its images are square: give one side"
        raise CheckpointError(
            f"{PREPROCESSOR}: size `{size}`, image_size `{image_size}`, crop_pct `{share}`", hint=hint
        )
    rest = {key: value for key, value in said.items() if key not in ("size", "crop_pct")}
    if edge >= 384:
        return {**rest, "size": {"height": edge, "width": edge}, "do_center_crop": False}
    crop = {"do_center_crop": True, "crop_size": {"height": edge, "width": edge}}
    return {**rest, **crop, "size": {"shortest_edge": int(edge / share)}}


def _mask2former(said: Mapping[str, Any], image_size: Size) -> dict[str, Any]:
    """Its own resize keeps the image's shape, which gives every image another size; here all have one."""
    left = ("size", "size_divisor", "do_pad", "image_processor_type", "feature_extractor_type")
    rest = {key: value for key, value in said.items() if key not in left}
    size: Any = said.get("size")
    if image_size is not None:
        height, width = image_size if isinstance(image_size, list | tuple) else (image_size, image_size)
        size = {"height": height, "width": width}
    if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
        message = f"{PREPROCESSOR}: `size` is {size}: its images reach the model in different sizes"
        raise CheckpointError(message, hint="say `image_size: [512, 512]` in the job: all are squashed to that")
    return {**rest, "size": dict(size)}


def _own_size(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Size:
    """Without a processor's file, the model's own size where it says one."""
    vision = config.get("vision_config")
    size = config.get("image_size") or (vision.get("image_size") if isinstance(vision, Mapping) else None)
    if processor is not None or not isinstance(size, int | list | tuple):
        return None
    return (size[0], size[1]) if isinstance(size, list | tuple) else size


def _processor_notes(processor: Mapping[str, Any] | None, otherwise: str) -> tuple[str, ...]:
    spelled = str((processor or {}).get("image_processor_type") or otherwise)
    if spelled.startswith("DINOv3"):
        return ("its own processor resizes in floating point; ours in 8 bits, half a level apart at most",)
    if spelled.startswith("Mask"):
        return ("images are squashed to one size, where its own processor keeps their shape",)
    return () if processor is not None else (f"no {PREPROCESSOR}: {otherwise}'s defaults",)


# --- timm ---


def _open_timm(
    model: str, name: str, image_size: Size, seed: int | None, storage_options: Mapping[str, object] | None
) -> External:
    timm, config = _library("timm"), dict[str, Any]()
    if seed is not None:
        folder, source, config = None, f"timm's own `{model}`, random({seed})", {"architecture": model}
    else:
        there = model if "/" in model or Path(model).is_dir() else f"timm/{model}"
        found = find(there, storage_options)
        folder, source, config = found.folder, found.source, read_json(found.folder / CONFIG)
    architecture = str(config.get("architecture"))
    if not timm.is_model(architecture):
        near = timm.list_models(f"{architecture[:4]}*")[:12]
        raise UnknownModel(
            f"{source}: timm has no architecture `{architecture}`", known=near, hint=nearest(architecture, near)
        )
    said = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    arguments = {**said, **dict(config.get("model_args") or {})}
    cfg = _timm_settings(timm, architecture, config)
    preprocess = _timm_preprocess(cfg, image_size)
    weights: FileWeights | RandomWeights
    weights = RandomWeights(seed, "timm", architecture, config) if seed is not None else _torch_weights(_there(folder))

    def make() -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            module = _timm_model(timm, architecture, arguments, preprocess.size_HW, cfg)
        if folder is not None:
            _fill(module, weight_files(folder), source)
        return Reference(module, _read_timm).measure(preprocess.size_HW, source)

    note = "an odd margin is cut from the other side than timm cuts it; its resize is Pillow's, ours torch's"
    return External(
        name, source, f"timm {timm.__version__}", f"timm/{architecture}", config, preprocess, weights,
        "timm's pooled features before the classifier (`forward_head(..., pre_logits=True)`)", make, False, (note,),
    )  # fmt: skip


def _there(folder: Path | None) -> Path:
    assert folder is not None
    return folder


def _timm_model(timm: Any, architecture: str, arguments: dict[str, Any], size_HW: tuple[int, int], cfg: Any) -> Any:
    """Positions are made for the input's size where the architecture has them."""
    trained = tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    resized = {} if trained == size_HW else {"img_size": size_HW}
    try:
        return timm.create_model(architecture, pretrained=False, **arguments, **resized)
    except TypeError:  # a convolutional network has no `img_size`, and needs none
        return timm.create_model(architecture, pretrained=False, **arguments)


def _timm_settings(timm: Any, architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(timm.get_pretrained_cfg(architecture).to_dict()) if not config.get("pretrained_cfg") else {}
    return own or dict(config["pretrained_cfg"])


_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def _timm_preprocess(cfg: Mapping[str, Any], image_size: Size) -> PreprocessSettings:
    """timm's `pretrained_cfg` -> our settings: short side to size / crop_pct, then the middle; or a squash."""
    _, height, width = cfg.get("input_size", (3, 224, 224))
    if image_size is not None:
        height, width = image_size if isinstance(image_size, list | tuple) else (image_size, image_size)
    mode, filter_, share = cfg.get("crop_mode", "center"), cfg.get("interpolation", "bilinear"), cfg.get("crop_pct", 1)
    if filter_ not in _FILTERS or mode not in ("center", "squash") or (mode == "center" and height != width):
        hint = "give a square `image_size`" if height != width else "give its settings in a folder's config.json"
        raise CheckpointError(f"timm's {filter_}, crop mode {mode} to {height}x{width} cannot be done here", hint=hint)
    sides = [math.floor(side / share) for side in (height, width)]
    size = {"height": sides[0], "width": sides[1]} if mode == "squash" else {"shortest_edge": sides[0]}
    said = {
        "size": size, "do_center_crop": True, "crop_size": {"height": height, "width": width},
        "resample": _FILTERS[filter_], "image_mean": list(cfg["mean"]), "image_std": list(cfg["std"]),
    }  # fmt: skip
    return read_settings(said, "ViTImageProcessor", None)


def _fill(module: nn.Module, weights: FileWeights, source: str) -> None:
    try:
        module.load_state_dict(weights.tensors(), strict=True)
    except RuntimeError as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        hint = "take config.json and weights from the same place, and leave `image_size` out"
        raise CheckpointError(f"{source}: the weights do not fit timm's model: {said}", hint=hint) from None


def _read_timm(model: Any, x_BCHW: Tensor, with_states: bool) -> dict[str, Tensor]:
    last = model.forward_features(x_BCHW)
    if not isinstance(last, Tensor):
        raise TypeError("it gives no single tensor of features")
    found = {"pooled": model.forward_head(last, pre_logits=True).flatten(1)}
    if model.num_classes:
        found["logits"] = model.forward_head(last)
    if last.dim() == 3:
        first = int(getattr(model, "num_prefix_tokens", 0))
        found |= {"tokens": last, "pooled:mean": last[:, first:].mean(dim=1)} | (
            {"pooled:cls": last[:, 0]} if first else {}
        )
    if with_states and hasattr(model, "forward_intermediates"):
        maps = model.forward_intermediates(x_BCHW, intermediates_only=True)
        found |= {f"feature_maps:stage{k}": map_ for k, map_ in enumerate(maps, 1) if isinstance(map_, Tensor)}
    return found


# --- shared ---


def _labels(config: Mapping[str, Any], gives: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names by class id: transformers' `id2label`, timm's `label_names`, else LABEL_0 and so on."""
    count = gives["logits" if "logits" in gives else "segmentation"][0]
    named = config.get("label_names")
    if isinstance(named, list) and len(named) == count:
        return tuple(map(str, named))
    return label_names(config) if "id2label" in config else tuple(f"LABEL_{index}" for index in range(count))


def _library(name: str) -> Any:
    """The library, imported when the first of its models is asked for."""
    importer: Callable[[str], Any] = importlib.import_module
    try:
        library = importer(name)
        if name == "transformers":  # what it has to say of a checkpoint we say ourselves
            library.logging.set_verbosity_error()
            library.logging.disable_progress_bar()
        return library
    except ImportError as error:
        lacks = getattr(error, "name", None) or name
        if lacks.split(".")[0] == name:
            message, hint = f"models named `{name}:...` need the package {name}", f"pip install 'img2parquet[{name}]'"
        else:
            message = f"{name} is there, but it needs the package {lacks}, which is not"
            hint = f"pip install {lacks}, of the release that goes with your torch {torch.__version__}"
        raise MissingDependency(message, hint=hint) from None
