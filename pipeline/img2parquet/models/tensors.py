"""Move values to torch tensors, and tensors back to the host."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def as_tensor(value: Any) -> Tensor:
    """Wrap an array without copying it. Silences torch's warning about Ray's read-only arrays: nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(value)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host through pinned memory, at the speed of the bus, waiting only for the current stream.

    The result is copied out of pinned memory to release it: columns live until their part is written."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.clone()
