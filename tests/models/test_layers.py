"""Fused layers equal plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from img2parquet.models import layers
from img2parquet.models.kernels.activations import ACTIVATIONS
from tests.models import oracle


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch without oneDNN")
def test_the_self_test_passes_where_onednn_is() -> None:
    """Otherwise everything would silently fall back, correct but slow."""
    assert layers.onednn_works(torch.float32)
    assert not layers.onednn_works(torch.float64)


def test_the_self_test_finds_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers._ONEDNN, "hardswish", ("relu", [], None))
    assert not layers.onednn_works.__wrapped__(torch.float32)
    monkeypatch.setitem(layers._ONEDNN, "hardswish", ("no such thing", [], None))
    assert not layers.onednn_works.__wrapped__(torch.float32)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_linear(activation: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "onednn_works", lambda dtype: fused)
    x, weight, bias, residual = noise(2, 7, 24), noise(16, 24, seed=1), noise(16, seed=2), noise(2, 7, 16, seed=3)
    theirs = ACTIVATIONS[activation](F.linear(x, weight, bias))
    oracle.agree({"y": layers.fused_linear(weight, bias, activation)(x)}, {"y": theirs})
    oracle.agree({"y": layers.fused_linear(weight)(x, residual)}, {"y": F.linear(x, weight) + residual})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("at", [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_conv(at: tuple[int, int, int], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "onednn_works", lambda dtype: fused)
    stride, padding, dilation = at
    x, weight, bias = noise(2, 8, 11, 9), noise(16, 8, 3, 3, seed=1), noise(16, seed=2)
    theirs = F.conv2d(x, weight, bias, stride, padding, dilation)
    residual = noise(*theirs.shape, seed=3).contiguous(memory_format=torch.channels_last)
    kept = x.clone(), residual.clone()
    for activation in ("linear", "relu", "hardswish"):
        conv = layers.fused_conv(weight, bias, stride=stride, padding=padding, dilation=dilation, activation=activation)
        act = ACTIVATIONS[activation]
        oracle.agree({"y": conv(x)}, {"y": act(theirs)})
        oracle.agree({"y": conv(x, residual)}, {"y": act(theirs + residual)})
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_folding_a_batch_norm(shape: tuple[int, ...]) -> None:
    norm = oracle.randomised(torch.nn.BatchNorm1d(6) if len(shape) == 2 else torch.nn.BatchNorm2d(6))
    weight, x = noise(*shape), noise(2, 4, 5, 5) if len(shape) == 4 else noise(9, 4)
    apply = F.conv2d if len(shape) == 4 else F.linear
    folded, bias = layers.fold_batch_norm(weight, norm)
    assert folded.dtype == torch.float64
    oracle.agree({"y": apply(x, folded.float(), bias.float())}, {"y": norm(apply(x, weight))}, 1e-6)
