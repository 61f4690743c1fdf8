"""The compiled group norm equals float64, is the same on any number of threads, and is never required."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models import bit
from img2parquet.models.kernels import compiler, group_norm
from img2parquet.models.kernels.activations import ACTIVATIONS
from img2parquet.models.kernels.group_norm import FusedGroupNorm, fused_group_norm

LAST = torch.channels_last


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no library loaded in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.native_library.cache_clear()
    yield tmp_path / "img2parquet"
    compiler.native_library.cache_clear()


def a_map(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).contiguous(memory_format=LAST)


def normed(x: Tensor, groups: int, activation: str = "relu", residual: Tensor | None = None, **how: bool) -> Tensor:
    return fused(x.shape[1], groups, activation)(x.clone(memory_format=torch.preserve_format), residual, **how)


def fused(channels: int, groups: int, activation: str) -> FusedGroupNorm:
    weight, bias = a_map(2, channels, 1, 1, seed=1).flatten(1)
    return fused_group_norm(weight, bias, groups, activation)


def exact(x: Tensor, groups: int, activation: str = "relu", residual: Tensor | None = None) -> Tensor:
    weight, bias = a_map(2, x.shape[1], 1, 1, seed=1).flatten(1).double()
    y = F.group_norm(x.double().contiguous(), groups, weight, bias, 1e-5)
    return ACTIVATIONS[activation](y if residual is None else y + residual.double())


def test_a_compiler_is_used_where_there_is_one() -> None:
    library = compiler.native_library(group_norm.SOURCE)
    assert library is not None, "this machine has g++, so the tests below must be about the compiled kernel"


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (8, 8), (17, 9), (40, 30)])
@pytest.mark.parametrize("channels", [8, 16, 24, 40, 64, 72, 136])
def test_equals_float64_for_every_tail_of_channels_and_pixels(
    channels: int, size: tuple[int, int], groups: int
) -> None:
    x = a_map(2, channels, *size)
    alone = size == (1, 1) and groups == channels  # variance 0: the divisor is the root of 1e-5
    assert torch.allclose(normed(x, groups).double(), exact(x, groups), rtol=1e-5, atol=1e-4 if alone else 3e-6)


@pytest.mark.parametrize("activation", ["relu", "linear", "gelu", "hardswish"])
@pytest.mark.parametrize("in_place", [False, True])
def test_residual_comes_before_the_activation(activation: str, in_place: bool) -> None:
    x, residual = a_map(3, 40, 9, 8), a_map(3, 40, 9, 8, seed=2)
    got = normed(x, 4, activation, residual, in_place=in_place)
    assert torch.allclose(got.double(), exact(x, 4, activation, residual), rtol=1e-5, atol=3e-6)


def test_leaves_its_input_alone_unless_told() -> None:
    norm, x = fused(16, 4, "relu"), a_map(1, 16, 4, 4)
    before = x.clone()
    norm(x)
    assert torch.equal(x, before)
    assert norm(x, in_place=True).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mean", [0.0, 30.0, -1000.0])
def test_a_mean_far_from_zero_costs_no_more_than_the_input_lost(mean: float) -> None:
    x = (a_map(2, 64, 28, 28) + mean).contiguous(memory_format=LAST)
    error = (normed(x, 32).double() - exact(x, 32)).abs().max()
    assert error < 2e-6 * max(1, abs(mean)), "rounding of x * scale + shift, as in torch's own kernel"


def test_channels_first_is_taken_too() -> None:
    x = a_map(2, 24, 6, 5).contiguous()
    assert torch.allclose(fused(24, 8, "relu")(x).double(), exact(x, 8), rtol=1e-5, atol=3e-6)


def test_bfloat16_is_the_rounded_result_of_float32_arithmetic() -> None:
    x, residual = a_map(2, 72, 13, 11).bfloat16(), a_map(2, 72, 13, 11, seed=2).bfloat16()
    want = exact(x, 8, "relu", residual)
    assert ((normed(x, 8, "relu", residual).double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()


def test_nan_and_no_images_pass_through() -> None:
    x = a_map(2, 16, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    y = normed(x, 2)
    assert y[0, :8].isnan().all() and not y[0, 8:].isnan().any() and not y[1].isnan().any()
    assert normed(a_map(0, 16, 4, 4), 2).shape == (0, 16, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(images: int, dtype: torch.dtype) -> None:
    x, before = a_map(images, 96, 30, 30).to(dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(normed(x, 32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_torch_does_the_same(monkeypatch: pytest.MonkeyPatch, fresh: Path, dtype: torch.dtype) -> None:
    monkeypatch.setenv("IMG2PARQUET_NATIVE", "0")
    assert compiler.native_library(group_norm.SOURCE) is None
    x, residual = a_map(2, 40, 9, 8).to(dtype), a_map(2, 40, 9, 8, seed=2).to(dtype)
    got, want = normed(x, 4, "relu", residual), exact(x, 4, "relu", residual)
    tolerance = 3e-6 if dtype == torch.float32 else 5e-2
    assert got.dtype == dtype and torch.allclose(got.double(), want, rtol=1e-5, atol=tolerance)
    assert not fresh.exists()


def test_importing_compiles_nothing(fresh: Path) -> None:
    for module in (group_norm, bit):
        runpy.run_path(str(module.__file__))
    assert not fresh.exists()
