"""The compiled stem equals float64 for every kernel and edge, and is the same on any number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.conv_stem import FusedStem, Geometry, fused_stem, plain
from tests.models import oracle

pytestmark = pytest.mark.skipif(not compiler.has_wide_vectors(), reason="torch is faster without AVX-512")

Convs = list[tuple[Tensor, Tensor]]


def made(channels: tuple[int, ...], at: Geometry) -> Convs:
    random = torch.Generator().manual_seed(len(channels))
    pairs = itertools.pairwise(channels)
    return [
        (torch.randn(o, i, at.kernel, at.kernel, generator=random) / i**0.5, torch.randn(o, generator=random))
        for i, o in pairs
    ]


def pixels(height: int, width: int, images: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(height * width))


def fused(convs: Convs, at: Geometry) -> FusedStem:
    stem = fused_stem(convs, at)
    assert stem is not None
    return stem


def exact(x_BCHW: Tensor, convs: Convs, at: Geometry) -> Tensor:
    return plain(x_BCHW.double(), [(weight.double(), bias.double()) for weight, bias in convs], at)


@pytest.mark.parametrize("at", [Geometry(3, 2, 1), Geometry(5, 2, 2), Geometry(1, 2, 0), Geometry(3, 1, 1),
                                Geometry(2, 3, 0), Geometry(4, 2, 3)], ids=str)  # fmt: skip
@pytest.mark.parametrize("sides", [(32, 32), (33, 47), (29, 64), (90, 16)], ids=str)
def test_equals_float64_for_every_kernel_and_side(at: Geometry, sides: tuple[int, int]) -> None:
    convs, x_BCHW = made((3, 16, 32, 48), at), pixels(*sides)
    want, got = exact(x_BCHW, convs, at), fused(convs, at)(x_BCHW)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("channels", [(1, 16), (4, 64, 16), (3, 32, 64, 128, 256)], ids=str)
def test_equals_float64_for_every_width(channels: tuple[int, ...]) -> None:
    at, x_BCHW = Geometry(3, 2, 1), pixels(64, 64, channels=channels[0])
    convs = made(channels, at)
    want, got = exact(x_BCHW, convs, at), fused(convs, at)(x_BCHW)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_the_size_that_levit_has() -> None:
    at, x_BCHW = Geometry(3, 2, 1), pixels(224, 224)
    convs = made((3, 16, 32, 64, 128), at)
    for layout in (torch.channels_last, torch.contiguous_format):
        got, want = fused(convs, at)(x_BCHW.contiguous(memory_format=layout)), exact(x_BCHW, convs, at)
        assert got.shape == (2, 128, 14, 14)
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_bits_do_not_depend_on_threads_or_neighbours() -> None:
    at, x_BCHW = Geometry(3, 2, 1), pixels(96, 80, images=5)
    # with more threads than images, images are split among threads
    assert oracle.same_bits(fused(made((3, 16, 48), at), at), (x_BCHW,), threads=(1, 2, 7, 64))


def test_not_a_number_stays_so_and_stays_where_it_is() -> None:
    at, x_BCHW = Geometry(3, 2, 1), pixels(64, 64)
    x_BCHW[1, 2, 10, 10] = float("nan")
    convs = made((3, 16, 16), at)
    got = fused(convs, at)(x_BCHW)
    assert torch.equal(got.isnan(), plain(x_BCHW, convs, at).isnan())
    assert got[1].isnan().any()


def test_no_images() -> None:
    at = Geometry(3, 2, 1)
    assert fused(made((3, 16), at), at)(pixels(32, 32, images=0)).shape == (0, 16, 16, 16)


def test_where_it_cannot_be_had_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Geometry(3, 2, 1)
    convs = made((3, 16, 32), at)
    assert fused_stem(made((3, 16, 20), at), at) is None, "20 channels are no whole vectors"
    assert fused_stem([(weight.bfloat16(), bias.bfloat16()) for weight, bias in convs], at) is None
    assert fused_stem([(weight.to("meta"), bias.to("meta")) for weight, bias in convs], at) is None
    compiler.native_library.cache_clear()
    monkeypatch.setenv("IMG2PARQUET_NATIVE", "0")
    assert fused_stem(convs, at) is None
    compiler.native_library.cache_clear()


def test_what_does_not_fit_never_reaches_the_kernel() -> None:
    at = Geometry(3, 2, 0)
    stem = fused(made((3, 16, 16), at), at)
    for wrong in (pixels(32, 32, channels=4), pixels(32, 32).double(), pixels(4, 64)):
        with pytest.raises(AssertionError):
            stem(wrong)
