"""Compute a chain of convolutions on full-size images without storing the maps between them.

Run one after the other over a whole batch, LeViT's four convolutions write and read maps that no cache holds (26 MB
after the first, for 32 images), and the first, whose input has three channels, leaves half of a processor's multipliers
idle. Here (compiled: see `compiler.py`) each convolution keeps the few rows that its kernel spans, and computes its
next row on demand: one thread of a Zen 4 takes 32 ms instead of 38. Float32 only: torch's bfloat16 convolutions have
instructions of their own. A pixel's sum runs in the same order whatever the batch, the number of threads, or where the
image is split among them.

Shapes: B batch, C channels, H W image, O I a kernel's channels out and in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.activations import ACTIVATIONS


@dataclass(frozen=True)
class Geometry:
    """The geometry of every convolution in the chain; kernels are square."""

    kernel: int
    stride: int
    padding: int

    def shrink(self, side: int) -> int:
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


def fused_stem(convs: Sequence[tuple[Tensor, Tensor]], at: Geometry) -> FusedStem | None:
    """Build a chain of convolutions (weight_OIHW, bias_O) with hardswish between them; None where torch must do it."""
    if not compiler.takes([weight for weight, _ in convs], compiler.LANES):
        return None
    compiled = compiler.native_library(SOURCE)
    return None if compiled is None else FusedStem(convs, at, compiled)


class FusedStem:
    """Built by `fused_stem`."""

    def __init__(self, convs: Sequence[tuple[Tensor, Tensor]], at: Geometry, compiled: ctypes.CDLL) -> None:
        self.at, self.compiled = at, compiled
        self.weights_HWIO = [weight.detach().permute(2, 3, 1, 0).contiguous() for weight, _ in convs]
        self.biases_O = [bias.detach().contiguous() for _, bias in convs]
        self.channels = [self.weights_HWIO[0].shape[2], *(len(bias_O) for bias_O in self.biases_O)]
        count = len(convs)
        self.constants = (  # arguments of every call: addresses of weights and biases, and channels between them
            (ctypes.c_void_p * count)(*(weight.data_ptr() for weight in self.weights_HWIO)),
            (ctypes.c_void_p * count)(*(bias.data_ptr() for bias in self.biases_O)),
            (ctypes.c_int64 * (count + 1))(*self.channels),
        )
        assert all(w.shape == (at.kernel, at.kernel, *pair) for w, pair in zip(
            self.weights_HWIO, zip(self.channels, self.channels[1:], strict=False), strict=True))  # fmt: skip

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> (B, O, H', W'), channels last. Does not change its input."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).contiguous()
        images, height, width, channels = x_BHWC.shape
        assert channels == self.channels[0] and x_BHWC.dtype == torch.float32, (x_BHWC.shape, x_BHWC.dtype)
        sides = height, width
        for _ in self.weights_HWIO:
            sides = self.at.shrink(sides[0]), self.at.shrink(sides[1])
            assert min(sides) > 0, (height, width)
        y_BHWO = torch.empty(images, *sides, self.channels[-1])
        self.compiled.stem_f32(
            x_BHWC.data_ptr(),
            *self.constants,
            y_BHWO.data_ptr(),
            *(
                len(self.weights_HWIO),
                images,
                height,
                width,
                self.at.kernel,
                self.at.stride,
                self.at.padding,
                torch.get_num_threads(),
            ),
        )
        return y_BHWO.permute(0, 3, 1, 2)


def _agrees(library: ctypes.CDLL) -> bool:
    random = torch.Generator().manual_seed(0)
    shapes = ((16, 3, 3, 3), (48, 16, 3, 3), (32, 48, 3, 3))
    convs = [(torch.randn(shape, generator=random) / 8, torch.randn(shape[0], generator=random)) for shape in shapes]
    x_BCHW, at = torch.randn(2, 3, 61, 40, generator=random), Geometry(3, 2, 1)
    return torch.allclose(FusedStem(convs, at, library)(x_BCHW), plain(x_BCHW, convs, at), rtol=1e-5, atol=1e-5)


def plain(x_BCHW: Tensor, convs: Sequence[tuple[Tensor, Tensor]], at: Geometry) -> Tensor:
    """Compute the same in plain torch."""
    for n, (weight, bias) in enumerate(convs):
        x_BCHW = F.conv2d(x_BCHW, weight, bias, at.stride, at.padding)
        x_BCHW = ACTIVATIONS["hardswish"](x_BCHW) if n + 1 < len(convs) else x_BCHW
    return x_BCHW


CPP = r"""
namespace {
struct Image { const float* at; int64_t height, width; };
struct Geometry { int64_t kernel, stride, padding; };

// One of the chain: it keeps as many rows of its input as its kernel is high, zeros around them, and makes a row of its
// output when it is asked for it. Rows are asked for from first to last.
struct Conv {
  const float *weight, *bias;  // weight[row of the kernel][column][channel in][channel out]
  int64_t in, out, height, width, out_width;  // height and width: of the input
  Geometry is;
  bool activated;
  Conv* before;  // makes the input's rows; the first one copies them
  const Image* image;
  int64_t next, length;  // the input's row to take next; a row with its padding, in whole lines
  Floats rows;
  std::vector<const float*> taps;  // where the rows under the kernel lie

  Conv(const float* weight, const float* bias, int64_t in, int64_t out, int64_t height, int64_t width, Geometry is,
       bool activated, Conv* before, const Image* image)
      : weight(weight), bias(bias), in(in), out(out), height(height), width(width),
        out_width((width + 2 * is.padding - is.kernel) / is.stride + 1), is(is), activated(activated), before(before),
        image(image), next(0), length(((width + 2 * is.padding) * in + LANES - 1) / LANES * LANES),
        rows(is.kernel * length), taps(is.kernel) {}

  float* slot(int64_t y) { return rows.data() + (y + is.padding) % is.kernel * length; }
  void begin(int64_t y) {
    next = y * is.stride - is.padding;
    if (before) before->begin(next < 0 ? 0 : next);
  }
  void take(int64_t y) {
    float* to = slot(y) + is.padding * in;
    if (y < 0 || y >= height) std::memset(to, 0, width * in * sizeof(float));
    else if (before) before->make(y, to);
    else std::memcpy(to, image->at + y * width * in, width * in * sizeof(float));
  }
  void make(int64_t y, float* to) {
    const int64_t first = y * is.stride - is.padding;
    for (; next < first + is.kernel; next++) take(next);
    for (int64_t k = 0; k < is.kernel; k++) taps[k] = slot(first + k);
    int64_t c = 0;
    for (; c + 2 * LANES <= out; c += 2 * LANES) columns<2>(c, to);
    for (; c < out; c += LANES) columns<1>(c, to);
  }
  template <int V> void columns(int64_t c, float* to) {
    int64_t x = 0;
    for (; x + 14 <= out_width; x += 14) pixels<14, V>(x, c, to);  // 28 sums leave registers for the factors
    if (x < out_width && out_width >= 14) pixels<14, V>(out_width - 14, c, to);  // some of them a second time
    else for (; x < out_width; x++) pixels<1, V>(x, c, to);
  }
  template <int P, int V> void pixels(int64_t x, int64_t c, float* to) {
    F sum[P][V];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int v = 0; v < V; v++) sum[p][v] = F{};
    const int64_t step = is.stride * in, span = is.kernel * in, outs = out;
    for (int64_t k = 0; k < is.kernel; k++)
      multiply(taps[k] + x * step, step, span, weight + k * span * outs + c, outs, sum);
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int v = 0; v < V; v++) {
      F y = sum[p][v] + load(bias + c + v * LANES);
      store(to + (x + p) * outs + c + v * LANES, activated ? hardswish(y) : y);
    }
  }
};
}  // namespace

extern "C" void stem_f32(const float* x, const float* const* weights, const float* const* biases,
                         const int64_t* channels, float* y, int64_t count, int64_t images, int64_t height,
                         int64_t width, int64_t kernel, int64_t stride, int64_t padding, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Image image{nullptr, height, width};
    std::vector<Conv> convs;
    convs.reserve(count);  // they point to each other
    int64_t h = height, w = width;
    for (int64_t n = 0; n < count; n++) {
      convs.emplace_back(weights[n], biases[n], channels[n], channels[n + 1], h, w, Geometry{kernel, stride, padding},
                         n + 1 < count, n ? &convs[n - 1] : nullptr, &image);
      h = (h + 2 * padding - kernel) / stride + 1, w = convs.back().out_width;
    }
    Conv& last = convs.back();
    const int64_t row = w * channels[count], parts = images < threads ? (h < threads ? h : threads) : 1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * parts; i++) {
      const int64_t part = i % parts, first = h * part / parts, end = h * (part + 1) / parts;
      image.at = x + i / parts * height * width * channels[0];
      last.begin(first);
      for (int64_t r = first; r < end; r++) last.make(r, y + (i / parts * h + r) * row);
    }
  }
}
"""

SOURCE = compiler.KernelSource(
    name="stem",
    code=CPP,
    functions={"stem_f32": (*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 7, ctypes.c_int)},
    agrees=_agrees,
    without="LeViT runs a few percent slower",
    wide=True,
)
