// cpu_linear_few_rows: x W^T + bias for up to 64 rows of x; kernels/cpu/linear_few_rows.py.
//
// Dot products along K, R rows of x by C rows of W at a time: R C sums stay in registers, no operand is rearranged, and W
// is read once, in its own order. A result depends on its row of x and its row of W alone, never on the other rows.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "decoding.h"
#include "vec.h"

#ifdef GADCORE_X86
#include <xmmintrin.h>
#endif

namespace gadcore {
namespace {

constexpr int64_t kMaxRows = 64;

#ifdef GADCORE_X86
// Columns of the result that are collected before they are written: whole cache lines, and a multiple of every C.
constexpr int64_t kColumns = 48;
// Columns that share a pass over x: their piece of W and four rows of x stay in the L1 cache. Up to eight rows stay there
// too, and fewer columns wait less for W.
constexpr int64_t shared_columns(int64_t m) { return m <= 8 ? 3 : 6; }
// Longest piece of K: short enough for L1, long enough to make the sums across lanes cheap.
constexpr int64_t kMostDepth = 640;

struct Product {
  const float *x, *w;
  int64_t x_stride, w_stride, m, k;
};

// What a strip of x asks for of the rows of W that come next, `rows` further down: each strip its share of bytes, so that
// the memory is busy all the time and not just while the first strip waits for it.
struct Prefetch {
  int64_t rows, begin, step;
};

template <int W, int C>
struct Kernel {
  using V = Vec<W>;
  using F = typename V::F;

  template <int R, int kC>
  static GADCORE_INLINE void tile(const float* x, const float* w, const Product& p, int64_t depth, bool add,
                                  const Prefetch& next, float* out) {
    F sum[R][kC];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sum[r][c] = V::splat(0.0f);
    }
    const char* ahead = reinterpret_cast<const char*>(w + next.rows * p.w_stride) + next.begin;
    int64_t k = 0;
    for (; k + W <= depth; k += W, ahead += next.step) {
      F column[kC];
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) {
        column[c] = V::load(w + c * p.w_stride + k);
        _mm_prefetch(ahead + 4 * c * p.w_stride, _MM_HINT_T1);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F row = V::load(x + r * p.x_stride + k);
#pragma GCC unroll 8
        for (int c = 0; c < kC; ++c) sum[r][c] = sum[r][c] + row * column[c];
      }
    }
    if (k < depth) {
      F column[kC];
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) column[c] = V::load_tail(w + c * p.w_stride + k, depth - k, 0.0f);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F row = V::load_tail(x + r * p.x_stride + k, depth - k, 0.0f);
#pragma GCC unroll 8
        for (int c = 0; c < kC; ++c) sum[r][c] = sum[r][c] + row * column[c];
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      float* o = out + c * kMaxRows;
      if constexpr (R == 4) {
        const __m128 total = sums_of_lanes(sum[0][c], sum[1][c], sum[2][c], sum[3][c]);
        _mm_store_ps(o, add ? _mm_add_ps(_mm_load_ps(o), total) : total);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) o[r] = add ? o[r] + V::sum(sum[r][c]) : V::sum(sum[r][c]);
      }
    }
  }

  // {V::sum(a), V::sum(b), V::sum(c), V::sum(d)}, added in the same order.
  static GADCORE_INLINE __m128 sums_of_lanes(F a, F b, F c, F d) {
    const __m128 x = fold(a), y = fold(b), z = fold(c), w = fold(d);
    const __m128 xy = _mm_add_ps(_mm_unpacklo_ps(x, y), _mm_unpackhi_ps(x, y));
    const __m128 zw = _mm_add_ps(_mm_unpacklo_ps(z, w), _mm_unpackhi_ps(z, w));
    return _mm_add_ps(_mm_movelh_ps(xy, zw), _mm_movehl_ps(zw, xy));
  }

  static GADCORE_INLINE __m128 fold(F v) {
    typename Vec<8>::F eight;
    if constexpr (W == 16) {
      typename Vec<8>::F high;
      V::halve(v, eight, high);
      eight = eight + high;
    } else {
      eight = v;
    }
    typename Vec<4>::F low, high;
    Vec<8>::halve(eight, low, high);
    return low + high;
  }

  template <int R>
  static GADCORE_INLINE void strip(const float* x, const float* w, const Product& p, int64_t columns, int64_t depth,
                                   bool add, const Prefetch& next, float* out) {
    int64_t c = 0;
    for (; c + C <= columns; c += C) tile<R, C>(x, w + c * p.w_stride, p, depth, add, next, out + c * kMaxRows);
    for (; c < columns; ++c) tile<R, 1>(x, w + c * p.w_stride, p, depth, add, next, out + c * kMaxRows);
  }

  // out [columns, kMaxRows], of which p.m count, = (rows [n0, n0 + columns) of W) x^T
  static GADCORE_INLINE void block(const Product& p, int64_t n0, int64_t columns, float* out) {
    const int64_t pieces = (p.k + kMostDepth - 1) / kMostDepth;
    const int64_t piece = (p.k + pieces * 16 - 1) / (pieces * 16) * 16;
    const int64_t strips = (p.m + 3) / 4, group = std::max<int64_t>(C, shared_columns(p.m));
    for (int64_t k = 0; k < p.k; k += piece) {
      const int64_t depth = std::min(piece, p.k - k), share = 4 * depth / strips;
      for (int64_t c = 0; c < columns; c += group) {
        const int64_t shared = std::min(group, columns - c);
        const float* w = p.w + (n0 + c) * p.w_stride + k;
        float* o = out + c * kMaxRows;
        Prefetch next{group, 0, 4 * W / strips};
        int64_t m = 0;
        for (; m + 4 <= p.m; m += 4, next.begin += share) {
          strip<4>(p.x + m * p.x_stride + k, w, p, shared, depth, k > 0, next, o + m);
        }
        const float* x = p.x + m * p.x_stride + k;
        if (p.m - m == 3) strip<3>(x, w, p, shared, depth, k > 0, next, o + m);
        if (p.m - m == 2) strip<2>(x, w, p, shared, depth, k > 0, next, o + m);
        if (p.m - m == 1) strip<1>(x, w, p, shared, depth, k > 0, next, o + m);
      }
    }
  }
};

GADCORE_AVX2 void block_avx2(const Product& p, int64_t n0, int64_t columns, float* out) {
  Kernel<8, 3>::block(p, n0, columns, out);
}
GADCORE_AVX512 void block_avx512(const Product& p, int64_t n0, int64_t columns, float* out) {
  Kernel<16, 6>::block(p, n0, columns, out);
}
GADCORE_AVX2 void block_wide(const Product& p, int64_t n0, int64_t columns, float* out) {
  Kernel<16, 6>::block(p, n0, columns, out);
}

using Block = void (*)(const Product& p, int64_t n0, int64_t columns, float* out);

// Null where torch's own product is the better choice.
Block block_kernel() {
  switch (level()) {
    case kAvx2:
      return block_avx2;
    case kAvx512:
      return block_avx512;
    case kWide:
      return block_wide;
    default:
      return nullptr;
  }
}

// y[:, n0 ..) = collected^T + bias
void write(const float* collected, int64_t m, int64_t n, int64_t n0, int64_t columns, const float* bias, float* y) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) {
    const float* from = collected + c * kMaxRows;
    const __m128 b = bias ? _mm_loadu_ps(bias + n0 + c) : _mm_setzero_ps();
    for (int64_t r = 0; r < m; r += 4) {
      __m128 rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = _mm_load_ps(from + i * kMaxRows + r);
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int64_t i = 0; i < std::min<int64_t>(4, m - r); ++i) {
        _mm_storeu_ps(y + (r + i) * n + n0 + c, _mm_add_ps(rows[i], b));
      }
    }
  }
  for (; c < columns; ++c) {
    for (int64_t r = 0; r < m; ++r) y[r * n + n0 + c] = collected[c * kMaxRows + r] + (bias ? bias[n0 + c] : 0.0f);
  }
}

at::Tensor multiply(const at::Tensor& x_in, const at::Tensor& weight, const std::optional<at::Tensor>& bias_in,
                    Block kernel) {
  const int64_t m = x_in.size(0), k = x_in.size(1), n = weight.size(0);
  const at::Tensor x = x_in.contiguous(), bias = bias_in ? bias_in->contiguous() : at::Tensor();
  at::Tensor y = at::empty({m, n}, x.options());
  const Product p{x.const_data_ptr<float>(), weight.const_data_ptr<float>(), k, weight.stride(0), m, k};
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* out = y.data_ptr<float>();
  // A thread is worth starting for about 20 microseconds of work.
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / (m * k * kColumns));
  at::parallel_for(0, (n + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float collected[kColumns * kMaxRows];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * kColumns, columns = std::min(kColumns, n - n0);
      kernel(p, n0, columns, collected);
      write(collected, m, n, n0, columns, b, out);
    }
  });
  return y;
}

#endif

}  // namespace

at::Tensor linear_few_rows(const at::Tensor& x_in, const at::Tensor& weight, const std::optional<at::Tensor>& bias_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_linear_few_rows";
  TORCH_CHECK(x_in.dim() == 2 && x_in.scalar_type() == at::kFloat && x_in.size(0) >= 1 && x_in.size(0) <= kMaxRows, op,
              ": x must be float32 [M, K] with 1 <= M <= ", kMaxRows, ", is ", x_in.scalar_type(), " ", x_in.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kFloat && weight.size(1) == x_in.size(1), op,
              ": weight must be float32 [N, ", x_in.size(1), "], is ", weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == weight.size(0) &&
                           bias_in->scalar_type() == at::kFloat),
              op, ": bias must be float32 [", weight.size(0), "]");
#ifdef GADCORE_X86
  const Block kernel = block_kernel();
  if (kernel && weight.stride(1) == 1 && weight.size(1) > 0) return multiply(x_in, weight, bias_in, kernel);
#endif
  return at::linear(x_in, weight, bias_in);
}

}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) { m.impl("cpu_linear_few_rows", &gadcore::linear_few_rows); }
