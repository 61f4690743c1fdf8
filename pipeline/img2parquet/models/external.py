"""Run models of other libraries: `transformers:<repo, folder or URI>` and `timm:<name>`, behind our `Model`.

* Such models are marked `reference`: the library computes them, without our folding and speed, and its version is part
  of the run's identity. For `model_type`s that we have natively, leave the prefix out.
* Files are found, pinned to a commit and hashed as for native models. The library gets a local folder and runs no code
  from it; the files must have every weight of the model and nothing else, apart from the names in `ignored`.
* Preprocessing is ours, by the checkpoint's own settings (`preprocessor_config.json`, timm's `pretrained_cfg`), so an
  image is still decoded once for all models; a model whose preprocessing we cannot reproduce is refused. No processor
  of transformers runs, so torchvision is not needed for it; timm itself imports torchvision.
* The features that a model gives are found by running it once on a black image.

Shapes: B batch, T tokens, D width, K classes, Q queries of a mask classifier, C h w a feature map.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2parquet.errors import CheckpointError, Img2ParquetError, MissingDependency, UnknownModel, nearest
from img2parquet.images.preprocess import FILTERS, Arithmetic, Size, pair, read_settings
from img2parquet.models.checkpoint import (
    FileWeights,
    RandomWeights,
    check_depth,
    known_labels,
    read_json,
    weight_files,
)
from img2parquet.models.family import Backbone, Card, ModelSpec, head_notes
from img2parquet.models.flax_checkpoint import SUFFIX as FLAX
from img2parquet.models.hub import CONFIG, find
from img2parquet.models.processor import Processor, channels_of, open_processor, pixels_of, read_processor
from img2parquet.models.wrong_files import cause_of

CLASS_FIRST, PATCHES, MAPS, QUERIES = "class token, registers, patches", "patches", "maps", "masks of queries"


@dataclass(frozen=True)
class Architecture:
    """A recipe to load and read one `model_type` of transformers.

    classes: the class to load for each name in config.json's `architectures`; the first if it names none.
    layout: the shape of its hidden states. embedding: the meaning of `pooled`."""

    classes: Mapping[str, str]
    layout: str
    embedding: str
    processor: str = "ViTImageProcessor"
    ignored: tuple[str, ...] = ()  # regular expressions of names in the file that this part of the model does not have


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_TEXT = (r"text_model\.", r"text_projection\.", r"logit_scale$", r"logit_bias$", r".*position_ids$")
_CLS, _CLASS_TOKEN = "ForImageClassification", "the class token after the last layer norm"
_PROJECTED = "the image's vector in the space shared with text (`image_embeds`); of a bare tower its `pooler_output`"
_MEAN = "`pooler_output`: the normed mean over the last stage"
_CLIP = Architecture(
    {"CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection", "CLIPModel": "CLIPVisionModelWithProjection",
     "CLIPVisionModel": "CLIPVisionModel", "CLIP" + _CLS: "CLIP" + _CLS},
    CLASS_FIRST, _PROJECTED, "CLIPImageProcessor", _TEXT,
)  # fmt: skip
_SIGLIP = Architecture(
    {"SiglipVisionModel": "SiglipVisionModel", "SiglipModel": "SiglipVisionModel", "Siglip" + _CLS: "Siglip" + _CLS},
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


def open_external(spec: ModelSpec, seed: int | None) -> External:
    """Find the model that a prefixed name means and read its settings; no weight is read. `seed`: random weights."""
    library, _, model = spec.model.partition(":")
    opened = _open_transformers if library == "transformers" else _open_timm
    return opened(replace(spec, model=model, name=spec.resolved_name), seed)


@dataclass(frozen=True)
class External:
    """The counterpart of `img2parquet.models.model.Opened` for a model that another library computes."""

    name: str
    source: str
    library: str
    family: str
    config: Mapping[str, Any]
    processor: Processor
    weights: FileWeights | RandomWeights
    embedding: str
    make: Callable[[], Backbone]  # the module with its weights, float32, on the CPU

    @cached_property
    def module(self) -> Backbone:
        return self.make()

    def filled(self, dtype: torch.dtype, device: torch.device, fast: bool) -> Backbone:
        """Return the module with its weights. `fast` has no effect: there is only one form."""
        module = self.module
        assert isinstance(module, Reference)
        module.model.to(device=device, dtype=dtype)
        return module

    def card(self) -> Card:
        """Describe the model. Raises CheckpointError when the weights do not fit config.json."""
        gives, module = self.module.gives(), self.module
        labels = _labels(self.config, gives) if {"logits", "segmentation"} & gives.keys() else ()
        assert isinstance(module, Reference)
        return Card(
            name=self.name,
            family=self.family,
            source=self.source,
            weights_hash=self.weights.hash(),
            config=self.config,
            preprocess=self.processor.settings,
            gives=gives,
            embedding=self.embedding if "pooled" in gives else "",
            labels=labels,
            parameters=sum(parameter.numel() for parameter in module.model.parameters()),
            notes=(
                f"computed by {self.library} itself, as the reference does",
                *self.weights.notes,
                *_size_notes(self.config, self.processor.settings.size_HW, "tokens" in gives),
                *head_notes(self.config, gives, labels),
                *self.processor.notes,
            ),
            reduces_labels=self.processor.reduces_labels,
            implementation=f"reference ({self.library})",
        )


class Reference:
    """A library's module as a `Backbone`; `read` runs it and names its outputs."""

    def __init__(self, model: nn.Module, read: Callable[[nn.Module, Tensor, bool], dict[str, Tensor]]) -> None:
        self.model, self.read = model.eval().requires_grad_(False), read
        self.lock = threading.Lock()  # `read` hooks into the module during a pass
        self.shapes: dict[str, tuple[int, ...]] = {}

    def measure(self, shape_HWC: tuple[int, int, int], source: str) -> Reference:
        """Find the features that the model gives for images of this shape. Raises CheckpointError if it cannot."""
        (*size_HW, channels) = shape_HWC
        x_BCHW = torch.zeros(1, channels, *size_HW, dtype=next(self.model.parameters()).dtype)
        try:
            with torch.inference_mode():
                found = self.read(self.model, x_BCHW, True)
        except Exception as error:  # the library's own code
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "leave `image_size` out, or use the one that it was trained with"
            message = f"{source}: the model takes no image of {size_HW[0]}x{size_HW[1]}: {reason}"
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


def _open_transformers(spec: ModelSpec, seed: int | None) -> External:
    """Open a model of the library; `spec.model` has no prefix here."""
    library, config = _library("transformers"), dict[str, Any]()
    if seed is not None and spec.model in TRANSFORMERS:
        folder, source, config = None, f"transformers' own `{spec.model}`", {"model_type": spec.model}
    else:
        found = find(spec.model, spec.storage_options)
        folder, source, config = found.folder, found.source, read_json(found.folder / CONFIG)
    check_depth(config)
    for part in ("vision_config", "backbone_config"):
        check_depth(config[part] if isinstance(config.get(part), Mapping) else {})
    _refuse_quantized(config, source)
    kind = _architecture(config, source)
    cls = _class(library, kind, config, source)
    weights: FileWeights | RandomWeights
    if seed is None:
        assert folder is not None
        weights = _torch_weights(folder)
    else:
        weights, source = RandomWeights(seed, config["model_type"], cls.__name__, config), f"{source}, random({seed})"
    if folder is None:
        processor = read_processor(None, config, kind.processor, spec.image_size, pixels_of(spec))
    else:
        processor = open_processor(folder, config, kind.processor, spec.image_size, pixels_of(spec))
    size_HW = processor.settings.size_HW

    def make() -> Backbone:
        if isinstance(weights, FileWeights):
            module = _loaded(cls, weights, kind, source)
        else:
            module = _seeded(cls, folder, weights.seed, source)
        first = 1 + int(getattr(module.config, "num_register_tokens", 0) or 0)
        reader = _reader(module, kind.layout, first, size_HW)
        return Reference(module, reader).measure(processor.settings.shape_HWC, source)

    return External(
        spec.resolved_name, source, f"transformers {version('transformers')}", f"transformers/{config['model_type']}",
        config, processor, weights, kind.embedding, make,
    )  # fmt: skip


def _refuse_quantized(config: Mapping[str, Any], source: str) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        message = f"{source}: {CONFIG}: quantization_config: {method or settings} weights are not supported"
        raise CheckpointError(message, hint="use the float checkpoint that they were made from")


def _architecture(config: Mapping[str, Any], source: str) -> Architecture:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in TRANSFORMERS:
        return TRANSFORMERS[model_type]
    problem = f"unknown architecture `{model_type}`" if model_type else "no `model_type`"
    hint = nearest(str(model_type), TRANSFORMERS) or "use one of these, or add it to the table in models/external.py"
    raise UnknownModel(f"{source}: {CONFIG}: {problem}", known=TRANSFORMERS, hint=hint)


def _class(library: Any, kind: Architecture, config: Mapping[str, Any], source: str) -> Any:
    names = config.get("architectures") or [next(iter(kind.classes))]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in kind.classes:
        hint = nearest(str(name), kind.classes) or "no output can use its other heads"
        raise UnknownModel(f"{source}: {CONFIG}: architectures: `{name}`", known=kind.classes, hint=hint)
    try:
        return getattr(library, kind.classes[name])
    except (AttributeError, ImportError, RuntimeError):  # a RuntimeError is what its lazy import makes of others
        message = f"transformers {version('transformers')} has no `{kind.classes[name]}`"
        raise MissingDependency(message, hint="pip install --upgrade 'img2parquet[transformers]'") from None


def _torch_weights(folder: Path) -> FileWeights:
    weights = weight_files(folder)
    if weights.files[0].suffix == FLAX:
        hint = "leave out the prefix `transformers:`; the native families can read it"
        raise CheckpointError(f"{folder}: transformers no longer reads Flax's files", hint=hint)
    weights.listed_names()  # our readers name what is wrong with a file
    return weights


@contextmanager
def _errors_of(library: str, source: str, doing: str) -> Iterator[None]:
    """Turn whatever a library raises about a checkpoint into one CheckpointError."""
    try:
        yield
    except Img2ParquetError:
        raise
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        message = f"{source}: {library} cannot {doing} it: {type(error).__name__}: {said[:300]}"
        hint = f"check {CONFIG}, and load the checkpoint with {library} alone, which says more"
        raise CheckpointError(message, hint=hint) from None


def _loaded(cls: Any, weights: FileWeights, kind: Architecture, source: str) -> Any:
    """Load the module from its files, all or nothing.

    The library sees config.json and the hashed weights only: it would apply an adapter that lies beside them, or
    prefer weights in another format."""
    with tempfile.TemporaryDirectory(prefix="img2parquet-") as alone, _errors_of("transformers", source, "load"):
        index = [weights.index] if weights.index else []
        for path in (weights.folder / CONFIG, *weights.files, *index):
            (Path(alone) / path.name).symlink_to(path.resolve())
        model, info = cls.from_pretrained(
            alone, local_files_only=True, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    surplus = [name for name in info["unexpected_keys"] if not any(re.match(one, name) for one in kind.ignored)]
    faults = {"missing": info["missing_keys"], "unexpected": surplus, "misshapen": info["mismatched_keys"]}
    lines = [
        f"  {len(names)} {fault}: {', '.join(map(str, sorted(names)[:4]))}" for fault, names in faults.items() if names
    ]
    if lines:
        message = f"{source}: the weights do not fit `{cls.__name__}` as config.json describes it"
        known = model.state_dict().keys()
        base = f"{model.base_model_prefix}."
        cause = cause_of(
            weights.listed_names(), lambda name: {name, base + name, name.removeprefix(base)} & known != set()
        )
        hint = cause or "take config.json and weights from the same place"
        raise CheckpointError("\n".join([message, *lines]), hint=hint)
    return model


def _seeded(cls: Any, folder: Path | None, seed: int, source: str) -> Any:
    with torch.random.fork_rng(devices=[]), _errors_of("transformers", source, "build"):
        torch.manual_seed(seed)
        return cls(cls.config_class.from_pretrained(folder) if folder else cls.config_class()).float()


def _reader(
    module: Any, layout: str, first: int, size_HW: tuple[int, int]
) -> Callable[[nn.Module, Tensor, bool], dict[str, Tensor]]:
    config = getattr(module.config, "vision_config", module.config)
    trained = getattr(config, "image_size", None)
    tower = getattr(module, "vision_model", module)  # of a CLIP or SigLIP with a classifier, which passes it on
    takes = {*inspect.signature(module.forward).parameters, *inspect.signature(tower.forward).parameters}
    other = trained is not None and tuple(trained if isinstance(trained, list | tuple) else (trained,) * 2) != size_HW
    more = {"interpolate_pos_encoding": True} if other and "interpolate_pos_encoding" in takes else {}

    def read(model: Any, x_BCHW: Tensor, with_states: bool) -> dict[str, Tensor]:
        if layout == QUERIES:
            return {"segmentation": semantic_maps(model(pixel_values=x_BCHW))}
        base, kept = getattr(model, model.base_model_prefix, tower), list[Any]()
        hook = base.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            out = model(pixel_values=x_BCHW, output_hidden_states=with_states, return_dict=True, **more)
        finally:
            hook.remove()
        whole = getattr(out, "last_hidden_state", None) is not None  # DINOv3's "base" is its encoder, without the norm
        return features_of(out, out if whole or not kept else kept[-1], layout, first, model.config)

    return read


def features_of(out: Any, base: Any, layout: str, first: int, config: Any) -> dict[str, Tensor]:
    """Map the outputs of a model and its base model to our names."""
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
    """Name the hidden states: `tokens:<k>`, and as maps `feature_maps:<stage>`."""
    states = getattr(base, "hidden_states", None) or getattr(out, "hidden_states", None) or ()
    maps = getattr(base, "reshaped_hidden_states", None) or [state for state in states if state.dim() == 4]
    found = {f"tokens:{k}": state for k, state in enumerate(states) if state.dim() == 3}
    stages = len(getattr(config, "depths", None) or ()) or len(maps)
    begins = 0 if len(maps) > stages else 1  # some also give the input of the first stage
    return found | {f"feature_maps:{f'stage{k}' if k else 'stem'}": map_ for k, map_ in enumerate(maps, begins)}


def semantic_maps(out: Any) -> Tensor:
    """Merge Mask2Former's queries as its processor's `post_process_semantic_segmentation` does -> (B, K, 384, 384)."""
    masks_BQhw = F.interpolate(out.masks_queries_logits, size=(384, 384), mode="bilinear", align_corners=False)
    classes_BQK = out.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last one is "nothing"
    return torch.einsum("bqc,bqhw->bchw", classes_BQK, masks_BQhw.sigmoid())


# --- timm ---


def _open_timm(spec: ModelSpec, seed: int | None) -> External:
    """Open a model of the library; `spec.model` has no prefix here."""
    timm, config = _library("timm"), dict[str, Any]()
    if seed is not None:
        folder, source, config = None, f"timm's own `{spec.model}`, random({seed})", {"architecture": spec.model}
    else:
        there = spec.model if "/" in spec.model or Path(spec.model).is_dir() else f"timm/{spec.model}"
        found = find(there, spec.storage_options)
        folder, source, config = found.folder, found.source, read_json(found.folder / CONFIG)
    architecture = str(config.get("architecture"))
    if not timm.is_model(architecture):
        near = timm.list_models(f"{architecture[:4]}*")[:12]
        raise UnknownModel(
            f"{source}: timm has no architecture `{architecture}`", known=near, hint=nearest(architecture, near)
        )
    registered = timm.get_pretrained_cfg(architecture)
    own = dict(registered.to_dict()) if registered else {}
    cfg = own if seed is not None else _timm_settings(config)
    _refuse_quantized(config, source)
    classes = config.get("num_classes", cfg.get("num_classes") if seed is None else None)
    arguments = {**({} if classes is None else {"num_classes": classes}), **dict(config.get("model_args") or {})}
    processor = _timm_preprocess(cfg, spec.image_size, "timm" if spec.preprocess == "pil" else "torchvision")
    size_HW = processor.settings.size_HW
    trained_HW = tuple(own.get("input_size", (3, 224, 224)))[1:]
    weights: FileWeights | RandomWeights
    weights = RandomWeights(seed, "timm", architecture, config) if seed is not None else _torch_weights(_there(folder))

    def make() -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            module = _timm_model(
                source, timm, architecture, arguments, {} if trained_HW == size_HW else {"img_size": size_HW}
            )
        if folder is not None:
            _fill(module, weight_files(folder), source)
        return Reference(module, _read_timm).measure(processor.settings.shape_HWC, source)

    return External(
        spec.resolved_name, source, f"timm {timm.__version__}", f"timm/{architecture}", config, processor, weights,
        "timm's pooled features before the classifier (`forward_head(..., pre_logits=True)`)", make,
    )  # fmt: skip


def _there(folder: Path | None) -> Path:
    assert folder is not None
    return folder


def _timm_model(source: str, timm: Any, architecture: str, arguments: dict[str, Any], resized: dict[str, Any]) -> Any:
    """Create the model, with positions for the input's size if the architecture has positions."""
    with _errors_of("timm", source, "build"):
        try:
            return timm.create_model(architecture, pretrained=False, **arguments, **resized)
        except TypeError:  # a convolutional network has no `img_size`, and needs none
            return timm.create_model(architecture, pretrained=False, **arguments)


_TIMM_DEFAULTS = {  # what timm assumes for a checkpoint's settings that its config.json leaves out (PretrainedCfg)
    "input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


def _timm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's `pretrained_cfg`; before timm 0.8 its entries were at the top of config.json."""
    given = config.get("pretrained_cfg", config)
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{CONFIG}: `pretrained_cfg` is {given!r}, not an object")
    return dict(given)


def _timm_preprocess(given: Mapping[str, Any], image_size: Size, pixels: Arithmetic) -> Processor:
    """Read timm's `pretrained_cfg` as our settings: short side to size / crop_pct, then a center crop; or a squash."""
    left_out = [key for key in _TIMM_DEFAULTS if not given.get(key)]
    cfg = {**given, **{key: _TIMM_DEFAULTS[key] for key in left_out}}
    size, filter_, mode, share = (cfg[key] for key in ("input_size", "interpolation", "crop_mode", "crop_pct"))
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise CheckpointError(f"{CONFIG}: input_size: `{size}` is not [channels, height, width]")
    if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
        raise CheckpointError(f"{CONFIG}: crop_pct: `{share}` is not a share of the image, such as 0.875")
    height, width = pair("image_size", size[1:] if image_size is None else image_size)
    if filter_ not in FILTERS or mode not in ("center", "squash") or (mode == "center" and height != width):
        hint = "use a square `image_size`" if height != width else "put its settings into a folder's config.json"
        raise CheckpointError(f"timm's {filter_}, crop mode {mode} to {height}x{width} cannot be done here", hint=hint)
    sides = [math.floor(side / share) for side in (height, width)]
    settings = {
        "size": {"height": sides[0], "width": sides[1]} if mode == "squash" else {"shortest_edge": sides[0]},
        "do_center_crop": True, "crop_size": {"height": height, "width": width}, "resample": filter_,
        "image_mean": cfg["mean"], "image_std": cfg["std"],
    }  # fmt: skip
    notes = [
        "pixels are Pillow's, as timm makes them (`preprocess: pil`)"
        if pixels == "timm"
        else "an odd margin is cut from the other side than timm cuts it; its resize is Pillow's, ours torch's; "
        "`preprocess: pil` follows timm"
    ]
    left_out = [key for key in left_out if key != "crop_mode"]  # which older files did not have
    if left_out:
        taken = ", ".join(f"{key} {_TIMM_DEFAULTS[key]}" for key in left_out)
        notes.append(f"{CONFIG} does not say {', '.join(left_out)}: timm's defaults are used, {taken}")
    read = read_settings(settings, "ViTImageProcessor", channels=channels_of({"num_channels": size[0]}))
    return Processor(replace(read, pixels=pixels), False, tuple(notes))


def _fill(module: nn.Module, weights: FileWeights, source: str) -> None:
    tensors = weights.tensors()
    try:
        module.load_state_dict(tensors, strict=True)
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        known = module.state_dict().keys()
        cause = cause_of(tensors, known.__contains__)
        hint = cause or "take config.json and weights from the same place, and leave `image_size` out"
        raise CheckpointError(f"{source}: the weights do not fit timm's model: {reason}", hint=hint) from None


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
    """Return the class names by id: transformers' `id2label`, timm's `label_names`, else LABEL_0 and so on."""
    count = gives["logits" if "logits" in gives else "segmentation"][0]
    written = config.get("pretrained_cfg")
    written = written if isinstance(written, Mapping) else {}
    named = (
        config.get("label_names") or written.get("label_names") or config.get("labels")
    )  # the last is timm's old name
    if isinstance(named, list) and len(named) == count:
        return tuple(map(str, named))
    return known_labels(config) if "id2label" in config else tuple(f"LABEL_{index}" for index in range(count))


def _size_notes(config: Mapping[str, Any], size_HW: tuple[int, int], has_tokens: bool) -> Iterator[str]:
    """Yield a note where images have another size than config.json says: of timm, or of a transformer."""
    written, vision = (config.get(name) for name in ("pretrained_cfg", "vision_config"))
    for part in (one for one in (written, config, vision) if isinstance(one, Mapping)):
        of_timm = part.get("input_size")
        size = of_timm[1:] if isinstance(of_timm, list) else part.get("image_size") if has_tokens else None
        if size:
            own_HW = tuple(size) if isinstance(size, list | tuple) else (size, size)
            if own_HW != size_HW:
                own, ours = ("x".join(map(str, pair)) for pair in (own_HW, size_HW))
                yield f"images of {ours} reach the model, where config.json has {own}"
            return


def _library(name: str) -> Any:
    """Import the library, when the first of its models is used. Raises MissingDependency."""
    importer: Callable[[str], Any] = importlib.import_module
    try:
        library = importer(name)
        if name == "transformers":  # we report problems of a checkpoint ourselves
            library.logging.set_verbosity_error()
            library.logging.disable_progress_bar()
        return library
    except Exception as error:  # a package built for another torch raises more than ImportError
        lacks = getattr(error, "name", None) or name
        if not isinstance(error, ImportError):
            message, hint = f"{name} cannot be imported: {type(error).__name__}: {error}", f"reinstall {name}"
        elif lacks.split(".")[0] == name:
            message, hint = f"models named `{name}:...` need the package {name}", f"pip install 'img2parquet[{name}]'"
        else:
            message = f"{name} is installed, but the package {lacks}, which it needs, is not"
            hint = f"pip install {lacks}, in the release that matches your torch {torch.__version__}"
        raise MissingDependency(message, hint=hint) from None
