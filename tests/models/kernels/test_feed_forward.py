"""The compiled feed-forward equals float64 for any number of rows, and is the same on any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.feed_forward import (
    FusedFeedForward,
    Linear,
    fused_feed_forward,
    plain,
)
from tests.models import oracle

pytestmark = pytest.mark.skipif(not compiler.has_wide_vectors(), reason="torch is faster without AVX-512")


def made(in_width: int, width: int, mlp_width: int) -> tuple[Linear, Linear, Linear]:
    random = torch.Generator().manual_seed(in_width)

    def linear(outputs: int, inputs: int) -> Linear:
        weight = torch.randn(outputs, inputs, generator=random) / inputs**0.5
        return weight, torch.randn(outputs, generator=random)

    return linear(width, in_width), linear(mlp_width, width), linear(width, mlp_width)


def rows(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))


def fused(linears: tuple[Linear, Linear, Linear]) -> FusedFeedForward:
    feed_forward = fused_feed_forward(*linears)
    assert feed_forward is not None
    return feed_forward


def exact(mixed: Tensor, x: Tensor | None, linears: tuple[Linear, Linear, Linear]) -> Tensor:
    doubles = [(weight.double(), bias.double()) for weight, bias in linears]
    return plain(mixed.double(), None if x is None else x.double(), *doubles)


@pytest.mark.parametrize("count", [1, 3, 13, 14, 15, 22, 27, 55, 56, 57, 70, 512])
@pytest.mark.parametrize("residual", [True, False])
def test_equals_float64_for_every_number_of_rows(count: int, residual: bool) -> None:
    linears, mixed, x = made(48, 64, 96), rows(count, 48), rows(count, 64) if residual else None
    want, got = exact(mixed, x, linears), fused(linears)(mixed, x)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("widths", [(1, 32, 32), (128, 128, 256), (1024, 384, 768), (20, 96, 32)], ids=str)
def test_equals_float64_for_every_width(widths: tuple[int, int, int]) -> None:
    linears, mixed, x = made(*widths), rows(40, widths[0]), rows(40, widths[1])
    kept = mixed.clone(), x.clone()
    want, got = exact(mixed, x, linears), fused(linears)(mixed, x)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()
    assert torch.equal(mixed, kept[0])
    assert torch.equal(x, kept[1])


def test_rows_may_have_any_shape_and_lie_apart() -> None:
    linears, mixed, x = made(48, 64, 96), rows(2 * 9, 96).reshape(2, 9, 96)[..., :48], rows(2 * 9, 64).reshape(2, 9, 64)
    assert torch.equal(fused(linears)(mixed, x).flatten(0, 1), fused(linears)(mixed.reshape(18, 48), x.reshape(18, 64)))


def test_bits_do_not_depend_on_threads_or_neighbours() -> None:
    assert oracle.same_bits(fused(made(48, 64, 96)), (rows(131, 48), rows(131, 64)), threads=(1, 2, 7, 64))


def test_not_a_number_stays_so_and_stays_in_its_row() -> None:
    linears, mixed = made(48, 64, 96), rows(20, 48)
    mixed[7, 3] = float("nan")
    got = fused(linears)(mixed)
    assert got[7].isnan().all()
    assert not got[torch.arange(20) != 7].isnan().any()


def test_no_rows() -> None:
    assert fused(made(48, 64, 96))(torch.empty(0, 49, 48)).shape == (0, 49, 64)


def test_where_it_cannot_be_had_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = made(48, 64, 96)
    assert fused_feed_forward(*made(48, 64, 80)) is None, "80 outputs are no whole panels"
    assert fused_feed_forward(*((weight.bfloat16(), bias.bfloat16()) for weight, bias in linears)) is None
    assert fused_feed_forward(*((weight.to("meta"), bias.to("meta")) for weight, bias in linears)) is None
    compiler.native_library.cache_clear()
    monkeypatch.setenv("IMG2PARQUET_NATIVE", "0")
    assert fused_feed_forward(*linears) is None
    compiler.native_library.cache_clear()


def test_what_does_not_fit_never_reaches_the_kernel() -> None:
    feed_forward = fused(made(48, 64, 96))
    for mixed, x in ((rows(4, 50), None), (rows(4, 48), rows(3, 64)), (rows(4, 48).double(), None)):
        with pytest.raises(AssertionError):
            feed_forward(mixed, x)
