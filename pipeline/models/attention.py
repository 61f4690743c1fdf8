"""Attention with a bias for each query and key, for narrow heads: queries, keys, values -> what they mix to at once.

torch's fused kernel wants heads of one width, in memory of their own; for heads of 16 or 32 channels the copies, the
padding and the weights written to memory take longer than the arithmetic. This one (compiled: see `native.py`) reads
the heads where the linear left them, side by side in a token's row, keeps a few queries' weights in the nearest cache,
and puts the activation into the same pass: 1.5 to 2.5 times as fast on LeViT's shapes (float32 and bfloat16, one
thread of a Zen 4). An image's head is summed in the same order whatever the number of threads.

Shapes: B batch, Q queries, K keys, A heads, W the width of all heads together.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import native
from pipeline.models.layers import ACTIVATIONS

LANES = 16  # floats that the kernel takes at once


def fused_attention(bias_AQK: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> FusedAttention | None:
    """hardswish(softmax(q k^T + bias) v) for the device of the bias; None where plain torch has to do it."""
    if bias_AQK.device.type != "cpu" or dtype not in native.DTYPES or value_dim % LANES:
        return None
    compiled = native_library()
    return None if compiled is None else FusedAttention(bias_AQK, key_dim, value_dim, compiled)


class FusedAttention:
    """Made by `fused_attention`. Arithmetic is float32 whatever the inputs' dtype."""

    def __init__(self, bias_AQK: Tensor, key_dim: int, value_dim: int, compiled: ctypes.CDLL) -> None:
        self.heads, self.queries, self.keys = bias_AQK.shape
        self.key_dim, self.value_dim, self.compiled = key_dim, value_dim, compiled
        # whole vectors of keys: what is past the last weighs nothing
        self.bias_AQP = F.pad(bias_AQK.detach().float(), (0, -self.keys % LANES), value=-torch.inf).contiguous()

    def __call__(self, q_BQW: Tensor, k_BKW: Tensor, v_BKW: Tensor) -> Tensor:
        """Heads side by side, each row's numbers next to each other; rows and images at any stride -> x_BQW."""
        images = len(q_BQW)
        mixed_BQW = torch.empty(images, self.queries, self.heads * self.value_dim, dtype=q_BQW.dtype)
        inputs = (q_BQW, k_BKW, v_BKW)
        self._check(inputs)
        strides = (stride for tensor in inputs for stride in tensor.stride()[:2])
        shape = (images, self.heads, self.queries, self.keys, self.key_dim, self.value_dim)
        function = self.compiled.attention_f32 if q_BQW.dtype == torch.float32 else self.compiled.attention_bf16
        function(
            *(tensor.data_ptr() for tensor in (*inputs, self.bias_AQP, mixed_BQW)),
            *(*shape, *strides, torch.get_num_threads()),
        )
        return mixed_BQW

    def _check(self, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """The kernel trusts what it is given."""
        rows, widths = (self.queries, self.keys, self.keys), (self.key_dim, self.key_dim, self.value_dim)
        for tensor, count, width in zip(inputs, rows, widths, strict=True):
            assert tensor.shape == (len(inputs[0]), count, self.heads * width), tuple(tensor.shape)
            assert tensor.stride(2) == 1 and tensor.dtype == inputs[0].dtype, (tensor.stride(), tensor.dtype)


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernel, made at the first call of a process; None where it cannot be had."""
    return native.library(SOURCE)


def _agrees(library: ctypes.CDLL) -> bool:
    random = torch.Generator().manual_seed(0)
    heads, queries, keys, key_dim, value_dim = 2, 7, 35, 8, 48
    q, k, v = (torch.randn(3, rows, heads * width, generator=random)
               for rows, width in ((queries, key_dim), (keys, key_dim), (keys, value_dim)))  # fmt: skip
    bias = torch.randn(heads, queries, keys, generator=random)
    want = plain(q, k, v, bias)
    attention = FusedAttention(bias, key_dim, value_dim, library)
    exact = torch.allclose(attention(q, k, v), want, rtol=1e-5, atol=1e-5)
    rounded = attention(*(tensor.bfloat16() for tensor in (q, k, v)))
    return exact and torch.allclose(rounded.float(), want, rtol=3e-2, atol=6e-2)


def plain(q_BQW: Tensor, k_BKW: Tensor, v_BKW: Tensor, bias_AQK: Tensor) -> Tensor:
    """The same in torch's words."""
    q, k, v = (tensor.unflatten(-1, (len(bias_AQK), -1)).transpose(1, 2) for tensor in (q_BQW, k_BKW, v_BKW))  # type: ignore[no-untyped-call]
    weights_BAQK = (q @ k.transpose(-2, -1) + bias_AQK).softmax(dim=-1)
    return ACTIVATIONS["hardswish"]((weights_BAQK @ v).transpose(1, 2).flatten(2))


CPP = r"""
namespace {
constexpr int ROWS = 6;  // queries at once: with 4 vectors of keys 24 sums, which leaves registers for the factors
typedef int32_t I __attribute__((vector_size(LANES * 4)));
#define UNROLL _Pragma("GCC unroll 8")

inline F all(float x) { return x - F{}; }
#ifdef __AVX512DQ__
inline F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F nearest(F t) { return t - (F)_mm512_reduce_ps((__m512)t, 0); }
inline F times_power(F p, F n) { return (F)_mm512_scalef_ps((__m512)p, (__m512)n); }
inline float largest_of(F x) { return _mm512_reduce_max_ps((__m512)x); }
inline float sum_of(F x) { return _mm512_reduce_add_ps((__m512)x); }
#else
inline float largest_of(F x) {
  for (int n = LANES / 2; n; n /= 2)
    for (int l = 0; l < n; l++) x[l] = x[l] > x[l + n] ? x[l] : x[l + n];
  return x[0];
}
inline float sum_of(F x) {
  for (int n = LANES / 2; n; n /= 2)
    for (int l = 0; l < n; l++) x[l] += x[l + n];
  return x[0];
}
inline F larger(F a, F b) { return a > b ? a : b; }
inline F nearest(F t) { return (t + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: what is added there is whole
inline F times_power(F p, F n) {
  I bits, whole = __builtin_convertvector(n, I) << 23;
  std::memcpy(&bits, &p, sizeof p);
  bits += whole;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}
#endif

// 2^t for t <= 0, within 2 units of the last place, 0 (or next to it) far below; the polynomial is Cephes' exp2f
inline F power(F t) {
  t = larger(all(-126.0f), t);  // in this order not a number stays none
  F n = nearest(t), r = t - n, p = all(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f; p = p * r + 9.618437357674640e-3f; p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f; p = p * r + 6.931472028550421e-1f; p = p * r + 1.0f;
  return times_power(p, n);
}
inline F hardswish(F x) {
  F y = x + 3.0f, zero{};
  y = y < zero ? zero : y;
  return x * (y > 6.0f ? all(6.0f) : y) * (1.0f / 6.0f);
}

// q k^T + bias for R queries and V vectors of keys; the largest of each lane goes on in `most`
template <int R, int V>
inline void scores(const float* q, int64_t depth, const float* keys, int64_t stride, const float* bias, float* s,
                   F* most) {
  F sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = load(bias + r * stride + v * LANES);
  for (int64_t d = 0; d < depth; d++, keys += stride) {
    F k[V];
    UNROLL for (int v = 0; v < V; v++) k[v] = load(keys + v * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      F x = all(q[r * depth + d]);
      UNROLL for (int v = 0; v < V; v++) sum[r][v] += x * k[v];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    most[r] = larger(most[r], sum[r][v]);
    store(s + r * stride + v * LANES, sum[r][v]);
  }
}

// scores -> weights that are not divided by their sum yet; what to multiply by for that
inline float weigh(float* s, int64_t stride, F most) {
  const float largest = largest_of(most), per_e = 1.44269504f;
  F sum{};
  for (int64_t j = 0; j < stride; j += LANES) {
    F weight = power((load(s + j) - largest) * per_e);
    store(s + j, weight);
    sum += weight;
  }
  return 1 / sum_of(sum);
}

template <class T, int R, int V>
inline void mix(const float* s, const float* scale, int64_t count, int64_t stride, const float* values, int64_t width,
                T* out, int64_t row) {
  F sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = F{};
  for (int64_t j = 0; j < count; j++, values += width) {
    F x[V];
    UNROLL for (int v = 0; v < V; v++) x[v] = load(values + v * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      F weight = all(s[r * stride + j]);
      UNROLL for (int v = 0; v < V; v++) sum[r][v] += weight * x[v];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++)
    store(out + r * row + v * LANES, hardswish(sum[r][v] * scale[r]));
}

// on whole cache lines: a vector that lies across two takes twice as long to load
struct Floats {
  struct Line { alignas(LANES * 4) float at[LANES]; };
  std::vector<Line> lines;
  explicit Floats(int64_t count) : lines((count + LANES - 1) / LANES) {}
  float* data() { return lines.data()->at; }
  float& operator[](int64_t n) { return data()[n]; }
};

// one head of one image, as floats: keys with a key to a column, values with a key to a row; s holds ROWS of scores
struct Head {
  int64_t count, stride, depth, width;
  Floats keys, values, queries, s;
  Head(int64_t count, int64_t depth, int64_t width)
      : count(count), stride((count + LANES - 1) / LANES * LANES), depth(depth), width(width), keys(depth * stride),
        values(count * width), queries(ROWS * depth), s(ROWS * stride) {}
  template <class T> void take(const T* k, int64_t k_row, const T* v, int64_t v_row) {
    for (int64_t j = 0; j < count; j++, k += k_row, v += v_row) {
      for (int64_t d = 0; d < depth; d++) keys[d * stride + j] = as_float(k[d]);
      for (int64_t d = 0; d < width; d += LANES) store(&values[j * width + d], load(v + d));
    }
  }
  template <class T, int R> void attend(const T* q, int64_t q_row, const float* bias, T* out, int64_t row) {
    for (int64_t r = 0; r < R; r++)
      for (int64_t d = 0; d < depth; d++) queries[r * depth + d] = as_float(q[r * q_row + d]);
    F most[R];
    float scale[R];
    for (int r = 0; r < R; r++) most[r] = all(-INFINITY);
    const float *x = queries.data(), *k = keys.data(), *v = values.data();
    float* to = s.data();
    int64_t j = 0, c = 0;
    for (; j + 4 * LANES <= stride; j += 4 * LANES) scores<R, 4>(x, depth, k + j, stride, bias + j, to + j, most);
    for (; j < stride; j += LANES) scores<R, 1>(x, depth, k + j, stride, bias + j, to + j, most);
    for (int r = 0; r < R; r++) scale[r] = weigh(to + r * stride, stride, most[r]);
    for (; c + 4 * LANES <= width; c += 4 * LANES) mix<T, R, 4>(to, scale, count, stride, v + c, width, out + c, row);
    for (; c + 2 * LANES <= width; c += 2 * LANES) mix<T, R, 2>(to, scale, count, stride, v + c, width, out + c, row);
    for (; c < width; c += LANES) mix<T, R, 1>(to, scale, count, stride, v + c, width, out + c, row);
  }
};

template <class T>
void run(const T* q, const T* k, const T* v, const float* bias, T* out, int64_t images, int64_t heads, int64_t queries,
         int64_t keys, int64_t depth, int64_t width, int64_t q_image, int64_t q_row, int64_t k_image, int64_t k_row,
         int64_t v_image, int64_t v_row, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Head head(keys, depth, width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * heads; i++) {
      int64_t image = i / heads, h = i % heads, row = heads * width;
      head.take(k + image * k_image + h * depth, k_row, v + image * v_image + h * width, v_row);
      const T* from = q + image * q_image + h * depth;
      const float* add = bias + h * queries * head.stride;
      T* to = out + image * queries * row + h * width;
      // blocks of nearly the same size: a last one of one query would wait for each of its sums
      for (int64_t left = queries, blocks = (queries + ROWS - 1) / ROWS, rows; blocks > 0; blocks--, left -= rows) {
        rows = (left + blocks - 1) / blocks;
        switch (rows) {
          case 1: head.attend<T, 1>(from, q_row, add, to, row); break;
          case 2: head.attend<T, 2>(from, q_row, add, to, row); break;
          case 3: head.attend<T, 3>(from, q_row, add, to, row); break;
          case 4: head.attend<T, 4>(from, q_row, add, to, row); break;
          case 5: head.attend<T, 5>(from, q_row, add, to, row); break;
          default: head.attend<T, ROWS>(from, q_row, add, to, row);
        }
        from += rows * q_row, add += rows * head.stride, to += rows * row;
      }
    }
  }
}
}  // namespace

#define EXPORT(NAME, T)                                                                                             \
  extern "C" void NAME(const T* q, const T* k, const T* v, const float* bias, T* out, int64_t images, int64_t heads, \
                       int64_t queries, int64_t keys, int64_t depth, int64_t width, int64_t q_image, int64_t q_row, \
                       int64_t k_image, int64_t k_row, int64_t v_image, int64_t v_row, int threads) {               \
    run(q, k, v, bias, out, images, heads, queries, keys, depth, width, q_image, q_row, k_image, k_row, v_image,    \
        v_row, threads);                                                                                            \
  }
EXPORT(attention_f32, float)
EXPORT(attention_bf16, uint16_t)
"""

SOURCE = native.Source(
    name="attention",
    code=CPP,
    functions=dict.fromkeys(
        ("attention_f32", "attention_bf16"), (*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 12, ctypes.c_int)
    ),
    agrees=_agrees,
    without="LeViT runs up to a fifth slower",
)
