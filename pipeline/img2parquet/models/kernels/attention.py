"""Compute attention with a bias for each query and key in one pass, for narrow heads.

torch's fused kernel needs heads of one width, each contiguous in memory; for heads of 16 or 32 channels the copies, the
padding and the weights written to memory take longer than the arithmetic. This one (compiled: see `compiler.py`) reads
the heads where the linear left them, side by side in a token's row, keeps a few queries' weights in the L1 cache, and
applies the activation in the same pass: 1.5 to 2.5 times as fast on LeViT's shapes (float32 and bfloat16, one thread of
a Zen 4). The sums of a head run in the same order whatever the number of threads.

Values are a linear function of the tokens, and so is their weighted mean: where the queries are few and the values
wide, it costs less to mix the tokens first and then compute values from the mixture (`mixes_first`).

Shapes: B batch, Q queries, K keys, A heads, I the tokens' width, h a head's values, W the width of all heads together.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models.kernels import compiler
from img2parquet.models.kernels.activations import ACTIVATIONS


def fused_attention(
    bias_AQK: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype, values: tuple[Tensor, Tensor] | None = None
) -> FusedAttention | None:
    """Build hardswish(softmax(q k^T + bias) v) for the device of the bias; None where plain torch has to compute it.

    With `values`, weight_WI and bias_W of the linear that computes v from tokens, a call takes tokens instead of v."""
    widths = (value_dim,) if values is None else (value_dim, values[0].shape[1])
    if bias_AQK.device.type != "cpu" or dtype not in compiler.DTYPES or any(width % compiler.LANES for width in widths):
        return None
    compiled = compiler.native_library(SOURCE)
    return None if compiled is None else FusedAttention(bias_AQK, key_dim, value_dim, compiled, values)


def mixes_first(queries: int, keys: int, width: int, value_dim: int) -> bool:
    """Whether mixing tokens of `width` before computing values takes fewer multiplications than after."""
    return queries * keys * width + queries * width * value_dim < keys * width * value_dim + queries * keys * value_dim


class FusedAttention:
    """Built by `fused_attention`. Arithmetic is float32 whatever the inputs' dtype."""

    def __init__(
        self,
        bias_AQK: Tensor,
        key_dim: int,
        value_dim: int,
        compiled: ctypes.CDLL,
        values: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.heads, self.queries, self.keys = bias_AQK.shape
        self.key_dim, self.value_dim, self.compiled = key_dim, value_dim, compiled
        # padded to whole vectors of keys; the padding gets no weight
        self.bias_AQP = F.pad(
            bias_AQK.detach().float(), (0, -self.keys % compiler.LANES), value=-torch.inf
        ).contiguous()
        self.values = None
        if values is not None:
            weight_WI, bias_W = (tensor.detach().float() for tensor in values)
            by_head = weight_WI.reshape(self.heads, value_dim, -1).transpose(1, 2)
            self.values = (by_head.contiguous(), bias_W.contiguous())

    def __call__(self, q_BQW: Tensor, k_BKW: Tensor, v_BKW: Tensor) -> Tensor:
        """q_BQW, k_BKW, v_BKW, heads side by side, rows contiguous, rows and images at any stride -> x_BQW."""
        images = len(q_BQW)
        mixed_BQW = torch.empty(images, self.queries, self.heads * self.value_dim, dtype=q_BQW.dtype)
        inputs = (q_BQW, k_BKW, v_BKW)
        self._check(inputs)
        strides = (stride for tensor in inputs for stride in tensor.stride()[:2])
        weight_AIh, bias_W = self.values or (None, None)
        width = self.value_dim if weight_AIh is None else weight_AIh.shape[1]
        shape = (images, self.heads, self.queries, self.keys, self.key_dim, width, self.value_dim)
        function = self.compiled.attention_f32 if q_BQW.dtype == torch.float32 else self.compiled.attention_bf16
        pointers = (*inputs, self.bias_AQP, weight_AIh, bias_W, mixed_BQW)
        function(
            *(None if tensor is None else tensor.data_ptr() for tensor in pointers),
            *(*shape, *strides, torch.get_num_threads()),
        )
        return mixed_BQW

    def _check(self, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """Check shapes, strides and dtypes, which the kernel itself does not."""
        keys_W, values_W = self.heads * self.key_dim, self.heads * self.value_dim
        widths = (keys_W, keys_W, values_W if self.values is None else self.values[0].shape[1])
        for tensor, count, width in zip(inputs, (self.queries, self.keys, self.keys), widths, strict=True):
            assert tensor.shape == (len(inputs[0]), count, width), tuple(tensor.shape)
            assert tensor.stride(2) == 1 and tensor.dtype == inputs[0].dtype, (tensor.stride(), tensor.dtype)


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
    tokens, weight, add = (torch.randn(*shape, generator=random) / 4 for shape in ((3, keys, 80), (96, 80), (96,)))
    mixing = FusedAttention(bias, key_dim, value_dim, library, (weight, add))
    want_mixed = plain(q, k, F.linear(tokens, weight, add), bias)
    exact = exact and torch.allclose(mixing(q, k, tokens), want_mixed, rtol=1e-5, atol=1e-5)
    return exact and torch.allclose(rounded.float(), want, rtol=3e-2, atol=6e-2)


def plain(q_BQW: Tensor, k_BKW: Tensor, v_BKW: Tensor, bias_AQK: Tensor) -> Tensor:
    """Compute the same in plain torch."""
    q, k, v = (tensor.unflatten(-1, (len(bias_AQK), -1)).transpose(1, 2) for tensor in (q_BQW, k_BKW, v_BKW))  # type: ignore[no-untyped-call]
    weights_BAQK = (q @ k.transpose(-2, -1) + bias_AQK).softmax(dim=-1)
    return ACTIVATIONS["hardswish"]((weights_BAQK @ v).transpose(1, 2).flatten(2))


CPP = r"""
namespace {
constexpr int ROWS = 6;  // queries at once: with 4 vectors of keys 24 sums, which leaves registers for the factors

inline F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F nearest(F t) { return t - (F)_mm512_reduce_ps((__m512)t, 0); }
inline F times_power(F p, F n) { return (F)_mm512_scalef_ps((__m512)p, (__m512)n); }
inline float largest_of(F x) { return _mm512_reduce_max_ps((__m512)x); }
inline float sum_of(F x) { return _mm512_reduce_add_ps((__m512)x); }

// 2^t for t <= 0, within 2 units of the last place, 0 (or next to it) far below; the polynomial is Cephes' exp2f
inline F power(F t) {
  t = larger(all(-126.0f), t);  // in this order not a number stays none
  F n = nearest(t), r = t - n, p = all(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f; p = p * r + 9.618437357674640e-3f; p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f; p = p * r + 6.931472028550421e-1f; p = p * r + 1.0f;
  return times_power(p, n);
}

// q k^T + bias for R queries and V vectors of keys; the largest of each lane goes on in `most`. The bias is added last:
// compilers keep sums in registers that begin as zeros, and moved them to memory and back when they began as the bias
template <int R, int V>
inline void scores(const float* q, int64_t depth, const float* keys, int64_t stride, const float* bias, float* s,
                   F* most) {
  F sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = F{};
  multiply(q, depth, depth, keys, stride, sum);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    F score = sum[r][v] + load(bias + r * stride + v * LANES);
    most[r] = larger(most[r], score);
    store(s + r * stride + v * LANES, score);
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

// what becomes of a sum, of row r and from column c
struct Mean {
  const float* scale;
  F operator()(F sum, int r, int64_t) const { return sum * scale[r]; }
};
struct ActivatedMean {
  const float* scale;
  F operator()(F sum, int r, int64_t) const { return hardswish(sum * scale[r]); }
};
struct ActivatedLinear {
  const float* bias;
  F operator()(F sum, int, int64_t c) const { return hardswish(sum + load(bias + c)); }
};

// R rows of `count` factors each, times `count` rows of values -> R rows, of which V vectors are made
template <int R, int V, class T, class Become>
inline void mix(const float* s, int64_t count, int64_t stride, const float* values, int64_t width, T* out, int64_t row,
                int64_t c, Become become) {
  F sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = F{};
  multiply(s, stride, count, values + c, width, sum);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++)
    store(out + r * row + c + v * LANES, become(sum[r][v], r, c + v * LANES));
}
template <int R, class T, class Become>
inline void mix(const float* s, int64_t count, int64_t stride, const float* values, int64_t width, T* out, int64_t row,
                Become become) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) mix<R, 4>(s, count, stride, values, width, out, row, c, become);
  for (; c + 2 * LANES <= width; c += 2 * LANES) mix<R, 2>(s, count, stride, values, width, out, row, c, become);
  for (; c < width; c += LANES) mix<R, 1>(s, count, stride, values, width, out, row, c, become);
}

struct Shape { int64_t images, heads, queries, keys, depth, width, out_width; };
struct Rows { int64_t image, row; };  // from one to the next
struct Linear {  // that makes a head's values of mixed tokens; none where values are what is mixed
  const float *weight, *bias;
  Linear of(int64_t head, const Shape& is) const {
    return weight ? Linear{weight + head * is.width * is.out_width, bias + head * is.out_width} : *this;
  }
};

// some heads of one image, as floats: keys with a key to a column, values with a key to a row; s holds ROWS of scores
struct Heads {
  int64_t heads, sets, count, stride, depth, width, out_width;
  Floats keys, values, queries, s, mixed;
  Heads(int64_t heads, const Shape& is, const Linear& linear)
      : heads(heads), sets(linear.weight ? 1 : heads), count(is.keys), stride((count + LANES - 1) / LANES * LANES),
        depth(is.depth), width(is.width), out_width(is.out_width), keys(heads * depth * stride),
        values(sets * count * width), queries(ROWS * depth), s(ROWS * stride), mixed(ROWS * width) {}
  template <class T> void take(const T* k, int64_t k_row, const T* v, int64_t v_row) {
    const int64_t columns = heads * depth, rows = count, jump = stride, each = width, all_sets = sets;
    float *to = keys.data(), *out = values.data();
    int64_t j = 0;
    for (; j + LANES <= rows; j += LANES, k += LANES * k_row, to += LANES)
      for (int64_t d = 0; d < columns; d++)
        UNROLL for (int l = 0; l < LANES; l++) to[d * jump + l] = as_float(k[l * k_row + d]);
    for (; j < rows; j++, k += k_row, to++)
      for (int64_t d = 0; d < columns; d++) to[d * jump] = as_float(k[d]);
    for (j = 0; j < rows; j++, v += v_row, out += each)
      for (int64_t set = 0; set < all_sets; set++)
        for (int64_t c = 0; c < each; c += LANES) store(out + set * rows * each + c, load(v + set * each + c));
  }
  template <int R, class T>
  void attend(int64_t head, const T* q, int64_t q_row, const float* bias, const Linear& linear, T* out, int64_t row) {
    for (int64_t r = 0; r < R; r++)
      for (int64_t d = 0; d < depth; d++) queries[r * depth + d] = as_float(q[r * q_row + d]);
    F most[R];
    float scale[R];
    for (int r = 0; r < R; r++) most[r] = all(-INFINITY);
    const float *x = queries.data(), *k = &keys[head * depth * stride], *v = values.data();
    float *to = s.data(), *between = mixed.data();
    int64_t j = 0;
    for (; j + 4 * LANES <= stride; j += 4 * LANES) scores<R, 4>(x, depth, k + j, stride, bias + j, to + j, most);
    for (; j < stride; j += LANES) scores<R, 1>(x, depth, k + j, stride, bias + j, to + j, most);
    for (int r = 0; r < R; r++) scale[r] = weigh(to + r * stride, stride, most[r]);
    if (linear.weight) {
      mix<R>(to, count, stride, v, width, between, width, Mean{scale});
      mix<R>(between, width, width, linear.weight, out_width, out, row, ActivatedLinear{linear.bias});
    } else {
      mix<R>(to, count, stride, v + head * count * width, width, out, row, ActivatedMean{scale});
    }
  }
};

template <class T>
void run(const T* q, const T* k, const T* v, const float* bias, Linear linear, T* out, Shape is, Rows q_at, Rows k_at,
         Rows v_at, int threads) {
  // all heads of an image, so that its rows are read once; a head at a time where there are not images enough
  const int64_t parts = is.images < threads ? is.heads : 1, each = is.heads / parts, row = is.heads * is.out_width;
#pragma omp parallel num_threads(threads)
  {
    Heads some(each, is, linear);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < is.images * parts; i++) {
      const int64_t image = i / parts, first = i % parts * each, skipped = linear.weight ? 0 : first * is.width;
      some.take(k + image * k_at.image + first * is.depth, k_at.row, v + image * v_at.image + skipped, v_at.row);
      for (int64_t h = 0; h < each; h++) {
        const T* from = q + image * q_at.image + (first + h) * is.depth;
        const float* add = bias + (first + h) * is.queries * some.stride;
        const Linear own = linear.of(first + h, is);
        T* to = out + image * is.queries * row + (first + h) * is.out_width;
        // blocks of nearly the same size: a last one of one query would wait for each of its sums
        for (int64_t left = is.queries, blocks = (left + ROWS - 1) / ROWS, rows; blocks > 0; blocks--, left -= rows) {
          rows = (left + blocks - 1) / blocks;
          switch (rows) {
            case 1: some.attend<1>(h, from, q_at.row, add, own, to, row); break;
            case 2: some.attend<2>(h, from, q_at.row, add, own, to, row); break;
            case 3: some.attend<3>(h, from, q_at.row, add, own, to, row); break;
            case 4: some.attend<4>(h, from, q_at.row, add, own, to, row); break;
            case 5: some.attend<5>(h, from, q_at.row, add, own, to, row); break;
            default: some.attend<ROWS>(h, from, q_at.row, add, own, to, row);
          }
          from += rows * q_at.row, add += rows * some.stride, to += rows * row;
        }
      }
    }
  }
}
}  // namespace

#define EXPORT(NAME, T)                                                                                              \
  extern "C" void NAME(const T* q, const T* k, const T* v, const float* bias, const float* weight, const float* add, \
                       T* out, int64_t images, int64_t heads, int64_t queries, int64_t keys, int64_t depth,          \
                       int64_t width, int64_t out_width, int64_t q_image, int64_t q_row, int64_t k_image,            \
                       int64_t k_row, int64_t v_image, int64_t v_row, int threads) {                                 \
    run(q, k, v, bias, Linear{weight, add}, out, Shape{images, heads, queries, keys, depth, width, out_width},       \
        Rows{q_image, q_row}, Rows{k_image, k_row}, Rows{v_image, v_row}, threads);                                  \
  }
EXPORT(attention_f32, float)
EXPORT(attention_bf16, uint16_t)
"""

SOURCE = compiler.KernelSource(
    name="attention",
    code=CPP,
    functions=dict.fromkeys(
        ("attention_f32", "attention_bf16"), (*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 13, ctypes.c_int)
    ),
    agrees=_agrees,
    without="LeViT runs up to a fifth slower",
    wide=True,
)
