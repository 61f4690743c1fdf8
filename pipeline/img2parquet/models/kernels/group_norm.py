"""Compute group norm, residual and ReLU of a channels-last map in one call, compiled where possible.

torch's own kernel is slow on channels-last maps (bf16: up to 27 times slower than this) and its variance there is less
accurate; torch.compile's takes 2 to 7 times as long, needs the same compiler, and half a minute at the first call. So
`CPP` is compiled (see `compiler.py`); where that is not possible, plain torch computes the same. A channel is summed in
the same order whatever the number of threads, so results do not depend on it.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.activations import ACTIVATIONS

EPS = 1e-5  # the only one that BiT uses


def fused_group_norm(weight_C: Tensor, bias_C: Tensor, groups: int, activation: str) -> FusedGroupNorm:
    """Build y = activation(group_norm(x) [+ residual]) for the weight's device, compiled where possible."""
    compiled = compiler.native_library(SOURCE) if weight_C.device.type == "cpu" else None
    return FusedGroupNorm(weight_C, bias_C, groups, activation, compiled)


class FusedGroupNorm:
    """Built by `fused_group_norm`. Statistics and affine are float32 whatever the map's dtype."""

    def __init__(
        self, weight_C: Tensor, bias_C: Tensor, groups: int, activation: str, compiled: ctypes.CDLL | None
    ) -> None:
        self.weight_C = weight_C.detach().float().contiguous()
        self.bias_C = bias_C.detach().float().contiguous()
        self.groups, self.activation, self.compiled = groups, activation, compiled

    def __call__(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None, *, in_place: bool = False) -> Tensor:
        """x_BCHW [+ residual of the same shape] -> the same shape, channels last; `in_place` may write over x."""
        if self.compiled is None or x_BCHW.dtype not in compiler.DTYPES:
            return self._plain(x_BCHW, residual_BCHW)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        if residual_BCHW is not None:
            residual_BCHW = residual_BCHW.contiguous(memory_format=torch.channels_last)
        y_BCHW = x_BCHW if in_place else torch.empty_like(x_BCHW)
        self._run(self.compiled, x_BCHW, residual_BCHW, y_BCHW)
        return y_BCHW if self.activation in ("relu", "linear") else ACTIVATIONS[self.activation](y_BCHW)

    def _plain(self, x_BCHW: Tensor, residual_BCHW: Tensor | None) -> Tensor:
        """Compute in plain torch; on a CPU channels first, where torch's statistics are accurate."""
        on_cpu, weight_C, bias_C = x_BCHW.device.type == "cpu", self.weight_C, self.bias_C
        if not on_cpu:
            weight_C, bias_C = weight_C.to(x_BCHW.dtype), bias_C.to(x_BCHW.dtype)
        y_BCHW = torch.group_norm(x_BCHW.contiguous() if on_cpu else x_BCHW, self.groups, weight_C, bias_C, EPS)
        y_BCHW = y_BCHW.contiguous(memory_format=torch.channels_last)
        return ACTIVATIONS[self.activation](y_BCHW if residual_BCHW is None else y_BCHW.add_(residual_BCHW))

    def _run(self, library: ctypes.CDLL, x_BCHW: Tensor, residual_BCHW: Tensor | None, y_BCHW: Tensor) -> None:
        images, channels, height, width = x_BCHW.shape
        threads = torch.get_num_threads()
        parts = -(-threads // images) if 0 < images < threads else 1
        function = library.group_norm_f32 if x_BCHW.dtype == torch.float32 else library.group_norm_bf16
        maps = (x_BCHW, residual_BCHW, self.weight_C, self.bias_C, y_BCHW)
        function(
            *(None if tensor is None else tensor.data_ptr() for tensor in maps),
            *(images, height * width, channels, self.groups, -(-self.groups // parts)),
            *(EPS, self.activation == "relu", threads),
        )


def _agrees(library: ctypes.CDLL) -> bool:
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn((2, 40, 9, 8), generator=random) + 3 for _ in range(2))
    weight, bias = torch.randn((2, 40), generator=random)
    want = F.relu(F.group_norm(x, 4, weight, bias, EPS) + residual)
    norm = FusedGroupNorm(weight, bias, 4, "relu", library)
    exact = torch.allclose(norm(x, residual), want, rtol=1e-5, atol=1e-5)
    return exact and torch.allclose(norm(x.bfloat16(), residual.bfloat16()).float(), want, rtol=3e-2, atol=6e-2)


CPP = r"""
namespace {
constexpr int64_t BLOCK = 64;

template <class T> inline F load_part(const T* p, int n) {
  T t[LANES] = {}; std::memcpy(t, p, n * sizeof *p); return load(t);
}
template <class T> inline void store_part(T* p, F v, int n) {
  T t[LANES]; store(t, v); std::memcpy(p, t, n * sizeof *p);
}

// a channel's sum and sum of squares around its centre, over a few pixels
template <class T, int V>
inline void block_sums(const T* x, int64_t pixels, int64_t stride, const float* centre, float* sum, float* square) {
  F c[V], s[V], q[V];
  for (int v = 0; v < V; v++) c[v] = load(centre + v * LANES), s[v] = F{}, q[v] = F{};
  for (int64_t p = 0; p < pixels; p++, x += stride)
    for (int v = 0; v < V; v++) { F d = load(x + v * LANES) - c[v]; s[v] += d; q[v] += d * d; }
  for (int v = 0; v < V; v++) store(sum + v * LANES, s[v]), store(square + v * LANES, q[v]);
}
template <class T>
inline void block_sums_part(const T* x, int64_t pixels, int64_t stride, int n, const float* centre, float* sum,
                            float* square) {
  F c = load(centre), s{}, q{};
  for (int64_t p = 0; p < pixels; p++, x += stride) { F d = load_part(x, n) - c; s += d; q += d * d; }
  store(sum, s), store(square, q);
}

// for some of an image's channels; each array is padded to whole vectors
struct Channels {
  std::vector<float> centre, block_sum, block_square, scale, shift;
  std::vector<double> sum, square;
  explicit Channels(int64_t n) : centre(n), block_sum(n), block_square(n), scale(n), shift(n), sum(n), square(n) {}
};

// Sums in float over BLOCK pixels at a time, in double over the blocks, around a centre that follows the mean: float is
// as fast as memory, and nothing cancels where a mean is far from zero.
template <class T>
void sum_channels(const T* x, int64_t pixels, int64_t stride, int64_t channels, Channels& of) {
  float *centre = of.centre.data(), *s = of.block_sum.data(), *q = of.block_square.data();
  for (int64_t k = 0; k < 4; k++) {
    const T* at = x + (k * (pixels < BLOCK ? pixels : BLOCK) / 4) * stride;
    for (int64_t c = 0; c < channels; c++) centre[c] += as_float(at[c]) / 4;
  }
  for (int64_t p = 0; p < pixels; p += BLOCK) {
    int64_t n = pixels - p < BLOCK ? pixels - p : BLOCK, c = 0;
    const T* at = x + p * stride;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) block_sums<T, 4>(at + c, n, stride, centre + c, s + c, q + c);
    for (; c + LANES <= channels; c += LANES) block_sums<T, 1>(at + c, n, stride, centre + c, s + c, q + c);
    if (c < channels) block_sums_part(at + c, n, stride, int(channels - c), centre + c, s + c, q + c);
    for (c = 0; c < channels; c++) {
      double m = centre[c], d = s[c];
      of.sum[c] += n * m + d;
      of.square[c] += q[c] + 2 * m * d + n * m * m;
      centre[c] = float(m + d / n);
    }
  }
}

// sums -> what makes (x - mean) / std * gamma + beta one multiply and add
void to_affine(const float* gamma, const float* beta, int64_t pixels, int64_t channels, int64_t width, double eps,
               Channels& of) {
  for (int64_t first = 0; first < channels; first += width) {
    double sum = 0, square = 0, count = double(pixels) * width;
    for (int64_t c = first; c < first + width; c++) sum += of.sum[c], square += of.square[c];
    double mean = sum / count, variance = square / count - mean * mean;
    double over_std = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
    for (int64_t c = first; c < first + width; c++) {
      of.scale[c] = float(gamma[c] * over_std);
      of.shift[c] = float(beta[c] - mean * gamma[c] * over_std);
    }
  }
}

inline F finished(F x, F scale, F shift, F residual, bool relu) {
  F v = x * scale + shift + residual, zero{};
  return relu ? (v < zero ? zero : v) : v;  // NaN stays NaN
}
template <class T>
void apply(const T* x, const T* residual, T* y, int64_t pixels, int64_t stride, int64_t channels, bool relu,
           const Channels& of) {
  const float *scale = of.scale.data(), *shift = of.shift.data();
  for (int64_t p = 0; p < pixels; p++, x += stride, y += stride, residual += residual ? stride : 0) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      F add = residual ? load(residual + c) : F{};
      store(y + c, finished(load(x + c), load(scale + c), load(shift + c), add, relu));
    }
    if (int n = int(channels - c)) {
      F add = residual ? load_part(residual + c, n) : F{};
      store_part(y + c, finished(load_part(x + c, n), load(scale + c), load(shift + c), add, relu), n);
    }
  }
}

template <class T>
void run(const T* x, const T* residual, const float* gamma, const float* beta, T* y, int64_t images, int64_t pixels,
         int64_t channels, int64_t groups, int64_t groups_per_item, double eps, bool relu, int threads) {
  int64_t width = channels / groups, parts = (groups + groups_per_item - 1) / groups_per_item;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < images * parts; i++) {
    int64_t first = i % parts * groups_per_item;
    int64_t count = groups - first < groups_per_item ? groups - first : groups_per_item;
    int64_t at = i / parts * pixels * channels + first * width;
    const T* add = residual ? residual + at : nullptr;
    Channels of((count * width + LANES - 1) / LANES * LANES);
    sum_channels(x + at, pixels, channels, count * width, of);
    to_affine(gamma + first * width, beta + first * width, pixels, count * width, width, eps, of);
    apply(x + at, add, y + at, pixels, channels, count * width, relu, of);
  }
}
}  // namespace

#define EXPORT(NAME, T)                                                                                            \
  extern "C" void NAME(const T* x, const T* residual, const float* gamma, const float* beta, T* y, int64_t images, \
                       int64_t pixels, int64_t channels, int64_t groups, int64_t groups_per_item, double eps,      \
                       int relu, int threads) {                                                                    \
    run(x, residual, gamma, beta, y, images, pixels, channels, groups, groups_per_item, eps, relu, threads);       \
  }
EXPORT(group_norm_f32, float)
EXPORT(group_norm_bf16, uint16_t)
"""

SOURCE = compiler.KernelSource(
    name="group_norm",
    code=CPP,
    functions=dict.fromkeys(
        ("group_norm_f32", "group_norm_bf16"),
        (*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 5, ctypes.c_double, *[ctypes.c_int] * 2),
    ),
    agrees=_agrees,
    without="BiT runs several times slower",
)
