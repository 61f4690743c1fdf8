"""Trace code for CUDA on a machine without a GPU.

fake_cuda      tensors without numbers (torch's FakeTensorMode): models of any size, with CUDA's rules for devices,
               dtypes and shapes
PretendCuda    tensors that say they are on `cuda:0`, with their numbers in host memory: what also reads values. Each
               operator first runs on tensors of `fake_cuda`, which raises where a GPU would, then on the numbers

Neither says anything of CUDA's kernels, streams or speed.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from img2parquet.images import preprocess
from img2parquet.models.checkpoint import FileWeights, RandomWeights, assign, expected
from img2parquet.models.family import TensorNames
from img2parquet.models.kernels.compiler import COMPILERS

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
ANY_DEVICE = "cuda:0"
NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)


@functools.cache
def register_guard() -> None:
    """Give torch a device guard for CUDA that does nothing: a build without CUDA has none, and refuses the device.

    Skips the test where there is no compiler."""
    if torch.backends.cuda.is_built():
        return  # FakeTensorMode replaces the guard of such a build itself
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        pytest.skip(f"NO CODE FOR CUDA IS TRACED: none of {', '.join(COMPILERS)} is installed")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(prefix="img2parquet-") as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", source]
        subprocess.run([*command, f"-L{root}/lib", "-lc10", "-o", library], check=True, capture_output=True)
        ctypes.CDLL(str(library))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Make all tensors fake. Random weights become zeros of the right shape, so that no model takes memory."""
    register_guard()
    monkeypatch.setattr(RandomWeights, "fill", _fill_with_zeros)
    monkeypatch.setattr(nn.Module, "_apply", _apply_and_replace)
    _forget_tensors()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by copy.deepcopy
        yield mode
    _forget_tensors()


def _forget_tensors() -> None:
    """Empty the caches of tensors that are kept by device: a fake one is of no use to others."""
    preprocess._mean_and_std.cache_clear()


def _fill_with_zeros(self: RandomWeights, module: nn.Module, family: TensorNames) -> None:
    with unset_fake_temporarily():
        assign(module, {name: torch.zeros(()).expand(shape) for name, shape in expected(module).items()})


def _apply_and_replace(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Stand in for torch's own way, which swaps tensors and cannot swap those that a mode remembers."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(function(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


class OnCuda(Tensor):
    """A tensor that says it is on `cuda:0`; its numbers are those of `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnCuda:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=ANY_DEVICE,
        )  # fmt: skip
        made.host = host
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnCuda({self.host})"

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} outside of PretendCuda")


class PretendCuda(TorchDispatchMode):
    """Makes the tensors of this thread that ask for CUDA `OnCuda`."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes, self.patches = FakeTensorMode(), ExitStack()

    def __enter__(self) -> PretendCuda:
        register_guard()
        patch = self.patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(nn.Module, "_apply", _apply_and_replace)
        patch.setattr(FileWeights, "fill", _without_modes(FileWeights.fill))  # sets storages, which no mode can
        # tensors of inference mode cannot be views of a subclass
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())
        _forget_tensors()
        self.patches.callback(_forget_tensors)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(synchronize=lambda: None))
        self.patches.enter_context(self.fakes)  # below us, it keeps torch from initialising CUDA
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._fused_sdp_choice.default:
            return torch.nn.attention.SDPBackend.MATH.value  # made of operators that a CPU has, too
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        devices = self._devices(func, args, kwargs)
        inputs = {id(one.host): one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if type(one) is OnCuda}

        def wrapped(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            on_cuda = next(devices) == "cuda"
            if id(result) in inputs:
                return inputs[id(result)]
            return OnCuda(result) if on_cuda else result

        with unset_fake_temporarily():
            result = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
        return tree_map(wrapped, result)

    def _devices(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
        """Find the devices of the operator's results by running it on fake tensors, which raises what CUDA would."""
        leaves = torch.utils._pytree.tree_leaves
        given_args, given_kwargs = tree_map(_faked, args), tree_map(_faked, kwargs)
        try:
            found = leaves(func(*given_args, **given_kwargs))
        except NEEDS_NUMBERS:
            there = {one.device.type for one in leaves((given_args, given_kwargs)) if isinstance(one, Tensor)}
            return itertools.repeat("cuda" if "cuda" in there else "cpu")
        return iter([one.device.type for one in found if isinstance(one, Tensor)])


def _without_modes(function: Any) -> Any:
    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.host if type(value) is OnCuda else value


def _faked(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
