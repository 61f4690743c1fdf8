"""Compute the output linear, the residual and the MLP after attention in one pass over a few rows at a time.

Run one after the other, each linear writes a batch's rows to memory and the next one reads them. Here (compiled: see
`compiler.py`) a few rows go through all three linears while they are in the L1 cache: on LeViT-128S's shapes a tenth
less time on one thread of a Zen 4, a seventh less on two. Float32 only: torch's bfloat16 linears have instructions of
their own. A row's sums run in the same order whatever the batch and the number of threads.

Shapes: N rows, W the width of all heads together, D the tokens' width, M the MLP's, O I a linear's outputs and inputs.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.activations import ACTIVATIONS

PANEL = 2 * compiler.LANES  # outputs that the kernel computes at once

Linear = tuple[Tensor, Tensor]  # weight_OI, bias_O


def fused_feed_forward(out: Linear, up: Linear, down: Linear) -> FusedFeedForward | None:
    """Build y = out(mixed) [+ x], then y + down(hardswish(up(y))); None where plain torch has to compute it."""
    if not compiler.takes([weight for weight, _ in (out, up, down)], PANEL):
        return None
    compiled = compiler.native_library(SOURCE)
    return None if compiled is None else FusedFeedForward(out, up, down, compiled)


class FusedFeedForward:
    """Built by `fused_feed_forward`."""

    def __init__(self, out: Linear, up: Linear, down: Linear, compiled: ctypes.CDLL) -> None:
        self.compiled = compiled
        (self.width, self.in_width), (self.mlp_width, _) = out[0].shape[:2], up[0].shape
        assert up[0].shape[1] == self.width and down[0].shape == (self.width, self.mlp_width)
        # for each input, a panel's outputs side by side, in the order of the multiplication
        self.tensors = [
            tensor.contiguous()
            for weight_OI, bias_O in (out, up, down)
            for tensor in (weight_OI.detach().unflatten(0, (-1, PANEL)).transpose(1, 2), bias_O.detach())  # type: ignore[no-untyped-call]
        ]

    def __call__(self, mixed: Tensor, x: Tensor | None = None) -> Tensor:
        """mixed (..., W), x (..., D) -> (..., D). Does not change its inputs."""
        mixed, x = mixed.contiguous(), None if x is None else x.contiguous()
        shape = (*mixed.shape[:-1], self.width)
        assert mixed.shape[-1] == self.in_width and mixed.dtype == torch.float32, (mixed.shape, mixed.dtype)
        assert x is None or (x.shape == shape and x.dtype == torch.float32), (x.shape, x.dtype)
        y = torch.empty(shape)
        self.compiled.feed_forward_f32(
            mixed.data_ptr(),
            None if x is None else x.data_ptr(),
            *(tensor.data_ptr() for tensor in (*self.tensors, y)),
            *(y.numel() // self.width, self.in_width, self.width, self.mlp_width, torch.get_num_threads()),
        )
        return y


def _agrees(library: ctypes.CDLL) -> bool:
    random = torch.Generator().manual_seed(0)
    shapes = ((64, 20), (96, 64), (64, 96))
    linears = [(torch.randn(o, i, generator=random) / 8, torch.randn(o, generator=random)) for o, i in shapes]
    mixed, x = torch.randn(75, 20, generator=random), torch.randn(75, 64, generator=random)
    out, up, down = linears
    fused = FusedFeedForward(out, up, down, library)
    return all(
        torch.allclose(fused(mixed, residual), plain(mixed, residual, out, up, down), rtol=1e-5, atol=1e-5)
        for residual in (x, None)
    )


def plain(mixed: Tensor, x: Tensor | None, out: Linear, up: Linear, down: Linear) -> Tensor:
    """Compute the same in plain torch."""
    y = F.linear(mixed, *out)
    y = y if x is None else y + x
    return y + F.linear(ACTIVATIONS["hardswish"](F.linear(y, *up)), *down)


CPP = r"""
namespace {
constexpr int TILE = 14;   // rows at once: with 2 vectors of outputs 28 sums, which leaves registers for the factors
constexpr int BLOCK = 56;  // rows that stay in the nearest cache for all three linears
constexpr int PANEL = 2 * LANES;

struct Rows { float* at; int64_t stride; };
struct Linear { const float *weight, *bias; int64_t in, out; };  // weight[panel][input][output of the panel]

template <int R, bool ACTIVATED>
inline void tile(const float* x, int64_t x_stride, int64_t in, const float* weight, const float* bias, const float* add,
                 int64_t add_stride, float* y, int64_t y_stride) {
  F sum[R][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < 2; v++) sum[r][v] = F{};
  multiply(x, x_stride, in, weight, PANEL, sum);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < 2; v++) {
    F out = sum[r][v] + load(bias + v * LANES);
    if (ACTIVATED) out = hardswish(out);
    if (add) out += load(add + r * add_stride + v * LANES);
    store(y + r * y_stride + v * LANES, out);
  }
}

template <int R, bool ACTIVATED>
inline void tiles(int64_t& n, int64_t rows, Rows x, const Linear& is, int64_t o, Rows add, Rows y) {
  for (; n + R <= rows; n += R)
    tile<R, ACTIVATED>(x.at + n * x.stride, x.stride, is.in, is.weight + o * is.in, is.bias + o,
                       add.at ? add.at + n * add.stride + o : nullptr, add.stride, y.at + n * y.stride + o, y.stride);
}

template <bool ACTIVATED> void linear(int64_t rows, Rows x, const Linear& is, Rows add, Rows y) {
  for (int64_t o = 0; o < is.out; o += PANEL) {
    int64_t n = 0;
    tiles<TILE, ACTIVATED>(n, rows, x, is, o, add, y);
    tiles<8, ACTIVATED>(n, rows, x, is, o, add, y);
    tiles<4, ACTIVATED>(n, rows, x, is, o, add, y);
    tiles<1, ACTIVATED>(n, rows, x, is, o, add, y);
  }
}
inline int64_t apart(int64_t width) { return width + LANES; }  // rows a power of 2 apart would share the cache's lines
}  // namespace

extern "C" void feed_forward_f32(const float* mixed, const float* x, const float* out_weight, const float* out_bias,
                                 const float* up_weight, const float* up_bias, const float* down_weight,
                                 const float* down_bias, float* y, int64_t rows, int64_t in, int64_t width,
                                 int64_t mlp, int threads) {
  const Linear out{out_weight, out_bias, in, width}, up{up_weight, up_bias, width, mlp},
      down{down_weight, down_bias, mlp, width};
  const int64_t whole = (rows + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
  {
    Floats a(BLOCK * apart(in)), b(BLOCK * apart(width)), c(BLOCK * apart(mlp));
    const Rows taken{a.data(), apart(in)}, token{b.data(), apart(width)}, wide{c.data(), apart(mlp)}, none{nullptr, 0};
#pragma omp for schedule(static)
    for (int part = 0; part < threads; part++) {
      const int64_t last = whole * (part + 1) / threads * TILE, end = last < rows ? last : rows;
      for (int64_t n = whole * part / threads * TILE; n < end; n += BLOCK) {
        const int64_t some = end - n < BLOCK ? end - n : BLOCK;
        for (int64_t r = 0; r < some; r++)
          std::memcpy(taken.at + r * taken.stride, mixed + (n + r) * in, in * sizeof(float));
        const Rows add{x ? const_cast<float*>(x) + n * width : nullptr, width}, to{y + n * width, width};
        linear<false>(some, taken, out, add, token);
        linear<true>(some, token, up, none, wide);
        linear<false>(some, wide, down, token, to);
      }
    }
  }
}
"""

SOURCE = compiler.KernelSource(
    name="feed_forward",
    code=CPP,
    functions={"feed_forward_f32": (*[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 4, ctypes.c_int)},
    agrees=_agrees,
    without="LeViT runs a few percent slower",
    wide=True,
)
