"""Choose the dtype that a model computes in, the same for jobs, `embed` and `load_model`."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

from img2parquet.errors import InputError, nearest

Dtype = Literal["float32", "bfloat16", "float16"]


def resolve_dtype(dtype: str, device: str = "cpu") -> str:
    """Resolve `auto` to bfloat16 where the device multiplies matrices in it, to float16 on GPUs that have only that,
    else to float32.

    CUDA devices of compute capability 7 (T4, V100) only emulate bfloat16, and those before it have no matrix units; of
    CPUs, those with AMX have them. Other kinds of device cannot be queried and get float32."""
    if dtype != "auto":
        return dtype
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float16" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 7 else "float32"
    return "bfloat16" if kind == "cpu" and torch.cpu._is_amx_tile_supported() else "float32"


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of that name. Raises InputError for names that models do not run in."""
    if name not in get_args(Dtype):
        known = ("auto", *get_args(Dtype))
        raise InputError(f"unknown dtype `{name}`", known=known, hint=nearest(name, known))
    return cast(torch.dtype, getattr(torch, name))
