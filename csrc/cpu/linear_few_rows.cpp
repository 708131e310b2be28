// cpu_linear_few_rows: x W^T + bias for up to 64 rows of x; cpu_adapted_few_rows: with adapters beside it (decoding.h).
// kernels/cpu/linear_few_rows.py
//
// Dot products along K, R rows of x by C rows of W at a time: R C sums stay in registers, no operand is rearranged, and W
// is read once, in its own order. A result depends on its row of x and its row of W alone, never on the other rows.
//
// What an adapter adds goes into the same sums before they are written: a lane a row of x there, and a number of B for all
// of them, so that B is read once and in its own order too.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
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

// B [n, rank] of an adapter, without gaps, beside the columns start .. start + n - 1 of the product. low: [rank,
// kMaxRows], scale x A^T; rows of x that there are not are 0 there.
struct Up {
  const float* b;
  int64_t start, n, rank;
  const float* low;
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

  // sums [columns, kMaxRows] += B low, kB rows of B and kV vectors of rows of x at a time.
  template <int kB, int kV>
  static GADCORE_INLINE void add_tile(const Up& up, const float* b, const float* low, float* sums) {
    F sum[kB][kV];
#pragma GCC unroll 8
    for (int c = 0; c < kB; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) sum[c][v] = V::load(sums + c * kMaxRows + v * W);
    }
    for (int64_t k = 0; k < up.rank; ++k) {
      F rows[kV];
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) rows[v] = V::load(low + k * kMaxRows + v * W);
#pragma GCC unroll 8
      for (int c = 0; c < kB; ++c) {
        const F each = V::splat(b[c * up.rank + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) sum[c][v] = sum[c][v] + each * rows[v];
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kB; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) V::store(sums + c * kMaxRows + v * W, sum[c][v]);
    }
  }

  // Of the rows [first, first + columns) of B; sums begin at theirs.
  static GADCORE_INLINE void add(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
    for (int64_t r = 0; r < m; r += 2 * W) {
      const float *b = up.b + first * up.rank, *low = up.low + r;
      const bool two = r + W < m;
      float* to = sums + r;
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4, b += 4 * up.rank, to += 4 * kMaxRows) {
        two ? add_tile<4, 2>(up, b, low, to) : add_tile<4, 1>(up, b, low, to);
      }
      for (; c < columns; ++c, b += up.rank, to += kMaxRows) {
        two ? add_tile<1, 2>(up, b, low, to) : add_tile<1, 1>(up, b, low, to);
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

GADCORE_AVX2 void add_avx2(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
  Kernel<8, 3>::add(up, first, columns, m, sums);
}
GADCORE_AVX512 void add_avx512(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
  Kernel<16, 6>::add(up, first, columns, m, sums);
}
GADCORE_AVX2 void add_wide(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums) {
  Kernel<16, 6>::add(up, first, columns, m, sums);
}

struct Kernels {
  void (*block)(const Product& p, int64_t n0, int64_t columns, float* out);
  void (*add)(const Up& up, int64_t first, int64_t columns, int64_t m, float* sums);
};

// Null where torch's own product is the better choice.
const Kernels* kernels_of_level() {
  static constexpr Kernels avx2{block_avx2, add_avx2}, avx512{block_avx512, add_avx512}, wide{block_wide, add_wide};
  switch (level()) {
    case kAvx2:
      return &avx2;
    case kAvx512:
      return &avx512;
    case kWide:
      return &wide;
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

// body(n0, columns) for pieces of n columns, on all threads. A thread is worth starting for about 20 microseconds of work.
template <class Body>
void over_columns(const Product& p, int64_t n, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / (p.m * p.k * kColumns));
  at::parallel_for(0, (n + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * kColumns, std::min(kColumns, n - i * kColumns));
  });
}

// [sum of ranks, kMaxRows]: scale A x^T, and 0 for rows of x that there are not.
at::Tensor low_rank(const at::Tensor& x, const Adapters& adapters, const Kernels& kernels) {
  const int64_t m = x.size(0), k = x.size(1), ranks = adapters.down.size(0);
  const at::Tensor low = at::zeros({ranks, kMaxRows}, x.options());
  const Product p{x.const_data_ptr<float>(), adapters.down.const_data_ptr<float>(), k, k, m, k};
  float* out = low.data_ptr<float>();
  const float scale = static_cast<float>(adapters.scale);
  over_columns(p, ranks, [&](int64_t n0, int64_t columns) {
    kernels.block(p, n0, columns, out + n0 * kMaxRows);
    for (int64_t c = n0; c < n0 + columns; ++c) {
      for (int64_t r = 0; r < m; ++r) out[c * kMaxRows + r] *= scale;
    }
  });
  return low;
}

at::Tensor multiply(const at::Tensor& x_in, const at::Tensor& weight, const std::optional<at::Tensor>& bias_in,
                    const Adapters* adapters, const Kernels& kernels) {
  const int64_t m = x_in.size(0), k = x_in.size(1), n = weight.size(0);
  const at::Tensor x = x_in.contiguous(), bias = bias_in ? bias_in->contiguous() : at::Tensor();
  at::Tensor y = at::empty({m, n}, x.options());
  const Product p{x.const_data_ptr<float>(), weight.const_data_ptr<float>(), k, weight.stride(0), m, k};
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* out = y.data_ptr<float>();
  at::Tensor low;
  c10::SmallVector<Up, 3> ups;
  if (adapters) {
    low = low_rank(x, *adapters, kernels);
    const float* its = low.const_data_ptr<float>();
    for (size_t i = 0; i < adapters->ups.size(); ++i) {
      const at::Tensor& up = adapters->ups[i];
      ups.push_back({up.const_data_ptr<float>(), adapters->starts[i], up.size(0), up.size(1), its});
      its += up.size(1) * kMaxRows;
    }
  }
  over_columns(p, n, [&](int64_t n0, int64_t columns) {
    alignas(64) float collected[kColumns * kMaxRows];
    // The last vector of rows of x may be longer than they are.
    if (adapters && m % 16) std::fill_n(collected, columns * kMaxRows, 0.0f);
    kernels.block(p, n0, columns, collected);
    for (const Up& up : ups) {
      const int64_t begin = std::max(n0, up.start), end = std::min(n0 + columns, up.start + up.n);
      if (begin < end) kernels.add(up, begin - up.start, end - begin, m, collected + (begin - n0) * kMaxRows);
    }
    write(collected, m, n, n0, columns, b, out);
  });
  return y;
}

#endif

void check(const char* op, const Adapters& adapters, const at::Tensor& weight) {
  const at::Tensor& down = adapters.down;
  TORCH_CHECK(down.dim() == 2 && down.size(1) == weight.size(1) && down.scalar_type() == at::kFloat &&
                  down.is_contiguous(),
              op, ": A must be contiguous float32 [sum of ranks, ", weight.size(1), "], is ", down.scalar_type(), " ",
              down.sizes());
  TORCH_CHECK(adapters.ups.size() == adapters.starts.size(), op, ": takes as many starts as B, got ",
              adapters.starts.size(), " and ", adapters.ups.size());
  int64_t ranks = 0;
  for (size_t i = 0; i < adapters.ups.size(); ++i) {
    const at::Tensor& up = adapters.ups[i];
    const int64_t start = adapters.starts[i];
    TORCH_CHECK(up.dim() == 2 && up.scalar_type() == at::kFloat && up.is_contiguous(), op,
                ": B must be contiguous float32 [n, rank], is ", up.scalar_type(), " ", up.sizes());
    TORCH_CHECK(start >= 0 && start <= weight.size(0) - up.size(0), op, ": B ", up.sizes(), " from column ", start,
                " on does not fit ", weight.size(0), " columns");
    ranks += up.size(1);
  }
  TORCH_CHECK(ranks == down.size(0), op, ": A has ", down.size(0), " rows, and all B have ", ranks, " columns");
}

// y with what the adapters add, by torch.
void add_by_torch(const at::Tensor& x, const Adapters& adapters, at::Tensor& y) {
  const at::Tensor low = at::linear(x, adapters.down);
  int64_t column = 0;
  for (size_t i = 0; i < adapters.ups.size(); ++i) {
    const at::Tensor& up = adapters.ups[i];
    const at::Tensor its = low.narrow(1, column, up.size(1));
    y.narrow(1, adapters.starts[i], up.size(0)).addmm_(its, up.t(), 1, adapters.scale);
    column += up.size(1);
  }
}

}  // namespace

at::Tensor linear_few_rows(const at::Tensor& x_in, const at::Tensor& weight, const std::optional<at::Tensor>& bias_in,
                           const Adapters* adapters) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const char* op = "cpu_linear_few_rows";
  TORCH_CHECK(x_in.dim() == 2 && x_in.scalar_type() == at::kFloat && x_in.size(0) >= 1 && x_in.size(0) <= kMaxRows, op,
              ": x must be float32 [M, K] with 1 <= M <= ", kMaxRows, ", is ", x_in.scalar_type(), " ", x_in.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kFloat && weight.size(1) == x_in.size(1), op,
              ": weight must be float32 [N, ", x_in.size(1), "], is ", weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == weight.size(0) &&
                           bias_in->scalar_type() == at::kFloat),
              op, ": bias must be float32 [", weight.size(0), "]");
  if (adapters) check(op, *adapters, weight);
#ifdef GADCORE_X86
  const Kernels* kernels = kernels_of_level();
  if (kernels && weight.stride(1) == 1 && weight.size(1) > 0) {
    return multiply(x_in, weight, bias_in, adapters, *kernels);
  }
#endif
  at::Tensor y = at::linear(x_in, weight, bias_in);
  if (adapters) add_by_torch(x_in, *adapters, y);
  return y;
}

namespace {

at::Tensor plain(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return linear_few_rows(x, weight, bias);
}

at::Tensor adapted(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const at::Tensor& down, at::TensorList ups, at::IntArrayRef starts, double scale) {
  const Adapters adapters{down, ups, starts, scale};
  return linear_few_rows(x, weight, bias, &adapters);
}

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("cpu_linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "cpu_adapted_few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor[] ups, int[] starts, float "
      "scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(gadcore, CPU, m) {
  m.impl("cpu_linear_few_rows", &gadcore::plain);
  m.impl("cpu_adapted_few_rows", &gadcore::adapted);
}
