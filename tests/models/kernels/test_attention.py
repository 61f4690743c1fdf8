"""The compiled attention equals float64 for every tail, is the same on any number of threads, and never loses NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.attention import FusedAttention, fused_attention, mixes_first, plain
from tests.models import oracle

pytestmark = pytest.mark.skipif(not compiler.has_wide_vectors(), reason="torch is faster without AVX-512")


def made(heads: int, queries: int, keys: int, key_dim: int, value_dim: int, images: int = 2) -> tuple[Tensor, ...]:
    """q, k, v as slices of one linear's output, as LeViT has them, and a bias."""
    random = torch.Generator().manual_seed(queries * keys)
    width, wide = heads * key_dim, heads * value_dim
    qkv = torch.randn(images, max(queries, keys) + 1, 2 * width + wide, generator=random)
    q, k, v = torch.split(qkv, [width, width, wide], dim=-1)
    return q[:, :queries], k[:, :keys], v[:, :keys], torch.randn(heads, queries, keys, generator=random)


def fused(
    bias: Tensor,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype = torch.float32,
    values: tuple[Tensor, Tensor] | None = None,
) -> FusedAttention:
    attention = fused_attention(bias, key_dim, value_dim, dtype, values)
    assert attention is not None
    return attention


@pytest.mark.parametrize("queries", [1, 5, 6, 7, 16, 49])
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 49, 64, 65, 196])
def test_equals_float64_for_every_tail_of_queries_and_keys(queries: int, keys: int) -> None:
    for key_dim, value_dim in ((16, 32), (3, 16)):
        q, k, v, bias = made(3, queries, keys, key_dim, value_dim)
        exact = plain(q.double(), k.double(), v.double(), bias.double())
        assert torch.allclose(fused(bias, key_dim, value_dim)(q, k, v).double(), exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("value_dim", [16, 32, 48, 64, 80, 112, 128])
def test_equals_float64_for_every_width_of_values(value_dim: int) -> None:
    q, k, v, bias = made(2, 9, 20, 8, value_dim)
    exact = plain(q.double(), k.double(), v.double(), bias.double())
    assert torch.allclose(fused(bias, 8, value_dim)(q, k, v).double(), exact, rtol=1e-5, atol=3e-6)


def tokens(heads: int, keys: int, width: int, value_dim: int, images: int = 2) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x_BKI, as a slice of longer rows, and the linear that makes values of it."""
    random = torch.Generator().manual_seed(width)
    x = torch.randn(images, keys + 1, width + 16, generator=random)[:, :keys, :width]
    weight = torch.randn(heads * value_dim, width, generator=random) / width**0.5
    return x, (weight, torch.randn(heads * value_dim, generator=random))


@pytest.mark.parametrize("queries", [1, 5, 7, 16, 49])
@pytest.mark.parametrize("keys", [1, 17, 49, 196])
@pytest.mark.parametrize(("width", "value_dim"), [(16, 32), (48, 16), (80, 112), (128, 64)])
def test_tokens_can_be_mixed_before_values_are_made_of_them(
    queries: int, keys: int, width: int, value_dim: int
) -> None:
    q, k, _, bias = made(3, queries, keys, 16, 16)
    x, (weight, add) = tokens(3, keys, width, value_dim)
    exact = plain(q.double(), k.double(), F.linear(x.double(), weight.double(), add.double()), bias.double())
    got = fused(bias, 16, value_dim, values=(weight, add))(q, k, x)
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=3e-6)


def test_what_is_fewer_multiplications_is_counted_right() -> None:
    # LeViT-128S: 49 queries of 196 keys of 128 channels, 64 values a head; then 16 of 49 of 256; then the first stage's
    assert mixes_first(49, 196, 128, 64)
    assert mixes_first(16, 49, 256, 64)
    assert not mixes_first(196, 196, 128, 32)


def test_bfloat16_is_the_rounded_result_of_float32_arithmetic() -> None:
    q, k, v, bias = made(4, 49, 196, 16, 64)
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    exact = plain(*(tensor.double() for tensor in low), bias.double())
    got = fused(bias, 16, 64, torch.bfloat16)(*low)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("shift", [-1e4, -200.0, 80.0, 1e4])
def test_scores_of_any_size(shift: float) -> None:
    q, k, v, bias = made(2, 13, 33, 8, 16)
    got = fused(bias + shift, 8, 16)(q, k, v).double()
    exact = plain(q.double(), k.double(), v.double(), (bias + shift).double())
    assert torch.allclose(got, exact, rtol=1e-5, atol=1e-6 * max(1, abs(shift)))


def test_one_key_far_above_all_others_takes_all() -> None:
    q, k, v, bias = made(1, 6, 40, 8, 16)
    bias[:, :, 17] += 300
    want = torch.nn.functional.hardswish(v[:, 17:18].expand(-1, 6, -1))
    assert torch.allclose(fused(bias, 8, 16)(q, k, v), want, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(value: float) -> None:
    q, k, v, bias = (tensor.clone() for tensor in made(2, 7, 18, 8, 16))
    q[0, 3, 2] = value
    got = fused(bias, 8, 16)(q, k, v)
    assert got[0, 3, :16].isnan().all()
    got[0, 3, :16] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_neighbours(dtype: torch.dtype) -> None:
    q, k, v, bias = made(3, 49, 49, 16, 32, images=5)
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    assert oracle.same_bits(fused(bias, 16, 32, dtype), (q, k, v))


def test_bits_of_mixed_tokens_do_not_depend_on_threads_or_neighbours() -> None:
    q, k, _, bias = made(3, 16, 49, 16, 16, images=5)
    x, values = tokens(3, 49, 80, 32, images=5)
    assert oracle.same_bits(fused(bias, 16, 32, values=values), (q, k, x))


def test_no_images() -> None:
    q, k, v, bias = made(2, 5, 5, 8, 16, images=0)
    assert fused(bias, 8, 16)(q, k, v).shape == (0, 5, 32)


def test_where_it_cannot_be_had_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.zeros(2, 4, 4)
    assert fused_attention(bias, 8, 20, torch.float32) is None, "20 values are no whole vectors"
    assert fused_attention(bias, 8, 16, torch.float16) is None
    assert fused_attention(bias, 8, 16, torch.float32, (torch.zeros(32, 20), torch.zeros(32))) is None
    assert fused_attention(bias.to("meta"), 8, 16, torch.float32) is None
    with monkeypatch.context() as without:
        without.setenv("IMG2PARQUET_NATIVE", "0")
        compiler.native_library.cache_clear()
        assert fused_attention(bias, 8, 16, torch.float32) is None
    monkeypatch.setattr(compiler, "has_wide_vectors", lambda: False)
    compiler.native_library.cache_clear()
    assert fused_attention(bias, 8, 16, torch.float32) is None
    compiler.native_library.cache_clear()


def test_tensors_of_another_shape_never_reach_the_kernel() -> None:
    q, k, v, bias = made(2, 5, 5, 8, 16)
    with pytest.raises(AssertionError):
        fused(bias, 8, 16)(q[:, :4], k, v)
    with pytest.raises(AssertionError):
        fused(bias, 8, 16)(q, k.bfloat16(), v)
    x, values = tokens(2, 5, 48, 16)
    with pytest.raises(AssertionError):
        fused(bias, 8, 16, values=values)(q, k, x[..., :32])
    with pytest.raises(AssertionError):
        fused(bias, 8, 16)(q, k, v.transpose(1, 2).contiguous().transpose(1, 2))
