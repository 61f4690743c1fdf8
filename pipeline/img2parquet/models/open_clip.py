"""Read `open_clip_config.json`, which OpenCLIP writes in the place of config.json, as the reference's settings.

Its own vision transformers only (LAION's CLIP, DFN, MetaCLIP): a tower of timm or of transformers inside it is refused,
as is any option that would change the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2parquet.errors import CheckpointError
from img2parquet.models.checkpoint import read_json
from img2parquet.models.hub import OPEN_CLIP_CONFIG

# options that may be there, with the values that are the architecture's own; None: any value, it is read or of training
VISION: Mapping[str, tuple[Any, ...] | None] = {
    "image_size": None, "layers": None, "width": None, "patch_size": None, "head_width": None, "mlp_ratio": None,
    "patch_dropout": None, "ls_init_value": (None,), "attentional_pool": (False,), "global_average_pool": (False,),
    "input_patchnorm": (False,), "no_ln_pre": (False,), "pos_embed_type": ("learnable",), "pool_type": ("tok",),
    "final_ln_after_pool": (False,), "output_tokens": (False,),
}  # fmt: skip
TEXT: Mapping[str, tuple[Any, ...] | None] = {
    "context_length": None, "vocab_size": None, "width": None, "heads": None, "layers": None, "mlp_ratio": None,
    "hf_tokenizer_name": None, "tokenizer_kwargs": None, "pad_id": None, "ls_init_value": (None,),
    "embed_cls": (False,), "no_causal_mask": (False,), "final_ln_after_pool": (False,), "pool_type": ("argmax",),
    "proj_type": ("linear",), "proj_bias": (False,), "output_tokens": (False,),
}  # fmt: skip
MODEL: Mapping[str, tuple[Any, ...] | None] = {
    "embed_dim": None, "vision_cfg": None, "text_cfg": None, "quick_gelu": (True, False), "custom_text": None,
    "init_logit_scale": None, "init_logit_bias": (None,), "nonscalar_logit_scale": (False,), "multimodal_cfg": (None,),
}  # fmt: skip
LEGACY_EOS = 2  # the reference's mark for reading a prompt at its highest token number, as OpenCLIP does


def read_open_clip(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what config.json and preprocessor_config.json of the same model would say. Raises CheckpointError."""
    written = read_json(folder / OPEN_CLIP_CONFIG)
    model = _section(written, "model_cfg")
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    for options, known, where in (
        (model, MODEL, "model_cfg"),
        (vision, VISION, "vision_cfg"),
        (text, TEXT, "text_cfg"),
    ):
        _refuse_others(options, known, where)
    size = model.get("embed_dim")
    act = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu", "projection_dim": size}
    width, image_size = _count(vision, "width", 768), vision.get("image_size", 224)
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": size,
        "vision_config": {
            **act, "hidden_size": width, "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": _count(vision, "layers", 12), "image_size": image_size,
            "num_attention_heads": width // _count(vision, "head_width", 64),
            "patch_size": vision.get("patch_size", 16),
        },
        "text_config": {
            **act, "hidden_size": _count(text, "width", 512), "num_hidden_layers": _count(text, "layers", 12),
            "num_attention_heads": _count(text, "heads", 8), "vocab_size": _count(text, "vocab_size", 49408),
            "intermediate_size": int(_count(text, "width", 512) * text.get("mlp_ratio", 4.0)),
            "max_position_embeddings": _count(text, "context_length", 77), "eos_token_id": LEGACY_EOS,
        },
    }  # fmt: skip
    return config, _preprocessor(written.get("preprocess_cfg") or {}, image_size)


def _preprocessor(given: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """Return the same steps as an image processor's file: shortest side and crop, or a squash."""
    size, mode = given.get("size", image_size), given.get("resize_mode", "shortest")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    filter_ = given.get("interpolation", "bicubic")
    if (
        mode not in ("shortest", "squash")
        or filter_ not in ("bicubic", "bilinear")
        or (mode == "shortest" and height != width)
    ):
        message = f"{OPEN_CLIP_CONFIG}: preprocess_cfg: resize_mode `{mode}`, {filter_}, to {height}x{width}"
        raise CheckpointError(f"{message} is not supported", hint="known: a square `shortest`, and `squash`")
    sides = {"height": height, "width": width}
    crop = {"size": {"shortest_edge": height}, "do_center_crop": True, "crop_size": sides}
    squash = {"size": sides, "do_center_crop": False}
    means = {f"image_{name}": given[name] for name in ("mean", "std") if name in given}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "resample": filter_,
        **means,
        **(squash if mode == "squash" else crop),
    }


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = given.get(name)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{OPEN_CLIP_CONFIG}: {name}: `{found}` is not an object")
    return found


def _refuse_others(given: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], where: str) -> None:
    for name, value in given.items():
        values = known.get(name, ())
        if values is not None and value not in values:
            message = f"{OPEN_CLIP_CONFIG}: {where}.{name}: `{value}` is another architecture than CLIP's own"
            hint = "use the checkpoint in transformers' layout (config.json and model.safetensors), if there is one"
            raise CheckpointError(message, hint=hint)


def _count(given: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = given.get(name, otherwise)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{OPEN_CLIP_CONFIG}: {name}: `{value}` is not a positive number")
    return value
